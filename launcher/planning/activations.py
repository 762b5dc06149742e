"""Bytes per token that forward leaves for backward: layers, adapters, loss.

Symbols: d hidden size, q and k widths of all query and of all key heads, f MLP width, c bytes of the compute dtype.
"""

from __future__ import annotations

from launcher.facts.shape import ModelShape
from launcher.planning.plan import DTYPE_BYTES, Candidate
from launcher.planning.stack import StackProfile
from launcher.planning.trainable import targeted


def layer_activation_bytes_per_token(model: ModelShape, candidate: Candidate) -> float:
    """Bytes one token leaves behind in one layer for backward, without checkpointing.

    Two RMSNorms (fp32 copy, normalized and scaled output): 8d + 4cd; attention: rotated q and k, v, output and the
    softmax statistics: c(2q + 2k); gated MLP: gate, activated gate, up and their product: 4cf. Norms of queries and
    keys keep an fp32 copy and the normalized values: (4 + c)(q + k). With the transient of `layer_transient_bytes_
    per_token` that is 16d + 4q + 4k + 10f at c = 2, what Bekman measured for single blocks of Llama and Mistral.
    """
    size = DTYPE_BYTES[candidate.precision]
    norm = 4 + 2 * size if model.norm == "RMSNorm" else 2 * size
    total: float = model.norms_per_layer * norm * model.hidden
    total += size * (2 * model.q_width + 2 * model.kv_width) + 4 * model.heads
    if model.qk_norm:
        total += (4 + size) * (model.q_width + model.kv_width)
    total += _attention_extra(model, candidate, size)
    mlp = (4 if model.gated_mlp else 2) * size * model.intermediate
    if model.experts:
        routing = 4 * model.experts + 2 * size * model.hidden * model.experts_per_token
        mlp = model.experts_per_token * mlp + routing
    return total + mlp + _adapter_bytes_per_token(model, candidate, size)


def layer_transient_bytes_per_token(model: ModelShape, candidate: Candidate) -> float:
    """Bytes per token that one layer needs while it is worked on, beyond what it keeps: one more MLP-wide tensor."""
    active = model.experts_per_token if model.experts else 1
    return DTYPE_BYTES[candidate.precision] * model.intermediate * active


def _attention_extra(model: ModelShape, candidate: Candidate, size: int) -> float:
    """Eager attention stores scores (quadratic); packed rows under SDPA need a mask, hence repeated key heads."""
    if candidate.attn_implementation == "eager":
        return (2 * size + 4) * model.heads * candidate.seq_len
    if candidate.attn_implementation == "sdpa" and candidate.packing:
        return 2 * size * (model.q_width - model.kv_width)
    return 0


def _adapter_bytes_per_token(model: ModelShape, candidate: Candidate, size: int) -> float:
    """Inputs that low-rank adapters keep of their own in one layer.

    fp32 adapters under autocast cast their input, so that every target holds a copy; dropout holds a copy and a
    1-byte mask per target; bf16 adapters without dropout share what the base kept anyway.
    """
    if candidate.lora is None:
        return 0
    layered, _ = targeted(model, candidate.lora.target_modules)
    dropout = candidate.lora.lora_dropout > 0
    copies = candidate.precision != "fp32" and candidate.zero_stage == 0
    per_input = (size if copies or dropout else 0) + (1 if dropout else 0)
    inputs = sum(linear.in_features for linear in layered) * per_input
    inner = size * candidate.lora.r * len(layered)
    outputs = 2 * size * sum(linear.out_features for linear in layered) if candidate.lora.use_dora else 0
    return inputs + inner + outputs


def stored_bytes_per_token(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """Bytes per token alive between forward and backward, all layers together."""
    if not candidate.gradient_checkpointing:
        return model.layers * layer_activation_bytes_per_token(model, candidate)
    wide = stack.residual_fp32_after_kbit and candidate.quant is not None
    size = 4 if wide else DTYPE_BYTES[candidate.precision]
    return model.layers * size * model.hidden


def logits_bytes_per_token(
    model: ModelShape, candidate: Candidate, stack: StackProfile, *, backward: bool = True
) -> float:
    """Bytes per token at the peak of a plain cross-entropy, final norm included."""
    size = DTYPE_BYTES[candidate.precision]
    held, wide = stack.logits_backward if backward else stack.logits_forward
    # fp32 logits need no fp32 copy.
    copies = held * size + 4 * (wide if size != 4 or backward else wide - 1)
    return copies * model.vocab + (4 + 2 * size) * model.hidden
