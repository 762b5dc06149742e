"""named: adapters that no run trained (combined, reduced, of another tool), by their name in a folder of runs.

`<runs>/.adapters/NAME` is such an adapter, or a symbolic link to its folder. So the file system keeps two from taking
one name, and a folder that is removed takes its name with it. Tags, which any adapter may have, run's or not, are in
`<runs>/.adapters/tags.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.errors import ClusterError, ConflictError, RecipeError, TemporaryError
from launcher.facts.adapters import CONFIG, WEIGHTS
from launcher.runs.folder import RunFolder, make_folder, read_json, write_json
from launcher.runs.lock import hold, lock_path

_FOLDER = ".adapters"
_TAGS = "tags.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_PATIENCE_S = 30.0
"""Others hold the lock for the time of two small writes."""


def is_adapter(folder: Path) -> bool:
    """Whether PEFT's two files are there; False where that cannot be seen."""
    try:
        return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()
    except OSError:
        return False


def named_adapters(runs: Path) -> dict[str, Path]:
    """Name -> folder of every adapter here that no run trained; those whose folder is gone are left out."""
    found = sorted((runs / _FOLDER).glob("[!.]*"))
    return {path.name: path.resolve() for path in found if is_adapter(path)}


def named_adapter(runs: Path, name: str) -> Path | None:
    """The folder of one."""
    path = runs / _FOLDER / name
    return path.resolve() if _NAME.fullmatch(name) and is_adapter(path) else None


def name_of(runs: Path, folder: Path) -> str | None:
    """The name that a folder has here."""
    return next((name for name, path in named_adapters(runs).items() if path == folder), None)


def place_of(runs: Path, name: str) -> Path:
    """Where an adapter is written that was given a name and no folder."""
    return runs.resolve() / _FOLDER / name


def half_made(runs: Path) -> list[Path]:
    """Folders that are being written here, or were when their writer was killed; links are none."""
    found = sorted((runs / _FOLDER).glob(".*")) if not (runs / _FOLDER).is_symlink() else []
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def tags_of(runs: Path) -> dict[str, str]:
    """Tag -> run, or name of an adapter that no run trained; {} where the file is damaged."""
    return {str(label): str(owner) for label, owner in read_json(runs / _FOLDER / _TAGS).items()}


def refuse_name(text: str, what: str) -> None:
    """Refuse what is no name; `what`: tag | --name.

    Raises:
        RecipeError: with what a name is made of.
    """
    if not _NAME.fullmatch(text):
        raise RecipeError(f"{what} {text!r}: letters, digits, dot, dash and underscore, at most 63, first no sign")


def owner_of(runs: Path, name: str) -> str | None:
    """What a name stands for already, in words; None: it is free."""
    path = runs / _FOLDER / name
    if (runs / name / "plan.json").is_file():
        return "a run"
    if is_adapter(path):
        return "an adapter"
    owner = tags_of(runs).get(name)
    if owner is not None:
        return f"a tag of {owner}"
    reserved = name in (_TAGS, lock_path(RunFolder(path)).name)
    gone = path.is_symlink() and not path.exists()
    return "a file of the list of adapters" if reserved or (os.path.lexists(path) and not gone) else None


def refuse_taken(runs: Path, name: str) -> None:
    """Refuse a new adapter's name that stands for something else.

    Raises:
        RecipeError: it is no name. ConflictError: whose it is.
    """
    refuse_name(name, "--name")
    owner = owner_of(runs, name)
    if owner is not None:
        raise ConflictError(f"--name: {name!r} is the name of {owner} in {runs}; choose another --name")


def free_name(runs: Path, wanted: str) -> str:
    """`wanted` as a name, with a number where it stands for something else."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip("._-")[:55] or "adapter"
    number = 1
    while owner_of(runs, name := plain if number == 1 else f"{plain}-{number}") is not None:
        number += 1
    return name


def prepare(runs: Path, name: str) -> None:
    """Make room for an adapter that will be written to `place_of`: no link of that name that leads nowhere, no tag.

    Raises:
        ClusterError, TemporaryError: the list cannot be written.
    """
    with alone(runs):
        _forget(runs, name)


def register(runs: Path, folder: Path, wanted: str | None = None) -> str:
    """Give a folder a name here: `wanted` or the folder's, with a number if need be; the one it has where it has one.

    Raises:
        RecipeError, ClusterError, TemporaryError: the list cannot be written.
    """
    folder = folder.resolve()
    with alone(runs):
        known = name_of(runs, folder)
        if known is not None:
            return known
        name = free_name(runs, wanted or folder.name)
        _forget(runs, name)
        inside = folder.is_relative_to(runs.resolve())
        target = os.path.relpath(folder, runs.resolve() / _FOLDER) if inside else str(folder)
        (runs / _FOLDER / name).symlink_to(target)
    return name


def _forget(runs: Path, name: str) -> None:
    """Remove a link of this name that leads nowhere and the tags it had, which are not its successor's."""
    path = runs / _FOLDER / name
    if path.is_symlink() and not path.exists():
        path.unlink()
    tags = tags_of(runs)
    kept = {label: owner for label, owner in tags.items() if owner != name}
    if kept != tags and not is_adapter(path):
        write_tags(runs, kept)


def write_tags(runs: Path, tags: dict[str, str]) -> None:
    """Replace the tags; the caller is `alone`.

    Raises:
        ConflictError: the file there is damaged, and what it held would be lost.
    """
    path = runs / _FOLDER / _TAGS
    if path.exists():
        try:
            damaged = not isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
        except (OSError, ValueError):
            damaged = True
        if damaged:
            raise ConflictError(f"{path} cannot be read as JSON; mend it, or move it away and tag anew")
    write_json(path, tags)


@contextlib.contextmanager
def alone(runs: Path) -> Iterator[None]:
    """Be the only one who changes names and tags, for as long as the block lasts.

    Raises:
        RecipeError: there is no such folder of runs. ClusterError: it cannot be written, or belongs to somebody else.
        TemporaryError: somebody else has been changing them for half a minute.
    """
    folder = runs / _FOLDER
    if not runs.is_dir():
        raise RecipeError(f"{runs}: there is no folder of runs; name one with --runs")
    deadline = time.monotonic() + _PATIENCE_S
    try:
        make_folder(folder)
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(hold(RunFolder(folder), "adapters"))
                    break
                except ConflictError as error:
                    if time.monotonic() > deadline:
                        raise TemporaryError(f"{folder}: names of adapters are being changed: {error}") from error
                    time.sleep(0.02)
            yield
    except OSError as error:
        raise ClusterError(f"cannot write {folder}: {error.strerror}") from error
