"""Calibration: the few coefficients of a site, fitted to its own finished runs.

One factor on time, one on memory, and the bandwidths that multi-GPU and multi-node runs depend on; medians, so that
one odd run moves nothing. A run that the site's formulas predict badly shows in the past error, not in the fit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from launcher.errors import DataError
from launcher.facts.learned import Learned
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning import memory, speed
from launcher.planning.plan import Candidate

_FARTHEST = 5.0
"""A run farther off than this says nothing of a site: too small a model, or a machine that had other work."""
_BANDWIDTHS = tuple(1e9 * 2 ** (step / 4) for step in range(41))
"""1 GB/s to 1 TB/s in steps of a fifth: finer is beyond what a step's time can tell."""
_ENOUGH = 2
"""Runs before a bandwidth is believed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One finished run: what was run, and what it took."""

    run: str
    model: ModelShape
    candidate: Candidate
    step_s: float
    """Seconds per optimizer step, start-up left out."""
    peak_bytes: int | None
    """Peak allocated on a GPU; None on CPU ranks."""


def calibrate(samples: Sequence[Sample], site: Site) -> Learned:
    """Fit a site's coefficients anew; what was learned before does not count, nor do outliers.

    Raises:
        DataError: nothing to learn from.
    """
    bare = replace(site, learned=None)
    outside = outliers(samples, bare)
    samples = [each for each in samples if each.run not in outside]
    if not samples:
        why = f": {', '.join(outside)} took more than {_FARTHEST:g} times longer or shorter" if outside else ""
        raise DataError(f"no finished run of site {site.name} to learn from{why}")
    alone = [each for each in samples if each.candidate.world_size == 1]
    one_node = [each for each in samples if each.candidate.nodes == 1]
    step = _median_factor(_step_ratios(alone or one_node or samples, bare))
    now = replace(bare, learned=Learned(runs=len(samples), step_factor=step))
    # A link can be told from a slow GPU only where other runs say how slow the GPU is.
    shared = [each for each in one_node if each.candidate.world_size > 1]
    intra = _bandwidth(shared, now, "intra_node_bw_bytes_s") if alone else None
    now = replace(now, intra_node_bw_bytes_s=intra or now.intra_node_bw_bytes_s)
    spread = [each for each in samples if each.candidate.nodes > 1]
    inter = _bandwidth(spread, now, "inter_node_bw_bytes_s") if one_node else None
    now = replace(now, inter_node_bw_bytes_s=inter or now.inter_node_bw_bytes_s)
    peaks = _memory_ratios(samples, bare)
    return Learned(
        runs=len(samples),
        step_factor=step,
        memory_factor=_median_factor(peaks),
        intra_node_bw_bytes_s=intra,
        inter_node_bw_bytes_s=inter,
        step_error_pct=_left_out_error(_step_ratios(samples, replace(now, learned=None))),
        memory_error_pct=_left_out_error(peaks),
    )


def outliers(samples: Iterable[Sample], site: Site) -> list[str]:
    """Runs that took so much longer or shorter than predicted that nothing can be learned from them."""
    bare = replace(site, learned=None)
    return [each.run for each in samples if abs(math.log(_step_ratios([each], bare)[0])) > math.log(_FARTHEST)]


def _step_ratios(samples: Iterable[Sample], site: Site) -> list[float]:
    """Measured over predicted step time of each sample."""
    return [each.step_s / speed.step_time(each.model, each.candidate, site).total_s for each in samples]


def _memory_ratios(samples: Iterable[Sample], site: Site) -> list[float]:
    return [
        each.peak_bytes / memory.estimate_memory(each.model, each.candidate, site).peak_bytes.expected
        for each in samples
        if each.peak_bytes
    ]


def _median_factor(ratios: Sequence[float]) -> float:
    """The typical ratio, on a logarithmic scale; 1 where nothing was measured."""
    if not ratios:
        return 1.0
    return math.exp(statistics.median(map(math.log, ratios)))


def _left_out_error(ratios: Sequence[float]) -> float | None:
    """Median error of each run's prediction with the factor that all the others give, in percent."""
    if len(ratios) < _ENOUGH:
        return None
    errors = []
    for number, ratio in enumerate(ratios):
        others = [*ratios[:number], *ratios[number + 1 :]]
        errors.append(abs(_median_factor(others) / ratio - 1) * 100)
    return statistics.median(errors)


def _bandwidth(samples: Sequence[Sample], site: Site, field: str) -> float | None:
    """The bandwidth that explains the samples best; None where none of them waits for the link.

    `field`: intra_node_bw_bytes_s or inter_node_bw_bytes_s.
    """
    if len(samples) < _ENOUGH:
        return None
    error = _error_with(samples, site, field)
    errors = {bandwidth: error(bandwidth) for bandwidth in _BANDWIDTHS}
    best = min(errors, key=errors.__getitem__)
    # Flat to the fast end: communication hid behind compute, and says nothing of the link.
    return None if errors[best] > 0.98 * errors[_BANDWIDTHS[-1]] else best


def _error_with(samples: Sequence[Sample], site: Site, field: str) -> Callable[[float], float]:
    def error(bandwidth: float) -> float:
        changed = {field: bandwidth}
        ratios = _step_ratios(samples, replace(site, **changed))  # type: ignore[arg-type]
        return statistics.fmean(abs(math.log(ratio)) for ratio in ratios)

    return error
