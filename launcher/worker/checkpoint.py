"""Checkpoints: collective saves that are whole or not there, and resume only from what verifies.

    checkpoints/
      step-000100/             appears by one rename, after everything in it is on disk
        manifest.json          written last: size and sha256 of every other file, ranks, stage, method, step
        rng-00000.pt ...       random number states, one per rank
        state.pt               what the loop needs besides the step
        engine.pt | zero/      the engine's own files
      .step-000200.<attempt>.tmp/   a save that has not finished, or never will

Failures are agreed: where one rank cannot write, every rank raises the same error and the older checkpoints stay.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from launcher.errors import ConflictError, JobFailedError
from launcher.runs.folder import write_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = re.compile(r"\.step-\d{6,}\.(.+)\.tmp")
_CHUNK_BYTES = 1 << 22


class Saves(Protocol):
    """The part of an engine that a checkpoint needs."""

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's state; returns the files this rank wrote."""

    def load(self, folder: Path) -> None:
        """Restore it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What a checkpoint belongs to; a resume must agree in all but the attempt."""

    run_id: str
    attempt: str
    world_size: int
    zero_stage: int
    method: str


class Checkpoints:
    """The checkpoints of one run. Every public call is collective; a single process needs no process group."""

    def __init__(self, folder: Path, identity: Identity, *, keep: int) -> None:
        self._folder = folder
        self._identity = identity
        self._keep = max(1, keep)
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self.notices: list[str] = []
        """What was found damaged and skipped, in words."""
        self.reshaped: dict[str, int] | None = None
        """Ranks and ZeRO stages that wrote the checkpoint loaded last and that read it, where they differ."""

    # --- writing -------------------------------------------------------------------------------

    def save(self, step: int, engine: Saves, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`; on return it is complete, on disk and visible.

        `state` holds tensors and plain values, and is the same on every rank (rank 0's is written).

        Raises:
            JobFailedError: a rank could not write (disk full, quota); older checkpoints are untouched.
        """
        final = self._folder / f"step-{step:06d}"
        unfinished = self._folder / f".step-{step:06d}.{self._identity.attempt}.tmp"
        try:
            self._together(f"prepare {unfinished}", lambda: self._on_rank_zero(lambda: _empty(unfinished)))
            parts = self._together(f"write {unfinished}", lambda: self._write_share(unfinished, engine, state))
            self._together(
                f"complete {final}", lambda: self._on_rank_zero(lambda: self._complete(unfinished, final, step, parts))
            )
        except JobFailedError:
            if self._rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return final

    def _write_share(self, folder: Path, engine: Saves, state: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Write and flush what is this rank's; name -> bytes and sha256."""
        files = engine.save(folder)
        files.append(_save_random_state(folder, self._rank))
        if self._rank == 0:
            torch.save(state, folder / "state.pt")
            files.append(folder / "state.pt")
        return {path.relative_to(folder).as_posix(): _seal(path) for path in files}

    def _complete(self, unfinished: Path, final: Path, step: int, parts: list[dict[str, Any]]) -> None:
        """Rank 0: manifest last, rename, then make room."""
        files = {name: facts for part in parts for name, facts in part.items()}
        there = {path.relative_to(unfinished).as_posix() for path in unfinished.rglob("*") if path.is_file()}
        if there != files.keys():
            raise OSError(f"files and shares disagree: {sorted(there ^ files.keys())}")
        for folder in [path for path in unfinished.rglob("*") if path.is_dir()]:
            _sync_folder(folder)
        identity = {name: getattr(self._identity, name) for name in self._identity.__slots__}
        write_json(
            unfinished / MANIFEST, {"schema": 1, "step": step, "time_s": time.time(), **identity, "files": files}
        )
        _sync_folder(unfinished)
        if final.exists():  # same step again after a resume: the old one was damaged or is replaced by its equal
            shutil.rmtree(final)
        unfinished.rename(final)
        _sync_folder(self._folder)
        self._prune(step)

    def _prune(self, newest: int) -> None:
        """Keep the last ones up to the step just written; what lies beyond it did not verify when we resumed."""
        steps = {path: int(match[1]) for path in self._folder.iterdir() if (match := _NAME.fullmatch(path.name))}
        good = sorted((path for path, step in steps.items() if step <= newest), key=steps.__getitem__)
        beyond = [path for path, step in steps.items() if step > newest]
        for path in good[: -self._keep] + beyond:
            if _manifest(path).get("run_id", self._identity.run_id) == self._identity.run_id:
                shutil.rmtree(path, ignore_errors=True)
        for path in self._folder.iterdir():
            match = _UNFINISHED.fullmatch(path.name)
            if match and match[1] != self._identity.attempt:
                shutil.rmtree(path, ignore_errors=True)

    # --- reading -------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """The newest checkpoint whose every byte verifies, or None where the run never finished one.

        Raises:
            JobFailedError: there are checkpoints and none verifies; training from step 0 would hide that.
        """
        found = self._listed()
        for path in found:
            trouble = [line for part in self._together(f"verify {path}", partial(self._damage, path)) for line in part]
            if not trouble:
                return path
            self.notices.append(f"{path.name} is damaged and was skipped: {'; '.join(trouble[:3])}")
        if found:
            raise JobFailedError(
                f"{self._folder} holds {len(found)} checkpoints and none is whole; "
                "move them away to start again from step 0",
                *self.notices,
            )
        return None

    def load(self, path: Path, engine: Saves) -> dict[str, Any]:
        """Restore engine and random states from a folder that `newest` returned; returns the saved `state`.

        Another number of ranks, or another ZeRO stage, may have written it; `reshaped` tells.

        Raises:
            ConflictError: it was written by another run or method, or its states cannot be read into these ranks.
        """
        self._refuse_other_run(path)
        engine.load(path)
        self.reshaped = self._reshaped(path)
        load_random_state(path, self._rank, int(_manifest(path)["world_size"]))
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True)

    def _listed(self) -> list[Path]:
        """Finished checkpoints, newest first, in rank 0's view of the folder."""

        def names() -> list[str]:
            found = [path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
            return sorted(found, key=lambda name: int(name[5:]), reverse=True)

        first = self._together(f"list {self._folder}", lambda: names() if self._rank == 0 else [])[0]
        return [self._folder / name for name in first]

    def _damage(self, path: Path) -> list[str]:
        """What is wrong with this rank's share of a checkpoint's files; the ranks divide the hashing."""
        manifest = _manifest(path)
        if not manifest:
            return [f"{MANIFEST} is missing or unreadable"] if self._rank == 0 else []
        world = dist.get_world_size() if dist.is_initialized() else 1
        names = sorted(manifest["files"])[self._rank :: world]
        problems = [_compare(path / name, manifest["files"][name]) for name in names]
        return [problem for problem in problems if problem]

    def _reshaped(self, path: Path) -> dict[str, int] | None:
        manifest, identity = _manifest(path), self._identity
        facts = {
            "from_world": int(manifest["world_size"]),
            "to_world": identity.world_size,
            "from_stage": int(manifest["zero_stage"]),
            "to_stage": identity.zero_stage,
        }
        same = facts["from_world"] == facts["to_world"] and facts["from_stage"] == facts["to_stage"]
        return None if same else facts

    def _refuse_other_run(self, path: Path) -> None:
        manifest = _manifest(path)
        names = {"method": "method", "run_id": "run"}
        problems = [
            f"{path.name} was saved with {words} {manifest.get(name)!r}, now it is {getattr(self._identity, name)!r}; "
            "resume with the old value"
            for name, words in names.items()
            if manifest.get(name) != getattr(self._identity, name)
        ]
        if problems:
            raise ConflictError(*problems)

    # --- agreement -----------------------------------------------------------------------------

    def _on_rank_zero(self, work: Callable[[], Any]) -> None:
        if self._rank == 0:
            work()

    def _together(self, name: str, work: Callable[[], Any]) -> list[Any]:
        """Do a rank's share and exchange the outcomes; every result, or the same error on every rank."""
        cause: Exception | None = None
        outcome: tuple[str | None, Any]
        try:
            outcome = (None, work())
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            cause, outcome = error, (f"rank {self._rank}: {error}", None)
        outcomes: list[Any] = [outcome]
        if dist.is_initialized() and dist.get_world_size() > 1:
            outcomes = [None] * dist.get_world_size()
            dist.all_gather_object(outcomes, outcome)
        failures = [error for error, _ in outcomes if error]
        if failures:
            raise JobFailedError(f"could not {name}; checkpoints written before are untouched", *failures) from cause
        return [result for _, result in outcomes]


# --- files -------------------------------------------------------------------------------------


def _empty(folder: Path) -> None:
    """A new, empty folder; what an earlier try of this attempt left there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)


def _seal(path: Path) -> dict[str, Any]:
    """Flush a file to disk and describe it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compare(path: Path, facts: dict[str, Any]) -> str | None:
    """One sentence if the file is not what the manifest says."""
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            return f"{path.name} has {size} of {facts['bytes']} bytes"
        return None if _sha256(path) == facts["sha256"] else f"{path.name} differs from its sha256"
    except OSError as error:
        return f"{path.name}: {error.strerror}"


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest, or {} where it is missing or not one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if isinstance(manifest.get("files"), dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- random numbers ----------------------------------------------------------------------------


def _save_random_state(folder: Path, rank: int) -> Path:
    """Every generator this process may draw from, as tensors and plain values (no pickled classes)."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (
            kind,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    path = folder / f"rng-{rank:05d}.pt"
    torch.save(state, path)
    return path


def load_random_state(folder: Path, rank: int, saved_ranks: int) -> None:
    """Restore this rank's generators; a rank that the saved run did not have gets states of its own.

    Those are seeded with the first 8 bytes of sha256(rank 0's saved torch state, then this rank's number as 8 bytes,
    little-endian): the same in every attempt from that checkpoint, and different for every rank.
    """
    if rank >= saved_ranks:
        first = torch.load(folder / "rng-00000.pt", map_location="cpu", weights_only=True)
        digest = hashlib.sha256(bytes(first["torch"].tolist()) + rank.to_bytes(8, "little")).digest()
        _seed_all(int.from_bytes(digest[:8], "little") >> 1)  # torch takes 63 bits without a sign
        return
    state = torch.load(folder / f"rng-{rank:05d}.pt", map_location="cpu", weights_only=True)
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
