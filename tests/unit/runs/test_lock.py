"""One submitter of a run at a time, told by a file; processes here are real ones."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launcher.errors import ConflictError
from launcher.runs import lock
from launcher.runs.folder import RunFolder
from launcher.runs.process import identify
from tests.unit.runs.material import make_run

LONG_AGO_S = lock.FOREIGN_AGE_S + 60


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "runs")


def left_behind(run: RunFolder, **changes: object) -> None:
    """A lock as another process would have left it; `changes` are fields of its holder."""
    held = replace(lock._myself("resume"), **changes)
    lock.lock_path(run).write_text(json.dumps(asdict(held)))


def ended_process() -> object:
    """The identity of a process of this machine that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = identify(child.pid)
    child.communicate(b"\n")
    return process


def test_the_lock_goes_with_its_holder(run: RunFolder) -> None:
    """Held inside the block, gone after it, after an error too."""
    with pytest.raises(ValueError, match="boom"), lock.hold(run, "submit"):
        assert lock.holder(run) is not None
        raise ValueError("boom")
    assert not lock.lock_path(run).exists()
    with lock.hold(run, "submit"):
        pass


def test_a_second_submitter_is_told_who_holds_it(run: RunFolder) -> None:
    """Exit 7 with host, process, user and time."""
    with lock.hold(run, "resume"):
        held = lock.holder(run)
        with pytest.raises(ConflictError) as caught, lock.hold(run, "resume"):
            pytest.fail("held twice")
    assert held is not None
    for word in (held.process.host, str(os.getpid()), held.user, time.strftime("%Y-"), "launcher resume"):
        assert word in str(caught.value)


def test_a_lock_of_a_dead_process_is_taken_over(run: RunFolder) -> None:
    """A launcher that was killed must not keep its run from going on."""
    left_behind(run, process=ended_process())
    with lock.hold(run, "resume"):
        held = lock.holder(run)
        assert held is not None and held.process.pid == os.getpid()
    assert not lock.lock_path(run).exists()


def test_a_lock_of_another_machine_is_believed_for_a_while(run: RunFolder) -> None:
    """Whether its process lives cannot be told from here; the message says for how long it is believed."""
    elsewhere = replace(lock._myself("resume").process, host="login2")
    left_behind(run, process=elsewhere)
    with pytest.raises(ConflictError, match=r"on login2 .*after 15 min"), lock.hold(run, "resume"):
        pytest.fail("taken over too early")
    left_behind(run, process=elsewhere, time_s=time.time() - LONG_AGO_S)
    with lock.hold(run, "resume"):
        pass


def test_a_lock_that_is_renewed_is_believed_for_as_long_as_it_is(run: RunFolder) -> None:
    """A trial that waits for days says now and then that it is at work: others must not send its next rung, too."""
    elsewhere, long_ago = replace(lock._myself("trial").process, host="login2"), time.time() - LONG_AGO_S
    left_behind(run, process=elsewhere, time_s=long_ago, renewed_s=time.time() - 60)
    with pytest.raises(ConflictError, match="on login2"), lock.hold(run, "trial"):
        pytest.fail("taken over from somebody who is at work")
    left_behind(run, process=elsewhere, time_s=long_ago, renewed_s=long_ago)
    with lock.hold(run, "trial"):
        pass


def test_only_who_holds_a_lock_renews_it_and_not_all_the_time(run: RunFolder) -> None:
    """The word is written anew when it is a minute old; a lock of others stays as it is, and so does none."""
    lock.renew(run)
    assert not lock.lock_path(run).exists()
    with lock.hold(run, "trial"):
        fresh = lock.lock_path(run).read_text()
        lock.renew(run)
        assert lock.lock_path(run).read_text() == fresh
        left_behind(run, token=json.loads(fresh)["token"], time_s=time.time() - LONG_AGO_S)
        lock.renew(run)
        held = lock.holder(run)
        assert held is not None and held.renewed_s is not None and time.time() - held.renewed_s < LONG_AGO_S / 2
    assert not lock.lock_path(run).exists()
    left_behind(run, process=ended_process(), time_s=time.time() - LONG_AGO_S)
    others = lock.lock_path(run).read_text()
    lock.renew(run)
    assert lock.lock_path(run).read_text() == others


def test_a_lock_of_another_namespace_is_not_judged_by_its_number(run: RunFolder) -> None:
    """A container has its own process numbers: not finding one here proves nothing."""
    left_behind(run, process=ended_process(), namespace="pid:[1]")
    with pytest.raises(ConflictError), lock.hold(run, "resume"):
        pytest.fail("taken over")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "x"}', "\0\0"])
def test_a_torn_lock_counts_as_being_written_until_it_is_old(run: RunFolder, text: str) -> None:
    """Its writer may be between creating and writing it."""
    path = lock.lock_path(run)
    path.write_text(text)
    with pytest.raises(ConflictError, match="about to submit"), lock.hold(run, "resume"):
        pytest.fail("taken over too early")
    then = time.time() - LONG_AGO_S
    os.utime(path, (then, then))
    with lock.hold(run, "resume"):
        pass


def test_a_planted_link_is_not_followed(run: RunFolder, tmp_path: Path) -> None:
    """Nothing is written through a symbolic link that somebody put there."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock.lock_path(run).symlink_to(victim)
    with pytest.raises(ConflictError, match="symbolic link"), lock.hold(run, "resume"):
        pytest.fail("followed")
    assert victim.read_text() == "precious"


def test_only_its_own_lock_is_removed(run: RunFolder) -> None:
    """Who was taken for dead and comes back leaves the new holder's lock alone."""
    with lock.hold(run, "resume"):
        left_behind(run, token="the next one's")
    assert lock.lock_path(run).exists()


def _compete(path: Path, start: object, results: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    try:
        with lock.hold(RunFolder(path), "resume"):
            results.put("won")  # type: ignore[attr-defined]
            start.wait()  # type: ignore[attr-defined]
    except ConflictError:
        results.put("lost")  # type: ignore[attr-defined]
        start.wait()  # type: ignore[attr-defined]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("_again", range(5))
def test_of_many_at_once_one_wins(run: RunFolder, left: bool, _again: int) -> None:
    """Real processes, on a free lock and on one left behind by a dead process."""
    if left:
        left_behind(run, process=ended_process())
    spawn = multiprocessing.get_context("fork")
    start, results = spawn.Barrier(6), spawn.Queue()
    racers = [spawn.Process(target=_compete, args=(run.path, start, results)) for _ in range(6)]
    for racer in racers:
        racer.start()
    outcomes = sorted(results.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join(60)
    assert outcomes == ["lost"] * 5 + ["won"]
