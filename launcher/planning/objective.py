"""Which of several estimates to take: the earliest result within the budget, the cheapest, or the best quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from launcher.planning.plan import Candidate, Estimate

Objective = Literal["time", "cost", "quality"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
QUALITY_ORDER = ("full", "lora", "qlora", "prompt")
"""What guides expect of methods, best first (G1 to G4); how far apart they are only a trial on one's own data says."""
THRIFT = 1.25
"""Without a budget, a faster plan may take this many times the device-hours of the cheapest one that fits."""
_SAME = 1.03
"""Times and hours this close are equal; the simpler candidate wins."""
_COMFORTABLE = 0.92
"""Share of a device's memory the chosen plan should stay below, where any does."""


def device_hours(each: Estimate) -> float:
    """GPU-hours; on CPUs node-hours, because their ranks share a node's cores."""
    candidate = each.candidate
    devices = candidate.world_size if candidate.device == "cuda" else candidate.nodes
    return each.wall_s / 3600 * devices


def within(each: Estimate, max_hours: float | None) -> bool:
    """Whether the plan stays within the budget of GPU-hours."""
    return max_hours is None or each.gpu_hours <= max_hours


def pick(found: Sequence[Estimate], objective: Objective = "time", max_hours: float | None = None) -> Estimate:
    """The best of estimates of one method; the nearest miss where none fits.

    time and quality: the earliest result within the budget (without one: within THRIFT times the cheapest);
    cost: the fewest device-hours. Over the budget everywhere: the cheapest.
    """
    fitting = [each for each in found if each.fits]
    if not fitting:
        return min(found, key=lambda each: (excess_bytes(each), each.wall_s, *_complexity(each.candidate)))
    affordable = [each for each in fitting if within(each, max_hours)]
    considered = _roomy(affordable or fitting)
    cheapest = min(device_hours(each) for each in considered)
    if objective == "cost" or not affordable:
        same = [each for each in considered if device_hours(each) <= _SAME * cheapest]
        return _simplest([each for each in same if within(each, max_hours)] or same)
    if max_hours is None:
        considered = [each for each in considered if device_hours(each) <= THRIFT * cheapest]
    earliest = min(each.result_s for each in considered)
    return _simplest([each for each in considered if each.result_s <= _SAME * earliest])


def fewest(found: Sequence[Estimate]) -> Estimate:
    """The best on the smallest number of ranks that fits; the nearest miss where none does."""
    fitting = [each for each in found if each.fits]
    ranks = min((each.candidate.world_size for each in fitting), default=0)
    return pick([each for each in fitting if each.candidate.world_size == ranks] or found)


def needed_bytes(each: Estimate) -> float:
    """Bytes the device must have: cautious peak, context and communication buffers."""
    return each.memory.peak_bytes.high + each.memory.terms_bytes["runtime"]


def excess_bytes(each: Estimate) -> float:
    """How many bytes a candidate is over the device's memory."""
    return max(0.0, needed_bytes(each) - each.memory.usable_bytes)


def _roomy(fitting: list[Estimate]) -> list[Estimate]:
    """Those that leave some room, where any does.

    Of 454 published runs none failed whose estimate left a fifth of the device free (arXiv 2411.06465); the peak
    used here is the cautious one already, so less room is asked for.
    """
    return [each for each in fitting if needed_bytes(each) <= _COMFORTABLE * each.memory.usable_bytes] or fitting


def _simplest(equal: Sequence[Estimate]) -> Estimate:
    return min(equal, key=lambda each: (*_complexity(each.candidate), each.memory.peak_bytes.expected))


def _complexity(candidate: Candidate) -> tuple[int, int, int, int]:
    """Fewer ranks first, then fewer offloads, then the lower stage, then weights held once."""
    return candidate.world_size, _offloads(candidate), candidate.zero_stage, candidate.hpz_partition


def _offloads(candidate: Candidate) -> int:
    return (candidate.offload_optimizer != "none") + (candidate.offload_param != "none")
