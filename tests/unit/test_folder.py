"""The run folder: names, atomic writes, the ledger."""

from __future__ import annotations

import json
import multiprocessing
import stat
from pathlib import Path

import pytest

from launcher.runs.folder import RunFolder, append_json_line, read_json_lines, write_atomic


def test_a_new_run_is_private_and_named_after_its_recipe(tmp_path: Path) -> None:
    """Other users of a shared file system can neither list nor read a run."""
    run = RunFolder.create(tmp_path / "runs", "tiny")
    assert run.run_id.startswith("tiny-")
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert {path.name for path in run.path.iterdir()} == {"checkpoints", "logs", "rendezvous", "submission"}


def test_two_runs_of_one_recipe_never_share_a_folder(tmp_path: Path) -> None:
    """Ids are random and claimed by mkdir."""
    assert len({RunFolder.create(tmp_path, "tiny").path for _ in range(50)}) == 50


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    """Readers see the old text or the new one, never half of it."""
    path = tmp_path / "value.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def _append_many(path: Path, writer: int) -> None:
    for number in range(200):
        append_json_line(path, {"writer": writer, "number": number, "filler": "x" * 500})


def test_lines_of_two_writers_never_mix(tmp_path: Path) -> None:
    """A rank left over from an older attempt cannot tear the ledger."""
    path = tmp_path / "attempts.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(path, writer)) for writer in range(3)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    rows = list(read_json_lines(path))
    assert len(rows) == 600
    for writer in range(3):
        assert [row["number"] for row in rows if row["writer"] == writer] == list(range(200))


def test_a_torn_last_line_is_skipped(tmp_path: Path) -> None:
    """A kill in the middle of a write costs that line, not the file."""
    path = tmp_path / "metrics.jsonl"
    append_json_line(path, {"step": 1})
    with path.open("a") as file:
        file.write(json.dumps({"step": 2})[:5])
    assert list(read_json_lines(path)) == [{"step": 1}]
