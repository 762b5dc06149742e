"""Communication of a step: bytes each rank moves, over which link, and how much of it hides behind compute.

Volumes are those of ZeRO (arXiv 1910.02054, section 7), the hierarchical partition those of ZeRO++ (2306.10209):
with M the bytes of the weights and (n-1)/n left out, an all-gather and a reduce-scatter each move M per rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.facts.gpu import Gpu
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.plan import DTYPE_BYTES, Candidate
from launcher.planning.speed_profile import SpeedProfile
from launcher.planning.states import weight_bytes
from launcher.planning.trainable import targeted, trainable_params

_NETWORK_SHARE = 0.8
"""Share of the line rate that large collectives reach (NCCL tests on InfiniBand and RoCE: 0.75 to 0.9)."""
_SPREAD = (0.012, 0.004)
"""How much longer the slowest rank computes than the mean, which every collective waits for: within a node, and per
doubling of nodes (llm-foundry's 7B loses 9 % from 8 to 512 H100s, torchtitan's 8B 3 % from 8 to 128)."""
_HOP_S = 20e-6
"""Latency of one collective per doubling of the nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Collectives of one optimizer step of one rank, in seconds on the links."""

    per_micro_batch_s: float
    """Weights gathered (stage 3) and gradients scattered (stages 2 and 3) in every micro-batch."""
    per_step_s: float
    """Gradients (stages 0 and 1) and updated weights (stages 1 and 2) exchanged once."""
    latency_s: float
    """Per micro-batch, never hidden: the host starts and waits for each gathered unit."""


def link_bytes_s(candidate: Candidate, device: Gpu, site: Site) -> float:
    """Bus bandwidth of a collective over all ranks: the slowest thing a ring crosses.

    A ring that enters a node once leaves it once, so all adapters of a node carry it together: between nodes the
    limit is the sum of the node's adapters, not one GPU's share. (MPT-13B at 64 H100s with 4096 tokens per
    micro-batch runs at the single-node speed; at one 400 Gbit/s port per rank it would take twice as long.)
    """
    inside = site.intra_node_bw_bytes_s or device.link_bytes_s
    if candidate.nodes == 1:
        return inside
    return min(inside, network_bytes_s(candidate, device, site))


def network_bytes_s(candidate: Candidate, device: Gpu, site: Site) -> float:
    """What one node sends to others: its GPUs' shares of the network together."""
    per_gpu = site.inter_node_bw_bytes_s or device.network_bytes_s
    return _NETWORK_SHARE * per_gpu * candidate.gpus_per_node


def traffic(model: ModelShape, candidate: Candidate, device: Gpu, site: Site, profile: SpeedProfile) -> Traffic:
    """Seconds on the links by occasion."""
    ranks = candidate.world_size
    if ranks == 1:
        return Traffic(per_micro_batch_s=0.0, per_step_s=0.0, latency_s=0.0)
    link = link_bytes_s(candidate, device, site)
    gradients = _gradient_bytes(model, candidate) * _share(ranks)
    if candidate.zero_stage == 2:
        # Partitioned gradients have nowhere to wait: scattered after every backward; weights are gathered per step.
        return Traffic(per_micro_batch_s=gradients / link, per_step_s=gradients / link, latency_s=0.0)
    if candidate.zero_stage < 2:
        # An all-reduce is a reduce-scatter and an all-gather; stage 1 gathers the updated weights instead.
        return Traffic(per_micro_batch_s=0.0, per_step_s=2 * gradients / link, latency_s=0.0)
    seconds = _gather_s(model, candidate, device, site) + gradients / link
    units = model.layers * _units_per_layer(model, candidate, profile)
    hops = _HOP_S * max(0, candidate.nodes - 1).bit_length() * model.layers
    return Traffic(per_micro_batch_s=seconds, per_step_s=0.0, latency_s=3 * (units * profile.unit_s + hops))


def _gather_s(model: ModelShape, candidate: Candidate, device: Gpu, site: Site) -> float:
    """Both all-gathers of stage 3: forward over all ranks, backward within a secondary partition where there is one.

    Recomputation needs no third gather: weights gathered for it stay for the backward of the same layer
    (stage3_max_reuse_distance). 4-bit weights travel packed.
    """
    weights = weight_bytes(model, candidate)
    forward = weights * _share(candidate.world_size) / link_bytes_s(candidate, device, site)
    secondary = candidate.hpz_partition
    if secondary <= 1:
        return 2 * forward
    inside = site.intra_node_bw_bytes_s or device.link_bytes_s
    link = inside if secondary <= candidate.gpus_per_node else link_bytes_s(candidate, device, site)
    return forward + weights * _share(secondary) / link


def _gradient_bytes(model: ModelShape, candidate: Candidate) -> float:
    """What is reduced: in fp32 by plain torch's DDP over fp32 gradients, else in the compute dtype."""
    size = 4 if candidate.zero_stage == 0 else DTYPE_BYTES[candidate.precision]
    return float(size * trainable_params(model, candidate))


def _units_per_layer(model: ModelShape, candidate: Candidate, profile: SpeedProfile) -> int:
    """Pieces of a layer gathered for themselves: DeepSpeed's hooks sit on every module that holds weights."""
    adapters = 2 * _adapted(model, candidate)
    if profile.gathers_modules:
        return len(model.linears) + model.norms_per_layer + adapters
    return 1 + (adapters if profile.wraps_adapters else 0)


def _adapted(model: ModelShape, candidate: Candidate) -> int:
    return 0 if candidate.lora is None else len(targeted(model, candidate.lora.target_modules)[0])


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


def exposed_s(traffic: Traffic, compute_s: float, candidate: Candidate, profile: SpeedProfile) -> float:
    """Seconds a step takes longer than compute alone.

    Hidden is what fits behind `overlap` of compute: behind every micro-batch in stage 3, behind the last backward
    (two thirds of a micro-batch) otherwise. Hidden collectives still slow the kernels beside them (`contention`).
    """
    window = profile.overlap * compute_s
    each = _over(traffic.per_micro_batch_s, window, profile) + traffic.latency_s
    # DeepSpeed's stages 1 and 2 reduce behind backward, but gather the updated weights after the step.
    waiting = candidate.gradient_accumulation * compute_s * _spread(candidate)
    once = _over(traffic.per_step_s, window * (2 / 3 if candidate.zero_stage == 0 else 1 / 3), profile)
    return candidate.gradient_accumulation * each + once + waiting


def _spread(candidate: Candidate) -> float:
    if candidate.world_size == 1:
        return 0.0
    return _SPREAD[0] + _SPREAD[1] * math.log2(candidate.nodes)


def _over(link_s: float, window_s: float, profile: SpeedProfile) -> float:
    hidden = min(link_s, window_s)
    return link_s - hidden + profile.contention * hidden
