"""site_profile: where a new site profile goes. An existing file is never touched."""

from __future__ import annotations

import os
import re
from pathlib import Path

from launcher.errors import ClusterError, ConflictError, RecipeError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str) -> str:
    """The name, if a profile may be called so.

    Raises:
        RecipeError: it may not.
    """
    if not _NAME.fullmatch(name) or name.endswith((".learned", ".yaml", ".yml")):
        raise RecipeError(
            f"--site: {name!r} cannot name a profile; use letters, digits, - and _, such as --site mycluster"
        )
    return name


def site_name(cluster: str) -> str:
    """A profile's name from a cluster's: what a file name cannot hold becomes `-`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", cluster).strip("-_")[:63] or "slurm"


def check_free(path: Path) -> None:
    """Refuse a name that is taken.

    Raises:
        ConflictError: a file is there; names the next free one.
        ClusterError: its folder cannot be written.
    """
    if path.exists() or path.is_symlink():
        number = next(number for number in range(2, 1000) if not _numbered(path, number).exists())
        other = _numbered(path, number)
        raise ConflictError(f"{path} exists already and stays as it is; write another one: launcher init -o {other}")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ClusterError(f"{path} cannot be written; name a place that can: launcher init -o FILE")


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist yet, readable as the user's umask says.

    Raises:
        ConflictError: somebody made it meanwhile. ClusterError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        check_free(path)
    except OSError as error:
        raise ClusterError(
            f"{path} cannot be written ({error.strerror}); name another place: launcher init -o FILE"
        ) from error
