"""verdicts: what a rehearsal's run folder says about each stage of the work; nothing is run here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.planning.shrunk import KILL_STEP, STEPS
from launcher.recipe.schema import Recipe
from launcher.runs.explanation import Explanation, explain
from launcher.runs.folder import RunFolder, read_json_lines

STAGES = ("plan", "data", "start", "steps", "evaluation", "save", "kill", "resume", "finish", "export")
OK, FAILED, NOT_EXERCISED = "ok", "failed", "not exercised"
_ERROR_CHARS = 300
_EQUAL = 1e-5
"""Losses of a step that was trained twice may differ by so much, relatively: sums in another order, no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One stage, judged."""

    stage: str
    verdict: Literal["ok", "failed", "not exercised"]
    seconds: float | None
    """From the end of the stage before; None where that is not known."""
    note: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"stage": self.stage, "verdict": self.verdict, "seconds": self.seconds, "note": self.note}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tale:
    """What a run's files tell, as lines in order."""

    run: RunFolder
    recipe: Recipe
    events: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    result: Mapping[str, Any] | None

    @classmethod
    def of(cls, run: RunFolder, recipe: Recipe) -> Tale:
        """Read the ledger, the metrics and the result."""
        result = json.loads(run.result.read_text(encoding="utf-8")) if run.result.exists() else None
        events, metrics = list(read_json_lines(run.attempts)), list(read_json_lines(run.metrics))
        return cls(run=run, recipe=recipe, events=events, metrics=metrics, result=result)

    def named(self, name: str) -> list[dict[str, Any]]:
        """The ledger's lines of one event."""
        return [event for event in self.events if event.get("event") == name]

    @property
    def phase(self) -> str | None:
        """What the first rank that failed was doing."""
        for path in sorted(self.run.errors.glob("*/rank-*.json")):
            phase = json.loads(path.read_text(encoding="utf-8")).get("phase")
            return None if phase is None else str(phase)
        return None

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss) as they were logged, null being NaN; a step trained twice is there twice."""
        lines = (line for line in self.metrics if "loss" in line and "step" in line)
        return [(line["step"], math.nan if line["loss"] is None else line["loss"]) for line in lines]


_AFTER_START = ("training", "evaluating", "saving", "finishing")
"""Phases of a rank that has its model; see runs/pulse.py."""
Judged = tuple[str, float | None] | None
"""A note and the time at which the stage was over (epoch seconds); None while nothing shows that it went well."""


class StageFailedError(Exception):
    """The run went on, but this stage did not do what it should."""


def _start(tale: Tale) -> Judged:
    joined = tale.named("joined")
    at_work = any("step" in line for line in tale.metrics) or tale.phase in _AFTER_START
    if not joined or not at_work:
        return None
    ranks = tale.named("started")[0].get("world_size")
    return f"{_many(ranks, 'rank')} met and built the model", joined[0]["time_s"]


def _steps(tale: Tale) -> Judged:
    losses, last_step = tale.losses, KILL_STEP - 1
    bad = [step for step, loss in losses if not math.isfinite(loss)]
    if bad:
        raise StageFailedError(f"the loss of step {bad[0]} is not finite")
    last = next((loss for step, loss in losses if step == last_step), None)
    if last is None:
        return None
    trend = "falls" if last < losses[0][1] else "does not fall in so few steps"
    return f"loss {losses[0][1]:.4f} -> {last:.4f} over {last_step} steps ({trend})", None


def _evaluation(tale: Tale) -> Judged:
    found = [line for line in tale.metrics if "validation_loss" in line]
    if not found:
        return None
    bad = [line["step"] for line in found if line["validation_loss"] is None]
    if bad:
        raise StageFailedError(f"the validation loss of step {bad[0]} is not finite")
    loss = found[-1]["validation_loss"]
    return f"validation loss {found[0]['validation_loss']:.4f} -> {loss:.4f}", None


def _save(tale: Tale) -> Judged:
    saved, failed = tale.named("saved"), tale.named("save_failed")
    if failed:
        raise StageFailedError(f"no checkpoint of step {failed[0].get('step')}: {failed[0].get('error')}")
    if not saved:
        return None
    one = saved[0]
    return f"checkpoint of step {one['step']}, {one['bytes'] / 1e6:.0f} MB in {one['seconds']:.1f} s", one["time_s"]


def _kill(tale: Tale) -> Judged:
    died, decided = tale.named("died"), tale.named("decided")
    if not died or not decided:
        return None
    again = decided[0].get("action") in ("requeue", "wait", "follow_up")
    if not again:
        raise StageFailedError(f"the job was not started again: {decided[0].get('reason')}")
    rank = next((line.get("rank") for line in died if line.get("signal")), died[0].get("rank"))
    return f"rank {rank} was killed at step {KILL_STEP}; noticed and started again", decided[0]["time_s"]


def _resume(tale: Tale) -> Judged:
    resumed, decided = tale.named("resumed"), tale.named("decided")
    if not decided:
        return None
    newest = decided[0].get("step")
    if not resumed:
        if tale.losses and len(tale.named("joined")) > 1 and tale.losses[-1][0] == 1:
            raise StageFailedError(f"the second start began at step 1, with a checkpoint of step {newest} there")
        return None
    begun = resumed[0]["step"]
    if begun != newest:
        raise StageFailedError(
            f"the second start went on after step {begun}, not after the checkpoint of step {newest}"
        )
    twice = _trained_twice(tale.losses)
    if STEPS not in dict(tale.losses):
        return None
    worst = max((abs(a - b) / max(abs(a), 1e-12) for a, b in twice.values()), default=0.0)
    if worst > _EQUAL:
        step = max(twice, key=lambda each: abs(twice[each][0] - twice[each][1]))
        first, second = twice[step]
        raise StageFailedError(f"step {step} had loss {first:.6f} before the kill and {second:.6f} after it")
    steps = _list(sorted(twice))
    return f"went on after step {begun}; {steps} trained again with the same loss", resumed[0]["time_s"]


def _trained_twice(losses: list[tuple[int, float]]) -> dict[int, tuple[float, float]]:
    """Step -> its first and last loss, of steps that were logged more than once."""
    found: dict[int, list[float]] = {}
    for step, loss in losses:
        found.setdefault(step, []).append(loss)
    return {step: (each[0], each[-1]) for step, each in found.items() if len(each) > 1}


def _list(steps: list[int]) -> str:
    return f"{'step' if len(steps) == 1 else 'steps'} {', '.join(map(str, steps))}" if steps else "no step"


def _finish(tale: Tale) -> Judged:
    reached = any(step == STEPS for step, _ in tale.losses)
    return (f"all {STEPS} steps are done", None) if reached else None


def _export(tale: Tale) -> Judged:
    if tale.result is None:
        return None
    artifact = tale.result.get("artifact", {})
    kind = "model" if tale.recipe.method == "full" else "adapter, loaded again by PEFT"
    tensors = artifact.get("tensors")
    counted = f"{tensors} tensors, " if isinstance(tensors, int) else ""
    return f"{kind}: {counted}its loss is the trained model's", tale.result.get("finished_time_s")


_JUDGES: dict[str, Callable[[Tale], Judged]] = {
    "start": _start,
    "steps": _steps,
    "evaluation": _evaluation,
    "save": _save,
    "kill": _kill,
    "resume": _resume,
    "finish": _finish,
    "export": _export,
}


def judge(tale: Tale, *, began_s: float, ended: bool) -> list[Verdict]:
    """Verdicts of the stages inside the job, as far as they are known; all of them once it has ended.

    `began_s`: epoch seconds at which it was submitted. After a stage that failed nothing is judged.
    """
    verdicts: list[Verdict] = []
    since_s = began_s
    for stage, look in _JUDGES.items():
        if stage == "evaluation" and _nothing_held_out(tale.recipe):
            verdicts.append(_not_exercised(stage, "the recipe holds nothing out (data.validation)"))
            continue
        try:
            found = look(tale)
        except StageFailedError as error:
            return [*verdicts, *_from(stage, str(error))]
        if found is None:
            return [*verdicts, *_from(stage, _why(tale))] if ended else verdicts
        note, at_s = found
        seconds = None if at_s is None else round(max(0.0, at_s - since_s), 1)
        since_s = at_s or since_s
        verdicts.append(Verdict(stage=stage, verdict="ok", seconds=seconds, note=note))
    return verdicts


def _nothing_held_out(recipe: Recipe) -> bool:
    held = recipe.data.validation
    return held.share is None and held.count is None and held.source is None


def _from(stage: str, why: str) -> list[Verdict]:
    """This stage failed, and those after it were never reached."""
    later = STAGES[STAGES.index(stage) + 1 :]
    failed = Verdict(stage=stage, verdict="failed", seconds=None, note=why)
    return [failed, *(_not_exercised(each, f"{stage} failed") for each in later)]


def fail(stage: str, why: str) -> list[Verdict]:
    """`stage` failed, and those after it were never reached."""
    return _from(stage, why)


def _not_exercised(stage: str, why: str) -> Verdict:
    return Verdict(stage=stage, verdict="not exercised", seconds=None, note=why)


def _why(tale: Tale) -> str:
    """What `launcher why` says of the run: sentence, evidence, command."""
    found = explain(tale.run)
    parts = [found.sentence, _evidence(tale, found), _command(tale.run, found)]
    return "; ".join(part for part in parts if part)


def _evidence(tale: Tale, found: Explanation) -> str | None:
    """The line that shows it; of an error of several lines the others too, which may name the field."""
    told = [" ".join(str(line.get("error")).split())[:_ERROR_CHARS] for line in tale.named("failed")]
    whole = next((error for error in told if found.evidence and error.startswith(found.evidence)), None)
    return whole or found.evidence


def _command(run: RunFolder, found: Explanation) -> str | None:
    """The command that helps, with the folder in place of a name that `--runs` would not find."""
    if not found.command:
        return None
    command = found.command
    if command.startswith("launcher ") and f" {run.run_id}" in command:
        command = f"launcher logs {run.path}" if "resume" in command else command.replace(run.run_id, str(run.path))
    return f"try: {command}"


def _many(count: object, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def exit_code(run: RunFolder) -> int:
    """8, or the class's code where the run failed for the recipe, the data or the model."""
    codes = [line.get("exit_code") for line in read_json_lines(run.attempts) if line.get("event") == "failed"]
    return next((code for code in codes if code in (2, 3, 4)), 8)
