"""Runs that are interrupted and come back by themselves, in every way that this Slurm allows, and never twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.folder import RunFolder, read_json_lines
from tests.cluster.bed import Bed, slurm

STEPS = 40
SLOW = "at=step,rank=0,do=sleep:0.4,always"
"""Long enough to be interrupted: 16 s of training."""
TRAIN = {"max_steps": STEPS, "eval_steps": STEPS}
RANKS = {"nodes": 2, "gpus_per_node": 1}


def submit(bed: Bed, name: str, *overrides: str, fault: str = SLOW, **slurm_section: Any) -> RunFolder:
    """A slow run of two ranks on two nodes."""
    section = {"cpus_per_task": 1, "time": 20, "mem": "4G", **RANKS, **slurm_section}
    recipe = bed.recipe(name, train=TRAIN, slurm=section, checkpoint={"save_minutes": None, "save_steps": 5})
    answer = bed.launcher("submit", recipe, *overrides, "--json", LAUNCHER_FAULT=fault).expect()
    return RunFolder(Path(json.loads(answer.out)["path"]))


def job_id(run: RunFolder) -> str:
    return str(json.loads(run.job.read_text())["job_id"])


def lines(run: RunFolder, name: str) -> list[dict[str, Any]]:
    """Events of that name in the ledger."""
    return [line for line in read_json_lines(run.attempts) if line["event"] == name]


def decided(run: RunFolder) -> list[tuple[str, str]]:
    """Cause and action of every decision, in order."""
    return [(line["cause"], line["action"]) for line in lines(run, "decided")]


def trained(run: RunFolder) -> list[int]:
    """Steps in the order in which they were trained."""
    return [line["step"] for line in read_json_lines(run.metrics) if "loss" in line]


def reaches(bed: Bed, run: RunFolder, step: int) -> None:
    """Wait until a step has been trained."""
    bed.until(lambda: trained(run)[-1:] >= [step], f"step {step}", run, limit_s=400)


def assert_finished_once(bed: Bed, run: RunFolder, *, again: int = 0) -> None:
    """One result, and one decision per attempt; `again`: how many steps may have been trained twice."""
    assert bed.finished(run)["step"] == STEPS
    attempts = [line["attempt"] for line in lines(run, "started")]
    bed.until(lambda: len(lines(run, "decided")) == len(attempts), "the last decision", run)
    assert [line["attempt"] for line in lines(run, "decided")] == attempts
    assert sorted(set(trained(run))) == list(range(1, STEPS + 1))
    assert len(trained(run)) <= STEPS + again
    assert len(lines(run, "completed")) == 1


@pytest.fixture
def urgent(bed: Bed) -> Iterator[list[str]]:
    """Jobs that push others aside; cancelled at the end."""
    jobs: list[str] = []
    yield jobs
    for job in jobs:
        slurm("scancel", job)


def test_preempted_with_enough_grace(bed: Bed, urgent: list[str]) -> None:
    """The ranks save and leave, the job stays until Slurm takes it, comes back by Slurm's requeue, loses no step."""
    run = submit(bed, "preempted", qos="preemptible")
    reaches(bed, run, 6)
    words = ("sbatch", "--parsable", "--qos=urgent", "--nodes=4", "--exclusive", "--time=1", "--output=/dev/null")
    urgent.append(bed.as_user([*words, "--wrap=sleep 2"]).expect().out.strip())
    assert_finished_once(bed, run)
    assert decided(run) == [("preempted", "wait"), ("finished", "finish")]
    [stopped] = lines(run, "stopped")
    assert lines(run, "resumed")[0]["step"] == stopped["step"]
    states = slurm("sacct", "--duplicates", "-X", "-n", "-P", "--format=State", f"--jobs={job_id(run)}").split()
    assert states[0] in ("PREEMPTED", "REQUEUED")


def test_an_operator_requeues_then_a_rank_dies_where_requeue_is_disabled(bed: Bed) -> None:
    """The first interruption is an operator's; after the second Slurm refuses the requeue: a follow-up job finishes."""
    run = submit(bed, "requeued")
    reaches(bed, run, 6)
    slurm("scontrol", "requeue", job_id(run))
    bed.until(lambda: len(lines(run, "started")) == 2, "the second start", run, limit_s=300)
    first = job_id(run)
    slurm("scontrol", "update", f"jobid={first}", "requeue=0")
    reaches(bed, run, 16)
    slurm("pkill", "-KILL", "--full", rf"launcher\.worker\.main .*{run.run_id}")
    assert_finished_once(bed, run, again=10)
    assert [cause for cause, _ in decided(run)] == ["operator_requeue", "rank_killed", "finished"]
    assert [action for _, action in decided(run)] == ["wait", "follow_up", "finish"]
    assert "requeue" in lines(run, "decided")[1]["reason"]
    assert len(lines(run, "submitted")) == 2
    assert job_id(run) != first
    assert len({line["attempt"] for line in lines(run, "started")}) == 3


def test_the_time_limit_comes_before_the_end(bed: Bed) -> None:
    """Warned ahead of its limit the job saves, goes back to the queue and finishes in further starts without a loss."""
    run = submit(bed, "limited", fault="at=step,rank=0,do=sleep:3,always", time=2)
    assert_finished_once(bed, run)
    assert "TIMEOUT" not in slurm("sacct", "--duplicates", "-X", "-n", "-P", "--format=State", f"--jobs={job_id(run)}")
    causes = [cause for cause, _ in decided(run)]
    assert causes == ["time_limit"] * (len(causes) - 1) + ["finished"]
    assert len(causes) >= 2


def test_cancelled_while_it_saves(bed: Bed) -> None:
    """A cancel is no preemption, although the ranks get the same signal: nothing of the run comes back."""
    run = submit(bed, "cancelled")
    reaches(bed, run, 3)
    slurm("scancel", job_id(run))
    assert bed.wait(run).code == 8
    bed.until(lambda: job_id(run) not in bed.queue(), "the job leaves the queue", run)
    assert bed.status(run)["state"] == "CANCELLED"
    assert len(lines(run, "submitted")) == len(lines(run, "started")) == 1
    assert decided(run) in ([], [("cancelled", "stop")])
