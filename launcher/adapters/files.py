"""files: a result appears complete or not at all; files that do not open are a user's error with their name."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from launcher.errors import ClusterError, ConflictError, ModelError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextlib.contextmanager
def appearing(target: Path, option: str) -> Iterator[Path]:
    """A folder to fill beside `target`, which becomes `target` when the block ends; `option` names another target.

    Whatever ends the block, nothing half-written is left, nor a parent folder that was made for it.

    Raises:
        ConflictError: the target exists, or came to be meanwhile. ClusterError: it cannot be written.
    """
    if target.exists() or target.is_symlink():
        raise _taken(target, option)
    made: list[Path] = []
    temporary = None
    try:
        made = _make_parents(target.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        if target.exists() or target.is_symlink():
            raise _taken(target, option)
        temporary.rename(target)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            beside = str(error.filename or "").startswith(str(target.parent))
            why = error.strerror if beside or error.errno in _FULL else str(error)
            raise ClusterError(f"{target}: was not written ({why}); another folder is named with {option}") from error
        if isinstance(error, SafetensorError):
            raise ClusterError(f"{target}: cannot be written: {error}") from error
        raise


def _taken(target: Path, option: str) -> ConflictError:
    return ConflictError(f"{target} exists already; name another folder with {option}, or move it away")


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and what is missing above it; those that were made, outermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    missing.reverse()
    for at, path in enumerate(missing):
        try:
            path.mkdir(exist_ok=True)
        except OSError:
            for done in reversed(missing[:at]):
                done.rmdir()
            raise
    return missing


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ModelError: it is none, or torn.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error}); copy it again") from error
