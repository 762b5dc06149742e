"""Process: a process of this machine that can be told from a later one with the same number."""

from __future__ import annotations

import contextlib
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
