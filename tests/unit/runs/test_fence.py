"""Only the newest attempt of a run may write, and an older one finds out."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from launcher.errors import ConflictError
from launcher.runs import fence
from launcher.runs.fence import Fence, FencedError, claim, replaced
from launcher.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "tiny")


def test_an_attempt_may_write_until_a_newer_one_begins(run: RunFolder) -> None:
    """The older one learns the newer one's name, as a conflict (exit code 7)."""
    old = claim(run, "11.0")
    old.check()
    new = claim(run, "11.1")
    new.check()
    with pytest.raises(FencedError, match=r"attempt 11\.0 was replaced by attempt 11\.1") as caught:
        old.check()
    assert isinstance(caught.value, ConflictError)
    assert caught.value.exit_code == 7


def test_every_rank_of_an_attempt_has_the_fence_of_its_rank_0(run: RunFolder) -> None:
    """What was claimed is found by name; an attempt that claimed nothing has none."""
    claimed = claim(run, "11.0")
    assert Fence.of(run, "11.0").number == claimed.number
    with pytest.raises(FencedError, match=r"attempt 12\.0 .* has no fence"):
        Fence.of(run, "12.0")


def test_the_same_attempt_started_twice_replaces_itself(run: RunFolder) -> None:
    """A process that was started again under its old name is newer than the one before."""
    first = claim(run, "11.0")
    claim(run, "11.0").check()
    with pytest.raises(FencedError):
        first.check()


def _claim_many(path: Path, attempt: str, count: int) -> list[int]:
    return [claim(RunFolder(path), attempt).number for _ in range(count)]


def test_attempts_that_begin_at_once_get_different_numbers(run: RunFolder) -> None:
    """Four processes claim 25 times each; no number is given twice, and none is left out."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        given = pool.starmap(_claim_many, [(run.path, f"{n}.0", 25) for n in range(4)])
    assert sorted(number for numbers in given for number in numbers) == list(range(1, 101))


def test_frequent_writers_look_only_now_and_then(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A glance soon after a look costs nothing; after GLANCE_S it looks again."""
    old = claim(run, "11.0")
    old.glance()
    claim(run, "11.1")
    old.glance()
    monkeypatch.setattr(fence, "GLANCE_S", 0.0)
    with pytest.raises(FencedError):
        old.glance()


def test_a_fenced_worker_writes_neither_ledger_nor_heartbeat(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder with a guard refuses; one without (status, supervisor) does not ask."""
    monkeypatch.setattr(fence, "GLANCE_S", 0.0)
    theirs = RunFolder(run.path, guard=claim(run, "11.0"))
    theirs.record("started")
    theirs.beat(step=1)
    claim(run, "11.1")
    before = run.attempts.read_bytes(), run.heartbeat.read_bytes()
    for write in (lambda: theirs.record("saved"), lambda: theirs.beat(step=2)):
        with pytest.raises(FencedError):
            write()
    assert (run.attempts.read_bytes(), run.heartbeat.read_bytes()) == before
    run.record("decided")


def test_what_may_be_swept_up_after(run: RunFolder) -> None:
    """Attempts before ours and unknown ones; never ours, never one that began after us."""
    claim(run, "10.0")
    ours = claim(run, "11.0")
    claim(run, "12.0")
    assert [ours.older(name) for name in ("10.0", "never-claimed", "11.0", "12.0")] == [True, True, False, False]


def test_whether_an_attempt_was_replaced(run: RunFolder) -> None:
    """True only where it had begun and a newer one came."""
    claim(run, "11.0")
    assert not replaced(run, "11.0")
    claim(run, "11.1")
    assert (replaced(run, "11.0"), replaced(run, "11.1"), replaced(run, "never")) == (True, False, False)
