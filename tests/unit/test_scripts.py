"""The scripts' own promises: what they refuse, with which words, and when a test run counts as failed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SUITE = '<testsuites><testsuite name="{}" tests="{}" failures="{}" errors="0" skipped="{}" time="1.5"/></testsuites>'


def run(script: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [str(shutil.which("bash")), str(SCRIPTS / script), *words]
    return subprocess.run(command, env=os.environ | environ, text=True, capture_output=True, timeout=60, check=False)


def summarise(folder: Path, *, counts: dict[str, tuple[int, int, int]], **environ: str) -> tuple[int, str]:
    """Exit code and output of the summary over parts of (tests, failures, skipped)."""
    for name, numbers in counts.items():
        (folder / f"{name}.xml").write_text(SUITE.format(name, *numbers))
    clean = {key: value for key, value in os.environ.items() if key not in ("CI", "LAUNCHER_REQUIRE_SLURM")}
    command = [sys.executable, str(SCRIPTS / "lib" / "summary.py"), str(folder)]
    ran = subprocess.run(command, env=clean | environ, text=True, capture_output=True, timeout=60, check=False)
    return ran.returncode, ran.stdout


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with what every system has, and no Slurm."""
    for name in ("bash", "cat", "dirname", "id", "sed", "tr"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    return str(tmp_path)


def test_the_cluster_says_which_packages_it_needs(bare_path: str) -> None:
    """Without Slurm's daemons the message is the very line that installs them."""
    said = run("dev-cluster", "start", PATH=bare_path)
    assert said.returncode == 1
    assert "missing: slurmctld" in said.stderr
    assert "apt-get install -y --no-install-recommends slurmctld slurmd" in said.stderr
    assert "mariadb-server" in said.stderr


def test_a_cluster_without_accounting_needs_no_database(bare_path: str) -> None:
    """ACCT=0 asks for no more packages than it uses."""
    said = run("dev-cluster", "start", PATH=bare_path, ACCT="0").stderr
    assert "slurmctld" in said
    assert "mariadb" not in said


def test_a_wrong_mode_or_verb_is_named() -> None:
    """A typing error is answered with what exists."""
    assert "neither netns nor ports" in run("dev-cluster", "status", MODE="network").stderr
    said = run("dev-cluster", "begin")
    assert said.returncode != 0
    assert "start | stop | status | logs" in said.stderr or "needs root" in said.stderr


def test_scripts_explain_themselves() -> None:
    """--help works without root and installs nothing."""
    for script in ("dev-cluster", "test"):
        said = run(script, "--help")
        assert said.returncode == 0
        assert f"scripts/{script}" in said.stdout


def test_unknown_tests_are_refused_before_anything_is_installed() -> None:
    """A path outside the three parts is an error, not an empty success."""
    said = run("test", "tests/nowhere")
    assert said.returncode == 2
    assert "unit train cluster" in said.stderr


def test_a_run_without_failures_passes(tmp_path: Path) -> None:
    """The last line is the plain count over all parts."""
    code, out = summarise(tmp_path, counts={"unit": (5, 0, 1), "train": (3, 0, 0)})
    assert code == 0
    assert out.splitlines()[-1] == "7 passed, 0 failed, 1 skipped"


def test_a_failure_fails_the_run(tmp_path: Path) -> None:
    """One failed test in one part is enough."""
    assert summarise(tmp_path, counts={"unit": (5, 0, 0), "train": (3, 1, 0)})[0] == 1


def test_a_run_without_tests_fails(tmp_path: Path) -> None:
    """Nothing run is no success."""
    assert summarise(tmp_path, counts={})[0] == 1


@pytest.mark.parametrize("switch", [{"CI": "true"}, {"LAUNCHER_REQUIRE_SLURM": "1"}])
def test_skipped_slurm_tests_fail_where_slurm_is_required(tmp_path: Path, switch: dict[str, str]) -> None:
    """A skip in tests/cluster is tolerated on a laptop and fails CI."""
    counts = {"unit": (5, 0, 0), "cluster": (4, 0, 1)}
    assert summarise(tmp_path, counts=counts)[0] == 0
    assert summarise(tmp_path, counts=counts, **switch)[0] == 1
