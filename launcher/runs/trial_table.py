"""trial_table: the table of a trial, and what may be said of the differences in it.

Quality columns (loss, perplexity, retention, steps, where each was stopped) come from losses alone and are the same to
the last bit whatever interrupted the runs. Times, and costs with them, are measured, so they are not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from launcher.runs.trial_folder import Confirms, Trial
from launcher.runs.trial_rungs import mean
from launcher.runs.trial_scores import Score
from launcher.runs.trial_standing import Standing

SCHEMA = 1
Outcome = Literal["confirmed", "tie", "reversed", "unknown"]
Measure = Literal["loss", "score"]
_T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Two-sided 5 % points of Student's t for 1 to 30 degrees of freedom (any table of it)."""
_NORMAL_95 = 1.960
_QUALITY = (
    *("candidate", "status", "rung", "steps", "seeds", "validation_loss", "losses", "spread", "perplexity"),
    *("base_loss", "score", "scores", "score_spread", "retention", "retention_change"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One candidate; numbers are means over its seeds, at the last rung that all of them reached."""

    candidate: str
    method: str
    lora_r: int | None
    learning_rate: float
    status: str
    """finished | stopped | failed | running | rejected."""
    why: str | None
    rung: int
    """From 1; 0 = none reached."""
    steps: int
    of_steps: int
    seeds: int
    validation_loss: float | None = None
    losses: tuple[float, ...] = ()
    """One per seed."""
    spread: float | None = None
    """Standard deviation over the seeds; None with one."""
    perplexity: float | None = None
    base_loss: float | None = None
    score: float | None = None
    """What the scorer gave the answers to held-out prompts; None where none was asked for."""
    scores: tuple[float, ...] = ()
    """One per seed."""
    score_spread: float | None = None
    """Standard deviation over the seeds; None with one."""
    base_score: float | None = None
    retention: float | None = None
    retention_change: float | None = None
    """Loss on the second set now, less that of the base; positive = something was forgotten."""
    train_s: float | None = None
    """In training steps, of one run."""
    wall_s: float | None = None
    """Devices held, of one run: with loading, evaluation and repeated work."""
    device_hours: float | None = None
    """Wall time times GPUs (on CPUs: nodes), of one run; so are the next two."""
    gpu_hours: float | None = None
    """None on CPUs."""
    cost: float | None = None
    train_device_hours: float | None = None
    """In training steps alone: what interruptions do not change."""
    peak_bytes: int | None = None
    """Of rank 0's GPU; None on CPUs."""
    host_peak_bytes: int | None = None
    """Resident memory of rank 0's process."""
    artifact_bytes: int | None = None
    tokens: int | None = None
    runs: tuple[str, ...] = ()
    predicted_device_hours: float | None = None
    """Of a whole run, by the plan."""
    trainable_params: int = 0

    def quality(self) -> dict[str, Any]:
        """What must not depend on interruptions."""
        return {name: getattr(self, name) for name in _QUALITY}


def rows(trial: Trial, standing: Standing) -> list[Row]:
    """The table, best first: who came further, and of those the lower loss."""
    told = [_row(trial, standing, each.name) for each in trial.candidates]
    given = scores(trial)
    told = [_with_scores(row, given) for row in told]
    return sorted(told, key=lambda row: (row.status == "rejected", -row.rung, _or_inf(row.validation_loss)))


def _with_scores(row: Row, given: Mapping[str, float]) -> Row:
    known = tuple(given[run] for run in row.runs if run in given)
    if not known or len(known) < len(row.runs):
        return replace(row, base_score=given.get("base"))
    spread = _deviation(known) if len(known) > 1 else None
    return replace(row, score=mean(known), scores=known, score_spread=spread, base_score=given.get("base"))


def scores(trial: Trial) -> dict[str, float]:
    """Run -> mean score of its answers, `base` among them; {} where no scorer has looked (see trial_scorer.py)."""
    try:
        document = json.loads((trial.path / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(document["scores"])


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _row(trial: Trial, standing: Standing, name: str) -> Row:
    candidate = trial.candidate(name)
    common: dict[str, Any] = {
        "candidate": name,
        "method": candidate.method,
        "lora_r": candidate.lora_r,
        "learning_rate": candidate.learning_rate,
        "of_steps": candidate.steps,
        "seeds": len(trial.seeds),
        "trainable_params": candidate.trainable_params,
    }
    if candidate.rejected is not None:
        return Row(**common, status="rejected", why=candidate.rejected, rung=0, steps=0)
    ended = standing.candidates[name]
    common |= {
        "status": ended.status,
        "why": ended.why,
        "rung": ended.rung + 1,
        "steps": trial.steps(name, ended.rung) if ended.rung >= 0 else 0,
        "predicted_device_hours": candidate.device_hours,
    }
    if not ended.scores:
        return Row(**common)
    return Row(**common, **_quality(ended.scores), **_effort(trial, name, ended.scores))


def _quality(scores: Sequence[Score]) -> dict[str, Any]:
    losses = [each.validation_loss for each in scores]
    known = tuple(loss for loss in losses if loss is not None)
    loss = mean(known) if len(known) == len(losses) else None
    retention, before = _mean(each.retention for each in scores), _mean(each.base_retention for each in scores)
    return {
        "validation_loss": loss,
        "losses": known,
        "spread": _deviation(known) if len(known) > 1 else None,
        "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
        "base_loss": _mean(each.base_loss for each in scores),
        "retention": retention,
        "retention_change": None if retention is None or before is None else retention - before,
    }


def _effort(trial: Trial, name: str, scores: Sequence[Score]) -> dict[str, Any]:
    candidate = trial.candidate(name)
    train_s, wall_s = mean([each.train_s for each in scores]), mean([each.wall_s for each in scores])
    on_gpus = candidate.gpu_hours > 0
    hours = wall_s / 3600 * candidate.devices
    peaks = [each.peak_bytes for each in scores if each.peak_bytes is not None]
    hosts = [each.host_peak_bytes for each in scores if each.host_peak_bytes is not None]
    sizes = [each.artifact_bytes for each in scores if each.artifact_bytes is not None]
    return {
        "train_s": train_s,
        "wall_s": wall_s,
        "device_hours": hours,
        "gpu_hours": hours if on_gpus else None,
        "cost": hours * trial.price if on_gpus and trial.price is not None else None,
        "train_device_hours": train_s / 3600 * candidate.devices,
        "peak_bytes": max(peaks, default=None),
        "host_peak_bytes": max(hosts, default=None),
        "artifact_bytes": max(sizes, default=None),
        "tokens": scores[0].tokens,
        "runs": tuple(each.run for each in scores),
    }


def _mean(values: Any) -> float | None:
    known = list(values)
    return None if not known or any(value is None for value in known) else mean(known)


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample."""
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


# ---------------------------------------------------------------- what is noise


def smallest_difference(finished: Sequence[Row], by: Measure = "loss") -> float | None:
    """The smallest difference of two means that is more than seed-to-seed noise; None with one seed.

    Student's two-sample test at 5 % with the spread pooled over all finished candidates (Fisher's least significant
    difference): t(df) * s * sqrt(2 / seeds), df = candidates * (seeds - 1). It errs on the side of a tie, because what
    a seed does to all candidates alike is counted as noise, too.
    """
    samples = [values for row in finished if len(values := row.losses if by == "loss" else row.scores) > 1]
    if not samples:
        return None
    freedom = sum(len(values) - 1 for values in samples)
    pooled = math.sqrt(math.fsum(_deviation(values) ** 2 * (len(values) - 1) for values in samples) / freedom)
    point = _T_95[freedom - 1] if freedom <= len(_T_95) else _NORMAL_95
    return point * pooled * math.sqrt(2 / min(len(values) for values in samples))


def ties(told: Sequence[Row], by: Measure = "loss") -> list[str]:
    """Finished candidates that cannot be told from the best: itself first; it alone where the spread is unknown."""
    finished = [row for row in told if row.status == "finished" and badness(row, by) < math.inf]
    if not finished:
        return []
    finished.sort(key=lambda row: badness(row, by))
    limit = badness(finished[0], by) + (smallest_difference(finished, by) or 0.0)
    return [row.candidate for row in finished if badness(row, by) <= limit]


def measured(row: Row, by: Measure) -> float | None:
    """The mean over the seeds."""
    return row.validation_loss if by == "loss" else row.score


def badness(row: Row, by: Measure) -> float:
    """The less the better; infinite where it was not measured."""
    value = measured(row, by)
    return math.inf if value is None else value if by == "loss" else -value


def to_json(trial: Trial, standing: Standing, told: Sequence[Row]) -> dict[str, Any]:
    """The document of `launcher trial --json` and of table.json."""
    finished = [row for row in told if row.status == "finished"]
    return {
        "schema": SCHEMA,
        "trial": trial.name,
        "path": str(trial.path),
        "state": "finished" if standing.finished else "cancelled" if trial.cancelled else "running",
        "rung": standing.rung + 1,
        "rungs": [str(share) for share in trial.shares],
        "seeds": list(trial.seeds),
        "rows": [_to_json(row) for row in told],
        "smallest_difference": smallest_difference(finished),
        "ties": ties(told) if standing.finished else [],
        "score_smallest_difference": smallest_difference(finished, "score"),
        "score_ties": ties(told, "score") if standing.finished else [],
        "base_score": scores(trial).get("base"),
        "confirms": _confirms(trial, told) if standing.finished else None,
    }


def _to_json(row: Row) -> dict[str, Any]:
    document = asdict(row)
    del document["base_score"]  # the same for all, so it stands beside the rows
    return document | {name: list(document[name]) for name in ("losses", "scores", "runs")}


def _confirms(trial: Trial, told: Sequence[Row]) -> dict[str, Any] | None:
    """What a confirmation says of the trial before it."""
    if trial.confirms is None:
        return None
    return asdict(trial.confirms) | {"outcome": confirmation(trial.confirms, told)}


def confirmation(before: Confirms, told: Sequence[Row]) -> Outcome:
    """Whether the winner was better again, by more than noise; where nobody knows the noise, nothing can be confirmed.

    Source: the same test as `smallest_difference`, on seeds that nothing was chosen by.
    """
    finished = [row for row in told if row.status == "finished"]
    bad = {row.candidate: badness(row, before.by) for row in finished}
    winner, other = bad.get(before.winner, math.inf), bad.get(before.runner_up, math.inf)
    noise = smallest_difference(finished, before.by)
    if math.inf in (winner, other) or noise is None:
        return "unknown"
    if abs(other - winner) <= noise:
        return "tie"
    return "confirmed" if winner < other else "reversed"
