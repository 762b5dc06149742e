"""The page through which a rank says that it goes on: two processes, no lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from launcher.runs.pulse import Pulse


@contextmanager
def _rank(pulse: Pulse, code: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has the page; ended with the block."""
    assert pulse.descriptor is not None
    prelude = "from launcher.runs.pulse import Pulse; pulse = Pulse.from_environment()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + code],
        env={**os.environ, **pulse.environment},
        pass_fds=[pulse.descriptor],
        stdout=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_what_a_rank_beats_another_process_reads() -> None:
    """Phase, step, number and age of the newest beat."""
    pulse = Pulse.create()
    assert (pulse.read().beats, pulse.read().phase) == (0, "starting")
    with _rank(pulse, "pulse.beat('building'); pulse.beat('training', 7); print(1)") as rank:
        rank.wait(timeout=60)
    reading = pulse.read()
    assert (reading.phase, reading.step, reading.beats) == ("training", 7, 2)
    assert 0 <= reading.age_s < 60


def test_how_far_a_rank_came_does_not_depend_on_how_often_it_beat() -> None:
    """Position counts phases entered since the step changed; beats of one phase are free."""
    pulse = Pulse.create()
    for _ in range(3):
        pulse.beat("training", 7)
    pulse.beat("evaluating")
    pulse.beat()
    reading = pulse.read()
    assert (reading.step, reading.position, reading.beats) == (7, 1, 5)
    pulse.beat("training", 8)
    assert (pulse.read().step, pulse.read().position) == (8, 0)


def test_a_rank_that_beats_without_pause_and_is_stopped_at_any_moment_can_be_read() -> None:
    """The reader never waits and never sees half a beat: step and beat number always belong together."""
    pulse = Pulse.create()
    with _rank(pulse, "n = 0\nwhile True: n += 1; pulse.beat('training', n)") as rank:
        deadline = time.monotonic() + 60
        while pulse.read().beats < 1000:
            assert time.monotonic() < deadline
        for _ in range(300):
            os.kill(rank.pid, signal.SIGSTOP)
            reading = pulse.read()
            assert reading.step == reading.beats
            os.kill(rank.pid, signal.SIGCONT)
        assert all((reading := pulse.read()).step == reading.beats for _ in range(20_000))


@pytest.mark.parametrize("value", ["", "nonsense", "98765"])
def test_without_a_page_a_beat_does_nothing(value: str) -> None:
    """A rank started by hand, or one that inherited the variable but not the open file."""
    pulse = Pulse.from_environment({"LAUNCHER_PULSE_FD": value})
    pulse.beat("training", 3)
    assert (pulse.descriptor, pulse.read().beats) == (None, 0)


def test_an_open_file_that_is_something_else_is_not_written_to() -> None:
    """The number may belong to any file of a process that inherited the variable."""
    other = os.memfd_create("other")
    os.ftruncate(other, 4096)
    Pulse.from_environment({"LAUNCHER_PULSE_FD": str(other)}).beat("training", 3)
    assert os.pread(other, 4096, 0) == bytes(4096)
    os.close(other)


def test_a_phase_that_does_not_exist_is_refused() -> None:
    """A typing error would otherwise give the rank another limit."""
    with pytest.raises(ValueError, match="trainning"):
        Pulse.create().beat("trainning")
