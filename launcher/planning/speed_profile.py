"""SpeedProfile: what a training stack's kernels and runtime cost, as numbers in one place.

Formulas in `compute`, `collectives` and `speed` take a profile. The numbers were fitted once over all published rows
of a stack, starting from counted kernel traffic; none depends on a model or a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedProfile:
    """Coefficients of one training stack."""

    name: str
    elementwise: float = 1.0
    """Memory traffic of norms, rotary, activations and residual adds, relative to one eager PyTorch kernel per
    operation (1). Fused or compiled kernels read and write once: about a third."""
    fused_only_llama: bool = False
    """Whether those kernels exist for RMSNorm models with a gated MLP alone (hand-written ones, no compiler)."""
    loss_bytes_per_logit: float = 40.0
    """Traffic of a cross-entropy per logit: fp32 copy, shift, log-softmax and back; about 10 when fused or chunked."""
    adapter_fp32: bool = False
    """Whether adapters compute in fp32: PEFT's default without autocast casts every input."""
    adapter_fused: bool = False
    """Whether low-rank products are fused into the base's matmul."""
    residual_fp32_after_kbit: bool = False
    """Whether preparing a 4-bit base makes the residual stream fp32, cast again in front of every linear layer."""
    fp32_weights: bool = False
    """Whether full fine-tuning without sharding holds fp32 weights, cast on use (autocast)."""
    attention: float = 1.0
    """Attention kernels relative to FlashAttention-2."""
    recompute: float = 1.0
    """Share of a layer's forward that checkpointing runs again; less for selective checkpointing."""
    launch_s: float = 0.3e-3
    """Host time to launch one layer's forward, eager; backward counts twice."""
    unit_s: float = 0.1e-3
    """Host time per gathered unit and pass that does not hide: FSDP's bookkeeping of one wrapped module."""
    gathers_modules: bool = False
    """Whether every module is gathered for itself (DeepSpeed's hooks), not a layer at once (FSDP's wrapping)."""
    wraps_adapters: bool = False
    """Whether each low-rank matrix is a gathered unit of its own (accelerate's FSDP policy for PEFT)."""
    expert_loop: bool = True
    """Whether routed experts run one after another from Python."""
    adam_bytes: float = 28.0
    """Bytes the optimizer reads and writes per trained element: gradient, master and two moments read, the latter
    three written, in fp32; 14 where all of them are 16 bits wide."""
    overlap: float = 0.8
    """Share of compute behind which communication can hide."""
    contention: float = 0.5
    """Slow-down of compute by communication behind it: collectives occupy multiprocessors and memory bandwidth."""
    band: tuple[float, float] = (0.82, 1.3)
    """Low and high of a step's time relative to the expected value."""


_FUSED = 0.38
"""Fused RMSNorm, rotary, SwiGLU and residual: each tensor crosses memory once instead of about three times."""

OUR_SPEED = SpeedProfile(name="launcher", fp32_weights=True, expert_loop=False, gathers_modules=True)
"""Hugging Face models in eager PyTorch, adapters in the compute dtype (autocast or DeepSpeed)."""

HF_TRAINER = SpeedProfile(name="hf-trainer", unit_s=0.33e-3, wraps_adapters=True, fused_only_llama=True)
_STACKS = {
    "hf-trainer": HF_TRAINER,
    # Triton attention of its time; MPT's own blocks, no rotary.
    "llm-foundry": SpeedProfile(name="llm-foundry", attention=0.6, expert_loop=False),
    # PyTorch-native stacks: fused norm and optimizer, `torch.compile` where a row says so.
    "torchtitan": SpeedProfile(name="torchtitan", elementwise=0.7, expert_loop=False),
    "torchtune": SpeedProfile(name="torchtune", elementwise=0.6, expert_loop=False),
    "fms-fsdp": SpeedProfile(name="fms-fsdp", elementwise=_FUSED, expert_loop=False),
    "nemo-automodel": SpeedProfile(name="nemo-automodel", elementwise=_FUSED, loss_bytes_per_logit=10),
    # Triton kernels for norms, rotary, MLP, loss and adapters.
    "unsloth": SpeedProfile(
        name="unsloth", elementwise=_FUSED, loss_bytes_per_logit=10, adapter_fused=True, expert_loop=False
    ),
    "launcher": OUR_SPEED,
}


def speed_of(setup: Mapping[str, Any]) -> SpeedProfile:
    """The profile of a published row's stack; an unknown stack counts as Hugging Face models in eager PyTorch."""
    profile = _STACKS.get(
        str(setup.get("stack")).lower(), replace(HF_TRAINER, name=str(setup.get("stack") or "unknown"))
    )
    fast = bool(setup.get("fast_kernels") or setup.get("compile"))
    hugging_face = profile.wraps_adapters
    selective = setup.get("gradient_checkpointing") == "selective"
    deepspeed = bool(setup.get("deepspeed")) or str(setup.get("sharding")).startswith("zero")
    fused_loss = bool(setup.get("fused_loss") or fast)
    return replace(
        profile,
        elementwise=min(profile.elementwise, _FUSED) if fast else profile.elementwise,
        fused_only_llama=profile.fused_only_llama and not setup.get("compile"),
        loss_bytes_per_logit=10.0 if fused_loss else profile.loss_bytes_per_logit,
        adapter_fp32=hugging_face and not setup.get("autocast"),
        adapter_fused=profile.adapter_fused or _fused_adapters(setup),
        residual_fp32_after_kbit=bool(setup.get("kbit_fp32_upcast")),
        adam_bytes=14.0 if _pure_16_bit(setup) and not deepspeed else profile.adam_bytes,
        recompute=0.5 if selective else 1.0,
        unit_s=OUR_SPEED.unit_s if deepspeed else profile.unit_s,
        wraps_adapters=profile.wraps_adapters and not deepspeed,
        gathers_modules=profile.gathers_modules or deepspeed,
    )


def _pure_16_bit(setup: Mapping[str, Any]) -> bool:
    sixteen = setup.get("weights_dtype") in ("bf16", "fp16")
    return sixteen and not (setup.get("fp32_master") or setup.get("autocast"))


def _fused_adapters(setup: Mapping[str, Any]) -> bool:
    """A compiler fuses what surrounds the low-rank products; hand-written kernels do for quantized bases."""
    return bool(setup.get("compile")) or (bool(setup.get("fast_kernels")) and setup.get("method") == "qlora")
