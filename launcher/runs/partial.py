"""Partial: the folder beside its place in which a staged copy grows; marked as ours, and in use while a lock is held.

The mark lies in a subfolder that is removed before the copy is published. The lock goes with its process; where a file
system keeps no locks, a folder in which nothing has changed for a day counts as abandoned all the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.facts.hub import UNFINISHED

SUFFIX = ".partial"
MARK = "launcher-partial"
"""File in `<folder>/.cache`; the lock is on it."""


@contextlib.contextmanager
def growing(folder: Path) -> Iterator[None]:
    """Mark the folder, made where it is missing, and hold it: several processes may, `launcher gc` not beside them.

    Raises:
        OSError: it cannot be written.
    """
    mark = folder / UNFINISHED / MARK
    mark.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(mark, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: the age tells
            fcntl.flock(held, fcntl.LOCK_SH)
        yield
    finally:
        os.close(held)


def unmark(folder: Path) -> None:
    """Take the mark and what has not come whole away, before the folder becomes the copy."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def abandoned(cache: Path, *, now_s: float, after_s: float) -> Iterator[Path]:
    """Our own partial folders below a cache that nobody holds and in which nothing changed for `after_s` seconds."""
    for kind in ("models", "datasets", "templates"):
        for folder in sorted((cache / kind).glob(f"*/*{SUFFIX}")):
            linked = any(one.is_symlink() for one in (folder, folder.parent, folder.parent.parent))
            if linked or not _is_ours(folder) or now_s - _changed_s(folder) <= after_s:
                continue
            if not _is_held(folder):
                yield folder


def _is_ours(folder: Path) -> bool:
    mark = folder / UNFINISHED / MARK
    try:
        regular = mark.is_file() and not mark.is_symlink() and not mark.parent.is_symlink()
        return regular and folder.stat().st_uid == mark.stat().st_uid == os.getuid()
    except OSError:
        return False


def _changed_s(folder: Path) -> float:
    """When anything in it changed last: a download writes into files, which leaves the folder's own time alone."""
    return max(one.lstat().st_mtime for one in (folder, *folder.rglob("*")))


def _is_held(folder: Path) -> bool:
    try:
        file = os.open(folder / UNFINISHED / MARK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False
