"""Bytes per GPU, per host and on disk, term by term.

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
from launcher.planning.plan import Candidate, Interval, MemoryEstimate
from launcher.planning.stack import OUR_STACK, StackProfile
from launcher.planning.trainable import targeted, trainable_params

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
TERMS = ("weights", "gradients", "optimizer", "activations", "logits", "gathered", "buffers", "runtime")
_CPU_USABLE = 0.9
"""Share of a host's memory that CPU ranks may plan with."""
_LOADING_SHARD_BYTES = 5 * 2**30
"""One weight file on its way to the device, per rank."""
_PINNED = 1.1
"""Pinned host buffers round up; transfer buffers come on top."""


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
    moment = max(moments(model, candidate, stack), key=lambda each: each.total_bytes)
    runtime = _runtime_bytes(candidate, stack)
    terms = {term: round(getattr(moment, term)) for term in TERMS if term != "runtime"}
    expected = sum(terms.values())
    low, high = (round(expected * factor) for factor in stack.peak_band)
    usable = usable_bytes(candidate, site)
    return MemoryEstimate(
        terms_bytes={**terms, "runtime": runtime},
        peak_bytes=Interval(low=low, expected=expected, high=high),
        device_bytes=_device(low, expected, high, runtime, usable, candidate, stack),
        usable_bytes=usable,
        binding=moment.name,
    )


def fits(memory: MemoryEstimate) -> bool:
    """Whether the cautious end of the peak, with context and communication buffers, fits the device.

    The allocator's reserve is left out on purpose: it grows into free memory and shrinks under pressure.
    """
    return memory.peak_bytes.high + memory.terms_bytes["runtime"] <= memory.usable_bytes


def _device(
    low: float, expected: float, high: float, runtime: int, usable: int, candidate: Candidate, stack: StackProfile
) -> Interval:
    if candidate.device == "cpu":
        return Interval(low=low + runtime, expected=expected + runtime, high=high + runtime)
    values = [
        round(peak * factor) + runtime for peak, factor in zip((low, expected, high), stack.fragmentation, strict=True)
    ]
    # A full device is as full as it gets: the allocator returns its reserve before it fails.
    floor = high + runtime
    capped = [min(value, max(usable, floor)) for value in values]
    return Interval(low=capped[0], expected=capped[1], high=capped[2])


def usable_bytes(candidate: Candidate, site: Site) -> int:
    """Memory one rank can use: the GPU's, or its share of the host's for CPU ranks."""
    if candidate.device == "cpu":
        return int(site.mem_bytes_per_node * _CPU_USABLE / candidate.gpus_per_node)
    return gpu(candidate.gpu).memory_bytes


def _runtime_bytes(candidate: Candidate, stack: StackProfile) -> int:
    if candidate.device == "cpu":
        return stack.process_bytes
    return stack.context_bytes + (stack.communicator_bytes if candidate.world_size > 1 else 0)


# ---------------------------------------------------------------- states


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


def _moments_bytes(candidate: Candidate) -> float:
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
        optimizer=_moments_bytes(candidate) * trained,
        gradients_between=gradients if accumulates else 0,
        step_temporary=4 * trained if foreach else 0,
    )


def _zero_states(model: ModelShape, candidate: Candidate, stack: StackProfile) -> States:
    """DeepSpeed: compute-dtype weights, an fp32 master with two moments, sharded from stage 1, 2 or 3 on."""
    trained, ranks, stage = trainable_params(model, candidate), candidate.world_size, candidate.zero_stage
    compute = DTYPE_BYTES[candidate.precision]
    whole = weight_bytes(model, candidate, stack) + (0 if candidate.method == "full" else compute * trained)
    weights = whole
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
    optimizer = (4 + _moments_bytes(candidate)) * shard if on_device else 0.0
    # The step works on fp32 gradients, flattened: of the whole shard in stages 1-2, of one sub-group in stage 3.
    temporary = 4 * (min(shard, candidate.buckets.sub_group_elements) if stage == 3 else shard) if on_device else 0.0
    return States(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        gradients_between=gradients,
        step_temporary=temporary,
    )


# ---------------------------------------------------------------- activations


def layer_activation_bytes_per_token(model: ModelShape, candidate: Candidate) -> float:
    """Bytes one token leaves behind in one layer for backward, without checkpointing.

    Two RMSNorms (fp32 copy, normalized and scaled output): 8d + 4cd; attention: rotated q and k, v, output and the
    softmax statistics: c(2q + 2k); gated MLP: gate, activated gate, up, product and one transient: 5cf. At c = 2
    that is 16d + 4q + 4k + 10f, within 1 % of the blocks Bekman measured (Llama, Mistral, Qwen, SmolLM).
    """
    size = DTYPE_BYTES[candidate.precision]
    norm = 4 + 2 * size if model.norm == "RMSNorm" else 2 * size
    total = model.norms_per_layer * norm * model.hidden
    total += size * (2 * model.q_width + 2 * model.kv_width) + 4 * model.heads
    if model.qk_norm:
        total += 3.5 * size * (model.q_width + model.kv_width)
    total += _attention_extra(model, candidate, size)
    mlp = (5 if model.gated_mlp else 3) * size * model.intermediate
    if model.experts:
        routing = 4 * model.experts + 2 * size * model.hidden * model.experts_per_token
        mlp = model.experts_per_token * mlp + routing
    return total + mlp + _adapter_bytes_per_token(model, candidate, size)


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


# ---------------------------------------------------------------- moments


def moments(model: ModelShape, candidate: Candidate, stack: StackProfile = OUR_STACK) -> list[Moment]:
    """Every moment of a step that can set the peak."""
    state = states(model, candidate, stack)
    tokens = candidate.micro_batch * (candidate.seq_len + (candidate.num_virtual_tokens or 0))
    stored = stored_bytes_per_token(model, candidate, stack) * tokens
    one_layer = layer_activation_bytes_per_token(model, candidate) * tokens
    working = one_layer if candidate.gradient_checkpointing else 0.0
    between = {
        "weights": state.weights,
        "gradients": state.gradients_between,
        "optimizer": state.optimizer,
        "buffers": _bucket_bytes(model, candidate),
    }
    found = [
        Moment(
            name="loss forward",
            activations=stored,
            logits=logits_bytes_per_token(model, candidate, stack, backward=False) * tokens,
            gathered=_gathered(model, candidate, "forward"),
            **between,
        ),
        Moment(
            name="loss backward",
            activations=stored,
            logits=logits_bytes_per_token(model, candidate, stack) * tokens,
            gathered=_gathered(model, candidate, "loss"),
            **between,
        ),
        Moment(
            name="backward of one layer",
            activations=stored + working,
            gathered=_gathered(model, candidate, "layer"),
            **between,
        ),
        Moment(
            name="end of backward",
            activations=one_layer,
            gathered=_gathered(model, candidate, "layer"),
            **{**between, "gradients": state.gradients},
        ),
        Moment(
            name="optimizer step",
            weights=state.weights,
            gradients=state.gradients,
            optimizer=state.optimizer + state.step_temporary,
            buffers=_bucket_bytes(model, candidate) + _allgather_bytes(model, candidate),
        ),
    ]
    return [*found, *_loading(model, candidate, stack)]


def _loading(model: ModelShape, candidate: Candidate, stack: StackProfile) -> list[Moment]:
    """A 4-bit base is loaded whole on every rank before ZeRO-3 shards it."""
    if candidate.quant is None or candidate.zero_stage < 3:
        return []
    return [Moment(name="loading the 4-bit base", weights=weight_bytes(model, candidate, stack))]


def _gathered(model: ModelShape, candidate: Candidate, when: str) -> float:
    """Whole weights alive beyond the resident ones, at the end of forward, at the loss's or a layer's backward."""
    size = DTYPE_BYTES[candidate.precision]
    total = 0.0
    if candidate.zero_stage == 3:
        total += _zero3_live(model, candidate, head=when != "layer")
    elif candidate.zero_stage == 0 and candidate.method == "full" and size != 4:
        total += size * _autocast_casts(model, candidate, when)
    if candidate.quant is not None and when == "layer":
        total += size * max(linear.in_features * linear.out_features for linear in model.linears)
    return total


def _autocast_casts(model: ModelShape, candidate: Candidate, when: str) -> int:
    """Weights autocast has cast: all of them until forward ends, and as long as backward needs them."""
    if when == "forward" or not candidate.gradient_checkpointing:
        return model.matmul_params
    return model.vocab * model.hidden if when == "loss" else model.layer_params


def _zero3_live(model: ModelShape, candidate: Candidate, *, head: bool) -> float:
    """Gathered parameters: bounded by max_live, never less than one layer (or the head) and what is prefetched.

    Where the unit is trained its gradients appear whole before they are reduced and partitioned.
    """
    size, buckets = DTYPE_BYTES[candidate.precision], candidate.buckets
    unit = model.vocab * model.hidden if head else model.layer_params
    live = min(model.params, max(unit, buckets.max_live_elements) + buckets.prefetch_elements)
    per_param = weight_per_param(model, candidate)
    whole_gradients = size * unit if candidate.method == "full" else 0
    return live * per_param + whole_gradients


def weight_per_param(model: ModelShape, candidate: Candidate) -> float:
    """Average bytes per base parameter as held; what a gather moves."""
    return weight_bytes(model, candidate) / model.params


def _bucket_bytes(model: ModelShape, candidate: Candidate) -> float:
    """DeepSpeed's contiguous gradient buffer; a tensor larger than the bucket passes beside it."""
    if candidate.zero_stage == 0:
        return 0
    size = DTYPE_BYTES[candidate.precision]
    return size * min(candidate.buckets.reduce_elements, trainable_params(model, candidate))


def _allgather_bytes(model: ModelShape, candidate: Candidate) -> float:
    """ZeRO-1 and ZeRO-2 gather updated weights after the step, a bucket at a time."""
    if candidate.zero_stage not in (1, 2) or candidate.world_size == 1:
        return 0
    elements = min(candidate.buckets.allgather_elements, trainable_params(model, candidate))
    return DTYPE_BYTES[candidate.precision] * elements


# ---------------------------------------------------------------- host and disk


def host_ram_bytes_per_node(model: ModelShape, candidate: Candidate, stack: StackProfile = OUR_STACK) -> int:
    """Host memory of the fullest node: processes, weights on their way to the device, offloaded states.

    Offloaded optimizer: fp32 master, two moments and fp32 gradients, 16 bytes per trained element over all nodes
    (DeepSpeed's own estimator counts 16 as well, times 1.5); offloaded parameters: the compute dtype once more.
    """
    trained = trainable_params(model, candidate)
    offloaded = 0.0
    if candidate.offload_optimizer == "cpu":
        offloaded += 16 * trained / candidate.nodes * _PINNED
    if candidate.offload_param == "cpu":
        offloaded += weight_bytes(model, candidate, stack) / candidate.nodes * _PINNED
    processes = candidate.gpus_per_node * stack.process_bytes
    if candidate.device == "cpu":
        peak = max(moment.total_bytes for moment in moments(model, candidate, stack))
        return int(processes + candidate.gpus_per_node * peak + offloaded)
    return int(processes + max(offloaded, _loading_host_bytes(model, candidate, stack)))


def _loading_host_bytes(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """What weights pass through the host.

    ZeRO-3: the first rank reads the model and the others take their shards; 4-bit: file by file to the device;
    else every rank reads the whole model and moves it.
    """
    if candidate.quant is not None:
        return candidate.gpus_per_node * _LOADING_SHARD_BYTES
    whole = weight_bytes(model, candidate, stack)
    return whole if candidate.zero_stage == 3 else candidate.gpus_per_node * whole


def checkpoint_bytes(model: ModelShape, candidate: Candidate) -> int:
    """One checkpoint on disk: trained weights and what the optimizer needs to go on exactly."""
    trained = trainable_params(model, candidate)
    if candidate.zero_stage == 0:
        return int(trained * (4 + _moments_bytes(candidate)))
    return int(trained * (DTYPE_BYTES[candidate.precision] + 4 + _moments_bytes(candidate)))
