"""`launcher gc`: what goes, what stays, and nothing through a symbolic link."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.runs import partial
from launcher.runs.folder import RunFolder
from launcher.runs.garbage import find_garbage
from launcher.runs.rehearsal_material import MARK
from tests.unit.runs.material import make_run, note_job, write_result


def filled(path: Path) -> Path:
    """A folder with one small file."""
    path.mkdir(parents=True)
    (path / "data.bin").write_bytes(b"x" * 100)
    return path


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    """A finished run with two checkpoints, an unfinished save and an adapter."""
    run = make_run(tmp_path / "runs")
    note_job(run, "42")
    write_result(run)
    for name in ("step-000003", "step-000006", ".step-000009.42.0.tmp"):
        filled(run.checkpoints / name)
    run.adapter.mkdir(exist_ok=True)
    return run


def names(parent: Path, **options: bool) -> set[str]:
    """Names of the folders that may go."""
    return {one.path.name for one in find_garbage(parent, **options)}


def test_checkpoints_of_a_finished_run_may_go_and_its_adapter_stays(finished: RunFolder) -> None:
    """The result is verified; --keep-checkpoints leaves all but the unfinished save."""
    parent = finished.path.parent
    assert names(parent) == {"step-000003", "step-000006", ".step-000009.42.0.tmp"}
    assert names(parent, checkpoints=False) == {".step-000009.42.0.tmp"}


def test_nothing_of_a_run_that_may_go_on_is_touched(tmp_path: Path) -> None:
    """Not even its unfinished save: somebody may be writing it."""
    run = make_run(tmp_path / "runs")
    note_job(run, "42")
    filled(run.checkpoints / "step-000003")
    filled(run.checkpoints / ".step-000006.42.0.tmp")
    assert names(run.path.parent) == set()


def test_only_old_folders_without_a_job_go(tmp_path: Path) -> None:
    """A run folder that was just written may be about to be submitted."""
    run = make_run(tmp_path / "runs")
    build = filled(tmp_path / "runs" / ".cache" / "tokens" / "abc.building-host-1")
    assert names(run.path.parent) == set()
    long_ago = time.time() - 2 * 24 * 3600
    for path in (run.path, build):
        os.utime(path, (long_ago, long_ago))
    assert names(run.path.parent) == {run.run_id, build.name}


def test_old_rehearsals_go_and_only_where_our_mark_is(tmp_path: Path) -> None:
    """One that was killed yesterday goes; today's may be running, and a folder without the mark is somebody else's."""
    long_ago = time.time() - 2 * 24 * 3600
    rehearsals = tmp_path / "runs" / ".rehearsals"
    for name in ("killed", "running", "unmarked"):
        filled(rehearsals / name)
        if name != "unmarked":
            (rehearsals / name / MARK).touch()
        if name != "running":
            os.utime(rehearsals / name, (long_ago, long_ago))
    assert names(tmp_path / "runs") == {"killed"}


def grown(path: Path, *, marked: bool = True, days_ago: float = 2) -> Path:
    """A copy that `launcher stage` began so many days ago."""
    filled(path)
    if marked:
        with partial.growing(path):
            pass
    then = time.time() - days_ago * 24 * 3600
    for one in (*path.rglob("*"), path):
        os.utime(one, (then, then))
    return path


def test_copies_that_were_never_finished_go(tmp_path: Path) -> None:
    """Only marked ones, a day after anything in them changed last; a finished copy has another name and no mark."""
    repository = tmp_path / "cache" / "models" / "acme--tiny"
    grown(repository / "aaa.partial")
    grown(repository / "bbb.partial", marked=False)
    grown(repository / "ccc.partial", days_ago=0.5)
    grown(repository / "ddd")
    fresh = grown(repository / "eee.partial")
    (fresh / "data.bin").write_bytes(b"a chunk that came just now")
    grown(tmp_path / "cache" / "datasets" / "local--rows" / "fff.partial")
    found = {one.path.name for one in find_garbage(tmp_path / "runs", cache=tmp_path / "cache")}
    assert found == {"aaa.partial", "fff.partial"}


def test_a_copy_that_somebody_is_writing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However old its files look: its process holds the lock."""
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    folder = grown(tmp_path / "cache" / "models" / "acme--tiny" / "aaa.partial")
    with partial.growing(folder):
        assert names(tmp_path / "runs") == set()
    assert names(tmp_path / "runs") == {"aaa.partial"}


def test_a_partial_folder_behind_a_link_stays(tmp_path: Path) -> None:
    """Wherever the link stands on the way, and when the mark itself is one."""
    elsewhere = grown(tmp_path / "elsewhere" / "aaa.partial")
    models = tmp_path / "cache" / "models"
    (models / "acme--tiny").mkdir(parents=True)
    (models / "acme--tiny" / "aaa.partial").symlink_to(elsewhere)
    (models / "acme--other").symlink_to(elsewhere.parent)
    planted = grown(models / "acme--third" / "bbb.partial", marked=False)
    (planted / ".cache").symlink_to(elsewhere / ".cache")
    assert find_garbage(tmp_path / "runs", cache=tmp_path / "cache") == []


def test_a_planted_link_is_not_followed(finished: RunFolder, tmp_path: Path) -> None:
    """A checkpoint that is a link to somebody's folder is neither listed nor removed."""
    victim = filled(tmp_path / "precious")
    (finished.checkpoints / "step-000012").symlink_to(victim)
    result = CliRunner().invoke(main, ["gc", "--yes", "--runs", str(finished.path.parent)])
    assert result.exit_code == 0, result.output
    assert (victim / "data.bin").exists()
    assert not (finished.checkpoints / "step-000003").exists()


def test_without_yes_everything_is_only_shown(finished: RunFolder) -> None:
    """The default names what would go, and touches nothing."""
    result = CliRunner().invoke(main, ["gc", "--runs", str(finished.path.parent)])
    assert "would remove 3 folders" in result.stderr
    assert (finished.checkpoints / "step-000003").exists()
