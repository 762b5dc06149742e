"""Runs that end otherwise than well: cancelled while pending, cancelled while running, failed."""

from __future__ import annotations

import json

import pytest

from launcher.runs.folder import RunFolder
from tests import tiny
from tests.cluster.bed import Bed, give_to_job_user, losses, slurm

HOLD = "slurm.extra.hold=true"


@pytest.fixture(scope="module")
def held(bed: Bed) -> RunFolder:
    """A run that waits in the queue until somebody releases or cancels it."""
    return bed.submit(bed.recipe("held"), HOLD)


@pytest.fixture(scope="module")
def broken(bed: Bed) -> RunFolder:
    """A run whose data broke between submission and start, as a file on a shared disk can."""
    rows = tiny.make_chat_rows(bed.home / "later.jsonl")
    give_to_job_user(rows)
    run = bed.submit(bed.recipe("broken", data={"train": [{"path": rows.name}]}), HOLD)
    with rows.open("a") as file:
        file.write('{"messages": [{"role": "user", "content"\n')
    slurm("scontrol", "release", job_id(run))
    return run


@pytest.fixture(scope="module")
def endless(bed: Bed) -> RunFolder:
    """A run that would train for hours."""
    return bed.submit(bed.recipe("endless", train={"max_steps": 100_000, "eval_steps": 50_000}))


def job_id(run: RunFolder) -> str:
    return str(json.loads(run.job.read_text())["job_id"])


def test_cancel_while_pending(bed: Bed, held: RunFolder, endless: RunFolder, broken: RunFolder) -> None:
    """A pending run is shown as pending, is gone from the queue at once when cancelled, and never ran."""
    assert bed.status(held)["state"] == "PENDING"
    bed.launcher("cancel", held.run_id).expect()
    bed.until(lambda: job_id(held) not in bed.queue(), "the job leaves the queue", held)
    assert bed.status(held)["state"] == "CANCELLED"
    assert bed.wait(held).code == 8
    assert not list(held.logs.iterdir())


def test_cancel_while_running(bed: Bed, endless: RunFolder) -> None:
    """A running run stops with all its processes, is shown as cancelled, and is not started again."""
    bed.until(lambda: losses(endless), "the first step", endless, limit_s=300)
    assert bed.status(endless)["state"] == "RUNNING"
    bed.launcher("cancel", endless.run_id).expect()
    bed.until(lambda: job_id(endless) not in bed.queue(), "the job leaves the queue", endless)
    bed.until(lambda: bed.status(endless)["state"] == "CANCELLED", "the state is cancelled", endless, limit_s=30)
    bed.until(lambda: not processes_of(endless), "no process of the run is left", endless, limit_s=30)
    assert bed.wait(endless).code == 8
    assert not endless.result.exists()


def test_cancelling_twice_is_harmless(bed: Bed, endless: RunFolder) -> None:
    """A second cancel finds the run ended and says so."""
    bed.until(lambda: bed.status(endless)["state"] == "CANCELLED", "the state is cancelled", endless)
    bed.launcher("cancel", endless.run_id).expect()
    assert bed.status(endless)["state"] == "CANCELLED"


def test_a_failing_job_is_seen_as_failed(bed: Bed, broken: RunFolder) -> None:
    """The worker's non-zero exit reaches Slurm, `wait` (exit 8) and `status`, with the row that broke it."""
    answer = bed.wait(broken)
    assert answer.code == 8
    assert bed.status(broken)["state"] == "FAILED"
    assert "later.jsonl:65" in bed.launcher("logs", broken.run_id).expect().out
    assert not broken.result.exists()
    state, code = (
        slurm("sacct", "-X", "-n", "-P", "--format=State,ExitCode", f"--jobs={job_id(broken)}").strip().split("|")
    )
    assert state == "FAILED"
    assert code != "0:0"


def processes_of(run: RunFolder) -> str:
    """Processes whose command line names the run."""
    return slurm("pgrep", "--full", run.run_id)
