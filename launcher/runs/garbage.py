"""Garbage: what can be removed below a runs folder without losing anything a user may want back.

Only things inside folders that carry our own marks are ever removed, never through a symbolic link:

- temporary folders of saves and of token caches that nobody is writing any more,
- checkpoints of runs that finished (the result is verified; the adapter or model stays), all but those asked for,
- run folders whose job never started anything and that are older than a day,
- rehearsals that failed, were kept or were killed, a day later,
- copies that `launcher stage` began and nobody went on with for a day,
- what a killed combine or reduce left half-made among the adapters, a day later; never an adapter.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.runs import partial
from launcher.runs.folder import RunFolder
from launcher.runs.named import half_made
from launcher.runs.rehearsal_material import FOLDER as REHEARSALS
from launcher.runs.rehearsal_material import MARK
from launcher.runs.state import read_evidence
from launcher.runs.status import RunStatus, list_runs

ABANDONED_S = 24 * 3600.0
"""A temporary folder untouched for so long has no writer; a build or a save takes hours at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """One folder that may go."""

    path: Path
    bytes: int
    why: str


def find_garbage(
    parent: Path, *, checkpoints: bool = True, cache: Path | None = None, now_s: float | None = None
) -> list[Garbage]:
    """Everything removable below `parent`, largest first; `checkpoints` of finished runs included or not.

    `cache`: where models and data are staged; None = $LAUNCHER_CACHE, or .cache below `parent`.
    """
    now = time.time() if now_s is None else now_s
    staged = cache or Path(os.environ.get("LAUNCHER_CACHE") or parent / ".cache")
    found = [*_caches(parent, now), *_rehearsals(parent, now), *_partial(staged.expanduser(), now)]
    found += _half_made(parent, now)
    for status in list_runs(parent):
        run = RunFolder(Path(status.path))
        if run.path.parent != parent.resolve() or run.path.is_symlink():
            continue
        found += _of_run(run, status, now, checkpoints=checkpoints)
    return sorted(found, key=lambda one: -one.bytes)


def _of_run(run: RunFolder, status: RunStatus, now: float, *, checkpoints: bool) -> Iterator[Garbage]:
    if status.state == "NOT_SUBMITTED" and not read_evidence(run).events and _age_s(run.path, now) > ABANDONED_S:
        yield _garbage(run.path, "was never submitted")
        return
    if not status.ended or not run.checkpoints.is_dir():
        return
    for path in sorted(run.checkpoints.iterdir()):
        if path.is_symlink() or not path.is_dir():
            continue
        if path.name.startswith(".step-") and path.name.endswith(".tmp"):
            yield _garbage(path, f"an unfinished save of {run.run_id}, which has ended")
        elif path.name.startswith("step-") and status.state == "COMPLETED" and checkpoints:
            yield _garbage(path, f"a checkpoint of {run.run_id}, which finished and was verified")


def _caches(parent: Path, now: float) -> Iterator[Garbage]:
    tokens = parent / ".cache" / "tokens"
    for path in sorted(tokens.glob("*.building-*")):
        if path.is_dir() and not path.is_symlink() and _age_s(path, now) > ABANDONED_S:
            yield _garbage(path, "a token cache whose build was killed")


def _rehearsals(parent: Path, now: float) -> Iterator[Garbage]:
    for mark in sorted((parent / REHEARSALS).glob(f"*/{MARK}")):
        path = mark.parent
        if not path.is_symlink() and not path.parent.is_symlink() and _age_s(path, now) > ABANDONED_S:
            yield _garbage(path, "a rehearsal that is over")


def _partial(cache: Path, now: float) -> Iterator[Garbage]:
    for path in partial.abandoned(cache, now_s=now, after_s=ABANDONED_S):
        yield _garbage(path, "a staged copy that was never finished; launcher stage begins it anew")


def _half_made(parent: Path, now: float) -> Iterator[Garbage]:
    for path in half_made(parent):
        if _age_s(path, now) > ABANDONED_S:
            yield _garbage(path, "an adapter or model whose making was killed")


def _garbage(path: Path, why: str) -> Garbage:
    files = (one for one in path.rglob("*") if one.is_file() and not one.is_symlink())
    return Garbage(path=path, bytes=sum(one.stat().st_size for one in files), why=why)


def _age_s(path: Path, now: float) -> float:
    return now - path.stat().st_mtime


def remove(found: list[Garbage]) -> list[str]:
    """Remove them; returns what could not be removed, in words."""
    trouble: list[str] = []

    def note(_function: object, path: str, error: tuple[object, BaseException, object]) -> None:
        trouble.append(f"{path}: {error[1]}")

    for one in found:
        if one.path.is_symlink():
            trouble.append(f"{one.path}: has become a symbolic link; left alone")
            continue
        shutil.rmtree(one.path, onerror=note)
    return trouble
