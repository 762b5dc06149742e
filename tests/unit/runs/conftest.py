"""Fixtures of the tests of `runs`: a PATH with fake Slurm commands only, and one without any."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.unit.runs.material import FakeSlurm

_TOOLS = ("bash", "cat", "cp", "env", "git", "sed", "sleep", "printf")


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that holds a few plain tools and no Slurm command, wherever the tests run."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in _TOOLS:
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    for name in ("SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_QOS", "LAUNCHER_SITE", "LAUNCHER_VENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LAUNCHER_PATIENCE_S", "0")  # an unreachable controller is not waited for
    return tools


@pytest.fixture
def fake_slurm(no_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A healthy, empty fake Slurm in front of the plain tools."""
    fake = FakeSlurm(tmp_path / "fake-slurm")
    for program in ("sbatch", "srun", "squeue", "scancel", "sinfo", "scontrol"):
        fake.say(program)
    fake.say("sacct", stderr="Slurm accounting storage is disabled", status=1)
    fake.say("sacctmgr", stderr="You are not running a supported accounting_storage plugin", status=1)
    monkeypatch.setenv("PATH", f"{fake.folder}:{no_slurm}")
    return fake
