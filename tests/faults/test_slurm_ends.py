"""What Slurm and its operators do to a job: rows 1 to 6 and 24 to 30 of the fault matrix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.runs.folder import RunFolder
from tests.cluster.bed import give_to_job_user, slurm
from tests.faults.bed import SAVE_STEPS, SLOW, FaultBed
from tests.faults.conftest import Reference
from tests.faults.gauntlet import check_survival
from tests.faults.invariants import assert_equal_sequence, assert_no_orphans, assert_one_artifact
from tests.faults.report import Row
from tests.faults.story import events, story

VICTIM = {"nodes": 2, "gpus_per_node": 1, "qos": "preemptible"}
FINISHED = "finished"
PROFILE = Path(__file__).resolve().parents[2] / "slurm" / "dev-cluster.yaml"


@pytest.fixture(autouse=True)
def slurm_row(row: Row) -> None:
    """Every row of this module is about Slurm."""
    row.where = "slurm"


@pytest.fixture
def urgent(slurm_bed: FaultBed) -> Iterator[list[str]]:
    """Jobs that push others aside; cancelled at the end."""
    jobs: list[str] = []
    yield jobs
    for job in jobs:
        slurm("scancel", job)


def job_id(run: RunFolder) -> str:
    """The run's newest job."""
    return str(json.loads(run.job.read_text())["job_id"])


def push_aside(bed: FaultBed, jobs: list[str]) -> None:
    """Start a job of higher priority that wants every node."""
    words = ("sbatch", "--parsable", "--qos=urgent", "--nodes=4", "--exclusive", "--time=1", "--wrap=sleep 3")
    jobs.append(bed.as_user([*words, "--output=/dev/null"]).expect().out.strip())


def case(name: str) -> object:
    """One parameter whose name carries the number in the matrix."""
    return pytest.mark.parametrize("_case", [pytest.param(None, id=name)])


@pytest.mark.fast
@case("f01_preempted_with_grace")
def test_preemption(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, urgent: list[str], row: Row) -> None:
    """All ranks stop at the same step, save, come back by Slurm's own requeue, and no step is trained twice."""
    row.fault = "preempted by a job of higher priority, grace long enough"
    run = slurm_bed.inject("lora-preempted", SLOW, slurm=VICTIM)
    slurm_bed.after_step(run, 6)
    push_aside(slurm_bed, urgent)
    reference = slurm_reference("lora")
    states = ("PREEMPTED|REQUEUED", "COMPLETED")
    check_survival(slurm_bed, run, reference, row, causes=("preempted", FINISHED), states=states, lost=0)


@case("f02_preempted_grace_too_short")
def test_preemption_during_a_slow_save(
    _case: None, slurm_bed: FaultBed, slurm_reference: Reference, urgent: list[str], row: Row
) -> None:
    """A save that the grace does not allow to finish is as if it had never begun."""
    row.fault = "preempted while saves take 30 s, longer than the grace"
    slow_save = f"at=before_manifest,do=sleep:30,attempt=1,always;{SLOW}"
    run = slurm_bed.inject("lora-hurried", slow_save, slurm=VICTIM)
    slurm_bed.after_step(run, SAVE_STEPS + 2)
    push_aside(slurm_bed, urgent)
    states = ("PREEMPTED|REQUEUED", "COMPLETED")
    causes = ("preempted", FINISHED)
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=causes, states=states)


LONG = "at=step,rank=0,do=sleep:2.5,always"
"""40 steps that take 100 s."""
TOO_LONG = "at=step,rank=0,do=sleep:8,always"
"""Longer than a limit of 2 min and the minute that Slurm may be late."""


@case("f03_time_limit_with_warning")
def test_time_limit(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """The job saves and leaves before its limit, comes back by itself, and never shows as TIMEOUT."""
    row.fault = "time limit of 2 min, SIGUSR2 before it"
    run = slurm_bed.inject("lora-limited", LONG, slurm={"time": 2})
    slurm_bed.finished(run)
    assert "TIMEOUT" not in slurm_bed.accounting(run)
    causes = ("time_limit",) * (len(story(run)) - 1) + (FINISHED,)
    assert len(causes) >= 2
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=causes, lost=0)


@case("f04_time_limit_without_warning")
def test_time_limit_without_a_signal(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """A job killed at its limit is shown as such; `resume` goes on from the newest checkpoint."""
    row.fault = "time limit of 2 min in a script without --signal"
    recipe = slurm_bed.fault_recipe("lora-unwarned", slurm={"time": 2, "requeue": False})
    script = slurm_bed.launcher("submit", recipe, "--print-sbatch", LAUNCHER_FAULT=TOO_LONG).expect().out
    unwarned = "".join(line for line in script.splitlines(keepends=True) if "--signal" not in line)
    assert unwarned != script
    job = slurm_bed.as_user(["sbatch", "--parsable"], input_text=unwarned, LAUNCHER_FAULT=TOO_LONG).expect().out.strip()
    run = RunFolder(next((slurm_bed.home / "runs").glob("lora-unwarned-*")))
    slurm_bed.until(lambda: "TIMEOUT" in slurm("sacct", "-X", "-n", "-j", job), "the limit", run, 400)
    assert_no_orphans(run)
    assert "time limit" in slurm_bed.launcher("why", run.run_id).expect().out
    named = ("squeue", "--noheader", f"--name={run.run_id}")
    slurm_bed.until(lambda: not slurm(*named).strip(), "its nodes are cleaned up", run, 120)
    slurm_bed.launcher("resume", run.run_id, "slurm.time=20").expect()
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=("time_limit", FINISHED))


@case("f05_time_limits_beyond_the_budget")
def test_restart_budget(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """When the restarts are used up the run stops, says so, and can be resumed."""
    row.fault = "a run that needs more time limits than slurm.max_restarts allows"
    run = slurm_bed.inject("lora-budget", LONG, slurm={"time": 2, "max_restarts": 0})
    assert slurm_bed.wait(run).code == 8
    (attempt,) = story(run)
    assert attempt.decision["action"] == "stop"
    assert "restart" in attempt.decision["reason"]
    slurm_bed.launcher("resume", run.run_id, "slurm.time=20").expect()
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=("time_limit", FINISHED), lost=0)


@case("f06_lead_not_below_limit")
def test_warning_longer_than_the_limit(_case: None, slurm_bed: FaultBed, row: Row) -> None:
    """A warning that would come at once is refused before the queue."""
    row.fault = "--signal=USR2@90 on a job of one minute"
    recipe = slurm_bed.fault_recipe("lora-lead", slurm={"time": 1, "extra": {"signal": "USR2@90"}})
    answer = slurm_bed.launcher("submit", recipe)
    assert answer.code in (2, 5)
    row.seen = f"refused, exit {answer.code}"
    assert "signal" in answer.err
    assert not list((slurm_bed.home / "runs").glob("lora-lead-*/job.json"))


@pytest.mark.fast
@case("f24_scancel_running")
def test_scancel(_case: None, slurm_bed: FaultBed, row: Row) -> None:
    """A cancelled job leaves no process, not even one that hides in a session of its own, and does not come back."""
    row.fault = "scancel; a rank left a child in its own session that ignores SIGTERM"
    run = slurm_bed.inject("lora-cancelled", f"at=step,rank=1,step=3,do=child;{SLOW}")
    slurm_bed.after_step(run, 5)
    slurm("scancel", job_id(run))
    assert slurm_bed.wait(run).code == 8
    assert_no_orphans(run)
    slurm_bed.until(lambda: job_id(run) not in slurm_bed.queue(), "the job leaves the queue", run)
    row.seen = " then ".join(slurm_bed.accounting(run))
    assert slurm_bed.accounting(run) == ["CANCELLED"]
    assert slurm_bed.status(run)["state"] == "CANCELLED"
    assert len(events(run, "submitted")) == 1


@case("f25_scancel_pending")
def test_scancel_pending(_case: None, slurm_bed: FaultBed, row: Row) -> None:
    """A run whose job is cancelled before it starts is known as cancelled at the next look."""
    row.fault = "scancel of a held job"
    run = slurm_bed.inject("lora-pending", "", "slurm.extra.hold=true")
    slurm("scancel", job_id(run))
    slurm_bed.until(lambda: slurm_bed.status(run)["state"] == "CANCELLED", "cancelled", run, 10)
    assert slurm_bed.wait(run).code == 8


@case("f26_cancel_twice")
def test_cancel_twice(_case: None, slurm_bed: FaultBed, row: Row) -> None:
    """Cancelling again, also while the job is still completing, changes nothing."""
    row.fault = "launcher cancel, three times"
    run = slurm_bed.inject("lora-twice", SLOW)
    slurm_bed.after_step(run, 2)
    for _ in range(3):
        slurm_bed.launcher("cancel", run.run_id).expect()
    assert_no_orphans(run)
    slurm_bed.until(lambda: slurm_bed.status(run)["state"] == "CANCELLED", "cancelled", run, 30)
    assert slurm_bed.accounting(run) == ["CANCELLED"]


@case("f27_requeued_by_hand")
def test_requeue(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """An operator's requeue is no failure: the job goes on, and both attempts are in the same logs (row 51)."""
    row.fault = "scontrol requeue"
    run = slurm_bed.inject("lora-requeued", SLOW)
    slurm_bed.after_step(run, 6)
    slurm("scontrol", "requeue", job_id(run))
    causes, states = ("operator_requeue", FINISHED), ("REQUEUED", "COMPLETED")
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=causes, states=states)
    log = run.log(job_id(run), 0).read_text()
    assert "step 1/40" in log
    assert "resumed after step" in log


@case("f28_requeuehold_then_release")
def test_requeue_and_hold(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """A job that is held after its requeue is shown as held, goes on when released, and is not sent twice."""
    row.fault = "scontrol requeuehold, then release"
    run = slurm_bed.inject("lora-held", SLOW)
    slurm_bed.after_step(run, 6)
    slurm("scontrol", "requeuehold", job_id(run))
    slurm_bed.until(lambda: "held" in json.dumps(slurm_bed.status(run)).lower(), "status says held", run, 60)
    slurm("scontrol", "release", job_id(run))
    causes = ("operator_requeue", FINISHED)
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=causes, states=("REQUEUED", "COMPLETED"))
    assert len(events(run, "submitted")) == 1


@case("f29_requeue_disabled")
def test_where_requeue_is_disabled(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """Where Slurm refuses to requeue, a new job follows the old one."""
    row.fault = "kill -9 of a rank in a job that Slurm may not requeue"
    run = slurm_bed.inject("lora-norequeue", f"at=step,rank=1,step=10,do=kill;{SLOW}")
    slurm_bed.after_event(run, "started")
    slurm("scontrol", "update", f"jobid={job_id(run)}", "requeue=0")
    check_follow_up(slurm_bed, run, slurm_reference("lora"), row)


def check_follow_up(bed: FaultBed, run: RunFolder, reference: RunFolder, row: Row) -> None:
    """The run was finished by a second job, of which the ledger knows."""
    bed.until(run.result.exists, "the result", run, 400)
    decision = story(run)[0].decision
    row.seen = f"action {decision['action']}: {decision['reason']}"
    assert decision["action"] == "follow_up"
    assert len({event["job_id"] for event in events(run, "submitted")}) == 2
    row.measure(run)
    assert_equal_sequence(run, reference)
    assert_one_artifact(run)
    assert_no_orphans(run)


@case("f30_no_scontrol_on_nodes")
def test_without_scontrol(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """Where the nodes have no scontrol the run still goes on by itself."""
    row.fault = "kill -9 of a rank where the node has no scontrol"
    broken = slurm_bed.home / "broken-bin"
    broken.mkdir(exist_ok=True)
    (broken / "scontrol").write_text("#!/bin/sh\necho 'scontrol: command not found' >&2\nexit 127\n")
    (broken / "scontrol").chmod(0o755)
    give_to_job_user(broken)
    fault = f"at=step,rank=1,step=10,do=kill;{SLOW}"
    # Only on the nodes: whoever submits has it.
    site = slurm_bed.home / "without-scontrol.yaml"
    site.write_text(f"{PROFILE.read_text()}setup:\n  - export PATH={broken}:$PATH\n")
    run = slurm_bed.inject("lora-noscontrol", fault, f"slurm.site={site}")
    slurm_bed.until(run.result.exists, "the result", run, 400)
    row.seen = f"action {story(run)[0].decision['action']}"
    row.measure(run)
    assert_equal_sequence(run, slurm_reference("lora"))
    assert_one_artifact(run)
