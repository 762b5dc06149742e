"""A checkpoint appears by one rename or not at all, in the background or not; one process, no group."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import JobFailedError
from launcher.runs.fence import Fence, FencedError, claim
from launcher.runs.folder import RunFolder
from launcher.worker.checkpoint import Checkpoints, Identity, Outcome
from launcher.worker.snapshot import HostMemory
from tests.privileges import unavailable


class FakeEngine:
    """An engine with two small files and, where asked, a full disk."""

    def __init__(self, *, full_disk: bool = False) -> None:
        self._full_disk = full_disk

    def save(self, writer: Any) -> None:
        if self._full_disk:
            raise OSError(28, "No space left on device")
        writer.write("part/a.pt", {"weights": b"weights"})
        writer.write("b.pt", [1, 2, 3])

    def load(self, folder: Path) -> None:
        pass


@contextlib.contextmanager
def _file_limit(size: int) -> Iterator[None]:
    """No file of this process may become larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _checkpoints(
    folder: Path, keep: int = 2, fence: Fence | None = None, memory: HostMemory | None = None
) -> Checkpoints:
    identity = Identity(run_id="tiny-abcde", attempt="7.0", world_size=1, zero_stage=0, method="lora")
    return Checkpoints(folder, identity, keep=keep, fence=fence, memory=memory)


def test_a_full_disk_leaves_the_older_checkpoint_and_no_rubbish(tmp_path: Path) -> None:
    """The save fails with the reason; what was there stays and verifies."""
    checkpoints = _checkpoints(tmp_path)
    before = checkpoints.save(1, FakeEngine(), {})
    with pytest.raises(JobFailedError, match="No space left on device"):
        checkpoints.save(2, FakeEngine(full_disk=True), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoints.newest() == before


def test_pruning_never_touches_what_is_not_this_runs(tmp_path: Path) -> None:
    """A folder with another run's manifest, and anything not named like a checkpoint, stays."""
    checkpoints = _checkpoints(tmp_path, keep=1)
    foreign = checkpoints.save(1, FakeEngine(), {})
    manifest = json.loads((foreign / "manifest.json").read_text())
    (foreign / "manifest.json").write_text(json.dumps(manifest | {"run_id": "other-zzzzz"}))
    (tmp_path / "notes").mkdir()
    checkpoints.save(2, FakeEngine(), {})
    checkpoints.save(3, FakeEngine(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-000001", "step-000003"]


def _landed(checkpoints: Checkpoints) -> Outcome:
    """Steps go by until the save in flight has landed; one rank's votes are the sums."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        outcome = checkpoints.heard(checkpoints.votes())
        if outcome is not None:
            return outcome
    raise AssertionError("the save never landed")


def test_a_save_in_the_background_is_the_blocking_one_a_few_steps_later(tmp_path: Path) -> None:
    """Same files with the same bytes, found by the votes of the steps that follow; nothing unfinished is left."""
    random_state = torch.get_rng_state()
    blocking, background = _checkpoints(tmp_path / "a"), _checkpoints(tmp_path / "b")
    blocking.save(1, FakeEngine(), {"n": 1})
    torch.set_rng_state(random_state)
    assert background.begin(1, FakeEngine(), {"n": 1}) is None
    outcome = _landed(background)
    assert (outcome.path, outcome.problem) == (tmp_path / "b" / "step-000001", None)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["step-000001"]
    files = [json.loads((tmp_path / name / "step-000001" / "manifest.json").read_text())["files"] for name in "ab"]
    assert files[0] == files[1]
    assert background.newest() == outcome.path


class SlowMemory(HostMemory):
    """Host memory whose copies take until somebody allows them to end."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = threading.Event()

    def settle(self) -> None:
        """Copy, when allowed."""
        self.allowed.wait(60)
        super().settle()


def test_an_update_waits_until_the_copy_is_whole(tmp_path: Path) -> None:
    """The votes are asked for between backward and update: they return when the state may change, not before."""
    checkpoints = _checkpoints(tmp_path, memory=(memory := SlowMemory()))
    assert checkpoints.begin(1, FakeEngine(), {}) is None
    with ThreadPoolExecutor(1) as pool:
        votes = pool.submit(checkpoints.votes)
        with pytest.raises(TimeoutError):
            votes.result(timeout=0.3)
        memory.allowed.set()
        votes.result(timeout=60)
    outcome = checkpoints.join()
    assert outcome is not None
    assert outcome.stall_s >= 0.3


def test_waiting_for_a_save_ends_with_it_on_disk(tmp_path: Path) -> None:
    """Before the next save, a stop or the export; without a save in flight there is nothing to wait for."""
    checkpoints = _checkpoints(tmp_path)
    assert checkpoints.join() is None
    checkpoints.begin(1, FakeEngine(), {})
    outcome = checkpoints.join()
    assert outcome is not None
    assert outcome.path is not None
    assert checkpoints.newest() == outcome.path
    assert 0 < outcome.stall_s <= outcome.seconds


def test_a_save_without_votes_completes_by_itself(tmp_path: Path) -> None:
    """The votes only tell how it ended."""
    checkpoints = _checkpoints(tmp_path)
    checkpoints.begin(1, FakeEngine(), {})
    deadline = time.monotonic() + 60
    while not (tmp_path / "step-000001").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _checkpoints(tmp_path).newest() == tmp_path / "step-000001"
    assert _landed(checkpoints).path == tmp_path / "step-000001"


@pytest.mark.parametrize("way", ["votes", "join"])
def test_a_background_write_that_fails_is_told_and_leaves_what_was_there(way: str, tmp_path: Path) -> None:
    """The file is too large for the limit of this process; the next save, after that, succeeds."""
    checkpoints = _checkpoints(tmp_path)
    before = checkpoints.save(1, FakeEngine(), {})
    with _file_limit(100_000):
        checkpoints.begin(2, FakeEngine(), {"large": torch.zeros(100_000)})
        outcome = checkpoints.join() if way == "join" else _landed(checkpoints)
    assert outcome is not None
    assert outcome.path is None
    assert "state.pt needs 400000 bytes" in str(outcome.problem)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoints.newest() == before
    checkpoints.begin(3, FakeEngine(), {"large": torch.zeros(100_000)})
    assert _landed(checkpoints).path == tmp_path / "step-000003"


def test_a_folder_that_cannot_be_written_is_told_with_its_path(tmp_path: Path) -> None:
    """Something else stands where checkpoints should go (a read-only folder would not stop root)."""
    (tmp_path / "checkpoints").write_text("not a folder")
    outcome = _checkpoints(tmp_path / "checkpoints").begin(1, FakeEngine(), {})
    assert outcome is not None
    assert str(tmp_path / "checkpoints") in str(outcome.problem)


def test_a_newer_attempt_keeps_an_older_one_from_finishing_its_save(tmp_path: Path) -> None:
    """The copy is made, then the other attempt begins: no manifest, no rename, and an error of its own class."""
    run = RunFolder.create(tmp_path, "tiny")
    checkpoints = _checkpoints(run.checkpoints, fence=claim(run, "7.0"))
    checkpoints.save(1, FakeEngine(), {})
    with pytest.raises(FencedError, match=r"7\.0 was replaced by attempt 7\.1"):
        checkpoints.begin(2, FakeEngine(), {})
        claim(run, "7.1")
        _landed(checkpoints)
    assert [path.name for path in run.checkpoints.glob("step-*")] == ["step-000001"]
    assert not list(run.checkpoints.glob("*/manifest.json"))[1:]
    with pytest.raises(FencedError):
        checkpoints.save(3, FakeEngine(), {})


def test_sweeping_spares_what_a_newer_attempt_is_writing(tmp_path: Path) -> None:
    """Only what older attempts left goes."""
    run = RunFolder.create(tmp_path, "tiny")
    claim(run, "6.0")
    checkpoints = _checkpoints(run.checkpoints, fence=claim(run, "7.0"))
    claim(run, "8.0")
    for attempt in ("6.0", "8.0"):
        (run.checkpoints / f".step-000009.{attempt}.tmp").mkdir()
    (run.checkpoints / ".step-000001.6.0.old.tmp").mkdir()
    assert checkpoints.newest() is None
    assert [path.name for path in run.checkpoints.iterdir()] == [".step-000009.8.0.tmp"]


def test_a_checkpoint_that_did_not_verify_never_takes_the_place_of_a_good_one(tmp_path: Path) -> None:
    """Of the last two, the damaged one goes and the good one stays."""
    checkpoints = _checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, FakeEngine(), {})
    flip(tmp_path / "step-000002" / "b.pt")
    assert checkpoints.newest() == tmp_path / "step-000001"
    assert "1 step of training is lost" in checkpoints.notices[-1]
    checkpoints.save(3, FakeEngine(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file others may write": (lambda path: (path / "b.pt").chmod(0o664), "b.pt can be written by others"),
    "a folder others may write": (lambda path: (path / "part").chmod(0o777), "part can be written by others"),
    "somebody's file": (lambda path: os.chown(path / "b.pt", 4321, -1), "b.pt belongs to user 4321"),
    "a file that is not listed": (lambda path: (path / "part" / "c.pt").touch(0o600), "part/c.pt does not belong"),
    "a link": (lambda path: (path / "c.pt").symlink_to(path / "b.pt"), "c.pt does not belong"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_somebody_else_may_have_put_there_is_not_opened(name: str, tmp_path: Path) -> None:
    """DeepSpeed unpickles its files: what is not ours alone, with the right hash or without, is not loaded."""
    plant, words = FOREIGN[name]
    if name == "somebody's file" and os.geteuid() != 0:
        unavailable("only root can give files away")
    checkpoints = _checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, FakeEngine(), {})
    plant(tmp_path / "step-000002")
    assert checkpoints.newest() == tmp_path / "step-000001"
    assert words in checkpoints.notices[0]


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    """A run that never saved starts at step 0, quietly."""
    assert _checkpoints(tmp_path).newest() is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
