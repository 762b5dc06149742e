"""Seconds per optimizer step, wall time, GPU-hours and money.

    step = accumulation * max(compute, launch floor) + exposed communication + optimizer + dequantization

Compute counts 2 FLOP per parameter and token forward, 4 backward (2 where the weights are frozen: no weight
gradient), and 2 more where checkpointing runs forward again. Symbols as in `memory`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.facts.gpu import Gpu, gpu
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.plan import DTYPE_BYTES, Candidate, Cost, Interval
from launcher.planning.states import weight_bytes
from launcher.planning.trainable import trainable_params

_INTER_NODE_BYTES_S = 25e9
"""Per GPU, where the site does not say: one 200 Gbit/s port each."""
_OVERLAP = 0.8
"""Share of compute behind which communication can hide."""
_LAUNCH_S_PER_LAYER = 0.3e-3
"""Host time to launch the kernels of one layer's forward."""
_RAMP_TOKENS = 400
"""Tokens per micro-batch at which a GPU reaches half its large-batch efficiency."""
_CPU_RAMP_TOKENS = 64
_EXPERT_EFFICIENCY = 0.5
"""Routed experts see a share of the tokens each: small matrices, and permutation besides."""
_CPU_ADAM_S_PER_PARAM = 0.6e-9
"""Offloaded Adam per element and host (ZenFlow measured > 4 s for 7e9 on one host)."""
_NVME_BYTES_S = 5e9
_STARTUP_S = 90.0
"""Imports, rendezvous, first kernels."""
_READ_BYTES_S = 2e9
"""Shared file system, per job, reading weights."""
_EVALUATION_SHARE = 1.0 / 3.0
"""A forward pass relative to forward and backward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """One optimizer step, in seconds."""

    compute_s: float
    communication_s: float
    """What does not hide behind compute."""
    optimizer_s: float
    dequantization_s: float

    @property
    def total_s(self) -> float:
        """All parts together."""
        return self.compute_s + self.communication_s + self.optimizer_s + self.dequantization_s


def flop_per_token(model: ModelShape, candidate: Candidate) -> float:
    """FLOP executed per token of a step, recomputation included."""
    weights = 2.0 * model.matmul_params
    attention = 2.0 * candidate.seq_len * model.q_width * model.layers
    backward = 2.0 if candidate.method == "full" else 1.0
    again = 1.0 if candidate.gradient_checkpointing else 0.0
    adapters = 0.0 if candidate.method == "full" else 6.0 * trainable_params(model, candidate)
    return weights * (1 + backward + again) + attention * (3 + again) + adapters


def step_time(model: ModelShape, candidate: Candidate, site: Site) -> StepTime:
    """Predict one optimizer step of the whole job."""
    device = gpu(candidate.gpu)
    compute = candidate.gradient_accumulation * _micro_batch_s(model, candidate, device, site)
    communication = _communication_s(model, candidate, device, site)
    return StepTime(
        compute_s=compute,
        communication_s=max(0.0, communication - _OVERLAP * compute),
        optimizer_s=_optimizer_s(model, candidate, device),
        dequantization_s=candidate.gradient_accumulation * _dequantization_s(model, candidate, device),
    )


def step_interval(time: StepTime, candidate: Candidate) -> Interval:
    """Low, expected and high; a CPU's speed depends on who else uses it."""
    low, high = (0.5, 2.5) if candidate.device == "cpu" else (0.8, 1.35)
    return Interval(low=low * time.total_s, expected=time.total_s, high=high * time.total_s)


def _flops(candidate: Candidate, device: Gpu, site: Site) -> float:
    if device.is_cpu:
        return device.flops * max(1, site.cpus_per_node // candidate.gpus_per_node)
    if candidate.precision == "fp32":
        return 0.85 * device.fp32_flops
    return device.achievable_flops * device.efficiency


def _micro_batch_s(model: ModelShape, candidate: Candidate, device: Gpu, site: Site) -> float:
    """Arithmetic, or the host's time to launch kernels where a micro-batch is too small to hide it."""
    tokens = candidate.micro_batch * candidate.seq_len
    arithmetic = tokens * flop_per_token(model, candidate) / _flops(candidate, device, site)
    if model.experts:
        arithmetic /= _EXPERT_EFFICIENCY
    if device.is_cpu:
        return arithmetic * (1 + _CPU_RAMP_TOKENS / tokens)
    passes = 4 if candidate.gradient_checkpointing else 3
    adapters = 1.0 if candidate.lora is None else 1.8
    floor = model.layers * passes * adapters * _LAUNCH_S_PER_LAYER
    return max(arithmetic * (1 + _RAMP_TOKENS / tokens), floor)


def link_bytes_s(candidate: Candidate, device: Gpu, site: Site) -> float:
    """Bandwidth of one GPU's share of the slowest link a collective crosses."""
    inside = site.intra_node_bw_bytes_s or device.link_bytes_s
    if candidate.nodes == 1:
        return inside
    return min(inside, site.inter_node_bw_bytes_s or _INTER_NODE_BYTES_S)


def _communication_s(model: ModelShape, candidate: Candidate, device: Gpu, site: Site) -> float:
    """Bytes each GPU moves per step over its link (ZeRO, arXiv 1910.02054, section 7).

    Stages 0-2 exchange gradients once per step, 2 P_t; stage 3 gathers weights forward and backward and scatters
    gradients in every micro-batch.
    """
    ranks = candidate.world_size
    if ranks == 1:
        return 0.0
    trained = trainable_params(model, candidate)
    size = DTYPE_BYTES[candidate.precision]
    share = (ranks - 1) / ranks
    if candidate.zero_stage < 3:
        volume = 2 * trained * (4 if candidate.zero_stage == 0 else size)
        return volume * share / link_bytes_s(candidate, device, site)
    gathers = 2 * weight_bytes(model, candidate)
    per_micro_batch = (gathers + trained * size) * share / link_bytes_s(candidate, device, site)
    from_host = 0.0 if candidate.offload_param == "none" else gathers / ranks / device.pcie_bytes_s
    return candidate.gradient_accumulation * (per_micro_batch + from_host)


def _optimizer_s(model: ModelShape, candidate: Candidate, device: Gpu) -> float:
    """Adam reads and writes about 32 bytes per element; offloaded, the host does and PCIe carries both ways."""
    trained = trainable_params(model, candidate)
    shards = candidate.world_size if candidate.zero_stage else 1
    if candidate.offload_optimizer == "none":
        return 32 * trained / shards / device.memory_bytes_s
    per_host = trained / candidate.nodes
    transfer = 2 * DTYPE_BYTES[candidate.precision] * per_host / (candidate.gpus_per_node * device.pcie_bytes_s)
    swap = 32 * per_host / _NVME_BYTES_S if candidate.offload_optimizer == "nvme" else 0.0
    return per_host * _CPU_ADAM_S_PER_PARAM + transfer + swap


def _dequantization_s(model: ModelShape, candidate: Candidate, device: Gpu) -> float:
    """Every pass reads the 4-bit weights and writes them in the compute dtype."""
    if candidate.quant is None:
        return 0.0
    passes = 3 if candidate.gradient_checkpointing else 2
    return passes * model.linear_params * 2.52 / device.memory_bytes_s


# ---------------------------------------------------------------- the whole run


def steps_of_run(*, rows: int, tokens: int, candidate: Candidate, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps: packed rows hold `seq_len` tokens (about 1 % stays empty), others one row each."""
    if max_steps is not None:
        return max_steps
    sequences = math.ceil(tokens / (0.99 * candidate.seq_len)) if candidate.packing else rows
    per_epoch = max(1, math.ceil(sequences / candidate.global_batch))
    return max(1, math.ceil(epochs * per_epoch))


def wall_s(
    model: ModelShape, candidate: Candidate, *, step_s: float, steps: int, evaluations: int, evaluation_rows: int
) -> float:
    """Start-up, reading weights, steps and evaluations; not the wait in the queue."""
    start = _STARTUP_S if candidate.device == "cuda" else _STARTUP_S / 3
    reading = 2 * model.params / _READ_BYTES_S
    per_evaluation = evaluation_rows / candidate.global_batch * step_s * _EVALUATION_SHARE
    return start + reading + steps * step_s + evaluations * per_evaluation


def cost(gpu_hours: float, price_per_gpu_hour: float | None) -> Cost:
    """Money, when a price is known."""
    amount = None if price_per_gpu_hour is None else gpu_hours * price_per_gpu_hour
    return Cost(amount=amount, price_per_gpu_hour=price_per_gpu_hour)
