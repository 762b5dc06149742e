"""Resident bytes of one rank: weights, gradients, optimizer states.

Symbols: P parameters, P_t trainable ones, N data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.facts.shape import ModelShape
from launcher.planning.plan import DTYPE_BYTES, Candidate
from launcher.planning.stack import OUR_STACK, StackProfile
from launcher.planning.trainable import trainable_params


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """Resident bytes of one rank that do not depend on the batch."""

    weights: float
    gradients: float
    optimizer: float
    gradients_between: float
    """Gradient bytes alive outside backward: what accumulation or flat buffers keep."""
    step_temporary: float
    """Extra bytes of the optimizer step."""

    @property
    def total_bytes(self) -> float:
        """Weights, gradients and optimizer states together."""
        return self.weights + self.gradients + self.optimizer


def states(model: ModelShape, candidate: Candidate, stack: StackProfile = OUR_STACK) -> States:
    """Weights, gradients and optimizer states of one rank (ZeRO, arXiv 1910.02054, section 3, and DeepSpeed's code)."""
    if candidate.zero_stage == 0 or stack.sharding == "fsdp":
        return _torch_states(model, candidate, stack)
    return _zero_states(model, candidate, stack)


def shard_count(candidate: Candidate, stack: StackProfile) -> int:
    """Ranks that share one copy of what is sharded."""
    return min(stack.shard_ranks or candidate.world_size, candidate.world_size)


def weight_bytes(model: ModelShape, candidate: Candidate, stack: StackProfile = OUR_STACK) -> float:
    """Bytes of the whole base model as it is held, unsharded, without adapters; only linear layers are quantized."""
    held = _held_bytes(candidate, stack)
    quantized = quantized_params(model, candidate, stack)
    return quantized * _quantized_bytes(candidate, stack) + (model.params - quantized) * held


def quantized_params(model: ModelShape, candidate: Candidate, stack: StackProfile) -> int:
    """Base parameters stored in few bits: the matrices of linear layers, and of experts where loading reaches them."""
    if candidate.quant is None:
        return 0
    matrices = sum(linear.in_features * linear.out_features for linear in model.linears)
    experts = model.expert_params_per_layer if stack.experts_quantized else 0
    return model.layers * (matrices + experts)


def _quantized_bytes(candidate: Candidate, stack: StackProfile) -> float:
    """Bytes per quantized weight.

    NF4 takes half a byte and one scale per 64 weights (`scale_bytes`); GPTQ's int4 half a byte, per group of 128 one
    fp16 scale and one 4-bit zero point; int8 one byte and one fp32 scale per row, which is next to nothing.
    """
    if stack.quantization == "gptq-int4":
        return 0.5 + (2 + 0.5) / 128
    if stack.quantization == "int8":
        return 1.0
    return 0.5 + scale_bytes(candidate)


def scale_bytes(candidate: Candidate) -> float:
    """Bytes of NF4's scales per weight.

    One per 64 weights: 4 bytes, or with double quantization 1 byte and 4 bytes per 256 scales (QLoRA, arXiv
    2305.14314, section 3).
    """
    if candidate.quant is None:
        return 0.0
    return (1 + 4 / 256) / 64 if candidate.quant.double_quant else 4 / 64


def _held_bytes(candidate: Candidate, stack: StackProfile) -> int:
    """Bytes per weight of the base: those of a trained weight where plain torch or FSDP trains it."""
    if candidate.method == "full" and (candidate.zero_stage == 0 or stack.sharding == "fsdp"):
        return stack.trained_bytes or 4
    if candidate.method != "full" and stack.frozen_bytes is not None:
        return stack.frozen_bytes
    return DTYPE_BYTES[candidate.precision]


def optimizer_moment_bytes(candidate: Candidate, per_moment: int = 4, stack: StackProfile = OUR_STACK) -> float:
    """Adam's two moments per trained element: as wide as the weight, or 8 bits with one fp32 scale per 256."""
    if stack.moment_bytes is not None:
        return stack.moment_bytes
    return 2 * (1 + 4 / 256) if "8bit" in candidate.optim else 2 * per_moment


def _torch_states(model: ModelShape, candidate: Candidate, stack: StackProfile) -> States:
    """Plain torch and FSDP: weights, gradients and moments in one dtype, no other master copy.

    FSDP shards as ZeRO does by stage: optimizer and gradients from 2 on, weights in 3.
    """
    trained = trainable_params(model, candidate) + stack.also_trained_params
    ranks = shard_count(candidate, stack) if candidate.zero_stage else 1
    size = trained_element_bytes(candidate, stack)
    adapters = 0 if candidate.method == "full" else size * trained
    weights = (weight_bytes(model, candidate, stack) + adapters) / (ranks if candidate.zero_stage == 3 else 1)
    if candidate.quant is not None and not stack.scales_sharded:
        weights += quantized_params(model, candidate, stack) * scale_bytes(candidate) * (1 - 1 / ranks)
    shard = trained / (ranks if candidate.zero_stage >= 2 else 1)
    gradients = 0.0 if stack.optimizer_in_backward else size * shard
    distributed = candidate.world_size > 1 and candidate.zero_stage == 0
    # DDP's buckets hold gradients of their own: always in older set-ups, and where micro-batches are accumulated
    # without sharing (no_sync), because the first of them allocates gradients that are no views into the buckets.
    if distributed and (stack.ddp_extra_gradient_copy or candidate.gradient_accumulation > 1):
        gradients *= 2
    optimizer = optimizer_moment_bytes(candidate, size, stack) * shard
    temporary = size * shard if _is_foreach(candidate, stack) else 0.0
    if _is_per_tensor(candidate, stack):
        temporary = 2.0 * size * min(shard, largest_trained_tensor(model, candidate))
    if candidate.offload_optimizer != "none":
        gradients, optimizer, temporary = 0.0, 0.0, 0.0
    if candidate.offload_param != "none":
        weights = 0.0
    accumulates = candidate.gradient_accumulation > 1 or distributed
    return States(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        gradients_between=gradients if accumulates else 0.0,
        step_temporary=temporary,
    )


def trained_element_bytes(candidate: Candidate, stack: StackProfile) -> int:
    """Bytes of one trained weight (and of its gradient and each moment) without a separate master copy."""
    return (stack.trained_bytes if candidate.method == "full" else stack.adapter_bytes) or 4


def _is_foreach(candidate: Candidate, stack: StackProfile) -> bool:
    """Multi-tensor AdamW holds one more parameter-sized list on a GPU; fused and per-tensor updates do not."""
    if stack.optimizer_in_backward or candidate.device != "cuda":
        return False
    return bool(stack.foreach)


def _is_per_tensor(candidate: Candidate, stack: StackProfile) -> bool:
    """Our worker's plain AdamW updates one tensor after the other: `fused=False` rules out multi-tensor updates too.

    Its denominator stands twice while it is made (root of the second moment, then that divided and shifted;
    torch/optim/adam.py, _single_tensor_adam).
    """
    return stack.foreach is None and candidate.optim == "adamw_torch"


def largest_trained_tensor(model: ModelShape, candidate: Candidate) -> int:
    """Elements of the largest single tensor the optimizer updates: embedding, linear layer, fused experts, adapter."""
    if candidate.method == "full":
        matrices = [linear.in_features * linear.out_features for linear in model.linears]
        experts = model.experts * (2 if model.gated_mlp else 1) * model.hidden * model.intermediate
        return max(model.vocab * model.hidden, experts, *matrices)
    if candidate.lora is None:
        return trainable_params(model, candidate)
    sides = [max(linear.in_features, linear.out_features) for linear in model.linears]
    return candidate.lora.r * max([model.hidden, *sides])


def secondary_partition_bytes(model: ModelShape, candidate: Candidate) -> float:
    """The weights once more, split over the ranks of one node (hpZ, ZeRO++, arXiv 2306.10209, section 3.2)."""
    if candidate.hpz_partition <= 1:
        return 0.0
    return DTYPE_BYTES[candidate.precision] * model.params / candidate.hpz_partition


def _zero_states(model: ModelShape, candidate: Candidate, stack: StackProfile) -> States:
    """DeepSpeed: compute-dtype weights, an fp32 master with two moments, sharded from stage 1, 2 or 3 on."""
    trained = trainable_params(model, candidate) + stack.also_trained_params
    ranks, stage = candidate.world_size, candidate.zero_stage
    compute = DTYPE_BYTES[candidate.precision]
    whole = weight_bytes(model, candidate, stack) + (0 if candidate.method == "full" else compute * trained)
    weights: float = whole
    if stage == 3:
        # Norms stay below DeepSpeed's persistence threshold and are never partitioned.
        persistent = model.layers * model.norm_params + model.final_norm_params
        weights = 0 if candidate.offload_param != "none" else whole / ranks
        weights += compute * persistent * (1 - 1 / ranks)
        weights += secondary_partition_bytes(model, candidate)
    on_device = candidate.offload_optimizer == "none"
    gradients: float
    if stage == 1:
        gradients = compute * trained
    else:
        gradients = stack.gradient_accumulation_bytes * trained / ranks if on_device else 0.0
    shard = trained / ranks
    optimizer = (4 + optimizer_moment_bytes(candidate, stack=stack)) * shard if on_device else 0.0
    # The step works on fp32 gradients, flattened: of the whole shard in stages 1-2, of one sub-group in stage 3.
    flat = 4 * (min(shard, candidate.buckets.sub_group_elements) if stage == 3 else shard) if on_device else 0.0
    temporary = flat
    if _is_per_tensor(candidate, stack):
        # Stages 1 and 2 let go of their gradients once they are flat; stage 3 keeps them.
        temporary = max(flat, 3 * flat - (gradients if stage < 3 else 0.0))
    return States(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        # Stages 1 and 2 free their gradients with the step; only accumulation carries them into the next forward.
        gradients_between=gradients if stage == 3 or candidate.gradient_accumulation > 1 else 0.0,
        step_temporary=temporary,
    )
