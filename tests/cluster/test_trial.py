"""`launcher trial` on a real Slurm: a rung is one array, the next is sent by itself, and a requeue changes nothing."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.folder import RunFolder, read_json_lines
from launcher.runs.trial_table import _QUALITY
from tests.cluster.bed import Bed, dev_cluster, slurm
from tests.cluster.strikes import KINDS, Target, at_work, draw, trained

CANDIDATES = ("low: train.learning_rate=1e-4", "high: train.learning_rate=1e-2", "wide: lora.r=16")
SLOW = "at=step,rank=0,do=sleep:1.0,always"
STEPS = 8
STEPS_OF_ALL = 3 * STEPS // 2 + 2 * STEPS // 2
"""What three candidates train, of which one stops in the middle."""
SEED_NAME = "LAUNCHER_TEST_SEED"
SEED = int(os.environ.get(SEED_NAME, "6"))
NODES = [f"node{number}" for number in range(1, 5)]
SLOWER = SLOW.replace("1.0", "2.0")
"""For what strikes between two steps, where the queue is asked first."""
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
            name, train={"max_steps": STEPS, "eval_steps": STEPS}, checkpoint={"save_minutes": None, "save_steps": 2}
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

    def jobs(self, trial: str) -> list[str]:
        """What the queue holds of it: tasks, follow-up jobs, and the job that sends the next rung."""
        runs = [run.run_id for run in self.runs(trial).values()]
        names = [f"{trial}-next", *(path.name for path in self.arrays(trial)), *runs]
        return slurm("squeue", "--noheader", "--format=%i", f"--name={','.join(names)}").split()

    def go_on(self, trial: str) -> None:
        """`launcher trial TRIAL`, as somebody types it who sees that nothing happens; again where it says so."""
        words = ("trial", trial)
        asked = lambda: self.bed.launcher(*words, LAUNCHER_FAULT=SLOWER)  # noqa: E731
        self.bed.until(lambda: (said := asked()).code not in (7, 75) and said.expect(), f"{trial} is taken on")

    def until(self, trial: str, happened: Callable[[], Any]) -> None:
        """Wait; where the trial waits for a person, be one."""

        def looked() -> Any:
            seen = happened() or self.ended(trial)
            if not seen and not self.jobs(trial):
                self.go_on(trial)
            return seen

        self.bed.until(looked, f"what {trial} is waited for", limit_s=LIMIT_S)

    def ended(self, trial: str) -> bool:
        """Whether its stored table says so."""
        return bool(json.loads((self.folder(trial).path / "table.json").read_text())["state"] == "finished")

    def end(self, trial: str) -> None:
        """`launcher cancel TRIAL`, after which nothing of it is in the queue."""
        self.bed.launcher("cancel", trial).expect()
        self.bed.until(lambda: not self.jobs(trial), f"the end of all jobs of {trial}")


@pytest.fixture(scope="module")
def trials(bed: Bed) -> Iterator[Trials]:
    """Trials whose jobs are cancelled at the end, on a cluster that is whole again after each test."""
    found = Trials(bed)
    yield found
    for name in found.names:
        found.end(name)


@pytest.fixture(scope="module")
def calm(trials: Trials) -> tuple[str, dict[str, dict[str, Any]]]:
    """A trial that nothing interrupted: its name, and the quality columns of its table."""
    trial = trials.start("calm")["trial"]
    return trial, trials.finished(trial)


@pytest.fixture
def whole_cluster(bed: Bed) -> Iterator[None]:
    """Controller and nodes are there again afterwards, whatever a test has taken away."""
    yield
    dev_cluster("start-controller")
    for node in NODES:
        dev_cluster("boot", node)
    bed.until(lambda: slurm("sinfo", "-h", "-t", "idle,mix,alloc", "-o", "%D").strip() == "4", "four nodes")


def events(run: RunFolder, name: str) -> list[dict[str, Any]]:
    return [line for line in read_json_lines(run.attempts) if line["event"] == name]


def test_an_array_per_rung_and_a_requeue_changes_nothing(
    bed: Bed, trials: Trials, calm: tuple[str, dict[str, dict[str, Any]]]
) -> None:
    """Three candidates as one array, two of them as the next; a task put back in the middle leaves the same table."""
    undisturbed, expected = calm
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


def test_a_whole_trial_is_cancelled_and_goes_on(
    bed: Bed, trials: Trials, calm: tuple[str, dict[str, dict[str, Any]]]
) -> None:
    """All tasks and the job after them leave the queue; the trial's name, typed at once, takes it to the same table."""
    trial = trials.start("halted", "--parallel", "2", LAUNCHER_FAULT=SLOW)["trial"]
    run = trials.runs(trial)["low"]
    bed.until(lambda: any(line.get("step") == 1 for line in read_json_lines(run.metrics)), "step 1", run, limit_s=400)
    told = bed.launcher("cancel", trial).expect().out
    assert f"cancelled trial {trial}: 4 jobs" in told  # two tasks that run, one that waits, and the job after all
    bed.launcher("trial", trial).expect()
    assert trials.finished(trial) == calm[1]


# ---------------------------------------------------------------- interrupted at random


@pytest.mark.timeout(2 * LIMIT_S)
def test_interruptions_at_random_leave_the_same_table(
    bed: Bed, trials: Trials, calm: tuple[str, dict[str, dict[str, Any]]], whole_cluster: None
) -> None:
    """Requeues, deaths, signals, a lost daemon, a lost controller, a lost job, whenever: the same, bit for bit."""
    drawn, near = draw(SEED, steps=STEPS_OF_ALL - 6, extra=2), functools.partial(at_work, steps=STEPS)
    print(f"{SEED_NAME}={SEED}")
    trial = trials.start("struck", LAUNCHER_FAULT=SLOWER)["trial"]
    runs = trials.runs(trial)
    for strike in drawn:
        trials.until(trial, lambda now=strike.after: sum(map(trained, runs.values())) >= now and near(runs))
        found = near(runs) or pytest.fail(f"nobody is at work when {strike} comes")
        run, pid = found[round(strike.luck * (len(found) - 1))]
        answer = KINDS[strike.kind](Target(bed=bed, trial=trial, run=run, pid=pid))
        print(f"{strike} hit {run.run_id} at step {trained(run)}: {answer.strip()}")
        if strike.kind == "next":
            trials.go_on(trial)
    trials.until(trial, lambda: trials.ended(trial))
    assert trials.finished(trial) == calm[1]
    for run in runs.values():
        print(
            run.run_id,
            [(line["event"], line.get("attempt"), line.get("step")) for line in read_json_lines(run.attempts)],
        )
    undisturbed = len(runs) + 2
    assert sum(len(events(run, "started")) for run in runs.values()) > undisturbed, (
        "the rank that was killed was not started again"
    )
