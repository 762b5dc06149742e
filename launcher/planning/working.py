"""Bytes per token that one layer needs while backward works on it: what lives beside the kept activations.

Backward of a layer has a few places where most is alive; the largest sets the moment. They were found by listing the
live tensors of traced steps (worker/trace.py) and are written down by what creates them, so that sizes follow from
the shape. tests/train/test_trace.py compares.

Symbols as in activations.py: d hidden size, q width of all query heads, f MLP width, H heads, S row length, c bytes of
the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.facts.shape import Linear, ModelShape
from launcher.planning.activations import (
    adapter_inputs_are_cast,
    attention_input_bytes,
    begins_with_norm,
    dropout_mask_bytes,
    layer_activation_bytes_per_token,
    measured_layer_bytes_per_token,
    residual_bytes,
)
from launcher.planning.plan import DTYPE_BYTES, Candidate
from launcher.planning.stack import StackProfile
from launcher.planning.trainable import targeted


def layer_working_bytes_per_token(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """Bytes per token of one layer while backward works on it, recomputed activations included with checkpointing."""
    if stack.layer_temporaries is None:
        return _derived_layer(model, candidate, stack)
    peak = measured_layer_bytes_per_token(model, candidate, stack)
    if candidate.gradient_checkpointing:
        return peak * stack.compiled
    return max(0.0, peak - layer_activation_bytes_per_token(model, candidate)) * stack.compiled


@dataclass(frozen=True, kw_only=True, slots=True)
class _Down:
    """The MLP's last linear layer: how its input is kept, in bytes per element."""

    input: int
    """What backward frees with its own gradient: the product, or an adapter's cast or dropped-out copy of it."""
    mask: int
    cast: bool
    """Whether an adapter in fp32 casts its input there and back."""
    adapted: bool


def _derived_layer(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """Bytes per token of one layer at the largest place of its backward.

    With checkpointing the layer's own activations are part of it (they have just been recomputed); without they are
    counted among all layers' and only what is beyond them is returned.
    """
    own = layer_activation_bytes_per_token(model, candidate)
    gradient = _gradient_bytes(model, candidate, stack)
    down = _down(model, candidate)
    places = [own + gradient + _mlp_backward(model, candidate, down)]
    if model.ends_in_norm:
        places.append(own + gradient + _norm_backward(model, candidate))
    if candidate.attn_implementation == "eager":
        places.append(gradient + _eager_backward(model, candidate))
    if candidate.gradient_checkpointing:
        places.append(own + gradient + _recomputation(model, candidate, down))
        return max(places) - _stored_already(model, candidate, stack)
    return max(0.0, max(places) - own)


def _stored_already(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """Where the residual is fp32 the first norm reads the stored input itself, with no fp32 copy of its own."""
    return 4 * model.hidden if residual_bytes(candidate, stack) == 4 and begins_with_norm(model) else 0.0


def _gradient_bytes(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """Gradient of the layer's output; where the residual is wider than the compute dtype also its cast."""
    wide = residual_bytes(candidate, stack)
    size = DTYPE_BYTES[candidate.precision]
    return (wide + (size if wide != size else 0)) * model.hidden


def _width(model: ModelShape) -> int:
    """Width of everything MLP-wide of one token: all experts it visits."""
    return model.intermediate * (model.experts_per_token if model.experts else 1)


def _down(model: ModelShape, candidate: Candidate) -> _Down:
    size = DTYPE_BYTES[candidate.precision]
    linear = _last_of_mlp(model)
    if candidate.method == "full" or linear is None:
        return _Down(input=size if candidate.method == "full" else 0, mask=0, cast=False, adapted=False)
    if candidate.lora is None or linear not in targeted(model, candidate.lora.target_modules)[0]:
        return _Down(input=0, mask=0, cast=False, adapted=False)
    mask = dropout_mask_bytes(candidate) if candidate.lora.lora_dropout > 0 else 0
    return _Down(input=size, mask=mask, cast=adapter_inputs_are_cast(candidate), adapted=True)


def _last_of_mlp(model: ModelShape) -> Linear | None:
    blocks = [linear for linear in model.linears if linear.block != model.linears[0].block]
    return blocks[-1] if blocks else None


def _mlp_backward(model: ModelShape, candidate: Candidate, down: _Down) -> float:
    """Beyond the kept activations, the larger of two places.

    Where the gated product is differentiated: gradients of the product and of both factors (of one activation without
    a gate), while the product is gone. Where an adapter's path is differentiated: an fp32 gradient beside the 16-bit
    one it is made of, or with dropout one before and one after the mask.
    """
    size = DTYPE_BYTES[candidate.precision]
    product = (3 if model.gated_mlp else 2) * size - down.input - down.mask
    if not model.gated_mlp:
        product = max(product, size)
    path = 0
    if down.adapted and down.mask:
        path = 2 * (4 if down.cast else size) - down.input
    elif down.cast:
        path = size + 4 - down.input
    return max(product, path) * _width(model)


def _recomputation(model: ModelShape, candidate: Candidate, down: _Down) -> float:
    """Beyond the kept activations, at the end of recomputing: what adapters make of the MLP's product.

    The product itself, its fp32 cast, and the dropped-out fp32 copy; with them the residual, the norm's output, the
    frozen layer's output and the scaled gradient that set the recomputation off.
    """
    if not down.adapted:
        return 0.0
    size = DTYPE_BYTES[candidate.precision]
    copies = 0
    if down.cast:
        copies = size + (4 + 4 if down.mask else 4)
    elif down.mask:
        copies = size
    beside = (3 if copies == 0 else 4) * size * model.hidden
    return copies * _width(model) + beside


def _norm_backward(model: ModelShape, candidate: Candidate) -> float:
    """Beyond the kept activations, where the norm after the MLP is differentiated: five fp32 gradients.

    Those of the normalized values and of their product with the inverse deviation, and three of the squares; trained
    weights have then let go of the normalized values.
    """
    normalized = 4 if candidate.method == "full" else 0
    return (5 * 4 - normalized) * model.hidden


def _eager_backward(model: ModelShape, candidate: Candidate) -> float:
    """All of the layer that is alive where eager attention's softmax is differentiated.

    The MLP's activations and the probabilities are gone, and so are the repeated values. Scores stand three times in
    fp32 (their softmax, its gradient, the scores' gradient), beside the values' gradient.
    """
    size = DTYPE_BYTES[candidate.precision]
    scores = candidate.seq_len * model.heads
    kept = attention_input_bytes(model, candidate) + 2 * size * model.q_width
    caps = size if model.attention_softcap else 0
    return kept + size * model.q_width + (3 * 4 + caps) * scores
