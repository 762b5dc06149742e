"""Bytes per GPU, term by term: what is alive at each moment of a step.

Symbols: P parameters, P_t trainable ones, N data-parallel ranks, T tokens of one micro-batch, d hidden size,
q and k widths of all query and of all key heads, f MLP width, L layers, V vocabulary, c bytes of the compute dtype.

The peak is the largest of a few moments of a step, never their sum: loss, backward of one layer, end of backward,
optimizer step. (On published sweeps, full fine-tuning's peak does not change by a byte between batch 4 and 8
where the optimizer step sets it.)
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.facts.gpu import gpu
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.activations import (
    adapter_inputs_are_cast,
    is_autocast,
    kept_in_backward_bytes_per_token,
    layer_activation_bytes_per_token,
    logits_bytes_per_token,
    stored_bytes_per_token,
)
from launcher.planning.plan import DTYPE_BYTES, Candidate, Interval, MemoryEstimate
from launcher.planning.stack import OUR_STACK, StackProfile
from launcher.planning.states import States, states, trained_element_bytes, weight_bytes
from launcher.planning.trainable import expert_targets, trainable_params
from launcher.planning.working import layer_working_bytes_per_token

TERMS = ("weights", "gradients", "optimizer", "activations", "logits", "gathered", "buffers", "runtime")
_CPU_USABLE = 0.9
"""Share of a host's memory that CPU ranks may plan with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What is alive on the device at one point of a step, in bytes."""

    name: str
    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    logits: float = 0
    gathered: float = 0
    """Whole weights beyond the resident ones: ZeRO-3's gathered units, autocast's casts, dequantized matrices."""
    buffers: float = 0

    @property
    def total_bytes(self) -> float:
        """Sum of all terms."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.gathered
            + self.buffers
        )


def estimate_memory(
    model: ModelShape, candidate: Candidate, site: Site, stack: StackProfile = OUR_STACK
) -> MemoryEstimate:
    """Predict the peak of one rank.

    Returns:
        Terms of the binding moment (their sum without `runtime` is the expected peak), the peak's interval,
        the whole device's interval and what the device can hold.
    """
    alive = moments(model, candidate, stack)
    moment = max(alive, key=lambda each: each.total_bytes)
    learned = site.learned.memory_factor if site.learned is not None and candidate.device == "cuda" else 1.0
    terms = {term: round(learned * getattr(moment, term)) for term in TERMS if term != "runtime"}
    runtime = _runtime_bytes(candidate, stack) + round(stack.pressure * (terms["activations"] + terms["logits"]))
    expected = sum(terms.values())
    low, high = _peak_band(terms, stack)
    peak = Interval(low=low, expected=expected, high=high)
    usable = usable_bytes(candidate, site)
    return MemoryEstimate(
        terms_bytes={**terms, "runtime": runtime},
        peak_bytes=peak,
        device_bytes=_device(peak, runtime, usable, candidate, stack, alive),
        usable_bytes=usable,
        binding=moment.name,
    )


def _peak_band(terms: dict[str, int], stack: StackProfile) -> tuple[int, int]:
    """Low and high of the peak: states are known better than what grows with tokens."""
    tokens = terms["activations"] + terms["logits"]
    rest = sum(terms.values()) - tokens
    bands = zip(stack.state_band or stack.peak_band, stack.peak_band, strict=True)
    low, high = (round(rest * states_factor + tokens * factor) for states_factor, factor in bands)
    return low, high


def fits(memory: MemoryEstimate) -> bool:
    """Whether the cautious end of the peak, with context and communication buffers, fits the device.

    The allocator's reserve is left out on purpose: it grows into free memory and shrinks under pressure.
    """
    return memory.peak_bytes.high + memory.terms_bytes["runtime"] <= memory.usable_bytes


def _device(
    peak: Interval, runtime: int, usable: int, candidate: Candidate, stack: StackProfile, alive: list[Moment]
) -> Interval:
    if candidate.device == "cpu":
        return Interval(low=peak.low + runtime, expected=peak.expected + runtime, high=peak.high + runtime)
    values = [round(each) for each in _reserved(peak, runtime, candidate, stack, alive)]
    # A full device is as full as it gets: the allocator returns its reserve before it fails.
    floor = round(peak.high + runtime)
    capped = [min(value, max(usable, floor)) for value in values]
    return Interval(low=capped[0], expected=capped[1], high=capped[2])


def _reserved(
    peak: Interval, runtime: int, candidate: Candidate, stack: StackProfile, alive: list[Moment]
) -> tuple[float, float, float]:
    """Low, expected and high of what the allocator holds, with what lies outside it.

    Without expandable segments blocks of other sizes are kept for later: a share of the largest activations and of
    the largest logits of any moment, up to twice of it.
    """
    if stack.reserve is None:
        low, expected, high = stack.fragmentation
        return peak.low * low + runtime, peak.expected * expected + runtime, peak.high * high + runtime
    outside = _runtime_bytes(candidate, stack)
    activations, logits = stack.reserve
    kept = activations * max(each.activations + each.logits for each in alive)
    kept += logits * max(each.logits for each in alive)
    return peak.low + outside / 2, peak.expected + outside + kept, peak.high + outside + 2 * kept


def usable_bytes(candidate: Candidate, site: Site) -> int:
    """Memory one rank can use: the GPU's, or its share of the host's for CPU ranks."""
    if candidate.device == "cpu":
        return int(site.mem_bytes_per_node * _CPU_USABLE / candidate.gpus_per_node)
    return gpu(candidate.gpu).memory_bytes


def _runtime_bytes(candidate: Candidate, stack: StackProfile) -> int:
    if candidate.device == "cpu":
        return stack.process_bytes
    return stack.context_bytes + (stack.communicator_bytes if candidate.world_size > 1 else 0)


def moments(model: ModelShape, candidate: Candidate, stack: StackProfile = OUR_STACK) -> list[Moment]:
    """Every moment of a step that can set the peak."""
    state = states(model, candidate, stack)
    tokens = candidate.micro_batch * (candidate.seq_len + (candidate.num_virtual_tokens or 0))
    stored = stored_bytes_per_token(model, candidate, stack) * tokens
    working = layer_working_bytes_per_token(model, candidate, stack) * tokens
    first_layer = working
    if stack.layer_temporaries is None and not candidate.gradient_checkpointing:
        first_layer += layer_activation_bytes_per_token(model, candidate) * tokens
    left_behind = kept_in_backward_bytes_per_token(model, candidate, stack) * tokens
    between = {
        "weights": state.weights,
        "gradients": state.gradients_between,
        "optimizer": state.optimizer,
        "buffers": _bucket_bytes(model, candidate, stack),
    }
    found = [
        Moment(
            name="loss forward",
            activations=stored,
            logits=logits_bytes_per_token(model, candidate, stack, backward=False) * tokens,
            gathered=_gathered(model, candidate, stack, "forward"),
            **between,
        ),
        Moment(
            name="loss backward",
            activations=stored,
            logits=logits_bytes_per_token(model, candidate, stack) * tokens,
            gathered=_gathered(model, candidate, stack, "loss"),
            **between,
        ),
        Moment(
            name="backward of the head",
            activations=stored,
            logits=DTYPE_BYTES[candidate.precision] * model.vocab * tokens if stack.logits is None else 0,
            gathered=_gathered(model, candidate, stack, "head"),
            **between,
        ),
        Moment(
            name="backward of one layer",
            activations=stored + working + left_behind,
            gathered=_gathered(model, candidate, stack, "layer"),
            **{**between, "gradients": max(state.gradients_between, _head_gradient(model, candidate, stack, state))},
        ),
        Moment(
            name="end of backward",
            activations=first_layer + left_behind,
            gathered=_gathered(model, candidate, stack, "layer"),
            **{
                **between,
                "gradients": max(state.gradients_between, _gradients_before_first_layer(model, candidate, state)),
            },
        ),
        Moment(
            name="optimizer step",
            weights=state.weights,
            gradients=state.gradients,
            optimizer=state.optimizer + state.step_temporary,
            buffers=_bucket_bytes(model, candidate, stack) + _allgather_bytes(model, candidate, stack),
        ),
    ]
    return [*found, *_loading(model, candidate, stack)]


def _head_gradient(model: ModelShape, candidate: Candidate, stack: StackProfile, state: States) -> float:
    """The head's gradient is there before that of any layer (other stacks have it among their gathered weights)."""
    if candidate.method != "full" or stack.trained_bytes is not None or candidate.offload_optimizer != "none":
        return 0.0
    return state.gradients * model.vocab * model.hidden / model.params


def _gradients_before_first_layer(model: ModelShape, candidate: Candidate, state: States) -> float:
    """Gradients that exist when backward reaches the first layer: its own and the embedding's are still to come."""
    if candidate.method != "full":
        return state.gradients
    coming = model.layer_params + (0 if model.tied_embeddings else model.vocab * model.hidden)
    return state.gradients * (1 - coming / model.params)


def _loading(model: ModelShape, candidate: Candidate, stack: StackProfile) -> list[Moment]:
    """A 4-bit base is loaded whole on every rank before ZeRO-3 shards it."""
    if candidate.quant is None or candidate.zero_stage < 3 or stack.sharding != "deepspeed":
        return []
    return [Moment(name="loading the 4-bit base", weights=weight_bytes(model, candidate, stack))]


def _gathered(model: ModelShape, candidate: Candidate, stack: StackProfile, when: str) -> float:
    """Whole weights alive beyond the resident ones: at the end of forward, at the loss's, head's or a layer's backward.

    Where weights are trained, the gradient of the unit at work is there whole before it is reduced.
    """
    size = DTYPE_BYTES[candidate.precision]
    total = 0.0
    if stack.sharding == "fsdp" and candidate.zero_stage >= 2:
        total += _fsdp_live(model, candidate, stack, when)
    elif candidate.zero_stage == 3:
        total += _zero3_live(model, candidate, stack, head=when != "layer")
        total += size * model.layer_params if when == "layer" and candidate.method == "full" else 0
    elif is_autocast(candidate, stack):
        total += size * _autocast_casts(model, candidate, when)
    elif stack.adapter_bytes is None:
        total += size * _adapter_casts(model, candidate, when)
    if when == "head" and candidate.method == "full":
        total += size * model.vocab * model.hidden
    if when == "layer" and candidate.zero_stage == 0 and stack.trained_bytes is not None and candidate.method == "full":
        total += stack.trained_bytes * model.vocab * model.hidden  # the head's gradient is there first
    total += _merged_experts(model, candidate, stack, when)
    if candidate.quant is not None and when == "layer" and stack.dequantizes_whole:
        total += size * max(linear.in_features * linear.out_features for linear in model.linears)
    return total


def _merged_experts(model: ModelShape, candidate: Candidate, stack: StackProfile, when: str) -> float:
    """Fused experts with adapters are used merged: PEFT forms their update whole and adds it to a copy of the weights.

    A layer's backward holds update and sum; without checkpointing every layer keeps its sum from forward on.
    """
    if candidate.lora is None or stack.experts_quantized:  # separate linear modules need no merging
        return 0.0
    if not expert_targets(model, candidate.lora.target_modules) - {"router"}:
        return 0.0
    size = DTYPE_BYTES[candidate.precision]
    kept = 0 if candidate.gradient_checkpointing else model.layers
    working = trained_element_bytes(candidate, stack) if when == "layer" else 0
    return model.expert_params_per_layer * (size * max(kept, 1 if working else 0) + working)


def _fsdp_live(model: ModelShape, candidate: Candidate, stack: StackProfile, when: str) -> float:
    """FSDP gathers the root unit (embedding, head) for the whole step, and one block at a time into its own buffers.

    Where weights are trained, the head's gradient waits whole until the root unit is reduced. SHARD_GRAD_OP keeps
    every block from forward to backward.
    """
    size = DTYPE_BYTES[candidate.precision]
    root: float = size * model.embedding_params
    if candidate.zero_stage == 2:
        root += model.layers * _block_bytes(model, candidate, stack)
    if when != "layer":
        return root
    gradient = size * model.vocab * model.hidden if candidate.method == "full" else 0
    return root + _block_bytes(model, candidate, stack) + gradient


def _block_bytes(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """One gathered block: quantized weights stay quantized, trained ones come in the compute dtype."""
    size = DTYPE_BYTES[candidate.precision]
    if candidate.quant is None:
        return size * model.layer_params
    outside = size * (model.embedding_params + model.final_norm_params)
    return (weight_bytes(model, candidate, stack) - outside) / model.layers


def _autocast_casts(model: ModelShape, candidate: Candidate, when: str) -> int:
    """Elements of weights autocast has cast: all of them until forward ends, and as long as backward needs them.

    At a layer's backward the head's cast is gone. The MLP's last weight has its gradient where its cast was, twice as
    wide (not so with experts, which are worked on one at a time).
    """
    down = 0 if model.experts or when != "layer" else model.hidden * model.intermediate
    if when == "forward":
        return model.matmul_params
    head = model.vocab * model.hidden
    if not candidate.gradient_checkpointing:
        return model.matmul_params - (head if when == "layer" else 0) + down
    return model.layer_params + down if when == "layer" else head


def _adapter_casts(model: ModelShape, candidate: Candidate, when: str) -> float:
    """Elements of fp32 adapters that autocast has cast to run on a 16-bit base; its cache lasts through forward."""
    if not adapter_inputs_are_cast(candidate):
        return 0.0
    trained = trainable_params(model, candidate)
    if when == "forward" or not candidate.gradient_checkpointing:
        return trained
    return trained / model.layers if when == "layer" else 0.0


def _zero3_live(model: ModelShape, candidate: Candidate, stack: StackProfile, *, head: bool) -> float:
    """Gathered parameters: bounded by max_live, never less than one layer (or the head) and what is prefetched."""
    buckets = candidate.buckets
    unit = model.vocab * model.hidden if head else model.layer_params
    live = min(model.params, max(unit, buckets.max_live_elements) + buckets.prefetch_elements)
    per_param = weight_bytes(model, candidate, stack) / model.params
    return live * per_param


def _bucket_bytes(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """DeepSpeed's contiguous gradient buffer, two of them where stages 1 and 2 overlap filling and reducing."""
    if candidate.zero_stage == 0 or stack.sharding != "deepspeed":
        return 0
    buffers = 2 if candidate.zero_stage < 3 and candidate.device == "cuda" else 1
    elements = min(candidate.buckets.reduce_elements, trainable_params(model, candidate))
    return buffers * DTYPE_BYTES[candidate.precision] * elements


def _allgather_bytes(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """ZeRO-1 and ZeRO-2 gather updated weights after the step, a bucket at a time."""
    if candidate.zero_stage not in (1, 2) or candidate.world_size == 1 or stack.sharding != "deepspeed":
        return 0
    elements = min(candidate.buckets.allgather_elements, trainable_params(model, candidate))
    return DTYPE_BYTES[candidate.precision] * elements
