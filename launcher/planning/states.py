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
    if candidate.zero_stage == 0:
        return _plain_states(model, candidate, stack)
    return _zero_states(model, candidate, stack)


def weight_bytes(model: ModelShape, candidate: Candidate, stack: StackProfile = OUR_STACK) -> float:
    """Bytes of the whole base model as it is held, unsharded, without adapters.

    NF4 takes half a byte per weight and one scale per 64: 4 bytes, or with double quantization 1 byte and
    4 bytes per 256 scales (QLoRA, arXiv 2305.14314, section 3). Only linear layers are quantized.
    """
    compute = _held_bytes(candidate)
    if candidate.quant is None:
        return model.params * compute
    scale = (1 + 4 / 256) / 64 if candidate.quant.double_quant else 4 / 64
    quantized = model.layers * sum(linear.in_features * linear.out_features for linear in model.linears)
    if stack.experts_quantized:
        quantized += model.layers * model.expert_params_per_layer
    return quantized * (0.5 + scale) + (model.params - quantized) * compute


def _held_bytes(candidate: Candidate) -> int:
    """Bytes per weight of the base: fp32 masters where plain torch trains everything, else the compute dtype."""
    if candidate.method == "full" and candidate.zero_stage == 0:
        return 4
    return DTYPE_BYTES[candidate.precision]


def optimizer_moment_bytes(candidate: Candidate) -> float:
    """Adam's two moments per trained element: fp32, or 8 bits with one fp32 scale per 256 (bitsandbytes)."""
    return 2 * (1 + 4 / 256) if "8bit" in candidate.optim else 8


def _plain_states(model: ModelShape, candidate: Candidate, stack: StackProfile) -> States:
    """Plain torch: fp32 trained weights (no other master copy), fp32 gradients and moments, nothing sharded."""
    trained = trainable_params(model, candidate)
    base = weight_bytes(model, candidate, stack)
    weights = base if candidate.method == "full" else base + 4 * trained
    gradients = 4.0 * trained
    distributed = candidate.world_size > 1
    if distributed and stack.ddp_extra_gradient_copy:
        gradients *= 2
    accumulates = candidate.gradient_accumulation > 1 or distributed
    # foreach AdamW on a GPU holds one more parameter-sized list; fused and per-tensor updates do not.
    foreach = candidate.device == "cuda" and candidate.optim == "adamw_torch"
    return States(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer_moment_bytes(candidate) * trained,
        gradients_between=gradients if accumulates else 0,
        step_temporary=4 * trained if foreach else 0,
    )


def _zero_states(model: ModelShape, candidate: Candidate, stack: StackProfile) -> States:
    """DeepSpeed: compute-dtype weights, an fp32 master with two moments, sharded from stage 1, 2 or 3 on."""
    trained, ranks, stage = trainable_params(model, candidate), candidate.world_size, candidate.zero_stage
    compute = DTYPE_BYTES[candidate.precision]
    whole = weight_bytes(model, candidate, stack) + (0 if candidate.method == "full" else compute * trained)
    weights: float = whole
    if stage == 3:
        # Norms stay below DeepSpeed's persistence threshold and are never partitioned.
        persistent = model.layers * model.norm_params + model.final_norm_params
        weights = 0 if candidate.offload_param != "none" else whole / ranks
        weights += compute * persistent * (1 - 1 / ranks)
    on_device = candidate.offload_optimizer == "none"
    gradients: float
    if stage == 1:
        gradients = compute * trained
    else:
        gradients = stack.gradient_accumulation_bytes * trained / ranks if on_device else 0.0
    shard = trained / ranks
    optimizer = (4 + optimizer_moment_bytes(candidate)) * shard if on_device else 0.0
    # The step works on fp32 gradients, flattened: of the whole shard in stages 1-2, of one sub-group in stage 3.
    temporary = 4 * (min(shard, candidate.buckets.sub_group_elements) if stage == 3 else shard) if on_device else 0.0
    return States(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        gradients_between=gradients,
        step_temporary=temporary,
    )
