"""Fixtures of the fault matrix: beds, one uninterrupted run per recipe, and the row that every test leaves behind."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.folder import RunFolder
from tests.cluster.bed import JOB_USER, cluster_is_up, make_bed
from tests.cluster.conftest import HOW
from tests.faults.bed import FaultBed, LocalBed, make_local_bed
from tests.faults.report import Row

OUTCOME = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def local_bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBed]:
    """A folder on this machine; what still runs at the end is killed."""
    bed = make_local_bed(tmp_path_factory.mktemp("local"))
    yield bed
    bed.cancel_everything()


@pytest.fixture(scope="session")
def slurm_bed() -> Iterator[FaultBed]:
    """The job user's folder on the running cluster; removed at the end, as its jobs are."""
    if not cluster_is_up():
        reason = f"no development cluster is running: {HOW}"
        if os.environ.get("CI") == "true" or os.environ.get("LAUNCHER_REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    home = Path(tempfile.mkdtemp(prefix="launcher-faults-", dir=pwd.getpwnam(JOB_USER).pw_dir))
    plain = make_bed(home)
    environ = plain.environ | {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    bed = FaultBed(home=home, environ=environ, ranks={"nodes": 2, "gpus_per_node": 1})
    yield bed
    bed.cancel_everything()
    shutil.rmtree(home, ignore_errors=True)


Reference = Callable[..., RunFolder]


@pytest.fixture(scope="session")
def references() -> dict[tuple[str, str], RunFolder]:
    """Uninterrupted runs, by bed and recipe."""
    return {}


def reference_in(bed: FaultBed, known: dict[tuple[str, str], RunFolder]) -> Reference:
    """A function that gives the uninterrupted run of a recipe, trained at its first call."""

    def reference(name: str, **changes: Any) -> RunFolder:
        key = (bed.where, name)
        if key not in known:
            run = bed.inject(name, **changes)
            bed.finished(run)
            known[key] = run
        return known[key]

    return reference


@pytest.fixture(scope="session")
def local_reference(local_bed: LocalBed, references: dict[tuple[str, str], RunFolder]) -> Reference:
    """Uninterrupted runs of this machine."""
    return reference_in(local_bed, references)


@pytest.fixture(scope="session")
def slurm_reference(slurm_bed: FaultBed, references: dict[tuple[str, str], RunFolder]) -> Reference:
    """Uninterrupted runs of the cluster."""
    return reference_in(slurm_bed, references)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    """The test's row in the table of results; its verdict is the test's own outcome."""
    return Row(test=request.node.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Write the row when the test is over, also where a fixture before it failed."""
    report = yield
    if "row" not in getattr(item, "fixturenames", ()):
        return report
    outcome = item.stash.get(OUTCOME, "passed")
    if outcome == "passed":
        item.stash[OUTCOME] = report.outcome
    if report.when == "teardown":
        row = getattr(item, "funcargs", {}).get("row") or Row(test=item.name)
        row.verdict = {"passed": "held", "failed": "BROKEN"}.get(item.stash[OUTCOME], "skipped")
        row.write()
    return report
