"""Orphans: processes of a run whose supervisor is gone.

A supervisor that ends in any way of its own takes its rank's whole family with it. One that is killed with SIGKILL
takes the rank along (the kernel sees to that), but not what the rank had started: schedulers that track processes by
group or parent lose a child in a session of its own. Such processes carry their supervisor's name in their
environment. A guard, which waits for nothing but the supervisor's death, ends them; if it was killed too, the next
supervisor of the run on this machine does. Only processes of this user, of this run, whose supervisor is certainly
dead are touched. Light: no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from launcher.runs import process

SUPERVISOR = "LAUNCHER_SUPERVISOR"
"""Environment variable of a rank and all it starts: process number, start, boot and process-number space."""
_GUARD_S = 10.0
RUN = "LAUNCHER_SUPERVISED_RUN"
"""Environment variable of a rank and all it starts: the run folder."""


def environment(run_dir: Path) -> dict[str, str]:
    """What a rank's environment carries, so that its family can be found; called by its supervisor."""
    return {SUPERVISOR: _identity(os.getpid()), RUN: str(run_dir)}


def guard(run_dir: Path) -> None:
    """Leave a process that outlives this one by a moment and ends its orphans.

    It is a session of its own and nobody's child, so that what ends this process does not end it too; it holds no
    output open. Call it before the process adopts orphans, and with stop signals blocked.
    """
    reading, writing = os.pipe()  # nobody writes: reading ends when this process, the only holder, does
    first = os.fork()
    if first == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                os.close(writing)
                _stand_guard(reading, run_dir)
        finally:
            os._exit(0)
    os.close(reading)
    os.waitpid(first, 0)


def _stand_guard(reading: int, run_dir: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    os.dup2(reading, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    os.read(3, 1)
    deadline = time.monotonic() + _GUARD_S
    while end_orphans(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)


def end_orphans(run_dir: Path) -> list[str]:
    """Kill what dead supervisors of this run left on this machine; returns "name (number)" of each."""
    ended = []
    for pid in process.numbers():
        carried = _carried(pid)
        if carried.get(RUN) != str(run_dir) or not _is_gone(carried.get(SUPERVISOR, "")):
            continue
        told = f"{process.name(pid)} ({pid})"
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            ended.append(told)
    return ended


def _identity(pid: int) -> str:
    """Number:start:boot:space; the space is the process-number namespace, because numbers mean nothing outside it."""
    seen = process.identify(pid)
    return f"{pid}:{seen.start_ticks}:{seen.boot_id}:{_space()}" if seen else ""


def _is_gone(identity: str) -> bool:
    """Whether the supervisor named was of this boot and space and runs no more."""
    parts = identity.split(":")
    if len(parts) != 4 or not parts[0].isdigit() or parts[3] != _space():
        return False
    here = process.identify(os.getpid())
    if here is None or parts[2] != here.boot_id:
        return False
    return _identity(int(parts[0])) != identity


def _carried(pid: int) -> dict[str, str]:
    """Our two variables in a process's environment; empty for processes of others."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in raw.split(b"\0"))
    return {
        key.decode(): value.decode(errors="replace")
        for key, _, value in pairs
        if key in (b"LAUNCHER_SUPERVISOR", b"LAUNCHER_SUPERVISED_RUN")
    }


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")  # noqa: PTH115 - names no file
    except OSError:
        return ""
