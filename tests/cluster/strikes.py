"""Interruptions of a trial, drawn from a seed: what strikes, when, and whom."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.runs.folder import RunFolder, read_json_lines
from launcher.runs.state import read_evidence
from tests.cluster.bed import Bed, dev_cluster, slurm


@dataclass(frozen=True, kw_only=True)
class Strike:
    """One interruption."""

    kind: str
    """A key of KINDS."""
    after: int
    """How many steps the runs have trained by then, the furthest of each, summed."""
    luck: float
    """Whom it hits of the runs that are at work then: 0 = the first, 1 = the last."""


def draw(seed: int, *, steps: int, extra: int) -> list[Strike]:
    """Every kind once and `extra` more, in a random order, at different moments before `steps` have been trained."""
    chance = random.Random(seed)
    kinds = [*KINDS, *chance.choices(list(KINDS), k=extra)]
    chance.shuffle(kinds)
    moments = sorted(chance.sample(range(1, steps), len(kinds)))
    return [Strike(kind=kind, after=after, luck=chance.random()) for kind, after in zip(kinds, moments, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The trial that is struck, and the run that was drawn."""

    bed: Bed
    trial: str
    run: RunFolder
    pid: int
    """Of its rank."""

    @property
    def task(self) -> str:
        """ARRAY_TASK, or the follow-up job, as Slurm's commands take it."""
        return str(read_evidence(self.run).slurm_id)


def trained(run: RunFolder) -> int:
    """The furthest step that a run has logged."""
    return max((line["step"] for line in read_json_lines(run.metrics) if "loss" in line), default=0)


def rank_of(run: RunFolder) -> int | None:
    """Process number of the run's rank, by the newest attempt of its ledger; None where it is not at work."""
    started = [line["attempt"] for line in read_json_lines(run.attempts) if line["event"] == "started"]
    note = run.faults / started[-1] / "rank-0.json" if started else Path("/nonexistent")
    with contextlib.suppress(OSError, ValueError):
        pid = int(json.loads(note.read_text())["pid"])
        if b"launcher.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def at_work(runs: Mapping[str, RunFolder], *, steps: int) -> list[tuple[RunFolder, int]]:
    """Runs whose rank lives and that have two steps or more before them, with its process number.

    One that is about to pause, or to end, leaves before many a strike has reached it: that would prove nothing.
    """
    far = [run for run in runs.values() if trained(run) + 2 <= _leaves_at(run, steps)]
    return [(run, pid) for run in far if (pid := rank_of(run)) is not None]


def _leaves_at(run: RunFolder, steps: int) -> int:
    """The step after which the run pauses, or the last."""
    try:
        return int(json.loads(run.pause.read_text())["after_step"])
    except (OSError, ValueError):
        return steps


# ---------------------------------------------------------------- the kinds


def _requeue(target: Target) -> str:
    return slurm("scontrol", "requeue", target.task)


def _kill(target: Target) -> str:
    with contextlib.suppress(ProcessLookupError):
        os.kill(target.pid, signal.SIGKILL)
    return f"process {target.pid}"


def _term(target: Target) -> str:
    """Somebody tells the ranks to stop: they save and leave, and the trial waits for a person."""
    return slurm("scancel", "--signal=TERM", target.task)


def _next(target: Target) -> str:
    """Nothing waits for the array any more, until somebody types the trial's name."""
    return slurm("scancel", f"--name={target.trial}-next")


def _slurmd(target: Target) -> str:
    """The daemon of the run's node dies and comes back; what ran there lives on."""
    node = slurm("squeue", "--noheader", f"--jobs={target.task}", "--format=%N").strip()
    if not node.startswith("node"):
        return f"{target.task} had left"
    target.bed.until(lambda: _killed(node), f"slurmd of {node}, which an earlier strike may have let start just now")
    dev_cluster("boot", node)
    return node


def _killed(node: str) -> bool:
    try:
        dev_cluster("kill-slurmd", node)
    except RuntimeError as error:
        if "is not running" not in str(error):
            raise
        return False
    return True


def _controller(target: Target) -> str:
    """Slurm does not answer for as long as the run takes for a step, or to leave."""
    before = trained(target.run)
    dev_cluster("stop-controller")
    try:
        target.bed.until(lambda: trained(target.run) > before or rank_of(target.run) is None, "a step without it")
    finally:
        dev_cluster("start-controller")
    return "stopped and started"


KINDS: dict[str, Callable[[Target], str]] = {
    "requeue": _requeue,
    "kill": _kill,
    "term": _term,
    "next": _next,
    "slurmd": _slurmd,
    "controller": _controller,
}
