"""The rows about Slurm of the table of bad inputs (tests/unit/test_bad_inputs.py), asked of a real one.

Three set-ups: lax (sbatch takes jobs over a partition's limits), strict (EnforcePartLimits=ALL), and without
accounting. In each the launcher refuses what could never start, with the same words, before anything is queued.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.cluster.bed import JOB_USER, Bed, dev_cluster, slurm

REFUSED = 5
LAX, STRICT, ALONE = "lax", "strict", "without accounting"
SETTINGS = {
    LAX: {"ACCT": "1", "MODE": "netns", "STRICT": "0"},
    STRICT: {"ACCT": "1", "MODE": "netns", "STRICT": "1"},
    ALONE: {"ACCT": "0", "MODE": "ports", "STRICT": "0"},
}
PARTITIONS = (
    "PartitionName=short Nodes=node[1-4] MaxTime=10",
    "PartitionName=closed Nodes=node[1-4] State=DOWN",
    "PartitionName=leaving Nodes=node[1-4] State=DRAIN",
    "PartitionName=broken Nodes=node4",
    "PartitionName=members Nodes=node[1-4] AllowGroups=root",
)
"""Made while the controller runs; gone when it starts anew. node4 is drained."""


@dataclass(frozen=True)
class Row:
    """One bad input: its number in the table, what is asked, and words of the answer."""

    number: int
    overrides: str
    words: tuple[str, ...]
    setups: tuple[str, ...] = (LAX,)


ROWS = (
    Row(11, "slurm.partition=short", ("00:20:00 asked", "00:10:00"), (LAX, STRICT, ALONE)),
    Row(13, "slurm.partition=mian", ("'mian' does not exist", "did you mean main"), (LAX, ALONE)),
    Row(14, "slurm.partition=closed", ("closed does not start jobs now",), (LAX, STRICT)),
    Row(15, "slurm.partition=leaving", ("leaving does not start jobs now",)),
    Row(16, "slurm.partition=members", ("members",)),
    Row(16, "slurm.account=nobody", ("'nobody' is not yours", "dev")),
    Row(17, "slurm.qos=golden", ("golden", "normal")),
    Row(19, "slurm.nodes=8 train.per_device_train_batch_size=1", ("8", "4 or fewer"), (LAX, STRICT, ALONE)),
    Row(20, "slurm.gpus_per_node=16 train.global_batch_size=32", ("slurm.gpus_per_node", "has 8")),
    Row(21, "slurm.cpus_per_task=64", ("64 CPUs", "has 16")),
    Row(21, "slurm.mem=900G", ("900G", "has 64G")),
    Row(22, "slurm.constraint=a101", ("'a101'", "did you mean a100")),
    Row(23, "slurm.extra.nodelist=node9", ("node9", "Invalid node name specified"), (LAX, ALONE)),
    Row(23, "slurm.extra.exclude=node[1-4]", ("node[1-4]", "Slurm says")),
    Row(24, "slurm.partition=broken", ("all 1 nodes of broken are down or drained", "sinfo -R"), (LAX, ALONE)),
    Row(26, "slurm.extra.reservation=nope", ("nope", "Requested reservation is invalid")),
    Row(29, "slurm.qos=urgent slurm.nodes=2", ("slurm.nodes", "QOS urgent allows 1"), (LAX, STRICT)),
    Row(30, "slurm.extra.dependency=afterok:99999", ("no job 99999",), (LAX, ALONE)),
)
HERE = {setup: [row for row in ROWS if setup in row.setups] for setup in SETTINGS}


@pytest.fixture(scope="module")
def recipe(bed: Bed) -> str:
    """A recipe that would be accepted as it stands."""
    return bed.recipe("refused")


@pytest.fixture(scope="module", params=list(SETTINGS))
def setup(bed: Bed, request: pytest.FixtureRequest) -> Iterator[str]:
    """The cluster in one of its set-ups, with partitions that jobs cannot use; as it was, at the end."""
    name: str = request.param
    dev_cluster("start", **SETTINGS[name])
    for partition in PARTITIONS:
        root("scontrol", "create", *partition.split())
    root("scontrol", "update", "nodename=node4", "state=drain", "reason=test")
    if name != ALONE:
        root("sacctmgr", "-i", "modify", "qos", "urgent", "set", "MaxTRES=node=1")
    yield name
    if name != ALONE:
        root("sacctmgr", "-i", "modify", "qos", "urgent", "set", "MaxTRES=node=-1")
    root("scontrol", "update", "nodename=node4", "state=resume")
    for partition in PARTITIONS:
        root("scontrol", "delete", partition.split()[0])
    if name == list(SETTINGS)[-1]:
        dev_cluster("start", **SETTINGS[LAX])


def root(*command: str) -> None:
    """A command of the administrator, which must succeed."""
    ran = subprocess.run(command, text=True, capture_output=True, timeout=60, check=False)
    assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"


def test_bad_inputs_are_refused(bed: Bed, setup: str, recipe: str) -> None:
    """Every row: exit 5, the words that help, nothing queued, no run folder left."""
    failed = []
    for row in HERE[setup]:
        before = bed.queue()
        answer = bed.launcher("submit", recipe, "--no-queue", *row.overrides.split())
        missing = [word for word in row.words if word not in answer.err]
        if answer.code != REFUSED or missing or bed.queue() != before or list((bed.home / "runs").glob("refused-*")):
            failed.append(f"row {row.number} {row.overrides}: exit {answer.code}, lacks {missing}\n{answer.err}")
            bed.cancel_everything()
    assert not failed, "\n".join(failed)


def test_what_sbatch_itself_would_do(bed: Bed, setup: str) -> None:
    """The premise: a lax Slurm takes a job over its partition's limit, which then waits for ever."""
    command = ["sbatch", "--parsable", "--partition=short", "--time=20", "--output=/dev/null", "--wrap=true"]
    answer = bed.as_user(command)
    if setup == STRICT:
        assert answer.code != 0
        return
    answer.expect()
    job = answer.out.strip()
    bed.until(
        lambda: "PartitionTimeLimit" in slurm("squeue", "--noheader", f"--jobs={job}", "--format=%r"), "its reason"
    )
    root("scancel", job)


def test_a_maintenance_is_told_before(bed: Bed, setup: str, recipe: str) -> None:
    """Row 25, in a set-up that leaves a question for it: a notice with the time that still fits, and exit 0."""
    if setup != ALONE:
        return
    begins = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 900))
    words = f"ReservationName=service StartTime={begins} Duration=60 Users=root Nodes=ALL Flags=MAINT,IGNORE_JOBS"
    root("scontrol", "create", "reservation", *words.split())
    try:
        answer = bed.launcher("submit", recipe, "--no-queue", "--dry-run").expect()
        assert "maintenance service" in answer.err and "slurm.time=00:1" in answer.err
    finally:
        root("scontrol", "delete", "ReservationName=service")


def test_jobs_over_the_submit_limit_are_refused(bed: Bed, setup: str, recipe: str) -> None:
    """Row 28: the limit, who sets it, and how many jobs there are; only accounting knows such limits."""
    if setup != LAX:
        return
    user = ["sacctmgr", "-i", "modify", "user", JOB_USER, "set"]
    held = bed.as_user(["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"]).expect().out.strip()
    root(*user, "MaxSubmitJobs=1")
    try:
        answer = bed.launcher("submit", recipe, "--no-queue").expect(REFUSED)
        assert "of your jobs wait or run, and account dev allows 1" in answer.err
    finally:
        root(*user, "MaxSubmitJobs=-1")
        root("scancel", held)
