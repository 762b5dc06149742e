"""Shelf: the folder of a run's checkpoints, and rank 0's moves on it. Nothing here waits for another rank.

A checkpoint appears and goes by one rename, so whatever dies whenever, what has a checkpoint's name is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.runs.fence import Fence
from launcher.runs.folder import write_json
from launcher.worker import faults
from launcher.worker.manifest import CHECKPOINT, MANIFEST, read_manifest, sizes_differ, sync_folder
from launcher.worker.snapshot import private_folder

SHARE = "share-{:05d}.json"
"""Name of what a rank says it has written."""
_UNFINISHED = re.compile(r"\.step-\d{6,}\.(.+?)(?:\.old)?\.tmp")
VISIBLE_S = 60.0
"""How long another rank's file may take to appear on a shared file system."""
WAIT_S = 0.5
SHARES_POLL_S = 0.05
"""How often rank 0's thread looks for the shares of the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What a checkpoint belongs to; a resume must agree in all but the attempt."""

    run_id: str
    attempt: str
    world_size: int
    zero_stage: int
    method: str


@dataclass(kw_only=True)
class Shelf:
    """One run's checkpoints, as rank `rank` of one attempt may move them."""

    folder: Path
    identity: Identity
    keep: int
    fence: Fence | None
    rank: int
    damaged: set[Path] = field(default_factory=set)
    """Checkpoints that did not verify when the run resumed."""

    def final(self, step: int) -> Path:
        """The checkpoint of `step`, once it is whole."""
        return self.folder / f"step-{step:06d}"

    def unfinished(self, step: int) -> Path:
        """Where this attempt writes it."""
        return self.folder / f".step-{step:06d}.{self.identity.attempt}.tmp"

    def complete(self, step: int, parts: list[dict[str, Any]]) -> int:
        """Manifest last, rename, then make room; returns the bytes of all files.

        Raises:
            OSError: files are missing, or the disk is full.
            FencedError: a newer attempt has begun.
        """
        unfinished, final = self.unfinished(step), self.final(step)
        files = {name: facts for part in parts for name, facts in part.items()}
        for share in unfinished.glob("share-*.json"):
            share.unlink()
        self._expect(unfinished, files)
        faults.at("before_manifest", rank=self.rank, step=step)
        self.check_fence()
        for folder in [path for path in unfinished.rglob("*") if path.is_dir()]:
            sync_folder(folder)
        identity = {name: getattr(self.identity, name) for name in self.identity.__slots__}
        write_json(
            unfinished / MANIFEST, {"schema": 1, "step": step, "time_s": time.time(), **identity, "files": files}
        )
        sync_folder(unfinished)
        faults.at("before_rename", rank=self.rank, step=step)
        self.check_fence()
        if final.exists():  # same step again after a resume: the old one was damaged or is replaced by its equal
            self._discard(final)
        unfinished.rename(final)
        sync_folder(self.folder)
        self.damaged.discard(final)
        with contextlib.suppress(OSError):  # the new one is there; what could not go now goes with the next
            self._prune(final, step)
        return sum(int(facts["bytes"]) for facts in files.values())

    def _expect(self, folder: Path, files: dict[str, Any]) -> None:
        """Rank 0 sees every file of every rank, whole."""
        deadline = time.monotonic() + VISIBLE_S
        while True:
            found = [path for path in folder.rglob("*") if path.is_file()]
            # A listing may be old: a share had a name with a dot before it had its own.
            there = {path.relative_to(folder).as_posix() for path in found if not path.name.startswith(".share-")}
            short = [name for name in there & files.keys() if (folder / name).stat().st_size != files[name]["bytes"]]
            if there == files.keys() and not short:
                return
            if there - files.keys() or time.monotonic() > deadline:
                raise OSError(f"files and shares disagree: {sorted(there ^ files.keys()) + sorted(short)}")
            time.sleep(WAIT_S)

    def _prune(self, newest: Path, step: int) -> None:
        """Keep the last ones up to the one just written, which is looked at once more before anything goes.

        What lies beyond it, and what did not verify when we resumed, goes first: neither is worth a place.
        """
        if sizes_differ(newest):
            return
        steps = {path: int(match[1]) for path in self.folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name))}
        good = sorted((p for p, s in steps.items() if s <= step and p not in self.damaged), key=steps.__getitem__)
        useless = [path for path in steps if path not in good]
        for path in good[: -self.keep] + useless:
            if read_manifest(path).get("run_id", self.identity.run_id) == self.identity.run_id:
                faults.at("in_prune", rank=self.rank, step=step)
                self.check_fence()
                self._discard(path)
        self.sweep()

    def _discard(self, path: Path) -> None:
        """Take a checkpoint away by one rename, so that a kill never leaves half of one under its name."""
        doomed = path.with_name(f".{path.name}.{self.identity.attempt}.old.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what attempts before this one left unfinished."""
        for path in self.folder.iterdir():
            match = _UNFINISHED.fullmatch(path.name)
            if match and match[1] != self.identity.attempt and (self.fence is None or self.fence.older(match[1])):
                shutil.rmtree(path, ignore_errors=True)

    def start(self, step: int) -> None:
        """A new, empty folder to write to; what an earlier try of this attempt left there goes."""
        self.check_fence()
        shutil.rmtree(self.unfinished(step), ignore_errors=True)
        private_folder(self.unfinished(step))

    def give_up(self, step: int) -> None:
        """Remove what a failed save has written."""
        shutil.rmtree(self.unfinished(step), ignore_errors=True)

    def shares(self, step: int, world: int) -> list[dict[str, Any]]:
        """What every rank says it has written.

        Raises:
            OSError: not all of them have.
            FencedError: a newer attempt has begun.
        """
        if self.fence is not None:
            self.fence.glance()
        folder = self.unfinished(step)
        os.listdir(folder)  # noqa: PTH208 (refreshes NFS's view)
        paths = [folder / SHARE.format(rank) for rank in range(world)]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def listed(self) -> list[str]:
        """Names of finished checkpoints, newest first."""
        found = [path.name for path in self.folder.iterdir() if CHECKPOINT.fullmatch(path.name)]
        return sorted(found, key=lambda name: int(name[5:]), reverse=True)

    def check_fence(self) -> None:
        """Raise FencedError where a newer attempt has begun."""
        if self.fence is not None:
            self.fence.check()
