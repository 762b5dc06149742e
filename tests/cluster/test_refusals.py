"""What the cluster cannot give is refused before the queue, with an exit code that scripts can act on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster.bed import Bed, dev_cluster

REFUSED, TRY_LATER = 5, 75


@pytest.fixture(scope="module")
def recipe(bed: Bed) -> str:
    """A recipe that would be accepted as it stands."""
    return bed.recipe("refused")


@pytest.fixture
def no_controller() -> Iterator[None]:
    """The controller is down while the test runs."""
    dev_cluster("stop-controller")
    yield
    dev_cluster("start-controller")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ("slurm.partition=mian", ["mian", "main"]),
        ("slurm.account=nobody", ["nobody", "dev"]),
        ("slurm.qos=golden", ["golden", "normal"]),
        ("slurm.nodes=8 train.per_device_train_batch_size=1", ["8", "4 or fewer"]),
        ("slurm.mem=900G", ["900G", "64G"]),
    ],
)
def test_what_does_not_exist_is_refused(bed: Bed, recipe: str, overrides: str, names: list[str]) -> None:
    """The message names what was asked and what exists; nothing is queued and no run folder is left."""
    before = bed.queue()
    answer = bed.launcher("submit", recipe, *overrides.split()).expect(REFUSED)
    assert all(name in answer.err for name in names), answer.err
    assert not new_jobs(bed, before)
    assert not run_folders(bed)


def test_controller_down_means_try_later(bed: Bed, recipe: str, no_controller: None) -> None:
    """Without a controller `submit` exits 75 and leaves nothing behind."""
    answer = bed.launcher("submit", recipe, "slurm.site=dev-cluster").expect(TRY_LATER)
    assert "try again" in answer.err
    assert not run_folders(bed)


def test_no_sbatch_means_go_elsewhere(bed: Bed, recipe: str) -> None:
    """On a machine without Slurm's commands `submit` exits 5 and says what is missing: waiting helps nobody."""
    only_python = str(Path(bed.python).parent)
    answer = bed.launcher("submit", recipe, "slurm.site=dev-cluster", PATH=only_python).expect(REFUSED)
    assert "sbatch" in answer.err


def test_dry_run_and_submit_speak_of_the_same_job(bed: Bed, recipe: str) -> None:
    """--dry-run prints the request with its script and touches nothing."""
    before = bed.queue()
    answer = bed.launcher("submit", recipe, "--dry-run").expect()
    assert '"script"' in answer.out
    assert "#SBATCH --nodes=1" in answer.out
    assert not new_jobs(bed, before)
    assert not run_folders(bed)


def new_jobs(bed: Bed, before: Sequence[str]) -> set[str]:
    """Jobs that were not there before; those of earlier tests may leave the queue meanwhile."""
    return set(bed.queue()) - set(before)


def run_folders(bed: Bed) -> list[Path]:
    """Run folders that a refused submission left."""
    return list((bed.home / "runs").glob("refused-*"))
