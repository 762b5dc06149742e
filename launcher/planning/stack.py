"""StackProfile: what a training stack adds to the textbook formulas, as numbers in one place.

Formulas in `memory` and `speed` take a profile, so that a stack other than ours (an older transformers, another
trainer) is another row of numbers and never a special case inside a formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class StackProfile:
    """Coefficients of one training stack."""

    name: str
    logits_forward: tuple[float, float]
    """Copies of the logits alive when the loss is computed: in the compute dtype, in fp32."""
    logits_backward: tuple[float, float]
    """The same when the loss is differentiated."""
    residual_fp32_after_kbit: bool
    """Whether preparing a 4-bit base upcasts norms and embeddings, which doubles stored checkpoints."""
    experts_quantized: bool
    """Whether 4-bit loading reaches the expert matrices of mixture-of-experts layers."""
    ddp_extra_gradient_copy: bool
    """Whether DDP keeps buckets beside the gradients (no gradient_as_bucket_view)."""
    gradient_accumulation_bytes: int
    """Bytes per element in which DeepSpeed ZeRO-2 and ZeRO-3 accumulate gradients."""
    context_bytes: int
    """CUDA context, kernels and cuBLAS workspace: outside the allocator."""
    communicator_bytes: int
    """NCCL buffers after the first collectives; only with more than one rank."""
    process_bytes: int
    """Host memory of one rank before any model: interpreter, torch, libraries."""
    fragmentation: tuple[float, float, float]
    """Reserved over allocated: low, expected, high (expandable segments on)."""
    peak_band: tuple[float, float]
    """Low and high of the peak relative to the expected value."""


OUR_STACK = StackProfile(
    name="launcher",
    logits_forward=(1, 2),
    logits_backward=(0, 3),
    residual_fp32_after_kbit=False,
    experts_quantized=False,
    ddp_extra_gradient_copy=False,
    gradient_accumulation_bytes=4,
    context_bytes=int(0.7 * GIB),
    communicator_bytes=int(1.5 * GIB),
    process_bytes=int(1.2 * GIB),
    fragmentation=(1.0, 1.08, 1.3),
    peak_band=(0.94, 1.06),
)
"""Logits: forward holds them, their fp32 copy and its log-softmax; backward the log-softmax, its gradient and the
fp32 logits' gradient (worker/loss.py; traced in tests/train/test_memory_model.py). Context and NCCL: Bekman's
measurements on A100, torch 2.x."""


def stack_of(setup: Mapping[str, Any]) -> StackProfile:
    """The profile of a published row's stack, with what its setup says."""
    del setup
    return OUR_STACK
