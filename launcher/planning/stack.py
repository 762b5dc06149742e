"""StackProfile: what a training stack adds to the textbook formulas, as numbers in one place.

Formulas in `memory` and `speed` take a profile, so that a stack other than ours (an older transformers, another
trainer) is another row of numbers and never a special case inside a formula.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    state_band: tuple[float, float] | None = None
    """The same for what does not depend on the batch, where it is known better than activations; None: peak_band."""
    reserve: tuple[float, float] | None = None
    """What the caching allocator holds beyond its peak, as shares of the largest activations and of the largest
    logits; None: `fragmentation`, which is enough where expandable segments are on."""
    pressure: float = 0.0
    """Share of the bytes of activations and logits that stays unusable even when the device is full."""
    sharding: str = "deepspeed"
    """Who shards: deepspeed | fsdp. FSDP gathers whole units beside the shards and has no buckets."""
    shard_ranks: int | None = None
    """Ranks that share one copy of the states (hybrid sharding); None: all."""
    trained_bytes: int | None = None
    """Bytes per weight, gradient and moment of full fine-tuning with torch's AdamW: 2 in pure bf16, 4 with fp32
    weights. None: fp32 in plain torch; DeepSpeed keeps an fp32 master beside the compute dtype."""
    adapter_bytes: int | None = None
    """The same for adapters; None: fp32 in plain torch, the compute dtype beside an fp32 master in DeepSpeed."""
    frozen_bytes: int | None = None
    """Bytes per frozen, unquantized weight; None: the compute dtype."""
    also_trained_params: int = 0
    """Elements of whole modules that are trained beside an adapter."""
    moment_bytes: float | None = None
    """Bytes of optimizer states per trained element that torch's allocator holds; None: Adam's two moments."""
    foreach: bool | None = None
    """Whether AdamW's step holds one more list of the trained tensors (multi-tensor updates); None: by optimizer."""
    optimizer_in_backward: bool = False
    """Whether weights are updated during backward, so that gradients never exist together."""
    adapter_input_bytes: int = 2
    """Bytes per element of the dropped-out copies that adapters read: 4 where fp32 adapters run without autocast."""
    logits: tuple[float, float] | None = None
    """Bytes of the loss per token: per vocabulary entry, per hidden channel; None: counted from the copies above."""
    layer_temporaries: float | None = None
    """Bytes per hidden channel that backward of one checkpointed layer needs beyond the closed form for full
    fine-tuning, 16d + 4q + 4k + 10f; None: the derivation of our own stack."""
    residual_fp32: bool = False
    """Whether the residual stream is fp32, which doubles stored checkpoints."""
    backward_keeps_residuals: bool = False
    """PEFT under FSDP 1: one more tensor of the residual's width per layer stays alive until backward ends."""
    activations_offloaded: bool = False
    """Whether stored checkpoints leave the GPU; two layers of them are on their way."""
    selective_checkpointing: bool = False
    """Whether checkpointing keeps attention's output and every second matrix product instead of the input alone."""
    compiled: float = 1.0
    """Share of layers' activations left after torch.compile fuses them."""
    quantization: str = "nf4"
    """How 4-bit bases are stored: nf4 | gptq-int4 | int8."""
    scales_sharded: bool = True
    """Whether the scales of 4-bit weights are sharded with them (FSDP shards only parameters)."""
    dequantizes_whole: bool = True
    """Whether one dequantized matrix counts on top of a layer's backward."""


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
