"""Compute time of one micro-batch on one device: a sum of what is bound by arithmetic and what is bound by memory.

    matmul FLOP / (achievable FLOP/s x efficiency)  +  attention FLOP / (achievable FLOP/s x attention efficiency)
    + element-wise bytes / memory bandwidth  +  passes x weight bytes / memory bandwidth  +  dequantization

Two clocks instead of one utilization figure, because they scale differently: an H100 has 2.9 times the arithmetic of
an A100, but 1.6 times its bandwidth, so the same eager model reaches 60 % on one and 42 % on the other.
Symbols: d hidden size, q and k widths of all query and of all key heads, f MLP width, L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.facts.gpu import Gpu
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.plan import DTYPE_BYTES, Candidate
from launcher.planning.speed_profile import SpeedProfile
from launcher.planning.trainable import targeted, trainable_params

_MEMORY_SHARE = 0.7
"""Share of a memory's bandwidth that element-wise kernels reach: copies of large tensors 0.8 to 0.9, the strided and
reducing ones among them less."""
_BACKWARD_ATTENTION = 2.5
"""FlashAttention's backward runs five matmuls for the forward's two (arXiv 2307.08691, section 3.1)."""
_EXPERT_RAMP_TOKENS = 550
"""Tokens per expert at which its matmuls reach half of the large-batch efficiency."""
_EXPERT_LAUNCH_S = 0.1e-3
"""Host time per expert and pass where experts run one after another."""
_ADAPTER_LAUNCH = 0.8
"""Kernels that adapters add to a layer, relative to the layer's own."""
_TILE = 64
"""Columns of the smallest matmul tile that keeps the tensor cores busy."""
_DEQUANTIZE_SHARE = 0.75
"""Bandwidth of the 4-bit dequantization kernel relative to streaming ones."""
_MASKED_ATTENTION = 0.6
"""Attention with a mask runs the memory-efficient kernel: slower than FlashAttention, and without causal skipping."""
_CPU_RAMP_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Seconds of one micro-batch on one rank."""

    matmul_s: float
    attention_s: float
    elementwise_s: float
    """Norms, rotary, activations, residual adds, adapters' and loss's element-wise kernels."""
    weights_s: float
    """Reading every weight once per pass: what few tokens cannot hide."""
    dequantization_s: float
    floor_s: float
    """Host time to launch the kernels; the GPU waits where its own work is shorter."""

    @property
    def total_s(self) -> float:
        """All parts, or the launch floor where that is longer."""
        parts = self.matmul_s + self.attention_s + self.elementwise_s + self.weights_s + self.dequantization_s
        return max(parts, self.floor_s)


def passes(candidate: Candidate, profile: SpeedProfile) -> float:
    """Forward-sized passes of a step: forward, backward (two), and what checkpointing runs again."""
    return 3.0 + _again(candidate, profile)


def _again(candidate: Candidate, profile: SpeedProfile) -> float:
    return profile.recompute if candidate.gradient_checkpointing else 0.0


def matmul_flop_per_token(model: ModelShape, candidate: Candidate, recompute: float = 1.0) -> float:
    """FLOP of linear layers and output head executed per token: 2 per parameter and pass (arXiv 2001.08361, 2.1).

    Backward takes two matmuls per weight, one where the weight is frozen (no weight gradient); checkpointing repeats
    the layers' forward by `recompute`, not the head's. Adapters run all passes.
    """
    head = model.vocab * model.hidden
    backward = 2.0 if candidate.method == "full" else 1.0
    again = recompute if candidate.gradient_checkpointing else 0.0
    layers = 2.0 * (model.matmul_params - head) * (1 + backward + again)
    return layers + 2.0 * head * (1 + backward)


def attention_flop_per_token(model: ModelShape, candidate: Candidate, recompute: float = 1.0) -> float:
    """FLOP of scores and weighted values: 4q per layer and key attended to; half of the keys in a causal model.

    A kernel with a dense mask (packed rows under SDPA, eager attention) computes all of them; only FlashAttention
    skips what a sliding window hides.
    """
    length = candidate.seq_len
    keys = length / 2
    window = model.sliding_window
    if _dense(candidate):
        keys = length
    elif window and window < length and "flash" in candidate.attn_implementation:
        keys = window - window**2 / (2 * length)
    again = recompute if candidate.gradient_checkpointing else 0.0
    return 4.0 * keys * model.q_width * model.layers * (1 + _BACKWARD_ATTENTION + again)


def _dense(candidate: Candidate) -> bool:
    masked = candidate.attn_implementation == "sdpa" and candidate.packing
    return masked or candidate.attn_implementation == "eager"


def elementwise_bytes_per_token(model: ModelShape, candidate: Candidate, profile: SpeedProfile) -> float:
    """Bytes that one token's element-wise kernels read and write in a step, counted kernel by kernel.

    Eager forward of one layer, 16-bit: RMSNorm 34d (fp32 cast, square, mean, scale, cast, weight), LayerNorm 6d (one
    kernel), a residual add 6d, rotary 20(q + k), a gated activation 10f, a plain one 4f. Backward moves about twice as
    much. The loss once per step: `loss_bytes_per_logit` V.
    """
    norm = (34 if model.norm == "RMSNorm" else 6) * model.hidden * model.norms_per_layer
    rotary = 0 if model.position_params or model.family == "mpt" else 20 * (model.q_width + model.kv_width)
    width = model.intermediate * (model.experts_per_token if model.experts else 1)
    layer = float(norm + 12 * model.hidden + rotary + (10 if model.gated_mlp else 4) * width)
    fused = not profile.fused_only_llama or (model.norm == "RMSNorm" and model.gated_mlp)
    layer *= profile.elementwise if fused else 1.0
    layer *= _widening(candidate, profile)
    if profile.residual_fp32_after_kbit and candidate.quant is not None and candidate.zero_stage < 3:
        # Norms and residual in fp32, a cast in front of every linear layer and adapter; FSDP casts back to 16 bits.
        layer += 120 * model.hidden
    if candidate.attn_implementation == "eager":
        layer += 20 * model.heads * candidate.seq_len
    loss = profile.loss_bytes_per_logit if fused else max(profile.loss_bytes_per_logit, 40.0)
    every_pass = model.layers * (layer + _adapter_bytes_per_token(model, candidate, profile))
    return every_pass * passes(candidate, profile) + loss * model.vocab


def _widening(candidate: Candidate, profile: SpeedProfile) -> float:
    """fp32 tensors are twice as wide; under autocast of fp32 weights those of norms and residual are."""
    if candidate.precision == "fp32":
        return 2.0
    autocast = profile.fp32_weights and candidate.method == "full" and candidate.zero_stage == 0
    return 1.5 if autocast else 1.0


def _adapter_bytes_per_token(model: ModelShape, candidate: Candidate, profile: SpeedProfile) -> float:
    """Element-wise bytes of one layer's adapters in one forward.

    Input: read once, and with dropout read, written and masked (5); in fp32 cast before (6) and twice as wide.
    Output: written, scaled and added to the base's (12); 28 in fp32. Fused: 2 and 4.
    """
    if candidate.lora is None:
        return 0.0
    linears = targeted(model, candidate.lora.target_modules)[0]
    inputs, outputs = sum(each.in_features for each in linears), sum(each.out_features for each in linears)
    dropout = candidate.lora.lora_dropout > 0
    if profile.adapter_fused:
        return 2.0 * inputs + 4.0 * outputs
    if profile.adapter_fp32:
        return (19.0 if dropout else 10.0) * inputs + 28.0 * outputs
    dora = 10.0 * outputs if candidate.lora.use_dora else 0.0
    return (7.0 if dropout else 2.0) * inputs + 12.0 * outputs + dora


def compute(model: ModelShape, candidate: Candidate, device: Gpu, site: Site, profile: SpeedProfile) -> Compute:
    """Predict one micro-batch of one rank."""
    tokens = candidate.micro_batch * (candidate.seq_len + (candidate.num_virtual_tokens or 0))
    if device.is_cpu:
        return _on_cpu(model, candidate, device, site, tokens)
    bandwidth = device.memory_bytes_s * _MEMORY_SHARE
    again = profile.recompute
    peak = 0.85 * device.fp32_flops if candidate.precision == "fp32" else device.achievable_flops
    matmul = tokens * matmul_flop_per_token(model, candidate, again) / (peak * device.efficiency)
    if model.experts:
        matmul *= 1 + _EXPERT_RAMP_TOKENS * model.experts / (tokens * model.experts_per_token)
    matmul += _adapter_matmul_s(model, candidate, tokens, peak, profile)
    attention_speed = peak * device.attention * profile.attention * (_MASKED_ATTENTION if _dense(candidate) else 1.0)
    return Compute(
        matmul_s=matmul,
        attention_s=tokens * attention_flop_per_token(model, candidate, again) / attention_speed,
        elementwise_s=tokens * elementwise_bytes_per_token(model, candidate, profile) / bandwidth,
        weights_s=passes(candidate, profile) * DTYPE_BYTES[candidate.precision] * model.params / bandwidth,
        dequantization_s=_dequantization_s(model, candidate, bandwidth, profile),
        floor_s=_floor_s(model, candidate, profile),
    )


def _adapter_matmul_s(
    model: ModelShape, candidate: Candidate, tokens: int, peak: float, profile: SpeedProfile
) -> float:
    """Low-rank products fill `r` of a matmul tile's columns; reading inputs and writing outputs counts elsewhere."""
    if candidate.lora is None:
        return 0.0
    filled = min(1.0, candidate.lora.r / _TILE)
    return tokens * 2.0 * trainable_params(model, candidate) * passes(candidate, profile) / (filled * peak)


def _dequantization_s(model: ModelShape, candidate: Candidate, bandwidth: float, profile: SpeedProfile) -> float:
    """Forward, recomputation and backward each read the 4-bit weights and write them in the compute dtype."""
    if candidate.quant is None:
        return 0.0
    often = 2.0 + _again(candidate, profile)
    return often * model.linear_params * (0.52 + DTYPE_BYTES[candidate.precision]) / (bandwidth * _DEQUANTIZE_SHARE)


def _floor_s(model: ModelShape, candidate: Candidate, profile: SpeedProfile) -> float:
    adapters = 1.0 if candidate.lora is None else 1.0 + _ADAPTER_LAUNCH
    layer = adapters * profile.launch_s
    if model.experts and profile.expert_loop:
        layer += model.experts * _EXPERT_LAUNCH_S
    return model.layers * passes(candidate, profile) * layer


def _on_cpu(model: ModelShape, candidate: Candidate, device: Gpu, site: Site, tokens: int) -> Compute:
    """A CPU rank has its share of the cores; nothing else is told apart."""
    flops = device.flops * max(1, site.cpus_per_node // candidate.gpus_per_node)
    flop = matmul_flop_per_token(model, candidate) + _cpu_attention(model, candidate)
    if candidate.method != "full":
        flop += 6.0 * trainable_params(model, candidate)
    seconds = tokens * flop / flops * (1 + _CPU_RAMP_TOKENS / tokens)
    return Compute(
        matmul_s=seconds * (2.0 if model.experts else 1.0),
        attention_s=0.0,
        elementwise_s=0.0,
        weights_s=0.0,
        dequantization_s=_dequantization_s(model, candidate, device.memory_bytes_s, _PLAIN),
        floor_s=0.0,
    )


def _cpu_attention(model: ModelShape, candidate: Candidate) -> float:
    return 2.0 * candidate.seq_len * model.q_width * model.layers * passes(candidate, _PLAIN)


_PLAIN = SpeedProfile(name="plain")
