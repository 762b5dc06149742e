"""Manifest: what a checkpoint's files must be, and whether they are."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"
CHECKPOINT = re.compile(r"step-(\d{6,})")
"""Name of a finished checkpoint."""


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def sizes_differ(path: Path) -> bool:
    """Whether a checkpoint just written reads back differently, by its manifest and its files' sizes."""
    files = read_manifest(path).get("files", {})
    try:
        return not files or any((path / name).stat().st_size != facts["bytes"] for name, facts in files.items())
    except OSError:
        return True


def strangers(folder: Path, names: Collection[str]) -> list[str]:
    """What must not be in a checkpoint: libraries open files by pattern, and unpickle what they find."""
    problems = []
    for path in (folder, *sorted(folder.rglob("*"))):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or name in names or name == MANIFEST):
            problems.append(f"{name} does not belong there")
        else:
            problems += [problem for problem in [not_private(path)] if problem]
    return problems


def not_private(path: Path) -> str | None:
    """Why a file or folder may have been put there by somebody else."""
    facts = path.lstat()
    if facts.st_uid != os.geteuid():
        return f"{path.name} belongs to user {facts.st_uid}, not to us ({os.geteuid()})"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return (
            f"{path.name} can be written by others (mode {stat.S_IMODE(facts.st_mode):o}); chmod go-w if you trust it"
        )
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare(path: Path, facts: dict[str, Any]) -> str | None:
    """One sentence if the file is not what the manifest says."""
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            return f"{path.name} has {size} of {facts['bytes']} bytes"
        return None if _sha256(path) == facts["sha256"] else f"{path.name} differs from its sha256"
    except OSError as error:
        return f"{path.name}: {error.strerror}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, or {} where it is missing or not one; its files are inside the folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
        return manifest if all(_is_entry(name, facts) for name, facts in files) else {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return {}


def _is_entry(name: str, facts: Any) -> bool:
    """Whether a manifest's line is one: a path that does not leave the folder, its size and its sha256."""
    path = PurePosixPath(name)
    inside = name.isprintable() and path.parts and not path.is_absolute() and ".." not in path.parts
    return bool(inside) and type(facts["bytes"]) is int and isinstance(facts["sha256"], str)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
