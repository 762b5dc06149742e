"""Process: a process of this machine that can be told from a later one with the same number, and its descendants.

Read from /proc; a zombie counts as ended everywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A session leader; its number, start time and boot together never come back."""

    pid: int
    start_ticks: int
    """Clock ticks between boot and its start (/proc/PID/stat, field 22)."""
    boot_id: str
    host: str


def identify(pid: int) -> Process | None:
    """The process with this number, or None when it has ended (a zombie has)."""
    fields = _stat(pid)
    if fields is None:
        return None
    return Process(pid=pid, start_ticks=int(fields[19]), boot_id=_boot_id(), host=socket.gethostname())


def process_from_json(document: dict[str, Any] | None) -> Process | None:
    """Read back what job.json holds; None when it holds no process."""
    if not document:
        return None
    names = ("pid", "start_ticks", "boot_id", "host")
    return Process(**{name: document[name] for name in names})


def is_here(process: Process) -> bool:
    """Whether this machine, since this boot, is where the process was started."""
    return process.host == socket.gethostname() and process.boot_id == _boot_id()


def is_alive(process: Process) -> bool:
    """Whether that very process still runs on this machine."""
    return is_here(process) and identify(process.pid) == process


def end_session(process: Process, *, grace_s: float) -> None:
    """Ask the process group to end (SIGTERM), and kill what is left after `grace_s` seconds.

    Nothing is sent unless the number still belongs to that very process.
    """
    if not is_alive(process):
        return
    _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    if is_alive(process):
        _signal_group(process.pid, signal.SIGKILL)
    while is_alive(process):
        time.sleep(0.05)


# --- families ----------------------------------------------------------------------------------

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the new parent of descendants whose own parent ends, `setsid` ones included."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with(parent: int) -> None:
    """In a new child: ask the kernel to kill it when `parent` dies, however that happens."""
    end_with(parent, signal.SIGKILL)


def end_with(parent: int, number: signal.Signals) -> None:
    """The same with a signal that can be handled."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before the kernel was asked
        os.kill(os.getpid(), number)


def descendants(pid: int) -> list[int]:
    """Processes below `pid` that have not ended, parents before children."""
    children: dict[int, list[int]] = {}
    for number in numbers():
        fields = _stat(number)
        if fields is not None:
            children.setdefault(int(fields[1]), []).append(number)
    found = list(children.get(pid, []))
    for number in found:  # grows while it is walked
        found += children.get(number, [])
    return found


def numbers() -> list[int]:
    """Every process number of this machine."""
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def name(pid: int) -> str:
    """What it calls itself, for people; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """What a process is doing, as the kernel sees it."""

    state: str
    """/proc's letter: R running, S sleeping, D waiting for a device or file system, T stopped, t traced."""
    cpu_s: float
    """CPU time of all its threads so far."""

    @property
    def stopped(self) -> bool:
        """By SIGSTOP or a debugger: it cannot do anything, not even answer."""
        return self.state in "Tt"


def activity(pid: int) -> Activity | None:
    """What the process is doing now; None when it has ended."""
    fields = _stat(pid)
    if fields is None:
        return None
    ticks = int(fields[11]) + int(fields[12])
    return Activity(state=fields[0], cpu_s=ticks / os.sysconf("SC_CLK_TCK"))


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on; the second may hold spaces and brackets."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if not fields or fields[0] in "ZX" else fields


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
