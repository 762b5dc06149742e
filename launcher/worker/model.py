"""The model to train: tokenizer, base, quantization and adapter, built from the recipe and the candidate alone.

The same call builds the same model on every rank: partitioned while it loads under ZeRO-3, in 4 bits for qlora,
with the adapter of the method on it. Reading the base is `base`'s, the adapters are `adapters`'.

4-bit bases are prepared here and not by PEFT's `prepare_model_for_kbit_training`. That function casts every
un-quantized weight to fp32, which turns the residual stream to fp32 and doubles each stored checkpoint
(2 * layers * hidden * tokens bytes more) for no gain: the norms of today's decoders compute in fp32 whatever
their weights are. So: everything is frozen, nothing is cast.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from launcher.planning.plan import Candidate
from launcher.recipe.schema import LORA_METHODS, Recipe
from launcher.worker.adapters import add_adapter, check_method
from launcher.worker.base import load_base

_log = logging.getLogger(__name__)
NOTABLE_SHARE = 0.05
"""Unquantized share of a 4-bit model, beside its embeddings, that is worth a line in the log."""


def build_model(
    recipe: Recipe,
    candidate: Candidate,
    *,
    device: str,
    ds_config: dict[str, Any] | None,
    total_steps: int | None = None,
) -> nn.Module:
    """Base plus adapter, ready for the engine: dtypes, frozen weights and checkpointing are set.

    `ds_config` is DeepSpeed's JSON with every batch key explicit; at stage 3 the process group must exist already.
    `total_steps` (optimizer steps of the whole run) is needed by adalora, unless the recipe gives max_steps.

    Raises:
        RecipeError: a combination that does not train, or targets that match nothing.
        ModelError: the base cannot be loaded.
    """
    check_method(recipe, candidate)
    zero3 = candidate.zero_stage == 3
    # transformers refuses a device map while ZeRO-3 is on, so 4-bit bases load whole and DeepSpeed partitions
    # them afterwards; the others are partitioned tensor by tensor as they are read.
    partition = HfDeepSpeedConfig(ds_config) if zero3 and candidate.quant is None else None
    base = load_base(recipe.model, candidate, device=device)
    if zero3 and partition is None:
        partition = HfDeepSpeedConfig(ds_config)
    if candidate.quant is not None:
        _tell_unquantized(base)
    base.config.use_cache = False
    model: nn.Module = base
    if candidate.method != "full":
        base.requires_grad_(False)
        model = add_adapter(base, recipe, candidate, total_steps=total_steps)
    _set_checkpointing(base, candidate)
    # transformers and PEFT hold it weakly and ask it whether weights are partitioned, as long as the model lives.
    model.zero3_config = partition
    return model.train()


def _tell_unquantized(base: PreTrainedModel) -> None:
    """Say so when much of a "4-bit" model is not: bitsandbytes replaces nn.Linear, and fused experts are not that."""
    embeddings = {id(layer.weight) for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer}
    whole = [
        (name, parameter.numel())
        for name, parameter in base.named_parameters()
        if getattr(parameter, "quant_state", None) is None and id(parameter) not in embeddings and parameter.dim() > 1
    ]
    share = sum(size for _, size in whole) / count_parameters(base).total
    if share > NOTABLE_SHARE:
        largest = max(whole, key=lambda entry: entry[1])[0]
        _log.warning("qlora: %.0f%% of the weights stay unquantized, such as %s", 100 * share, largest)


def _set_checkpointing(base: PreTrainedModel, candidate: Candidate) -> None:
    if not candidate.gradient_checkpointing:
        return
    # Named gradient_checkpointing_enable before transformers 5.2x; the first argument is the same.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": candidate.checkpointing_reentrant})
    if candidate.checkpointing_reentrant or candidate.method in LORA_METHODS:
        # The re-entrant form returns no gradient at all for a block whose input needs none.
        base.enable_input_require_grads()


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Weights of a model, as the mathematics counts them."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count weights whatever form they are stored in.

    A 4-bit weight holds two or four of them per stored element, so its quantization state knows the shape;
    a weight partitioned by ZeRO-3 is empty here and knows its size as `ds_numel`.
    """
    trainable = total = 0
    for parameter in model.parameters():
        size = _weights_in(parameter)
        total += size
        trainable += size if parameter.requires_grad else 0
    return ParameterCount(trainable=trainable, total=total)


def _weights_in(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return math.prod(state.shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _adalora(model: nn.Module) -> Any | None:
    """The tuner that allocates ranks, or None for every other method."""
    tuner = getattr(model, "base_model", None)
    return tuner if hasattr(tuner, "rankallocator") else None


def adalora_regularize(model: nn.Module) -> None:
    """Add the gradient of AdaLoRA's orthogonality term to the gradients; nothing for other methods.

    PEFT adds the term to a loss the model computes itself; ours is computed outside it, over the whole batch.
    The term depends on weights alone, so every rank adds the same, once per step: after gradients are
    averaged and unscaled, before clipping. Weight and formula: AdaLoraConfig.orth_reg_weight times the mean of
    ||P P^T - I|| over all lora_A and lora_B (arXiv 2303.10512, equation 4).
    """
    tuner = _adalora(model)
    if tuner is None:
        return
    weight = tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight
    factors = [(name, p) for name, p in tuner.named_parameters() if ".lora_A." in name or ".lora_B." in name]
    terms = []
    for name, factor in factors:
        gram = factor @ factor.T if ".lora_A." in name else factor.T @ factor
        terms.append(torch.linalg.norm(gram - torch.eye(gram.shape[0], device=gram.device, dtype=gram.dtype)))
    parameters = [factor for _, factor in factors]
    # autograd.grad leaves DDP's hooks alone, which .backward() would fire a second time.
    gradients = torch.autograd.grad(weight * torch.stack(terms).mean(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient)


def adalora_after_step(model: nn.Module, step: int) -> None:
    """Let AdaLoRA judge and reassign ranks; nothing for other methods.

    Call after the optimizer's step and before gradients are cleared, with the number of steps done (from 1).
    """
    tuner = _adalora(model)
    if tuner is not None:
        tuner.update_and_allocate(step)


_ALLOCATOR_STATE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def adalora_state(model: nn.Module) -> dict[str, Any]:
    """What AdaLoRA knows beyond the weights: importance averages and the current ranks; {} for other methods."""
    tuner = _adalora(model)
    if tuner is None:
        return {}
    config = tuner.peft_config[tuner.trainable_adapter_name]
    averages = {name: dict(getattr(tuner.rankallocator, name)) for name in _ALLOCATOR_STATE}
    return {"averages": averages, "rank_pattern": config.rank_pattern}


def load_adalora_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Put back what `adalora_state` gave; nothing for other methods.

    Raises:
        ValueError: the model is adalora and the state holds none of it.
    """
    tuner = _adalora(model)
    if tuner is None:
        return
    if "averages" not in state:
        raise ValueError("the checkpoint holds no adalora state: it was written by another method")
    device = next(tuner.parameters()).device
    for name in _ALLOCATOR_STATE:
        setattr(tuner.rankallocator, name, {key: value.to(device) for key, value in state["averages"][name].items()})
    tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = state["rank_pattern"]
