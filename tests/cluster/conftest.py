"""The cluster tests' fixtures: a bed per session, and a clear word where there is no cluster."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.bed import JOB_USER, Bed, cluster_is_up, make_bed

HOW = "start it as root with scripts/dev-cluster start, or let scripts/test cluster do everything"


@pytest.fixture(scope="session")
def bed() -> Iterator[Bed]:
    """The job user's folder on the running cluster; removed at the end, as its jobs are."""
    if not cluster_is_up():
        reason = f"no development cluster is running: {HOW}"
        if os.environ.get("CI") == "true" or os.environ.get("LAUNCHER_REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    home = Path(tempfile.mkdtemp(prefix="launcher-tests-", dir=pwd.getpwnam(JOB_USER).pw_dir))
    bed = make_bed(home)
    found = bed.as_user([bed.python, "-c", "import launcher"])
    if found.code != 0:
        pytest.fail(f"{JOB_USER} cannot import the package with {bed.python}: {HOW}\n{found.err}")
    yield bed
    bed.cancel_everything()
    shutil.rmtree(home, ignore_errors=True)
