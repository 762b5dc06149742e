"""trial_scores: what a run of a trial showed at one of its steps, from its files alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.runs.folder import RunFolder, read_json_lines
from launcher.runs.state import Evidence, read_evidence

PAUSED = "paused"


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One run at one step."""

    run: str
    step: int
    validation_loss: float | None
    """Mean over the trained tokens of the held-out rows; None: not a finite number."""
    base_loss: float | None
    """The same before the first step."""
    retention: float | None
    """Loss on the second set now."""
    base_retention: float | None
    train_s: float
    """In training steps, over all attempts; steps that an interruption lost are counted once."""
    wall_s: float
    """From the first word of each attempt to its last, summed."""
    tokens: int | None
    peak_bytes: int | None
    """Largest allocation of rank 0's GPU; None on CPUs."""
    host_peak_bytes: int | None
    """Most resident memory of rank 0's process, over all attempts that left in order."""
    artifact_bytes: int | None
    """Weights of the adapter or model; None of a run that paused."""


def reached(run: RunFolder, step: int, *, last: bool) -> bool:
    """Whether a run has done this step and left: paused there, or (the last) finished."""
    evidence = read_evidence(run)
    if evidence.result is not None:
        return True
    return not last and any(_paused_at(event) >= step for event in evidence.events)


def _paused_at(event: Mapping[str, Any]) -> int:
    paused = event.get("event") == "stopped" and event.get("reason") == PAUSED
    return int(event.get("step") or 0) if paused else -1


def score(run: RunFolder, step: int) -> Score:
    """What the run showed at a step that it has reached."""
    evidence, lines = read_evidence(run), list(read_json_lines(run.metrics))
    return Score(
        run=run.run_id,
        step=step,
        validation_loss=_at(lines, "validation_loss", step),
        base_loss=_at(lines, "validation_loss", 0),
        retention=_at(lines, "retention_loss", step),
        base_retention=_at(lines, "retention_loss", 0),
        train_s=_train_s(evidence, step),
        wall_s=wall_s(evidence),
        tokens=_tokens(evidence, step),
        peak_bytes=max((int(line["peak_bytes"]) for line in lines if line.get("peak_bytes")), default=None),
        host_peak_bytes=_host_peak(evidence),
        artifact_bytes=_size(run.adapter) or _size(run.model),
    )


def _at(lines: list[dict[str, Any]], name: str, step: int) -> float | None:
    """The last number of that name logged for a step; an interrupted run may have logged it twice, with one value."""
    values = [line[name] for line in lines if line.get("step") == step and name in line]
    value = values[-1] if values else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _facts_at(evidence: Evidence, step: int) -> Mapping[str, Any]:
    """Where the run said how far it had come at a step: its result, or the line of its pause."""
    if evidence.result is not None and evidence.result.get("step") == step:
        return evidence.result
    return next((event for event in evidence.events[::-1] if _paused_at(event) == step), {})


def _train_s(evidence: Evidence, step: int) -> float:
    return float(_facts_at(evidence, step).get("train_s") or 0.0)


def _tokens(evidence: Evidence, step: int) -> int | None:
    tokens = _facts_at(evidence, step).get("tokens")
    return int(tokens) if isinstance(tokens, int) else None


def _host_peak(evidence: Evidence) -> int | None:
    said = [*evidence.events, evidence.result or {}]
    peaks = [peak for facts in said if isinstance(peak := facts.get("host_peak_bytes"), int)]
    return max(peaks, default=None)


def wall_s(evidence: Evidence) -> float:
    """Seconds that attempts of the run held their devices, from the first line of each in the ledger to the last."""
    return math.fsum(last - first for first, last in _spans(evidence))


def _spans(evidence: Evidence) -> Iterator[tuple[float, float]]:
    spans: dict[str, tuple[float, float]] = {}
    for event in evidence.events:
        name, time_s = event.get("attempt"), event.get("time_s")
        if isinstance(name, str) and isinstance(time_s, int | float) and event.get("event") != "decided":
            first, last = spans.get(name, (float(time_s), float(time_s)))
            spans[name] = first, max(last, float(time_s))
    yield from spans.values()


def _size(folder: Path) -> int | None:
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def last_decision(run: RunFolder) -> Mapping[str, Any]:
    """What was decided after the newest attempt of a run; {} where nothing was."""
    events = read_evidence(run).events
    return next((event for event in events[::-1] if event.get("event") == "decided"), {})


def failure_of(run: RunFolder) -> str | None:
    """Why a run will not do better when it is started again; None where it may, or where a person ended it."""
    decision = last_decision(run)
    if decision.get("action") != "stop" or decision.get("cause") not in _OF_THE_CANDIDATE:
        return None
    return str(decision.get("sentence") or decision.get("reason") or decision.get("cause"))


_OF_THE_CANDIDATE = frozenset(
    {"nan_loss", "gpu_out_of_memory", "host_out_of_memory", "recipe_error", "model_error", "our_bug"}
)
"""Causes that come again, with this candidate: it is out. After all others the trial waits for somebody to go on."""
