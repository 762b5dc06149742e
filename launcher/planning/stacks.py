"""Other people's training stacks as StackProfiles: one row per stack, then what a published row's setup switches.

Coefficients are physical quantities read off sweeps over the batch, where a peak is exactly linear in tokens: slopes
give bytes per token, intercepts the resident bytes. None belongs to a model or to a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.errors import ModelError
from launcher.facts.shape import ModelShape
from launcher.planning.stack import GIB, OUR_STACK, StackProfile

_KEPT_FUSED_LOSS = (0.0, 10.0)
"""Fused linear cross-entropy never holds the logits: hidden states, their gradient and one chunk, about 10d."""
_FAST_LAYER, _PLAIN_LAYER = 1.0, 7.0
"""Bytes per hidden channel in a layer's backward beyond the closed form, with fused norm and rotary kernels and
without (A100 sweeps of Mistral-7B, Llama-3-8B, Llama-2-70B and Mixtral: -1 to 4, and 7)."""

HF_TRAINER = replace(
    OUR_STACK,
    name="hf-trainer",
    sharding="fsdp",
    experts_quantized=True,
    foreach=True,
    logits=(12.0, 6.0),
    layer_temporaries=_PLAIN_LAYER,
    scales_sharded=False,
    dequantizes_whole=False,
    ddp_extra_gradient_copy=True,
    communicator_bytes=int(1.6 * GIB),
    context_bytes=int(1.0 * GIB),
    reserve=(0.1, 0.3),
    pressure=0.04,
    peak_band=(0.92, 1.08),
    state_band=(0.98, 1.02),
)
"""Hugging Face Trainer (and what is built on it) with transformers 4.x on torch 2.x: adapters in fp32 (PEFT), multi-
tensor AdamW, one more parameter-sized list in its step (10.0 and 20.0 bytes per parameter, measured). Expandable
segments are off: what nvidia-smi shows beyond the peak grows with the tensors of a micro-batch."""
_UNSWEPT = (0.88, 1.12)
"""Band of stacks of which nobody published a sweep: their temporaries are read off single runs or documentation."""
_EXPANDABLE: dict[str, Any] = {"reserve": None, "pressure": 0.0, "fragmentation": (1.0, 1.08, 1.25)}
_FSDP_RESERVE: dict[str, Any] = {"reserve": (0.2, 0.0), "pressure": 0.13}
"""Gathered units come and go between activations, so that more of the allocator's blocks fit nothing else."""

_STACKS: dict[str, StackProfile] = {
    profile.name: profile
    for profile in (
        HF_TRAINER,
        replace(HF_TRAINER, name="trl", peak_band=_UNSWEPT),
        replace(HF_TRAINER, name="llama-factory", peak_band=_UNSWEPT),
        replace(HF_TRAINER, name="axolotl", foreach=False, peak_band=_UNSWEPT),
        replace(
            HF_TRAINER,
            name="unsloth",
            peak_band=_UNSWEPT,
            logits=_KEPT_FUSED_LOSS,
            layer_temporaries=_FAST_LAYER,
            foreach=False,
            **_EXPANDABLE,
        ),
        replace(
            HF_TRAINER,
            name="torchtune",
            peak_band=_UNSWEPT,
            # Recipes switch on fused AdamW, and a cross-entropy in eight chunks that keeps only 16-bit logits whole.
            foreach=False,
            logits=(2 + 12 / 8, 6.0),
            adapter_bytes=2,
            layer_temporaries=_FAST_LAYER,
        ),
        replace(
            HF_TRAINER,
            name="torchtitan",
            peak_band=_UNSWEPT,
            foreach=False,
            logits=(12.0, 6.0),
            layer_temporaries=_FAST_LAYER,
            **{**_EXPANDABLE, "fragmentation": (1.0, 1.14, 1.3)},
        ),
        # Its default cross-entropy is flash-attention's, in place on 16-bit logits.
        replace(HF_TRAINER, name="llm-foundry", logits=(4.0, 6.0), layer_temporaries=_FAST_LAYER),
        replace(HF_TRAINER, name="fms-fsdp", layer_temporaries=_FAST_LAYER, foreach=False),
        replace(HF_TRAINER, name="nemo-automodel", layer_temporaries=_FAST_LAYER, foreach=False),
        OUR_STACK,
    )
}
"""Stack name of a published row -> profile; a name that is not here counts as Hugging Face Trainer."""

_NO_UPCAST = frozenset({"gpt2", "gpt_bigcode", "gpt_neox", "gptj", "falcon", "bloom", "opt", "mpt"})
"""transformers 4.x families whose loss takes logits as they are; the others cast them to fp32 first."""
_MOMENTS = {"adamw": 2, "adam": 2, "lion": 1, "sgd": 0, "adafactor": 0, "sm3": 0}
"""Optimizer -> moments as wide as the weight. Adafactor's rows and columns are next to nothing."""
_COMPILED_LOGITS = {"torchtune": (2.0, 6.0)}
"""Losses whose fp32 copies torch.compile fuses away."""
_COMPILED = 0.8
"""torch.compile against eager on the same run: a fifth to a quarter of the activations is never written."""


def stack_of(setup: Mapping[str, Any], model: ModelShape) -> StackProfile:
    """The profile of a published row: its stack's, with what its setup says."""
    base = _STACKS.get(str(setup.get("stack")), HF_TRAINER)
    if base is OUR_STACK:
        return base
    sharding = str(setup.get("sharding") or "none")
    zero = sharding.startswith("zero")
    checkpointing = setup.get("gradient_checkpointing")
    fsdp = not zero and sharding not in ("none", "ddp")
    profile = replace(
        base,
        sharding="deepspeed" if zero else "fsdp",
        shard_ranks=_shard_ranks(setup) if sharding == "hsdp" else None,
        trained_bytes=4 if setup.get("fp32_master") or setup.get("weights_dtype") == "fp32" else 2,
        adapter_bytes=base.adapter_bytes or 4,
        frozen_bytes=4 if setup.get("weights_dtype") == "fp32" else None,
        also_trained_params=_also_trained(setup, model),
        moment_bytes=_moment_bytes(setup),
        foreach=_foreach(setup, base),
        optimizer_in_backward=bool(setup.get("optimizer_in_backward")),
        adapter_input_bytes=_adapter_input_bytes(setup, base),
        residual_fp32=bool(setup.get("kbit_fp32_upcast")) and not fsdp,
        backward_keeps_residuals=sharding in ("fsdp", "hsdp") and base.adapter_bytes != 2,
        activations_offloaded="activations" in (setup.get("offload") or ()) or checkpointing in ("unsloth", "offload"),
        selective_checkpointing=checkpointing == "selective",
        compiled=_COMPILED if setup.get("compile") else 1.0,
        quantization=str(setup.get("quantization") or "nf4"),
    )
    if fsdp and base.reserve is not None:
        profile = replace(profile, **_FSDP_RESERVE)
    return _with_loss(profile, setup, model)


def _adapter_input_bytes(setup: Mapping[str, Any], base: StackProfile) -> int:
    """fp32 adapters read a cast copy of their input, unless autocast casts the adapters or a fused kernel does both."""
    fused = setup.get("fast_kernels") and not setup.get("lora_dropout")
    return 2 if setup.get("autocast") or base.adapter_bytes == 2 or fused else 4


def _shard_ranks(setup: Mapping[str, Any]) -> int:
    """Hybrid sharding shards inside a node and replicates between nodes."""
    return max(1, int(setup.get("gpus") or 1) // int(setup.get("nodes") or 1))


def _also_trained(setup: Mapping[str, Any], model: ModelShape) -> int:
    """Embedding and head trained whole (PEFT's modules_to_save); norms are next to nothing."""
    names = [str(name) for name in setup.get("also_trained") or ()]
    return model.vocab * model.hidden * sum("embed" in name or "head" in name for name in names)


def _moment_bytes(setup: Mapping[str, Any]) -> float | None:
    """None where Adam's formula holds; paged states live in managed memory, which torch's allocator does not count.

    Raises:
        ModelError: an optimizer whose states nobody has written down here.
    """
    name = str(setup.get("optimizer") or "adamw").lower()
    if "paged" in name:
        return 0.0
    known = [moments for prefix, moments in _MOMENTS.items() if name.startswith(prefix)]
    if not known:
        raise ModelError(f"setup.optimizer is {name!r}; known: {', '.join(_MOMENTS)}, and paged or 8-bit ones")
    if known[0] == 2:
        return None
    wide = 4 if setup.get("method") != "full" or setup.get("fp32_master") else 2
    return float(known[0] * (1 if "8bit" in name else wide))


def _foreach(setup: Mapping[str, Any], base: StackProfile) -> bool:
    """The optimizer's name decides where it says more than "adamw"."""
    name = str(setup.get("optimizer") or "adamw")
    if "foreach" in name:
        return True
    return bool(base.foreach) and name in ("adamw", "adamw_torch")


def _with_loss(profile: StackProfile, setup: Mapping[str, Any], model: ModelShape) -> StackProfile:
    """Loss and layer kernels: fused or not, and by the version of transformers."""
    fast = bool(setup.get("fast_kernels"))
    layer = _FAST_LAYER if fast else profile.layer_temporaries
    if setup.get("fused_loss"):
        return replace(profile, logits=_KEPT_FUSED_LOSS, layer_temporaries=layer)
    if setup.get("compile") and profile.name in _COMPILED_LOGITS:
        return replace(profile, logits=_COMPILED_LOGITS[profile.name], layer_temporaries=layer)
    if profile.logits != HF_TRAINER.logits or profile.name == "torchtitan":
        return replace(profile, layer_temporaries=layer)
    return replace(profile, logits=_hf_logits(setup, model, fast=fast), layer_temporaries=layer)


def _hf_logits(setup: Mapping[str, Any], model: ModelShape, *, fast: bool) -> tuple[float, float]:
    """Bytes of transformers' loss per token, per vocabulary entry and per hidden channel.

    Three fp32 copies are alive when cross-entropy is differentiated (log-softmax, its gradient, the logits'
    gradient); 4.45 keeps the 16-bit logits besides. A Triton cross-entropy works in place and saves one copy.
    Families without the cast to fp32 do the same in 16 bits, and in both widths under autocast.
    """
    version = _version(setup.get("transformers"))
    if model.family in _NO_UPCAST and (version is None or version < (4, 46)):
        if setup.get("autocast"):
            return (14.0, 16.0) if fast else (18.0, 16.0)
        return (6.0, 5.0) if fast else (8.0, 5.0)
    if version is not None and version < (4, 46) and version >= (4, 45):
        return (10.0, 4.0) if fast else (14.0, 6.0)
    return (8.0, 4.0) if fast else (12.0, 8.0)


def _version(text: Any) -> tuple[int, int] | None:
    parts = str(text or "").split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 and parts[0].isdigit() and parts[1].isdigit() else None
