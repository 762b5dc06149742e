"""Adapters: one PEFT configuration per method, put on the base the same way on every rank.

Low-rank methods keep their matrices in fp32 under plain torch (the optimizer's only copy) and in the compute
dtype under DeepSpeed, which holds the fp32 master itself and wants one dtype per parameter group.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, PromptTuningInit
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from launcher.errors import RecipeError, raise_all
from launcher.planning.plan import Candidate, LoraNumbers
from launcher.recipe.schema import LORA_METHODS, METHODS, PROMPT_METHODS, Recipe
from launcher.worker.base import DTYPES

ALL_LINEAR = "all-linear"


def check_method(recipe: Recipe, candidate: Candidate) -> None:
    """Refuse, by name, the combinations that are known not to train.

    Raises:
        RecipeError: every one found, each with what works instead.
    """
    raise_all(RecipeError, [*_stage_problems(candidate), *_method_problems(recipe, candidate)])


def _stage_problems(candidate: Candidate) -> list[str]:
    problems = []
    method, stage = candidate.method, candidate.zero_stage
    if method == "adalora" and stage >= 1:
        problems.append(
            f"method: adalora cannot run with deepspeed.stage {stage}: its rank allocation reads whole gradients, "
            "which ZeRO frees or partitions; use deepspeed.stage: 0, or method: lora"
        )
    # PyTorch's non-reentrant form compares recomputed shapes with those ZeRO-3 had released when they were saved.
    # Whether that strikes depends on versions and prefetching (transformers issue 47254); the re-entrant form is
    # what tests/train/test_model.py proves.
    frozen = method != "full"
    if stage == 3 and frozen and candidate.gradient_checkpointing and not candidate.checkpointing_reentrant:
        problems.append(
            f"method: {method} with deepspeed.stage 3 needs re-entrant gradient checkpointing: "
            "the non-reentrant form is known to crash where ZeRO-3 meets frozen weights"
        )
    return problems


def _method_problems(recipe: Recipe, candidate: Candidate) -> list[str]:
    problems = []
    method = candidate.method
    if method not in METHODS:
        problems.append(f"method: {method} is unknown; one of {', '.join(METHODS)}")
    if method in PROMPT_METHODS and candidate.packing:
        problems.append(
            f"method: {method} cannot use data.packing: virtual tokens would stand before the first document of a "
            "packed row only; set data.packing: false"
        )
    if method == "prefix" and candidate.gradient_checkpointing:
        problems.append(
            "method: prefix cannot use train.gradient_checkpointing: its keys and values travel in the cache, "
            "which checkpointing drops; set train.gradient_checkpointing: false"
        )
    if method == "adalora" and recipe.lora.use_rslora:
        problems.append("lora.use_rslora has no meaning for method: adalora, which scales by its own rank")
    if method in LORA_METHODS and candidate.lora is None:
        problems.append(f"method: {method} needs lora numbers in the plan")
    if method == "qlora" and candidate.quant is None:
        problems.append("method: qlora needs quantization numbers in the plan")
    if method in PROMPT_METHODS and not candidate.num_virtual_tokens:
        problems.append(f"method: {method} needs prompt.num_virtual_tokens of at least 1")
    return problems


def add_adapter(base: PreTrainedModel, recipe: Recipe, candidate: Candidate, *, total_steps: int | None) -> nn.Module:
    """Put the candidate's adapter on `base`; only adapter weights are trainable afterwards.

    The initial weights depend on `train.seed` and the method alone, so that every rank of every world size
    starts from the same adapter without a broadcast. The caller's random state is left as it was.

    Raises:
        RecipeError: the targets match no module of this model.
    """
    config = _CONFIGS[candidate.method](base, candidate, total_steps or recipe.train.max_steps)
    if candidate.lora is not None:
        _check_targets(base, candidate.lora.target_modules)
    plain = candidate.zero_stage == 0
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(recipe.train.seed)
        model = _wrap(base, config, fp32_adapter=plain)
    config.base_model_name_or_path = recipe.model.name_or_path
    config.revision = recipe.model.revision
    if not plain:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[candidate.precision])
    return model


def _wrap(base: PreTrainedModel, config: PeftConfig, *, fp32_adapter: bool) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by an older name; and it tells of its own patterns for fused experts.
            warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|did not match any targeted module)")
            return peft.get_peft_model(base, config, autocast_adapter_dtype=fp32_adapter)
    except ValueError as error:
        if "ParamWrapper" in str(error):
            raise RecipeError(
                f"lora: PEFT cannot put this on the fused experts of {base.config.model_type} ({error}); "
                "set lora.lora_dropout: 0 and method: lora, or name only attention layers in lora.target_modules"
            ) from error
        if "arget module" not in str(error):
            raise
        raise RecipeError(
            f"lora.target_modules: {error}; {base.config.model_type} has {', '.join(linear_modules(base))}"
        ) from error


def _numbers(candidate: Candidate) -> LoraNumbers:
    if candidate.lora is None:
        raise ValueError(f"{candidate.method} without lora numbers")
    return candidate.lora


def _low_rank(numbers: LoraNumbers) -> dict[str, Any]:
    targets = numbers.target_modules
    if isinstance(targets, str) and targets != ALL_LINEAR:
        targets = (targets,)  # PEFT would read a bare string as a regular expression over whole names
    return {
        "task_type": "CAUSAL_LM",
        "lora_alpha": numbers.lora_alpha,
        "lora_dropout": numbers.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "bias": "none",
    }


def _lora(_: PreTrainedModel, candidate: Candidate, __: int | None) -> PeftConfig:
    numbers = _numbers(candidate)
    return LoraConfig(r=numbers.r, use_rslora=numbers.use_rslora, use_dora=numbers.use_dora, **_low_rank(numbers))


def _adalora(_: PreTrainedModel, candidate: Candidate, total_steps: int | None) -> PeftConfig:
    """Start at rank r, end at two thirds of it on average (PEFT's 12 to 8), as the paper's budget does.

    The schedule is the paper's shape (arXiv 2303.10512, table 8): a tenth of the steps before pruning
    starts, three tenths after it has ended, allocation about a hundred times in between.
    """
    if not total_steps:
        raise ValueError("adalora needs the number of optimizer steps: its rank schedule is spread over them")
    numbers = _numbers(candidate)
    return AdaLoraConfig(
        init_r=numbers.r,
        target_r=max(1, numbers.r * 2 // 3),
        tinit=total_steps // 10,
        tfinal=total_steps * 3 // 10,
        deltaT=max(1, total_steps // 100),
        total_step=total_steps,
        **_low_rank(numbers),
    )


def _prefix(_: PreTrainedModel, candidate: Candidate, __: int | None) -> PeftConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=candidate.num_virtual_tokens)


def _prompt(_: PreTrainedModel, candidate: Candidate, __: int | None) -> PeftConfig:
    """Start from embeddings of random words: unit-variance noise is 50 times their size and trains slowly."""
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=candidate.num_virtual_tokens,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )


_CONFIGS: dict[str, Callable[[PreTrainedModel, Candidate, int | None], PeftConfig]] = {
    "lora": _lora,
    "qlora": _lora,
    "dora": _lora,
    "adalora": _adalora,
    "prefix": _prefix,
    "prompt": _prompt,
}


def _check_targets(base: PreTrainedModel, targets: str | tuple[str, ...]) -> None:
    """Refuse target names that match nothing: PEFT refuses only when none of them does."""
    if targets == ALL_LINEAR:
        return
    names = linear_modules(base)
    wanted = (targets,) if isinstance(targets, str) else targets
    lost = [name for name in wanted if not any(_ends_with(module, name) for module, _ in base.named_modules())]
    if lost:
        raise RecipeError(
            f"lora.target_modules: {', '.join(lost)} matches no module of {base.config.model_type}; "
            f"it has {', '.join(names)}"
        )


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def linear_modules(base: nn.Module) -> list[str]:
    """Last names of the modules low-rank matrices can be put on, such as q_proj."""
    return sorted({name.rpartition(".")[2] for name, module in base.named_modules() if _takes_lora(module)})


def _takes_lora(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)
