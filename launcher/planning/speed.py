"""Seconds per optimizer step, wall time, GPU-hours and money.

    step = accumulation x micro-batch + exposed communication + optimizer

A micro-batch's compute is in `compute`, communication in `collectives`; both take a stack's `SpeedProfile`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.facts.gpu import Gpu, gpu
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.collectives import exposed_s, link_bytes_s, traffic
from launcher.planning.compute import attention_flop_per_token, compute, matmul_flop_per_token
from launcher.planning.plan import DTYPE_BYTES, Candidate, Cost, Interval
from launcher.planning.speed_profile import OUR_SPEED, SpeedProfile
from launcher.planning.states import weight_bytes
from launcher.planning.trainable import trainable_params

__all__ = [
    "StepTime",
    "cost",
    "evaluation_s",
    "first_step_s",
    "flop_per_token",
    "link_bytes_s",
    "mfu",
    "save_s",
    "step_interval",
    "step_time",
    "steps_of_run",
    "wall_s",
]

_HOST_BYTES_S = 70e9
"""Memory bandwidth CPU Adam reaches per host: published times are 0.25 s (ZeRO-Offload, arXiv 2101.06840, table 4) to
0.6 s (ZenFlow, 2505.12242) per 1e9 elements, 112 to 47 GB/s."""
_NVME_BYTES_S = 5e9
"""Of one node's local drives, reading and writing."""
_STARTUP_S = 90.0
"""Imports, rendezvous, first kernels."""
_READ_BYTES_S = 2e9
"""Shared file system, per job, reading weights."""
_WRITE_BYTES_S = 1e9
"""One node writing checkpoints to a shared file system, where the site does not say: an NFS or Lustre client."""
_WRITE_LIMIT_BYTES_S = 10e9
"""All nodes of a job together: what a mid-sized parallel file system takes from one job."""


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
    adapters = 0.0 if candidate.method == "full" else 6.0 * trainable_params(model, candidate)
    return matmul_flop_per_token(model, candidate) + attention_flop_per_token(model, candidate) + adapters


def mfu(model: ModelShape, candidate: Candidate, tokens_per_s_per_gpu: float) -> float:
    """Model FLOP utilization (PaLM, arXiv 2204.02311, appendix B): useful FLOP/s over the data sheet's.

    Useful are forward and backward without recomputation; frozen weights need no weight gradient, so that low-rank
    adapters count 4 per parameter, not 6.
    """
    device = gpu(candidate.gpu)
    useful = matmul_flop_per_token(model, candidate, 0.0) + 6.0 * candidate.seq_len * model.q_width * model.layers
    peak = device.fp32_flops if candidate.precision == "fp32" and not device.is_cpu else device.flops
    return tokens_per_s_per_gpu * useful / peak


def step_time(model: ModelShape, candidate: Candidate, site: Site, profile: SpeedProfile = OUR_SPEED) -> StepTime:
    """Predict one optimizer step of the whole job."""
    device = gpu(candidate.gpu)
    micro_batch = compute(model, candidate, device, site, profile)
    moved = traffic(model, candidate, device, site, profile)
    often = candidate.gradient_accumulation
    learned = site.learned.step_factor if site.learned is not None else 1.0
    return StepTime(
        compute_s=learned * often * (micro_batch.total_s - micro_batch.dequantization_s),
        communication_s=exposed_s(moved, micro_batch.total_s, candidate, profile),
        optimizer_s=learned * _optimizer_s(model, candidate, device, profile.adam_bytes)
        + often * _host_traffic_s(model, candidate, device),
        dequantization_s=learned * often * micro_batch.dequantization_s,
    )


def step_interval(time: StepTime, candidate: Candidate, profile: SpeedProfile = OUR_SPEED) -> Interval:
    """Low, expected and high: wider where others use the CPU, the host's memory or its bus (offload, PCIe boxes)."""
    low, high = profile.band
    if candidate.device == "cpu":
        low, high = 0.5, 2.5
    elif candidate.offload_optimizer != "none" or candidate.offload_param != "none":
        low, high = 0.6, 1.7
    elif candidate.world_size > 1 and _over_pcie(candidate):
        low, high = 0.75, 1.6
    return Interval(low=low * time.total_s, expected=time.total_s, high=high * time.total_s)


def _over_pcie(candidate: Candidate) -> bool:
    device = gpu(candidate.gpu)
    return device.link_bytes_s < device.pcie_bytes_s


def _optimizer_s(model: ModelShape, candidate: Candidate, device: Gpu, adam_bytes: float) -> float:
    """Adam is bound by the memory its states lie in; offloaded, by the host's, and by NVMe where they lie there."""
    trained = trainable_params(model, candidate)
    if candidate.offload_optimizer == "none":
        shards = candidate.world_size if candidate.zero_stage else 1
        return adam_bytes * trained / shards / device.memory_bytes_s
    per_host = trained / candidate.nodes
    swap = 2 * 16 * per_host / _NVME_BYTES_S if candidate.offload_optimizer == "nvme" else 0.0
    return adam_bytes * per_host / _HOST_BYTES_S + swap


def _host_traffic_s(model: ModelShape, candidate: Candidate, device: Gpu) -> float:
    """PCIe per micro-batch: gradients out and weights back with the optimizer offloaded, weights in twice with them."""
    size, ranks = DTYPE_BYTES[candidate.precision], candidate.world_size
    moved = 0.0
    if candidate.offload_optimizer != "none":
        shards = ranks if candidate.zero_stage > 1 else 1
        moved += 2 * size * trainable_params(model, candidate) / shards
    if candidate.offload_param != "none":
        moved += 2 * weight_bytes(model, candidate) / ranks
    return moved / device.pcie_bytes_s


# ---------------------------------------------------------------- the whole run


def steps_of_run(*, rows: int, tokens: int, candidate: Candidate, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps: packed rows hold `seq_len` tokens (about 1 % stays empty), others one row each."""
    if max_steps is not None:
        return max_steps
    sequences = math.ceil(tokens / (0.99 * candidate.seq_len)) if candidate.packing else rows
    per_epoch = max(1, math.ceil(sequences / candidate.global_batch))
    return max(1, math.ceil(epochs * per_epoch))


def first_step_s(model: ModelShape, candidate: Candidate) -> float:
    """Seconds from the job's start to its first step: imports, rendezvous, weights read once per node."""
    start = _STARTUP_S if candidate.device == "cuda" else _STARTUP_S / 3
    return start + 2 * model.params / _READ_BYTES_S


def save_s(checkpoint_bytes: float, nodes: int, site: Site) -> float:
    """Seconds a checkpoint takes to write while training waits: every rank writes its shard, nodes side by side."""
    per_node = site.write_bw_bytes_s or _WRITE_BYTES_S
    return checkpoint_bytes / min(nodes * per_node, max(per_node, _WRITE_LIMIT_BYTES_S))


def evaluation_s(candidate: Candidate, *, step_s: float, rows: int) -> float:
    """Seconds of one validation of `rows` sequences over all ranks, from a training step's time.

    A forward pass is one of a step's: backward takes two, one where weights are frozen, checkpointing one more.
    """
    passes = (3 if candidate.method == "full" else 2) + (1 if candidate.gradient_checkpointing else 0)
    return rows / candidate.global_batch * step_s / passes


def wall_s(
    model: ModelShape,
    candidate: Candidate,
    *,
    step_s: float,
    steps: int,
    evaluations: int,
    evaluation_rows: int,
    saves: int = 0,
    save_s: float = 0.0,
) -> float:
    """Start-up, reading weights, steps, evaluations and saves; not the wait in the queue."""
    validating = evaluations * evaluation_s(candidate, step_s=step_s, rows=evaluation_rows)
    return first_step_s(model, candidate) + steps * step_s + validating + saves * save_s


def cost(gpu_hours: float, price_per_gpu_hour: float | None) -> Cost:
    """Money, when a price is known."""
    amount = None if price_per_gpu_hour is None else gpu_hours * price_per_gpu_hour
    return Cost(amount=amount, price_per_gpu_hour=price_per_gpu_hour)
