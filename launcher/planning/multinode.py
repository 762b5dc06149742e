"""More nodes or fewer gathers: what a ZeRO-3 layout over several nodes competes with, decided by bandwidth.

ZeRO-3 over all ranks sends the weights through the network twice per micro-batch. What can be faster: a second
partition inside each node, so that backward gathers over NVLink (hpZ, ZeRO++, arXiv 2306.10209: costs 2 bytes x P /
ranks per node); ZeRO-2, which gathers once per step (costs whole weights); one node, which uses no network.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.facts.gpu import gpu
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.collectives import link_bytes_s, traffic
from launcher.planning.plan import Candidate
from launcher.planning.speed import step_time
from launcher.planning.speed_profile import OUR_SPEED, SpeedProfile

HPZ_SOURCE = "ZeRO, arXiv 1910.02054, section 7; ZeRO++, arXiv 2306.10209"


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """One way to run the same global batch."""

    name: str
    """ZeRO-3 | ZeRO-3 with hpZ | ZeRO-2 | one node."""
    candidate: Candidate
    step_s: float
    link_s: float
    """Seconds of a step that its collectives take on the links, hidden or not."""
    exposed_s: float
    """Seconds of a step that they add."""
    link_bytes_s: float


def zero3_vs_alternatives(
    model: ModelShape, candidate: Candidate, site: Site, profile: SpeedProfile = OUR_SPEED
) -> tuple[Alternative, ...]:
    """The candidate and what it competes with, fastest first; whether they fit is for the memory model to say.

    Empty for anything but ZeRO-3 over several nodes. All keep the global batch: one node accumulates more.
    """
    if candidate.zero_stage != 3 or candidate.nodes == 1:
        return ()
    ways = {"ZeRO-3": replace(candidate, hpz_partition=1), "one node": _on_one_node(candidate)}
    if hpz_may_help(candidate, site):
        ways["ZeRO-3 with hpZ"] = with_hpz(candidate)
    if candidate.offload_param == "none" and candidate.quant is None:
        ways["ZeRO-2"] = replace(candidate, zero_stage=2, hpz_partition=1)
    found = [_alternative(name, model, way, site, profile) for name, way in ways.items()]
    return tuple(sorted(found, key=lambda each: (each.step_s, each.name)))


def hpz_may_help(candidate: Candidate, site: Site) -> bool:
    """Whether a second partition moves gathers to a faster link: several nodes whose inside is faster.

    Full fine-tuning only: frozen weights fit few nodes, and packed 4-bit ones have no second partition. Offloaded
    parameters have no room for it.
    """
    if candidate.zero_stage != 3 or candidate.nodes == 1 or candidate.gpus_per_node == 1:
        return False
    if candidate.method != "full" or candidate.offload_param != "none":
        return False
    device = gpu(candidate.gpu)
    inside = replace(candidate, nodes=1)
    return link_bytes_s(candidate, device, site) < 0.95 * link_bytes_s(inside, device, site)


def with_hpz(candidate: Candidate) -> Candidate:
    """The same with a second partition of the weights inside each node."""
    return replace(candidate, hpz_partition=candidate.gpus_per_node)


def _on_one_node(candidate: Candidate) -> Candidate:
    often = candidate.gradient_accumulation * candidate.nodes
    return replace(candidate, nodes=1, gradient_accumulation=often, hpz_partition=1)


def _alternative(name: str, model: ModelShape, candidate: Candidate, site: Site, profile: SpeedProfile) -> Alternative:
    device = gpu(candidate.gpu)
    moved = traffic(model, candidate, device, site, profile)
    step = step_time(model, candidate, site, profile)
    return Alternative(
        name=name,
        candidate=candidate,
        step_s=step.total_s,
        link_s=candidate.gradient_accumulation * moved.per_micro_batch_s + moved.per_step_s,
        exposed_s=step.communication_s,
        link_bytes_s=link_bytes_s(candidate, device, site),
    )
