"""`launcher sync`: all offline folders of a run, in order, under the run's one id."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.errors import ClusterError, DataError
from launcher.runs import wandb_sync
from launcher.runs.folder import RunFolder
from tests.unit.runs.material import make_run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of two attempts that recorded offline."""
    run = make_run(tmp_path / "runs")
    for name in ("offline-run-20261122_190500-x", "offline-run-20261122_190000-x"):
        (run.path / "wandb" / name).mkdir(parents=True)
    return run


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FakeWandb: a Python that writes down its arguments; no W&B server can be had here."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    code = f"$(cat {tmp_path}/code 2>/dev/null || echo 0)"
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/said\nexit {code}\n")
    python.chmod(0o755)
    monkeypatch.setenv("LAUNCHER_VENV", str(tmp_path / "venv"))
    return tmp_path


def test_attempts_are_sent_together_oldest_first(run: RunFolder, fake_wandb: Path) -> None:
    """One command, the run's id, both folders in order of start."""
    result = CliRunner().invoke(main, ["sync", str(run.path)])
    assert result.exit_code == 0, result.output
    said = (fake_wandb / "said").read_text().split("\n")
    assert said[:6] == ["-m", "wandb", "sync", "--yes", "--id", run.run_id]
    assert [Path(path).name for path in said[6:8]] == ["offline-run-20261122_190000-x", "offline-run-20261122_190500-x"]


def test_a_dry_run_sends_nothing(run: RunFolder, fake_wandb: Path) -> None:
    """The command is printed."""
    result = CliRunner().invoke(main, ["sync", str(run.path), "--dry-run"])
    assert "wandb sync --yes" in result.stdout
    assert not (fake_wandb / "said").exists()


def test_refusals_name_what_helps(run: RunFolder, fake_wandb: Path, tmp_path: Path) -> None:
    """A failing wandb is exit 5 with the login hint; a run without offline records is exit 3."""
    (fake_wandb / "code").write_text("1")
    with pytest.raises(ClusterError, match="WANDB_API_KEY"):
        wandb_sync.send(run)
    with pytest.raises(DataError, match="recorded nothing offline"):
        wandb_sync.offline_folders(make_run(tmp_path / "others"))
