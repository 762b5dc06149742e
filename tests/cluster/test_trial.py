"""`launcher trial` on a real Slurm: a rung is one array, the next is sent by itself, and a requeue changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.folder import RunFolder, read_json_lines
from launcher.runs.trial_table import _QUALITY
from tests.cluster.bed import Bed, slurm

CANDIDATES = ("low: train.learning_rate=1e-4", "high: train.learning_rate=1e-2", "wide: lora.r=16")
SLOW = "at=step,rank=0,do=sleep:1.0,always"
LIMIT_S = 1200.0
"""For eight tiny jobs, most of whose time is imports on two busy cores."""


class Trials:
    """Trials of three candidates and two rungs, as the job user types them."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.names: list[str] = []

    def start(self, name: str, *words: str, **environ: str) -> dict[str, Any]:
        """`launcher trial`, which returns when the first array is sent."""
        recipe = self.bed.recipe(
            name, train={"max_steps": 8, "eval_steps": 8}, checkpoint={"save_minutes": None, "save_steps": 2}
        )
        named = [word for line in CANDIDATES for word in ("--candidate", line)]
        answer = self.bed.launcher("trial", recipe, *named, "--rungs", "1/2,1", "--json", *words, **environ).expect()
        document: dict[str, Any] = json.loads(answer.out)
        self.names.append(document["trial"])
        return document

    def look(self, trial: str) -> dict[str, Any]:
        """The table now; nothing is sent or written."""
        document: dict[str, Any] = json.loads(self.bed.launcher("trial", trial, "--dry-run", "--json").expect().out)
        return document

    def finished(self, trial: str) -> dict[str, dict[str, Any]]:
        """Wait for the end, which comes without anybody's doing; the quality columns by candidate."""
        self.bed.until(lambda: self.look(trial)["state"] == "finished", f"the end of {trial}", limit_s=LIMIT_S)
        rows = self.look(trial)["rows"]
        return {row["candidate"]: {name: row[name] for name in _QUALITY} for row in rows}

    def folder(self, trial: str) -> RunFolder:
        return RunFolder(self.bed.home / "runs" / ".trials" / trial)

    def runs(self, trial: str) -> dict[str, RunFolder]:
        """The run of each candidate."""
        lines = [line for line in read_json_lines(self.folder(trial).attempts) if line["event"] == "run"]
        return {line["candidate"]: RunFolder(self.bed.home / "runs" / line["run"]) for line in lines}

    def arrays(self, trial: str) -> list[Path]:
        return sorted((self.folder(trial).path / "arrays").iterdir())


@pytest.fixture
def trials(bed: Bed) -> Iterator[Trials]:
    """Trials whose jobs are cancelled at the end."""
    found = Trials(bed)
    yield found
    for name in found.names:
        slurm("scancel", f"--name={','.join([f'{name}-next', *(path.name for path in found.arrays(name))])}")


def events(run: RunFolder, name: str) -> list[dict[str, Any]]:
    return [line for line in read_json_lines(run.attempts) if line["event"] == name]


def test_an_array_per_rung_and_a_requeue_changes_nothing(bed: Bed, trials: Trials) -> None:
    """Three candidates as one array, two of them as the next; a task put back in the middle leaves the same table."""
    undisturbed = trials.start("calm")["trial"]
    expected = trials.finished(undisturbed)
    assert sorted((row["status"], row["steps"]) for row in expected.values()) == [
        ("finished", 8),
        ("finished", 8),
        ("stopped", 4),
    ]
    first, second = trials.arrays(undisturbed)
    jobs = [events(RunFolder(path), "submitted")[0]["job_id"] for path in (first, second)]
    ended = sorted([f"{jobs[0]}_{n}|COMPLETED" for n in range(3)] + [f"{jobs[1]}_{n}|COMPLETED" for n in range(2)])
    ask = ("sacct", "-X", "-n", "-P", "--format=JobID,State", f"--jobs={','.join(jobs)}")
    bed.until(lambda: sorted(slurm(*ask).split()) == ended, "accounting sees five tasks end", limit_s=120)

    disturbed = trials.start("rough", "--parallel", "2", LAUNCHER_FAULT=SLOW)["trial"]
    run = trials.runs(disturbed)["high"]
    bed.until(lambda: any(line.get("step") == 1 for line in read_json_lines(run.metrics)), "step 1", run, limit_s=400)
    slurm("scontrol", "requeue", events(run, "submitted")[0]["job_id"])
    assert trials.finished(disturbed) == expected
    assert len(events(run, "started")) >= 2
    assert "operator_requeue" in [line["cause"] for line in events(run, "decided")]


def test_a_task_that_a_person_ended_waits_for_a_person(bed: Bed, trials: Trials) -> None:
    """The job after the array says which run it misses; typing the trial's name sends that run alone, and it ends."""
    trial = trials.start("ended", LAUNCHER_FAULT=SLOW)["trial"]
    run = trials.runs(trial)["wide"]
    bed.until(lambda: any(line.get("step") == 1 for line in read_json_lines(run.metrics)), "step 1", run, limit_s=400)
    bed.launcher("cancel", run.run_id).expect()
    logs = trials.folder(trial).logs
    said = lambda: "".join(path.read_text() for path in logs.glob("next-*.out"))  # noqa: E731
    bed.until(lambda: f"go on with: launcher trial {trial}" in said(), "the word of the job after it", run, limit_s=600)
    assert run.run_id in said()
    bed.launcher("trial", trial).expect()
    links = [path.resolve() for path in trials.arrays(trial)[1].glob("[0-9]*")]
    assert links == [run.path]
    assert len(trials.finished(trial)) == 3
