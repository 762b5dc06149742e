"""What the files of a run say happened: its attempts, the steps each of them trained, and how one led to the next."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from launcher.runs.folder import RunFolder, read_json_lines


@dataclass(kw_only=True)
class Attempt:
    """One start of the run's ranks."""

    name: str
    started_s: float
    resumed_step: int = 0
    """Step of the checkpoint it began with; 0 without one."""
    steps: list[tuple[int, float]] = field(default_factory=list)
    """Every logged training step, with the time it was logged."""
    decision: dict[str, Any] = field(default_factory=dict)
    """The ledger's one line on what ended it and what was done."""

    @property
    def last_step(self) -> int:
        """The newest step it is known to have trained, or where it began."""
        return max((step for step, _ in self.steps), default=self.resumed_step)

    @property
    def cause(self) -> str:
        """What ended it, in the launcher's words."""
        return str(self.decision.get("cause", "none recorded"))


def story(run: RunFolder) -> list[Attempt]:
    """The run's attempts in the order in which they started."""
    attempts: dict[str, Attempt] = {}
    for event in read_json_lines(run.attempts):
        name = str(event.get("attempt"))
        if event["event"] == "started" and name not in attempts:
            attempts[name] = Attempt(name=name, started_s=event["time_s"])
        elif event["event"] == "resumed":
            attempts[name].resumed_step = event["step"]
        elif event["event"] == "decided" and name in attempts:
            attempts[name].decision = event
    told = list(attempts.values())
    for line in read_json_lines(run.metrics):
        if "loss" in line:
            # Only the newest attempt may write, so a line belongs to the last one that had started.
            writer = [attempt for attempt in told if attempt.started_s <= line["time_s"]][-1]
            writer.steps.append((line["step"], line["time_s"]))
    return told


def lost_steps(run: RunFolder) -> list[int]:
    """For each interruption, how many steps were trained a second time."""
    return [max(0, before.last_step - after.resumed_step) for before, after in itertools.pairwise(story(run))]


def seconds_to_resume(run: RunFolder) -> list[float]:
    """For each interruption, the time from the last sign of training before it to the first step after it."""
    return [
        after.steps[0][1] - (before.steps[-1][1] if before.steps else before.started_s)
        for before, after in itertools.pairwise(story(run))
        if after.steps
    ]


def sequence(run: RunFolder) -> dict[int, tuple[float, float, int]]:
    """Step -> loss, learning rate, fingerprint of the rows; of a step trained twice the later one."""
    return {
        line["step"]: (line["loss"], line["learning_rate"], line["samples"])
        for line in read_json_lines(run.metrics)
        if "loss" in line
    }


def events(run: RunFolder, name: str) -> list[dict[str, Any]]:
    """The ledger's lines of one kind."""
    return [event for event in read_json_lines(run.attempts) if event["event"] == name]


def marks(run: RunFolder) -> list[dict[str, Any]]:
    """Injected faults that happened, in the order of their clauses."""
    return [line for file in sorted(run.faults.glob("*.json")) for line in read_json_lines(file)]
