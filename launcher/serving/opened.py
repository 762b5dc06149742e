"""opened: an adapter read from disk and judged, before the model is touched: any thread may do this.

PEFT mixes adapters within one batch for plain LoRA only. DoRA is answered in batches of its own. Where one adapter
replaces modules or changes fused experts, none is mixed: PEFT asks such modules for every row's adapter. Virtual
tokens are no weights, so they mix with everything: prompt tuning's stand before the prompt, prefix tuning's are keys
and values that have been read already.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.adapters.lineage import WEIGHTS, Adapter, read_adapter, refuse_other_base
from launcher.errors import ConflictError, ModelError, RecipeError, raise_all
from launcher.serving.folding import folded

_SPECIAL = ("modules_to_save", "target_parameters", "trainable_token_indices")
_KINDS = ("LORA", "ADALORA", "PROMPT_TUNING", "PREFIX_TUNING")
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin an adapter that leave the base's weights alone; the others change them when it is loaded."""
_VARIANTS = ("alora_invocation_tokens", "layer_replication", "use_qalora", "monteclora_config", "use_bdlora",
             "arrow_config", "kasa_config", "velora_config", "megatron_config")  # fmt: skip
"""Kinds of LoRA that do more than add a product, each in its own way."""
_FACTORS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """An adapter that can be served."""

    folder: Path
    alone: bool
    """Whether it needs batches of its own."""
    special: bool
    """Whether it is more than factors of plain matrices, so that PEFT mixes nobody while it is there."""
    tokenizer: PreTrainedTokenizerBase | None
    """Its own, with the template it was trained with; None: it has none, the base's is meant."""
    virtual: Tensor | None = None
    """Prompt tuning: tokens x width of the model."""
    prefix: Tensor | None = None
    """Prefix tuning: layers x 2 x heads x tokens x numbers per head."""
    as_lora: tempfile.TemporaryDirectory[str] | None = None
    """AdaLoRA: the same as plain LoRA, on disk for as long as this is held."""

    @property
    def readable(self) -> Path:
        """The folder that PEFT reads."""
        return Path(self.as_lora.name) if self.as_lora is not None else self.folder

    @property
    def in_model(self) -> bool:
        """Whether PEFT puts anything into the model."""
        return self.virtual is None and self.prefix is None


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFacts:
    """What an adapter is held against."""

    folder: Path
    quantization: Mapping[str, Any] | None
    """How the loaded base is rounded."""
    any_rounding: bool
    """Whether the user chose the rounding, so that adapters trained with another are taken."""


def open_adapter(folder: Path, base: BaseFacts, *, trusted: bool) -> Opened:
    """Read and judge an adapter folder.

    Raises:
        ModelError: no adapter, or its files do not fit together.
        ConflictError: it was trained on other weights, or on weights rounded otherwise.
        RecipeError: its kind cannot be served beside others.
    """
    found = read_adapter(folder)
    _refuse_kind(found)
    _refuse_base_weights(found)
    refuse_other_base(found, base.folder, trusted=trusted)
    _refuse_rounding(found, base)
    kind = str(found.config.get("peft_type"))
    virtual = _virtual(found) if kind in ("PROMPT_TUNING", "PREFIX_TUNING") else None
    opened = Opened(
        folder=folder,
        alone=bool(found.config.get("use_dora")),
        special=any(found.config.get(name) for name in _SPECIAL),
        tokenizer=load_tokenizer(folder) if (folder / "tokenizer_config.json").is_file() else None,
    )
    if kind == "ADALORA":
        return dataclasses.replace(opened, as_lora=folded(found))
    if kind == "PROMPT_TUNING":
        return dataclasses.replace(opened, virtual=virtual)
    return dataclasses.replace(opened, prefix=_as_prefix(found, virtual)) if virtual is not None else opened


def _refuse_kind(found: Adapter) -> None:
    config, problems = found.config, []
    kind = str(config.get("peft_type"))
    if kind not in _KINDS:
        problems.append(
            f"its kind is {kind}, which cannot stand beside others; merge it (launcher merge --whole) and serve that"
        )
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        problems.append(f"its task is {task}, and only CAUSAL_LM writes text")
    start = config.get("init_lora_weights", True)
    if kind == "LORA" and start not in _STARTS:
        problems.append(
            f"it changes the base's own weights when it is loaded (init_lora_weights: {start}), which all would share; "
            "merge it, or save it as plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    odd = [name for name in _VARIANTS if config.get(name)]
    if odd:
        problems.append(f"it is a variant of LoRA that is not served here ({', '.join(odd)}); merge it")
    if config.get("bias", "none") != "none":
        problems.append(f"it trained biases of the base (bias: {config['bias']}), which all would share; merge it")
    raise_all(RecipeError, [f"{found.folder}: {problem}" for problem in problems])


def _refuse_rounding(found: Adapter, base: BaseFacts) -> None:
    told = found.quantization
    if found.lineage and not base.any_rounding and _rounding(told) != _rounding(base.quantization):
        raise ConflictError(
            f"{found.folder}: was trained on a base {_rounding(told)}, and this one is {_rounding(base.quantization)}; "
            "its answers would be others than in training. Serve it by itself, or choose with --dtype "
            "(4bit, bf16, fp16, fp32)"
        )


def _refuse_base_weights(found: Adapter) -> None:
    """Refuse files that hold weights of the base beside the adapter's: PEFT would write them into the base of all."""
    own = ("lora_", "trainable_tokens", "prompt_embeddings", *(found.config.get("modules_to_save") or ()))
    with safe_open(found.weights, framework="pt") as file:
        foreign = [name for name in file.keys() if not any(part in name for part in own)]  # noqa: SIM118
    if foreign:
        raise ModelError(
            f"{found.folder}: {WEIGHTS} holds weights of the base itself, such as {foreign[0]} (PEFT's "
            "save_embedding_layers); merge it and serve that, or save it again without them"
        )


def _rounding(quantization: Mapping[str, Any] | None) -> str:
    if not quantization:
        return "that is not quantized"
    double = ", scales quantized too" if quantization["bnb_4bit_use_double_quant"] else ""
    return f"in 4 bits ({quantization['bnb_4bit_quant_type']}{double})"


def _virtual(found: Adapter) -> Tensor:
    """The embeddings of virtual tokens, tokens x numbers.

    Raises:
        ModelError: the file has none.
    """
    try:
        # A copy: what was loaded is the file itself, and writing that anew would change answers, or end the server.
        tensor = load_file(found.weights)["prompt_embeddings"].clone()
    except KeyError:
        raise ModelError(f"{found.folder}: {WEIGHTS} has no prompt_embeddings") from None
    return tensor


def _as_prefix(found: Adapter, flat: Tensor) -> Tensor:
    """PEFT's flat numbers (tokens x layers*2*heads*numbers) as keys and values per layer."""
    config = found.config
    layers, heads = int(config["num_layers"]), int(config["num_attention_heads"])
    tokens = flat.shape[0]
    return flat.view(tokens, layers, 2, heads, -1).permute(1, 2, 3, 0, 4).contiguous()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, without running code of it.

    Raises:
        ModelError: it does not load.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        # The first call settles how it truncates; later ones change nothing, so that threads may share it.
        tokenizer("x")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
    return tokenizer


def refuse_other_shapes(opened: Opened, model: nn.Module) -> None:
    """Refuse factors of modules that the model does not have, or has in another size.

    What is more than factors of plain matrices is PEFT's to judge, whose names for it are its own.

    Raises:
        ModelError: the first few.
    """
    if not opened.in_model or opened.alone or opened.special:
        return
    modules = dict(model.named_modules())
    wrong = [name for name, tensor in load_file(opened.readable / WEIGHTS).items() if not _fits(name, tensor, modules)]
    if wrong:
        raise ModelError(f"{opened.folder}: {len(wrong)} tensors fit no module of this base, such as {wrong[0]}")


def _fits(name: str, tensor: Tensor, modules: Mapping[str, nn.Module]) -> bool:
    ending = next((one for one in _FACTORS if name.endswith(one)), None)
    if ending is None:
        return True  # magnitudes, embeddings and replaced modules: PEFT looks at these itself
    module = modules.get(name.removeprefix("base_model.model.").removesuffix(ending))
    if module is None:
        return False
    features, dim = ("in_features", 1) if ending == _FACTORS[0] else ("out_features", 0)
    size = getattr(module, features, None)
    return size is None or size == tensor.shape[dim]


def dtype_of(name: str) -> torch.dtype:
    """bf16, fp16 or fp32 as torch calls it."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
