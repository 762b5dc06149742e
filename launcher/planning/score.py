"""Score: predictions beside what was measured, and how far apart they are.

`allocated` is compared with `peak_bytes`, every other kind of reading with `device_bytes`; an out-of-memory row asks
only whether the plan would have refused it. Errors are relative to what was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.planning import memory, speed
from launcher.planning.published import Published, Run

SCHEMA = 1
_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One row's prediction beside its measurement; GiB and tokens per second, both per GPU; None: not asked."""

    id: str
    kind: str | None
    predicted_gib: float | None = None
    low_gib: float | None = None
    high_gib: float | None = None
    measured_gib: float | None
    error_pct: float | None = None
    predicted_tokens_per_s: float | None = None
    measured_tokens_per_s: float | None
    predicted_fits: bool | None = None
    outcome: str
    skipped: str | None
    complete: bool
    model: str
    stack: str
    sharding: str
    predicted_device_gib: float | None = None
    measured_device_gib: float | None
    """nvidia-smi's reading beside another kind."""
    usable_gib: float | None = None
    binding: str | None = None
    """The moment that sets the predicted peak."""

    @property
    def speed_error_pct(self) -> float | None:
        """Predicted over measured tokens per second, as a deviation."""
        return _error(self.predicted_tokens_per_s, self.measured_tokens_per_s)


def score(rows: Iterable[Published]) -> list[Scored]:
    """Predict every row."""
    return [_score_row(row) for row in rows]


def predict_memory(run: Run) -> Any:
    """The plan's memory estimate for a published run."""
    return memory.estimate_memory(run.model, run.candidate, run.site, run.stack)


def predict_tokens_per_s(run: Run) -> float:
    """The plan's speed for a published run, per GPU."""
    step_s = speed.step_time(run.model, run.candidate, run.site, run.speed).total_s
    return run.candidate.global_batch * run.candidate.seq_len / step_s / run.candidate.world_size


def _score_row(row: Published) -> Scored:
    measured = row.measured
    return Scored(
        id=row.id,
        model=row.model,
        stack=row.stack,
        sharding=row.sharding,
        kind=measured.kind,
        measured_gib=measured.memory_gib,
        measured_device_gib=measured.device_gib if measured.outcome == "ok" else None,
        measured_tokens_per_s=measured.tokens_per_s_per_gpu,
        outcome=measured.outcome,
        skipped=row.skipped,
        complete=row.complete,
        **({} if row.run is None else _predictions(row, row.run)),
    )


def _predictions(row: Published, run: Run) -> dict[str, Any]:
    estimate = predict_memory(run)
    interval = estimate.peak_bytes if row.measured.kind in ("allocated", None) else estimate.device_bytes
    predicted = interval.expected / _GIB
    asks_speed = run.knows_gpu and row.measured.tokens_per_s_per_gpu is not None
    return {
        "predicted_gib": predicted,
        "low_gib": interval.low / _GIB,
        "high_gib": interval.high / _GIB,
        "error_pct": _error(predicted, row.measured.memory_gib),
        "predicted_tokens_per_s": predict_tokens_per_s(run) if asks_speed else None,
        "predicted_fits": memory.fits(estimate) if run.knows_gpu else None,
        "usable_gib": estimate.usable_bytes / _GIB if run.knows_gpu else None,
        "predicted_device_gib": estimate.device_bytes.expected / _GIB,
        "binding": estimate.binding,
    }


def _error(predicted: float | None, measured: float | None) -> float | None:
    if predicted is None or not measured:
        return None
    return 100 * (predicted / measured - 1)


# ---------------------------------------------------------------- the table


def summary(rows: Sequence[Scored]) -> dict[str, Any]:
    """The document of `launcher score --json` (schema 1).

    Memory and speed count rows with `complete`, fit every row with a known outcome; `incomplete` holds the same
    numbers for the others.
    """
    return {
        "schema": SCHEMA,
        "n": len(rows),
        "skipped": sum(row.skipped is not None for row in rows),
        **_figures([row for row in rows if row.complete]),
        "fit": _fit(rows),
        "incomplete": _figures([row for row in rows if not row.complete]),
        "groups": {key: _groups(rows, key) for key in ("stack", "model", "sharding")},
        "rows": [asdict(row) for row in rows],
    }


def _figures(rows: Sequence[Scored]) -> dict[str, Any]:
    return {
        "memory": {
            "allocated": memory_figures([row for row in rows if row.kind == "allocated"]),
            "device": memory_figures([row for row in rows if row.kind not in ("allocated", None)]),
            "nvidia_smi": _nvidia_smi(rows),
        },
        "speed": _speed(rows),
    }


def memory_figures(rows: Sequence[Scored]) -> dict[str, Any]:
    """Error of memory predictions, in percent of what was measured."""
    asked = [row for row in rows if row.error_pct is not None and row.outcome == "ok"]
    errors = [row.error_pct or 0.0 for row in asked]
    inside = [(row.low_gib or 0) <= (row.measured_gib or 0) <= (row.high_gib or 0) for row in asked]
    return {
        "n": len(asked),
        "median_abs_pct": _quantile(errors, 0.5),
        "p95_abs_pct": _quantile(errors, 0.95),
        "bias_pct": _rounded(statistics.fmean, errors),
        "in_interval_pct": _rounded(statistics.fmean, [100.0 * each for each in inside]),
    }


def _groups(rows: Sequence[Scored], key: str) -> dict[str, dict[str, Any]]:
    """Errors of allocated memory group by group, incomplete rows included: do they hold beyond one stack or model?"""
    asked = [row for row in rows if row.kind == "allocated" and row.error_pct is not None]
    names = sorted({getattr(row, key) for row in asked})
    return {name: memory_figures([row for row in asked if getattr(row, key) == name]) for name in names}


def _nvidia_smi(rows: Sequence[Scored]) -> dict[str, Any]:
    """The same for nvidia-smi's reading beside an allocator's: how far the cache grows, not what a run needs."""
    errors = [error for row in rows if (error := _error(row.predicted_device_gib, row.measured_device_gib)) is not None]
    return {
        "n": len(errors),
        "median_abs_pct": _quantile(errors, 0.5),
        "p95_abs_pct": _quantile(errors, 0.95),
        "bias_pct": _rounded(statistics.fmean, errors),
        "in_interval_pct": None,
    }


def _fit(rows: Sequence[Scored]) -> dict[str, int]:
    asked = [row for row in rows if row.predicted_fits is not None]
    false_fits = sum(bool(row.predicted_fits) and row.outcome == "oom" for row in asked)
    false_ooms = sum(not row.predicted_fits and row.outcome != "oom" for row in asked)
    return {
        "n": len(asked),
        "correct": len(asked) - false_fits - false_ooms,
        "false_fits": false_fits,
        "false_ooms": false_ooms,
    }


def _speed(rows: Sequence[Scored]) -> dict[str, Any]:
    errors = [error for row in rows if (error := row.speed_error_pct) is not None]
    return {
        "n": len(errors),
        "median_abs_pct": _quantile(errors, 0.5),
        "within_25_pct": _rounded(statistics.fmean, [100.0 * (abs(error) <= 25) for error in errors]),
    }


def _quantile(errors: Sequence[float], share: float) -> float | None:
    """The smallest absolute error that `share` of all do not exceed."""
    ordered = sorted(map(abs, errors))
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, max(0, -(-int(len(ordered) * share * 1000) // 1000) - 1))], 2)


def _rounded(mean: Callable[[Sequence[float]], float], values: Sequence[float]) -> float | None:
    return round(mean(values), 2) if values else None
