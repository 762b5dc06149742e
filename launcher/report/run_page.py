"""One run as one self-contained page: curves, what was predicted, attempts, diagnosis, lineage, what to do next."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.errors import ModelError
from launcher.facts.adapters import read_adapter_facts
from launcher.report.compare import UNITS
from launcher.report.curves import Chart, Line, chart
from launcher.report.numbers import GIB, MIB, bytes_, count, loss, money, percent, seconds
from launcher.report.pages import environment
from launcher.runs.attempts import Attempt, attempts
from launcher.runs.explanation import Explanation, explain
from launcher.runs.folder import RunFolder, read_json_lines
from launcher.runs.run_facts import Against, RunFacts, run_facts
from launcher.runs.status import RunStatus, run_status

_GOOD = ("COMPLETED", "RUNNING", "COMPLETING", "PENDING")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPage:
    """What the page of a run shows."""

    facts: RunFacts
    status: RunStatus
    explanation: Explanation
    attempts: tuple[Attempt, ...]
    lineage: dict[str, Any]
    """Empty for full fine-tuning and for runs that are not done."""
    recipe: str
    lines: tuple[dict[str, Any], ...]
    """metrics.jsonl."""
    events: tuple[dict[str, Any], ...]
    """The ledger."""

    @classmethod
    def of(cls, run: RunFolder) -> RunPage:
        """Everything that a run folder tells, and Slurm where it is asked."""
        events = tuple(read_json_lines(run.attempts))
        recipe = run.resolved if run.resolved.exists() else run.recipe
        return cls(
            facts=run_facts(run),
            status=run_status(run),
            explanation=explain(run),
            attempts=tuple(attempts(events)),
            lineage=_lineage(run),
            recipe=recipe.read_text(encoding="utf-8", errors="replace"),
            lines=tuple(read_json_lines(run.metrics)),
            events=events,
        )

    def to_json(self) -> dict[str, Any]:
        """The document of `launcher report --json`."""
        return {
            "schema": 1,
            "run": self.facts.to_json(),
            "status": self.status.to_json(),
            "explanation": self.explanation.to_json(),
            "attempts": [attempt.to_json() for attempt in self.attempts],
            "lineage": self.lineage,
            "next": self.next_steps(),
        }

    def next_steps(self) -> list[str]:
        """Commands that make sense now, the most useful first."""
        run = self.facts.run
        if not self.facts.finished:
            return [self.explanation.command or f"launcher status {run}"]
        over = self.facts.retention_rise is not None and self.facts.retention_rise > self.facts.retention_limit
        again = [f"launcher trial {self.facts.path}/recipe.yaml"] if over else []
        if self.facts.method == "full":
            return [*again, f"launcher compare {run}"]
        return [*again, f"launcher compare {run}", f"launcher merge {run}", f"launcher export {run} --for vllm"]


def write_run(page: RunPage, path: Path) -> Path:
    """Write the page to `path`, whose folder must exist, and return it."""
    path.write_text(render_run(page), encoding="utf-8")
    return path


def render_run(page: RunPage) -> str:
    """The page as text."""
    return (
        environment()
        .get_template("run.html.j2")
        .render(
            page=page,
            good=page.status.state in _GOOD,
            facts=list(_facts(page.facts)),
            charts=list(_charts(page)),
            against=[_against(one) for one in page.facts.against],
            attempts=[_attempt(one) for one in page.attempts],
            lineage=list(_origin(page.lineage)),
            ledger=[(_clock(event.get("time_s")), event.get("event"), _told(event)) for event in page.events],
            next_steps=page.next_steps(),
            version=__version__,
            written=_clock(time.time()),
        )
    )


def _lineage(run: RunFolder) -> dict[str, Any]:
    try:
        return dict(read_adapter_facts(run.adapter).lineage)
    except ModelError:
        return {}


def _facts(run: RunFacts) -> Iterator[tuple[str, str]]:
    """What a reader looks for first, as name and value."""
    method = f"{run.method or 'unknown method'}{f' r={run.lora_r}' if run.lora_r else ''}"
    rate = f" at learning rate {run.learning_rate:.3g}" if run.learning_rate else ""
    yield "Base", run.base or "unknown"
    yield "Method", f"{method}{rate}, {count(run.step)} of {count(run.total_steps)} steps"
    if run.validation.last is not None:
        best = f"; best {loss(run.validation.best)} after step {run.validation.best_step}"
        yield "Validation loss", f"{loss(run.validation.base)} before, {loss(run.validation.last)} after{best}"
    if run.retention_rise is not None:
        yield (
            "Retention loss",
            f"{loss(run.retention.base)} before, {loss(run.retention.last)} after: perplexity "
            f"{percent(run.retention_rise)} (limit {percent(run.retention_limit)})",
        )
    money_ = f", {money(run.cost)} in your currency" if run.cost is not None else ""
    hours = f", {count(run.gpu_hours, digits=2)} GPU-hours{money_}" if run.gpu_hours is not None else ""
    restarts = f", {run.restarts} restart{'s' if run.restarts != 1 else ''}" if run.restarts else ""
    yield "Took", f"{seconds(run.wall_s)}{hours}{restarts}"
    peaks = [(run.peak_bytes, "of the GPU"), (run.host_peak_bytes, "of the host")]
    said = ", ".join(f"{bytes_(value)} {where}" for value, where in peaks if value is not None)
    yield "Peak memory of rank 0", said or "not measured"
    if run.artifact is not None:
        yield "Result", f"{run.artifact} ({bytes_(run.artifact_bytes)})"


# ---------------------------------------------------------------- curves


def _charts(page: RunPage) -> Iterator[Chart]:
    """Losses over the whole width; learning rate, speed and memory beside each other."""
    marks = [(attempt.from_step, f"attempt {attempt.name}") for attempt in page.attempts if attempt.from_step]
    losses = [
        Line(kind=kind, label=label, points=_points(page.lines, name))
        for kind, label, name in (
            ("train", "training loss", "loss"),
            ("validation", "validation loss", "validation_loss"),
            ("retention", "retention loss", "retention_loss"),
        )
    ]
    rate = Line(kind="rate", label="learning rate", points=_points(page.lines, "learning_rate"))
    speed = Line(kind="memory", label="tokens per second", points=_points(page.lines, "tokens_per_s"))
    device = Line(kind="memory", label="peak of the GPU", points=_points(page.lines, "peak_bytes"))
    host = Line(kind="host", label="host memory of rank 0", points=_points(page.lines, "host_bytes"))
    found = (
        chart("losses", "Loss", losses, lambda value: f"{value:.3g}", whole=True, marks=marks, log=True),
        chart("rate", "Learning rate", [rate], lambda value: f"{value:.3g}", from_zero=True, marks=marks),
        chart("speed", "Tokens per second", [speed], lambda value: f"{value:,.0f}", from_zero=True, marks=marks),
        _memory(device, host, marks),
    )
    yield from (one for one in found if one is not None)


def _memory(device: Line, host: Line, marks: Sequence[tuple[int, str]]) -> Chart | None:
    """Round ticks are round in the unit of the labels."""
    most = max((value for line in (device, host) for _, value in line.points), default=0.0)
    unit = float(GIB if most >= GIB / 4 else MIB)
    return chart("memory", "Memory", [device, host], _axis_bytes, from_zero=True, marks=marks, unit=unit)


def _axis_bytes(value: float) -> str:
    return bytes_(value) if value else "0"


def _points(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Values by step; of a step done twice, after an interruption, the later one."""
    found = {
        line["step"]: float(line[name])
        for line in lines
        if isinstance(line.get("step"), int) and isinstance(line.get(name), int | float)
    }
    return sorted(found.items())


# ---------------------------------------------------------------- tables


def _against(one: Against) -> dict[str, str]:
    said = UNITS[one.unit]
    interval = f" ({said(one.low)} to {said(one.high)})" if one.low is not None and one.low != one.high else ""
    within = one.measured is None or one.low is None or one.high is None or one.low <= one.measured <= one.high
    return {
        "name": one.name,
        "predicted": f"{said(one.predicted)}{interval}",
        "measured": said(one.measured),
        "error": percent(one.error),
        "outside": "" if within else "outside the interval",
    }


def _attempt(one: Attempt) -> dict[str, str]:
    reached = count(one.to_step) if one.to_step is not None else "-"
    return {
        "name": one.name,
        "began": _clock(one.began_s),
        "took": seconds(one.ended_s - one.began_s),
        "where": f"{count(one.ranks)} rank{'s' if one.ranks != 1 else ''} on {', '.join(one.hosts) or '-'}",
        "steps": f"{count(one.from_step)} to {reached}",
        "end": one.end,
    }


_ORIGIN = {
    "base": "Base",
    "base_revision": "Revision",
    "base_fingerprint": "Fingerprint of its weights",
    "base_dtype": "Precision of the base",
    "quantization": "Quantization",
    "chat_template_sha256": "Chat template (sha256)",
    "data_key": "Tokens (key of the cache)",
    "recipe_sha256": "Recipe (sha256)",
    "run_id": "Run",
}


def _origin(lineage: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the adapter says of itself in its own header."""
    for key, name in _ORIGIN.items():
        value = lineage.get(key)
        if isinstance(value, dict):
            value = ", ".join(f"{field} {told}" for field, told in value.items())
        if value is not None:
            yield name, str(value)


def _told(event: dict[str, Any]) -> str:
    """The facts of an event on one line."""
    hidden = ("event", "time_s", "host")
    return ", ".join(f"{key} {value}" for key, value in event.items() if key not in hidden and value not in (None, []))


def _clock(time_s: Any) -> str:
    """Epoch seconds as UTC."""
    if not isinstance(time_s, int | float):
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time_s)) + " UTC"
