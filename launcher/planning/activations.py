"""Bytes per token that forward leaves for backward: layers, adapters, loss.

Symbols: d hidden size, q and k widths of all query and of all key heads, f MLP width, c bytes of the compute dtype.
The coefficients are those of transformers 5 with PyTorch's autograd; tests/train/test_memory_model.py compares them
with the live bytes of real steps.
"""

from __future__ import annotations

from launcher.facts.shape import Linear, ModelShape
from launcher.planning.plan import DTYPE_BYTES, Candidate
from launcher.planning.stack import OUR_STACK, StackProfile
from launcher.planning.trainable import targeted


def layer_activation_bytes_per_token(model: ModelShape, candidate: Candidate) -> float:
    """Bytes one token leaves behind in one layer, without checkpointing.

    Full fine-tuning keeps per RMSNorm the fp32 input, the normalized values and the output (4 + 2c)d; attention keeps
    rotated q and k, v, the output and the softmax's statistics, c(2q + 2k) + 4 per head; a gated MLP keeps gate,
    activated gate, up and their product, 4cf. With frozen weights, normalized values and linear inputs are not needed.
    With one more MLP-wide tensor in use that is 16d + 4q + 4k + 10f at c = 2, what Bekman measured for single blocks
    of Llama and Mistral.
    """
    size = DTYPE_BYTES[candidate.precision]
    total = model.norms_per_layer * _norm_bytes(model, candidate) + _head_norm_bytes(model, candidate, size)
    total += _attention_bytes(model, candidate, size)
    mlp = (3 if model.gated_mlp else 1) * size * model.intermediate
    if model.experts:
        routing = 4 * model.experts + 2 * size * model.hidden * model.experts_per_token
        mlp = model.experts_per_token * mlp + routing
    return total + mlp + _linear_input_bytes(model, candidate, size, _kept_inputs(model, candidate))


def attention_input_bytes(model: ModelShape, candidate: Candidate) -> float:
    """Bytes per token that one layer keeps up to its query, key and value heads: norms and what projections read."""
    size = DTYPE_BYTES[candidate.precision]
    inputs = _projections(model, candidate)
    norms = _norm_bytes(model, candidate) + _head_norm_bytes(model, candidate, size)
    return norms + _linear_input_bytes(model, candidate, size, inputs)


def measured_layer_bytes_per_token(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """Peak of one checkpointed layer's backward as published allocator peaks have it.

    16d + 4q + 4k + 10f for gated MLPs with RMSNorm (Bekman; exact for Llama and Mistral blocks), 12d + 8f for plain
    MLPs with LayerNorm, with the stack's own temporaries; adapters with dropout keep one copy per target instead.
    Of routed experts each token keeps 6f per expert it visits, while one expert at a time is worked on.
    """
    size = DTYPE_BYTES[candidate.precision]
    total: float = (8 if model.norm == "RMSNorm" else 6) * model.norms_per_layer * model.hidden
    total += 4 * model.q_width + 4 * model.kv_width + (stack.layer_temporaries or 0.0) * model.hidden
    if model.qk_norm:
        total += 7 * (model.q_width + model.kv_width)
    if candidate.attn_implementation == "eager":
        total += (2 * size + 4) * model.heads * candidate.seq_len
    kept, worked = (6, 4) if model.gated_mlp else (4, 4)
    if model.experts:
        active = model.experts_per_token
        total += (kept * active + worked * active / model.experts) * model.intermediate
        total += size * model.hidden * active + 4 * model.experts
        total += 24 * model.hidden if residual_bytes(candidate, stack) == 4 else 0
    else:
        total += (kept + worked) * model.intermediate
    if residual_bytes(candidate, stack) == 4:
        # Norms put out fp32, which every block reads and autocast casts back.
        total += 16 * model.hidden
    return total * size / 2 + _adapter_copies(model, candidate, stack)


def _adapter_copies(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """One dropped-out input per target; without dropout only what casting to fp32 adapters adds."""
    if candidate.lora is None:
        return 0.0
    targets = targeted(model, candidate.lora.target_modules)[0]
    inputs = sum(linear.in_features for linear in targets)
    kept = stack.adapter_input_bytes if candidate.lora.lora_dropout > 0 or stack.adapter_input_bytes == 4 else 0
    return kept * inputs + 2 * candidate.lora.r * len(targets)


def residual_bytes(candidate: Candidate, stack: StackProfile) -> int:
    """Bytes per element of the residual stream, which is what checkpointing stores of every layer.

    fp32 weights under autocast make it fp32, and so does preparing a 4-bit base where the stack upcasts its norms.
    """
    wide = is_autocast(candidate, stack) or stack.residual_fp32
    wide = wide or (stack.residual_fp32_after_kbit and candidate.quant is not None)
    return 4 if wide else DTYPE_BYTES[candidate.precision]


def is_autocast(candidate: Candidate, stack: StackProfile = OUR_STACK) -> bool:
    """Whether fp32 weights are cast to 16 bits on use: full fine-tuning in plain torch."""
    fp32_weights = stack.trained_bytes in (None, 4)
    return fp32_weights and candidate.method == "full" and candidate.zero_stage == 0 and candidate.precision != "fp32"


def _norm_bytes(model: ModelShape, candidate: Candidate) -> float:
    """What one norm keeps of one token: its input in fp32 and, where its weight is trained, the normalized values."""
    size = 4 if is_autocast(candidate) else DTYPE_BYTES[candidate.precision]
    kept = 4 if model.norm == "RMSNorm" else size
    return (kept + _normalized_bytes(model, candidate, size)) * model.hidden


def _normalized_bytes(model: ModelShape, candidate: Candidate, size: int) -> int:
    """Bytes per channel of a norm's normalized values: only a trained weight's gradient needs them."""
    if candidate.method != "full" or model.norm != "RMSNorm":
        return 0
    return 4 if model.norm_in_fp32 else size


def _head_norm_bytes(model: ModelShape, candidate: Candidate, size: int) -> float:
    """The same for norms of query and key heads."""
    if not model.qk_norm:
        return 0.0
    return (4 + _normalized_bytes(model, candidate, size)) * (model.q_width + model.kv_width)


def _attention_bytes(model: ModelShape, candidate: Candidate, size: int) -> float:
    """Rotated queries and keys, values, the output, and what the kernel keeps of the scores.

    Fused kernels keep one fp32 statistic per head. Where packed rows need a mask under SDPA, every layer keeps it as a
    bias of the compute dtype, c bytes for each token of the row, and key heads repeated. Eager attention keeps the
    softmax in fp32 and in the compute dtype, and the tanh of capped scores; its output is kept by the projection that
    reads it alone.
    """
    heads = size * (2 * model.q_width + 2 * model.kv_width) + 4 * model.heads
    # One single key head is repeated by a view.
    repeated = 2 * size * (model.q_width - model.kv_width) if model.kv_heads > 1 else 0
    if candidate.attn_implementation == "eager":
        copies = 4 + (size if size != 4 else 0) + (size if model.attention_softcap else 0)
        unread = 0 if candidate.method == "full" else size * model.q_width
        return heads - 4 * model.heads - unread + repeated + copies * model.heads * candidate.seq_len
    if not needs_mask(candidate):
        return heads
    return heads + repeated + size * candidate.seq_len


def needs_mask(candidate: Candidate) -> bool:
    """Whether SDPA gets a mask: the documents of a packed row must not see each other."""
    return candidate.attn_implementation == "sdpa" and candidate.packing


def _kept_inputs(model: ModelShape, candidate: Candidate) -> tuple[Linear, ...]:
    """Linear modules whose weights (or adapters) are trained, so that they keep what they read."""
    if candidate.method == "full":
        return model.linears
    return targeted(model, candidate.lora.target_modules)[0] if candidate.lora is not None else ()


def _projections(model: ModelShape, candidate: Candidate) -> tuple[Linear, ...]:
    """Those of them that make queries, keys and values."""
    fed, block = _fed_by_activations(model), model.linears[0].block
    return tuple(each for each in _kept_inputs(model, candidate) if each.block == block and each.name not in fed)


def adapter_inputs_are_cast(candidate: Candidate) -> bool:
    """Whether fp32 adapters run on a 16-bit base: plain torch, under autocast."""
    return candidate.lora is not None and candidate.precision != "fp32" and candidate.zero_stage == 0


def _linear_input_bytes(model: ModelShape, candidate: Candidate, size: int, inputs: tuple[Linear, ...]) -> float:
    """Inputs that linear layers keep for their weight gradients, besides those something else keeps anyway.

    Shared: norm outputs and the MLP's product, once each (the attention's output is kept by attention). Autocast
    casts the input of every linear layer for itself. Adapters keep their inputs alone: a cast copy per target under
    autocast, a dropped-out copy and its mask per target with dropout, else the shared ones.
    """
    dropped = candidate.lora is not None and candidate.lora.lora_dropout > 0
    if dropped or adapter_inputs_are_cast(candidate):
        mask = dropout_mask_bytes(candidate) if dropped else 0
        kept = float(sum(linear.in_features for linear in inputs) * (size + mask))
    elif is_autocast(candidate):
        after_norm = [linear for linear in inputs if linear.name not in _fed_by_activations(model)]
        kept = size * (sum(linear.in_features for linear in after_norm) + _product(model, inputs))
    else:
        kept = size * (model.hidden * _norms_read(model, inputs) + _product(model, inputs))
        kept += size * _output_read(model, inputs) if candidate.attn_implementation == "eager" and candidate.lora else 0
    kept += size * model.hidden * model.experts_per_token if model.experts and candidate.method == "full" else 0
    return kept + _adapter_inner_bytes(candidate, inputs, size)


def dropout_mask_bytes(candidate: Candidate) -> int:
    """Bytes per element of a dropout mask: booleans on a GPU, the input's own type (fp32 before a cast) on the CPU."""
    if candidate.device == "cuda":
        return 1
    return 4 if adapter_inputs_are_cast(candidate) else DTYPE_BYTES[candidate.precision]


def _output_read(model: ModelShape, inputs: tuple[Linear, ...]) -> int:
    """Width of attention's output where an adapter on its projection reads it."""
    names = _fed_by_activations(model)
    block = model.linears[0].block
    return max((linear.in_features for linear in inputs if linear.name in names and linear.block == block), default=0)


def _fed_by_activations(model: ModelShape) -> set[str]:
    """Names of the linear layers that read attention's output or the MLP's product."""
    last = {linear.block: linear.name for linear in model.linears}
    return set(last.values())


def _norms_read(model: ModelShape, inputs: tuple[Linear, ...]) -> int:
    """How many different norm outputs the given linear layers read in one layer."""
    blocks = {linear.block for linear in inputs if linear.name not in _fed_by_activations(model)}
    return len(blocks) if model.norms_per_layer > 1 else min(1, len(blocks))


def _product(model: ModelShape, inputs: tuple[Linear, ...]) -> int:
    """Width of the MLP's product where its last linear layer keeps it."""
    names = _fed_by_activations(model)
    return max((linear.in_features for linear in inputs if linear.name in names and "mlp" in linear.block), default=0)


def _adapter_inner_bytes(candidate: Candidate, inputs: tuple[Linear, ...], size: int) -> float:
    if candidate.lora is None:
        return 0
    outputs = 2 * size * sum(linear.out_features for linear in inputs) if candidate.lora.use_dora else 0
    return size * candidate.lora.r * len(inputs) + outputs


def stored_bytes_per_token(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """Bytes per token alive between forward and backward, all layers together."""
    if not candidate.gradient_checkpointing:
        layers = model.layers * layer_activation_bytes_per_token(model, candidate)
        return (layers - _first_layer_spares(model, candidate)) * stack.compiled
    per_layer: float = residual_bytes(candidate, stack) * model.hidden
    if stack.selective_checkpointing:
        per_layer += _every_second_product(model, candidate)
    stored = min(2, model.layers) if stack.activations_offloaded else model.layers
    return stored * per_layer + _row_mask_bytes(candidate)


def _first_layer_spares(model: ModelShape, candidate: Candidate) -> float:
    """What the first layer does not keep under adapters, because a frozen embedding's output needs no gradient.

    That is its first norm's input and the dropout masks of the projections that read the norm. (Checkpointing makes the
    embedding's output require gradients.)
    """
    if candidate.lora is None:
        return 0.0
    masks = 0.0
    if candidate.lora.lora_dropout > 0:
        masks = dropout_mask_bytes(candidate) * sum(linear.in_features for linear in _projections(model, candidate))
    return masks + (_norm_bytes(model, candidate) if begins_with_norm(model) else 0.0)


def begins_with_norm(model: ModelShape) -> bool:
    """Whether attention reads a normed input (OLMo 2 norms outputs alone)."""
    return model.norms_per_layer > (2 if model.ends_in_norm else 0)


def _row_mask_bytes(candidate: Candidate) -> int:
    """The mask itself, which recomputation needs again: booleans for SDPA, a bias for eager attention."""
    if needs_mask(candidate):
        return candidate.seq_len
    eager = candidate.attn_implementation == "eager"
    return candidate.seq_len * DTYPE_BYTES[candidate.precision] if eager else 0


def _every_second_product(model: ModelShape, candidate: Candidate) -> float:
    """What selective checkpointing keeps: attention's output and half of the matrix products' outputs (torchtitan)."""
    size = DTYPE_BYTES[candidate.precision]
    outputs = sum(linear.out_features for linear in model.linears)
    if model.experts:
        outputs += model.experts_per_token * (3 if model.gated_mlp else 2) * model.intermediate
    return size * (model.q_width + outputs / 2)


def kept_in_backward_bytes_per_token(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """What piles up per token while backward walks the layers, but for the two it is working on."""
    if not stack.backward_keeps_residuals or not candidate.gradient_checkpointing or candidate.method == "full":
        return 0.0
    return max(0, model.layers - 2) * DTYPE_BYTES[candidate.precision] * model.hidden


def logits_bytes_per_token(
    model: ModelShape, candidate: Candidate, stack: StackProfile, *, backward: bool = True
) -> float:
    """Bytes per token at the peak of the loss, what the final norm keeps included."""
    if stack.logits is not None:
        per_entry, per_channel = stack.logits
        return per_entry * model.vocab + per_channel * model.hidden
    size = DTYPE_BYTES[candidate.precision]
    held, wide = stack.logits_backward if backward else stack.logits_forward
    # fp32 logits need no fp32 copy.
    held += model.logits_softcap  # the tanh, which is kept for its gradient
    copies = held * size + 4 * (wide if size != 4 or backward else wide - 1)
    head_input = size * model.hidden if candidate.method == "full" else 0
    return copies * model.vocab + _norm_bytes(model, candidate) + head_input
