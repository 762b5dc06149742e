"""A site without accounting: the same verbs tell the same truth, from the run folder and the controller."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from launcher.runs.folder import RunFolder
from tests.cluster.bed import Bed, dev_cluster, losses, slurm
from tests.cluster.test_ends import HOLD, job_id


@pytest.fixture(scope="module", autouse=True)
def no_accounting(bed: Bed) -> Iterator[None]:
    """The cluster, restarted without slurmdbd and with all nodes on one host name; restored afterwards."""
    dev_cluster("start", ACCT="0", MODE="ports")
    yield
    dev_cluster("start", ACCT="1", MODE="netns")


@pytest.fixture(scope="module")
def killed(bed: Bed, no_accounting: None) -> RunFolder:
    """A run whose worker dies without a word and is not started again."""
    endless = {"max_steps": 100_000, "eval_steps": 50_000}
    return bed.submit(bed.recipe("killed", train=endless, slurm={"requeue": False}))


@pytest.fixture(scope="module")
def lora(bed: Bed, no_accounting: None, killed: RunFolder) -> RunFolder:
    """A run that ends well; queued beside the other."""
    return bed.submit(bed.recipe("plain"))


def test_accounting_is_really_absent() -> None:
    """The premise of this module."""
    assert "accounting storage is disabled" in slurm("sacct")


def test_a_site_is_surveyed_without_accounting(bed: Bed) -> None:
    """`init` does without sacctmgr, and its profile says that there is no accounting."""
    answer = bed.launcher("init", "--site", "bare", "--dry-run").expect()
    assert "accounting: false" in answer.out
    assert "# qos_limits: this cluster has no accounting" in answer.out
    assert "preempt_type: preempt/partition_prio" in answer.out


def test_a_run_completes(bed: Bed, killed: RunFolder, lora: RunFolder) -> None:
    """`wait`, `status` and `logs` reach the end of a run without sacct."""
    assert bed.finished(lora)["step"] == 6
    assert bed.status(lora)["state"] == "COMPLETED"
    assert "6/6" in bed.launcher("logs", lora.run_id).expect().out


def test_a_worker_that_dies_without_a_word_is_seen(bed: Bed, killed: RunFolder) -> None:
    """SIGKILL to the rank and its supervisor: the job's failure is known although neither could write a record."""
    bed.until(lambda: losses(killed), "the first step", killed, limit_s=300)
    ours = r"^\S*python\S* -u -m launcher\.(runs\.train_job|worker\.main)"  # not their srun
    slurm("pkill", "-KILL", "--full", rf"{ours} .*{killed.run_id}")
    answer = bed.wait(killed)
    assert answer.code == 8
    assert bed.status(killed)["state"] == "FAILED"


def test_cancel_while_pending(bed: Bed) -> None:
    """A held job is cancelled and stays known as cancelled."""
    run = bed.submit(bed.recipe("never"), HOLD)
    assert bed.status(run)["state"] == "PENDING"
    bed.launcher("cancel", run.run_id).expect()
    bed.until(lambda: job_id(run) not in bed.queue(), "the job leaves the queue", run)
    assert bed.status(run)["state"] == "CANCELLED"
    assert bed.wait(run).code == 8
