"""A Slurm whose own parts are away: rows 18 to 23 of the fault matrix."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.bed import dev_cluster, give_to_job_user, slurm
from tests.faults.bed import SLOW, FaultBed
from tests.faults.conftest import Reference
from tests.faults.gauntlet import check_survival
from tests.faults.report import Row
from tests.faults.story import events

FINISHED = "finished"


@pytest.fixture(autouse=True)
def slurm_row(row: Row) -> None:
    """Every row of this module is about Slurm."""
    row.where = "slurm"


@pytest.fixture(autouse=True)
def whole_cluster(slurm_bed: FaultBed) -> Iterator[None]:
    """The controller answers again after each test."""
    yield
    dev_cluster("start-controller")


def case(name: str) -> pytest.MarkDecorator:
    """One parameter whose name carries the number in the matrix."""
    return pytest.mark.parametrize("_case", [pytest.param(None, id=name)])


@case("f18_controller_down_at_submit")
def test_controller_down_at_submit(_case: None, slurm_bed: FaultBed, row: Row) -> None:
    """Without a controller `submit` says that it is temporary, and the next try makes one job."""
    row.fault = "slurmctld stopped before submit"
    recipe = slurm_bed.fault_recipe("lora-nocontroller")
    dev_cluster("stop-controller")
    answer = slurm_bed.launcher("submit", recipe, "slurm.extra.hold=true", "--json")
    dev_cluster("start-controller")
    row.seen = f"exit {answer.code}: {answer.err.strip().splitlines()[-1] if answer.err.strip() else ''}"[:120]
    assert answer.code == 75
    before = slurm_bed.queue()
    slurm_bed.inject("lora-nocontroller", "", "slurm.extra.hold=true")
    assert len(slurm_bed.queue()) == len(before) + 1
    slurm_bed.cancel_everything()


@case("f19_controller_down_while_running")
def test_controller_down_while_running(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """Training goes on without the controller; `status` does not call the run failed."""
    row.fault = "slurmctld stopped at step 6, started again at step 12"
    run = slurm_bed.inject("lora-headless", SLOW)
    slurm_bed.after_step(run, 6)
    dev_cluster("stop-controller")
    said = slurm_bed.launcher("status", run.run_id, "--json")
    slurm_bed.after_step(run, 12)
    dev_cluster("start-controller")
    state = json.loads(said.out)["state"] if said.out else said.err
    row.seen = f"status: {state}"
    assert state not in ("FAILED", "COMPLETED", "CANCELLED")
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=(FINISHED,), states=("COMPLETED",), lost=0)


@case("f20_answer_of_sbatch_lost")
def test_answer_lost(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """sbatch queued the job and its answer was lost: the job is found again by the run's name, and is the only one."""
    row.fault = "sbatch queues the job and exits 1 without a word"
    folder = slurm_bed.home / "mute-bin"
    folder.mkdir(exist_ok=True)
    (folder / "sbatch").write_text('#!/bin/sh\n/usr/bin/sbatch "$@" >/dev/null 2>&1\nexit 1\n')
    (folder / "sbatch").chmod(0o755)
    give_to_job_user(folder)
    recipe = slurm_bed.fault_recipe("lora-mute")
    run = slurm_bed.launch(recipe, PATH=f"{folder}:/usr/bin:/bin")
    names = slurm("squeue", "--noheader", "--states=all", "--format=%j").split()
    assert names.count(run.run_id) == 1
    assert len(events(run, "submitted")) == 1
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=(FINISHED,), states=("COMPLETED",), lost=0)


@case("f21_database_down")
def test_database_down(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """Without slurmdbd everything is still known from the queue and the run's own files."""
    row.fault = "slurmdbd stopped while the run trains and ends; a rank killed meanwhile"
    run = slurm_bed.inject("lora-nodatabase", f"at=step,rank=1,step=14,do=kill;{SLOW}")
    slurm_bed.after_step(run, 6)
    subprocess.run(["pkill", "-x", "slurmdbd"], check=True)
    try:
        assert slurm_bed.status(run)["state"] == "RUNNING"
        check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=("rank_killed", FINISHED))
        assert slurm_bed.status(run)["state"] == "COMPLETED"
    finally:
        dev_cluster("start")
    slurm_bed.until(lambda: slurm_bed.accounting(run)[-1:] == ["COMPLETED"], "late rows arrive", run, 60)


@pytest.fixture
def without_accounting(slurm_bed: FaultBed) -> Iterator[None]:
    """The cluster restarted without slurmdbd; restored afterwards."""
    slurm_bed.cancel_everything()
    dev_cluster("start", ACCT="0", MODE="netns")
    yield
    dev_cluster("start", ACCT="1", MODE="netns")


@case("f22_no_accounting")
def test_no_accounting(
    _case: None, without_accounting: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row
) -> None:
    """A site without accounting requeues, diagnoses and finishes like any other."""
    row.fault = "no accounting at all; a rank killed"
    run = slurm_bed.inject("lora-noaccounting", f"at=step,rank=1,step=14,do=kill;{SLOW}")
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=("rank_killed", FINISHED))
    assert slurm_bed.status(run)["state"] == "COMPLETED"


@pytest.fixture
def forgetful(slurm_bed: FaultBed) -> Iterator[None]:
    """A controller that forgets jobs two seconds after their end, as a busy site's does after five minutes."""
    config = Path("/etc/slurm/slurm.conf")
    before = config.read_text()
    config.write_text(before + "MinJobAge=2\n")
    slurm("scontrol", "reconfigure")
    yield
    config.write_text(before)
    slurm("scontrol", "reconfigure")


@case("f23_forgotten_by_the_controller")
def test_purged(_case: None, forgetful: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """A job the controller has forgotten is what it was: `status` and `why` say the same, and `resume` goes on."""
    row.fault = "rank 1 killed, no restarts left, and the job purged from slurmctld"
    run = slurm_bed.inject("lora-purged", f"at=step,rank=1,step=14,do=kill;{SLOW}", slurm={"max_restarts": 0})
    assert slurm_bed.wait(run).code == 8
    before = slurm_bed.status(run)["state"]
    job = json.loads(run.job.read_text())["job_id"]
    slurm_bed.until(lambda: not known_to_the_controller(job), "the controller forgets the job", run, 300)
    assert slurm_bed.status(run)["state"] == before
    assert "killed" in slurm_bed.launcher("why", run.run_id).expect().out
    slurm_bed.launcher("resume", run.run_id).expect()
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=("rank_killed", FINISHED))


def known_to_the_controller(job: str) -> bool:
    """Whether `scontrol show job` finds it."""
    return subprocess.run(["scontrol", "show", "job", job], check=False, capture_output=True).returncode == 0
