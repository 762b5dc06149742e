"""Shared memory that dead ranks left behind.

DeepSpeed's collectives on a CPU put one file of 69 MB per rank into /dev/shm and take it away when the rank ends in
order. A killed rank leaves it, a few dozen fill the node's memory. Only files of this user are removed, by DeepSpeed's
name for them, when no living process maps them and they are not fresh (one is made a moment before it is mapped).
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from launcher.runs import process

_FOLDER = Path("/dev/shm")
_PREFIX = "deepspeed_allreduce_buffer_"
_FRESH_S = 30.0


def sweep(folder: Path = _FOLDER, *, fresh_s: float = _FRESH_S) -> list[str]:
    """Remove what nobody uses any more; returns the names removed."""
    old = {path.name: path for path in _candidates(folder, fresh_s)}
    if not old:
        return []
    used = _mapped(set(old), folder)
    removed = []
    for name, path in old.items():
        if name not in used:
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(name)
    return removed


def _candidates(folder: Path, fresh_s: float) -> list[Path]:
    found = []
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                facts = path.lstat()
                if facts.st_uid == os.getuid() and time.time() - facts.st_mtime > fresh_s and not path.is_symlink():
                    found.append(path)
    return found


def _mapped(names: set[str], folder: Path) -> set[str]:
    """Which of the files some process maps; a process whose maps cannot be read is another user's."""
    found: set[str] = set()
    for pid in process.numbers():
        try:
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
        except OSError:
            continue
        if str(folder) in maps:
            found |= {name for name in names if f"{folder}/{name}" in maps}
    return found
