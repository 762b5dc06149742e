"""trial_progress: where a trial is now, in one line, and the states of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from launcher.runs.state import read_evidence
from launcher.runs.status import RunStatus, statuses
from launcher.runs.trial_folder import Task, Trial
from launcher.runs.trial_scores import PAUSED
from launcher.runs.trial_standing import Standing, stand

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A trial now. Of the runs of its rung: how many have reached it, and what the others do."""

    trial: Trial
    state: str
    """running | cancelled | finished."""
    rung: int
    """From 1."""
    done: int
    running: int
    pending: int
    """In the queue, or not sent yet."""
    ended: int
    """Left before the rung: it comes back by itself, or a person is waited for."""
    candidates: dict[str, str]
    """Candidate -> running | finished | stopped | failed."""
    runs: tuple[RunStatus, ...]

    @property
    def sentence(self) -> str:
        """One line."""
        told = list(self.candidates.values())
        out = [f"{told.count(word)} {word}" for word in ("finished", "stopped", "failed") if word in told]
        if self.state == "finished":
            return f"trial {self.trial.name}: finished; of {len(told)} candidates {', '.join(out)}"
        counted = {"done": self.done, "running": self.running, "pending": self.pending, "ended before it": self.ended}
        count = ", ".join(f"{number} {word}" for word, number in counted.items() if number or word == "done")
        where = f"rung {self.rung} of {len(self.trial.shares)} ({_share(self.trial.shares[self.rung - 1])})"
        was = "cancelled in " if self.state == "cancelled" else ""
        left = f"; of {len(told)} candidates {', '.join(out)}" if out else ""
        return f"trial {self.trial.name}: {was}{where}: {count}{left}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "schema": SCHEMA,
            "trial": self.trial.name,
            "path": str(self.trial.path),
            "state": self.state,
            "rung": self.rung,
            "rungs": [str(share) for share in self.trial.shares],
            "tasks": {"done": self.done, "running": self.running, "pending": self.pending, "ended": self.ended},
            "candidates": self.candidates,
            "runs": [run.to_json() for run in self.runs],
        }


def _share(share: Fraction) -> str:
    return "to the end" if share == 1 else f"to {share} of the steps"


def progress(trial: Trial) -> Progress:
    """Where the trial is, from its files first and Slurm second; one question to Slurm for all runs."""
    standing = stand(trial)
    runs = statuses(trial.made())
    alive = [name for name, ended in standing.candidates.items() if ended.status == "running"]
    words = [_doing(trial, task, runs) for task in standing.todo]
    return Progress(
        trial=trial,
        state=_state(trial, standing),
        rung=min(standing.rung + 1, len(trial.shares)),
        done=len(trial.tasks(alive)) - len(standing.todo),
        running=words.count("running"),
        pending=words.count("pending"),
        ended=words.count("ended"),
        candidates={name: ended.status for name, ended in standing.candidates.items()},
        runs=tuple(runs),
    )


def _state(trial: Trial, standing: Standing) -> str:
    if standing.finished:
        return "finished"
    return "cancelled" if trial.cancelled else "running"


def _doing(trial: Trial, task: Task, runs: Sequence[RunStatus]) -> str:
    """What a task does that has not reached its rung; one that paused at an earlier rung waits for the next array."""
    run = trial.run_of(task)
    status = next((one for one in runs if run is not None and one.run == run.run_id), None)
    if run is None or status is None or status.state in ("NOT_SUBMITTED", "PENDING"):
        return "pending"
    if not status.ended:
        return "running"
    paused = (read_evidence(run).last("stopped") or {}).get("reason") == PAUSED
    return "pending" if paused else "ended"
