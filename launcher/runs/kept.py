"""kept: the checkpoints of a run that look whole from outside: names, manifests and sizes, nothing hashed.

Whether every byte is right is found by the job, before it loads one; this is what can be said without waiting.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.runs.folder import RunFolder

_NAME = re.compile(r"step-(\d{6,})")
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """One checkpoint folder."""

    path: Path
    step: int
    damage: str | None
    """What is wrong with it; None when it looks whole."""
    world_size: int | None = None
    """Ranks that wrote it."""


def kept_checkpoints(run: RunFolder) -> list[Kept]:
    """Checkpoints of the run, newest first; folders without such a name are not ours."""
    if not run.checkpoints.is_dir():
        return []
    named = [(path, _NAME.fullmatch(path.name)) for path in run.checkpoints.iterdir() if not path.is_symlink()]
    steps = sorted(((int(match[1]), path) for path, match in named if match and path.is_dir()), reverse=True)
    return [_looked_at(path, step) for step, path in steps]


def newest_whole(run: RunFolder) -> Kept | None:
    """The newest checkpoint that looks whole; None when none does."""
    return next((each for each in kept_checkpoints(run) if each.damage is None), None)


def _looked_at(path: Path, step: int) -> Kept:
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
        damage = next((words for name, facts in files if (words := _damage(path / name, facts["bytes"]))), None)
        return Kept(path=path, step=step, damage=damage, world_size=manifest.get("world_size"))
    except FileNotFoundError:
        return Kept(path=path, step=step, damage=f"{_MANIFEST} is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Kept(path=path, step=step, damage=f"{_MANIFEST} cannot be read")


def _damage(path: Path, expected_bytes: int) -> str | None:
    try:
        found = path.lstat().st_size
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None if found == expected_bytes else f"{path.name} has {found} of {expected_bytes} bytes"
