"""Injected faults: how the variable is read, when a fault happens, and that it happens once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.runs.folder import RunFolder, read_json_lines
from launcher.worker import faults
from launcher.worker.faults import Fault, parse


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """An empty run folder."""
    return RunFolder.create(tmp_path, "faulty")


def arm(run: RunFolder, monkeypatch: pytest.MonkeyPatch, text: str, *, rank: int = 0, attempt: str = "1.0") -> None:
    """Arm this process as a rank of an attempt."""
    monkeypatch.setenv(faults.VARIABLE, text)
    faults.arm(run, rank=rank, attempt=attempt)


@pytest.fixture(autouse=True)
def disarmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test inherits the faults of another."""
    monkeypatch.setattr(faults, "_armed", None)


def test_clauses_are_read_with_what_they_leave_open() -> None:
    """Two clauses, one narrow, one wide."""
    assert parse("at=step, rank=1, step=25, do=kill; at=before_manifest,attempt=2,do=sleep:1.5,always;") == (
        Fault(at="step", do="kill", rank=1, step=25),
        Fault(at="before_manifest", do="sleep:1.5", attempt=2, always=True),
    )


def test_everything_wrong_is_said_at_once() -> None:
    """A typo in each clause: every one is named, with what there is."""
    with pytest.raises(RecipeError) as error:
        parse("at=stpe,do=kill;at=step,do=kil;at=step,do=kill,rank=one;at=step,do=kill,when=now;at=start,do=nan")
    text = str(error.value)
    for part in ("at=stpe", "after_step", "do=kil ", "killall", "rank=one", "'when=now'", "only at=step"):
        assert part in text, part


def test_an_empty_variable_of_clauses_is_refused() -> None:
    """Separators alone are an accident."""
    with pytest.raises(RecipeError, match="an example"):
        parse(" ; ")


def test_without_the_variable_nothing_happens(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is written and no place does anything."""
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    faults.arm(run, rank=0, attempt="1.0")
    faults.at("step", rank=0, step=1)
    assert not run.faults.exists()


def test_a_fault_happens_at_its_place_only(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank, step or stage passes."""
    arm(run, monkeypatch, "at=step,rank=1,step=3,do=enospc")
    for stage, rank, step in (("step", 0, 3), ("step", 1, 2), ("after_step", 1, 3)):
        faults.at(stage, rank=rank, step=step)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        faults.at("step", rank=1, step=3)


def test_a_fault_happens_once_in_a_run(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The retry passes the place, and the mark says who did it, where and when."""
    arm(run, monkeypatch, "at=step,step=3,do=raise", rank=1)
    with pytest.raises(RuntimeError, match="injected fault"):
        faults.at("step", rank=1, step=3)
    arm(run, monkeypatch, "at=step,step=3,do=raise", attempt="1.1")
    faults.at("step", rank=0, step=3)
    (mark,) = read_json_lines(run.faults / "000.json")
    assert (mark["rank"], mark["step"], mark["attempt"], mark["do"]) == (1, 3, "1.0", "raise")
    assert mark["time_s"] > 0


def test_always_lifts_the_limit(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash loop needs a fault that comes back."""
    arm(run, monkeypatch, "at=step,do=raise,always")
    for step in (1, 2):
        with pytest.raises(RuntimeError):
            faults.at("step", rank=0, step=step)
    assert len(list(read_json_lines(run.faults / "000.json"))) == 2


def test_attempts_are_counted_in_the_order_they_started(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second attempt is the second, whatever its job's number, and on a rank that looks before it is recorded."""
    run.record("started", attempt="7.0")
    arm(run, monkeypatch, "at=step,attempt=2,do=raise", attempt="7.0")
    faults.at("step", rank=0, step=1)
    arm(run, monkeypatch, "at=step,attempt=2,do=raise", attempt="99.0")
    with pytest.raises(RuntimeError):
        faults.at("step", rank=0, step=1)


PROGRAM = """
import sys
from pathlib import Path
from launcher.runs.folder import RunFolder
from launcher.worker import faults
faults.arm(RunFolder(Path(sys.argv[1])), rank=int(sys.argv[2]), attempt="1.0")
print("ready", flush=True)
sys.stdin.readline()
faults.at("step", rank=int(sys.argv[2]), step=1)
print("passed", flush=True)
"""


def rank_process(run: RunFolder, text: str, rank: int = 0) -> subprocess.Popen[str]:
    """A process that arms itself and reaches step 1 when it is sent a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run.path), str(rank)],
        env=os.environ | {faults.VARIABLE: text, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("kill", -signal.SIGKILL),
        ("term", -signal.SIGTERM),
        ("usr2", -signal.SIGUSR2),
        ("segv", -signal.SIGSEGV),
        ("abort", -signal.SIGABRT),
        ("exit0", 0),
        ("memory", 1),
    ],
)
def test_a_process_ends_as_the_fault_says(run: RunFolder, action: str, code: int) -> None:
    """Each way of dying is the real one: the signal, or the exit code."""
    process = rank_process(run, f"at=step,do={action}")
    said, _ = process.communicate("\n", timeout=60)
    assert process.returncode == code
    assert "passed" not in said


def test_killall_takes_the_whole_attempt(run: RunFolder) -> None:
    """One rank reaches the place, the other dies while it waits."""
    text = "at=step,rank=0,do=killall"
    waiting, killer = rank_process(run, text, rank=1), rank_process(run, text, rank=0)
    killer.communicate("\n", timeout=60)
    assert waiting.wait(timeout=60) == killer.returncode == -signal.SIGKILL


def test_killall_spares_a_stranger_with_an_old_number(run: RunFolder) -> None:
    """The number of a rank that ended may belong to somebody else now."""
    stranger = rank_process(run, "at=step,rank=9,do=kill")
    text = "at=step,do=killall"
    killer = rank_process(run, text, rank=1)
    file = run.faults / "1.0" / "rank-0.json"
    file.write_text(json.dumps({"pid": stranger.pid, "start_ticks": 1}))
    killer.communicate("\n", timeout=60)
    said, _ = stranger.communicate("\n", timeout=60)
    assert stranger.returncode == 0
    assert "passed" in said


def test_a_child_left_behind_names_its_run(run: RunFolder) -> None:
    """It is in a session of its own and ignores SIGTERM, so only somebody who looks for the run finds it."""
    process = rank_process(run, "at=step,do=child")
    process.communicate("\n", timeout=60)
    found = subprocess.run(["pgrep", "--full", str(run.path)], text=True, capture_output=True, check=True)
    (child,) = [int(pid) for pid in found.stdout.split()]
    assert os.getsid(child) == child
    os.kill(child, signal.SIGKILL)
