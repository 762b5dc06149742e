"""Checkpoints: collective saves that are whole or not there, and resume only from what verifies.

    checkpoints/
      step-000100/             appears by one rename, after everything in it is on disk
        manifest.json          written last: size and sha256 of every other file, ranks, stage, method, step
        rng-00000.pt ...       random number states, one per rank
        state.pt               what the loop needs besides the step
        engine.pt | zero/      the engine's own files
      .step-000200.<attempt>.tmp/       a save that has not finished, or never will
        share-00000.json ...            what each rank has written, while rank 0 waits for all of them
      .step-000100.<attempt>.old.tmp/   a checkpoint on its way out

A save in the background goes: copy (every rank, at once) - write (a thread of every rank) - complete (rank 0's thread,
as soon as it sees the shares of all ranks in the folder: a kill after that loses nothing of the save). Threads never
talk to other ranks; how a save ended travels with the votes that the loop sums in every step, so all ranks learn of it
at the same step.

Failures are agreed: where one rank cannot write, every rank raises the same error and the older checkpoints stay.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from launcher.errors import ConflictError, JobFailedError
from launcher.runs.fence import Fence, FencedError
from launcher.runs.folder import write_json
from launcher.worker import faults
from launcher.worker.generators import load_random_state, random_state
from launcher.worker.manifest import MANIFEST, compare, read_manifest, step_of, strangers
from launcher.worker.shelf import SHARE, SHARES_POLL_S, VISIBLE_S, WAIT_S, Identity, Shelf
from launcher.worker.snapshot import FolderWriter, HostMemory, NoRoomError, SnapshotWriter, Writer

__all__ = ["Checkpoints", "Identity", "Outcome", "Saves"]


class Saves(Protocol):
    """The part of an engine that a checkpoint needs."""

    def save(self, writer: Writer) -> None:
        """Hand this rank's state over; collective."""

    def load(self, folder: Path) -> None:
        """Restore it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a save ended, the same on every rank but for the times."""

    step: int
    path: Path | None
    """None where it failed."""
    problem: str | None
    seconds: float
    """From its beginning until it was on disk."""
    stall_s: float
    """How long training stood still for it."""
    bytes: int
    """Of the whole checkpoint; 0 where it failed, and on ranks other than 0."""


@dataclass(kw_only=True)
class _Flight:
    """A save on its way."""

    step: int
    started_s: float
    stall_s: float = 0.0
    thread: threading.Thread | None = None
    failure: Exception | None = None
    copied: threading.Event = field(default_factory=threading.Event)
    """The state may change: the copy of it is whole, or failed."""
    written: threading.Event = field(default_factory=threading.Event)
    """This rank's share is there, or failed."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """A rank failed: rank 0's thread waits for no share any more."""
    all_written_s: float | None = None
    """When rank 0 heard that every share is written; each must be visible VISIBLE_S later."""
    bytes: int = 0
    """Of the complete checkpoint; rank 0, when it is there."""
    moved_bytes: int = 0
    ended_s: float = field(default=0.0)

    @property
    def busy(self) -> bool:
        """Whether a thread of this rank is still at work."""
        return self.thread is not None and self.thread.is_alive()


class Checkpoints:
    """The checkpoints of one run. Public calls are collective but for `votes`; a single process needs no group."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        *,
        keep: int,
        fence: Fence | None = None,
        memory: HostMemory | None = None,
        waiting: Callable[[], None] | None = None,
    ) -> None:
        """`memory`: where copies for background saves go; `waiting` is called while a wait makes progress."""
        self._folder = folder
        self._identity = identity
        self._memory = memory or HostMemory()
        self._waiting = waiting or (lambda: None)
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._shelf = Shelf(folder=folder, identity=identity, keep=max(1, keep), fence=fence, rank=self._rank)
        self._flight: _Flight | None = None
        self.notices: list[str] = []
        """What was found damaged and skipped, in words."""
        self.reshaped: dict[str, int] | None = None
        """Ranks and stage that wrote the checkpoint loaded last, and these, where they are not the same."""

    # --- writing -------------------------------------------------------------------------------

    def save(self, step: int, engine: Saves, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`; on return it is complete, on disk and visible.

        `state` holds tensors and plain values, and is the same on every rank (rank 0's is written).

        Raises:
            JobFailedError: a rank could not write (disk full, quota); older checkpoints are untouched.
            FencedError: a newer attempt has begun.
        """
        outcome = self.save_now(step, engine, state)
        if outcome.path is None:
            raise JobFailedError(str(outcome.problem))
        return outcome.path

    def save_now(self, step: int, engine: Saves, state: dict[str, Any]) -> Outcome:
        """`save`, with what it took; a failure is told, not raised."""
        flight = _Flight(step=step, started_s=time.monotonic())

        def share() -> dict[str, Any]:
            writer = FolderWriter(self._shelf.unfinished(step), moved=partial(self._moved, flight))
            self._hand_over(engine, state, writer)
            if writer.failure is not None:
                raise writer.failure
            faults.at("after_share", rank=self._rank, step=step)
            return writer.files

        try:
            self._prepare(step)
            parts = self._together(f"write {self._shelf.unfinished(step)}", share)
            self._together(
                f"complete {self._shelf.final(step)}", lambda: self._on_rank_zero(lambda: self._complete(flight, parts))
            )
        except JobFailedError as error:
            self._sweep_up(step)
            return self._outcome(flight, str(error))
        flight.ended_s = time.monotonic()
        flight.stall_s = flight.ended_s - flight.started_s
        return self._outcome(flight, None)

    def begin(self, step: int, engine: Saves, state: dict[str, Any]) -> Outcome | None:
        """Copy the state of `step` to host memory and let a thread write it; None, or why that failed.

        `votes` and `heard` follow it; nothing else may be saved before it has landed (`join`). Until `votes` has been
        called, or it has landed, the state must not change: the thread is still copying.

        Raises:
            NoRoomError: on every rank, where one has too little memory for a copy.
        """
        if self._flight is not None:
            raise RuntimeError("a save is in flight; join it first")
        flight = _Flight(step=step, started_s=time.monotonic())
        writer = SnapshotWriter(self._memory, self._shelf.unfinished(step))

        def copied() -> str | None:
            self._hand_over(engine, state, writer)
            if isinstance(writer.failure, NoRoomError):
                return str(writer.failure)
            if writer.failure is not None:
                raise writer.failure
            writer.arrive()
            faults.at("snapshot", rank=self._rank, step=step)
            return None

        try:
            self._prepare(step)
            refusals = [told for told in self._together(f"copy the state of step {step}", copied) if told]
        except JobFailedError as error:
            self._sweep_up(step)
            return self._outcome(flight, str(error))
        if refusals:
            self._sweep_up(step)
            raise NoRoomError(refusals[0])
        self._flight = flight
        self._start(flight, partial(self._write_share, flight, writer))
        flight.stall_s = time.monotonic() - flight.started_s
        return None

    def votes(self) -> tuple[int, int, int]:
        """How far this rank's save is, to be summed over ranks: (share written or failed, failed, completed).

        Asked between the backward pass and the update, which must not change what is still being copied: this waits.
        """
        flight = self._flight
        if flight is None:
            return 0, 0, 0
        if not flight.copied.is_set():
            began_s = time.monotonic()
            flight.copied.wait()
            flight.stall_s += time.monotonic() - began_s
        resting = not flight.busy
        failed, completed = flight.failure is not None, flight.bytes > 0
        return int(flight.written.is_set()), int(resting and failed), int(resting and completed)

    def heard(self, votes: Sequence[int]) -> Outcome | None:
        """Act on the summed votes of a step; how the save ended, once it has. Collective only where one failed."""
        flight, (written, failed, completed) = self._flight, votes
        if flight is None or written < self._world:
            return None
        if failed:
            return self._land(flight, None)
        if completed:
            flight.ended_s = time.monotonic()
            return self._land(flight, flight.bytes)
        flight.all_written_s = flight.all_written_s or time.monotonic()
        return None

    def join(self) -> Outcome | None:
        """Wait for the save in flight, if there is one, and say how it ended."""
        flight = self._flight
        if flight is None:
            return None
        began_s = time.monotonic()
        try:
            self._wait(flight)
            self._together(f"write {self._shelf.unfinished(flight.step)}", lambda: _told(flight))
            flight.all_written_s = flight.all_written_s or time.monotonic()
            self._together(f"complete {self._shelf.final(flight.step)}", lambda: _ended(flight))
        except JobFailedError as error:
            flight.stall_s += time.monotonic() - began_s
            self._flight = None
            self._abandon(flight)
            return self._outcome(flight, str(error))
        flight.ended_s = time.monotonic()
        flight.stall_s += flight.ended_s - began_s
        return self._land(flight, flight.bytes)

    def _land(self, flight: _Flight, size: int | None) -> Outcome:
        """The save is over; where it failed the ranks exchange why."""
        self._flight = None
        if size is not None:
            return self._outcome(flight, None)
        try:
            self._together(f"write {self._shelf.final(flight.step)}", lambda: _told(flight))
        except JobFailedError as error:
            self._abandon(flight)
            return self._outcome(flight, str(error))
        raise RuntimeError(f"the save of step {flight.step} failed and no rank says why")

    def _outcome(self, flight: _Flight, problem: str | None) -> Outcome:
        ended_s = flight.ended_s or time.monotonic()
        return Outcome(
            step=flight.step,
            path=None if problem else self._shelf.final(flight.step),
            problem=problem,
            seconds=ended_s - flight.started_s,
            stall_s=flight.stall_s if flight.stall_s else ended_s - flight.started_s,
            bytes=flight.bytes,
        )

    # --- the parts of a save -------------------------------------------------------------------

    def _prepare(self, step: int) -> None:
        folder = self._shelf.unfinished(step)
        self._together(f"prepare {folder}", lambda: self._on_rank_zero(lambda: self._shelf.start(step)))

    def _complete(self, flight: _Flight, parts: list[dict[str, Any]]) -> None:
        flight.bytes = self._shelf.complete(flight.step, parts)

    def _sweep_up(self, step: int) -> None:
        """After a failure that all ranks know of."""
        self._on_rank_zero(lambda: self._shelf.give_up(step))

    def _abandon(self, flight: _Flight) -> None:
        """All ranks know that it failed: rank 0's thread ends before what it may be looking at goes."""
        flight.cancelled.set()
        if flight.thread is not None:
            flight.thread.join()
        self._sweep_up(flight.step)

    def _hand_over(self, engine: Saves, state: dict[str, Any], writer: Writer) -> None:
        """Everything that is this rank's, in the same order every time."""
        engine.save(writer)
        writer.write(f"rng-{self._rank:05d}.pt", random_state())
        if self._rank == 0:
            writer.write("state.pt", state)

    def _start(self, flight: _Flight, work: Callable[[], None]) -> None:
        """Do `work` in a thread that keeps its error. It dies with the process: a dead disk must not hold that up."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                flight.failure = error
            finally:
                flight.copied.set()
                flight.written.set()

        flight.thread = threading.Thread(target=run, name=f"save-{flight.step}", daemon=True)
        flight.thread.start()

    def _write_share(self, flight: _Flight, writer: SnapshotWriter) -> None:
        """In a thread: this rank's files, then the word that they are there; rank 0 goes on to complete."""
        writer.settle()
        flight.copied.set()
        files = writer.into(moved=partial(self._moved, flight))
        faults.at("after_share", rank=self._rank, step=flight.step)
        write_json(self._shelf.unfinished(flight.step) / SHARE.format(self._rank), files)
        flight.written.set()
        if self._rank == 0 and (parts := self._await_shares(flight)) is not None:
            self._complete(flight, parts)

    def _await_shares(self, flight: _Flight) -> list[dict[str, Any]] | None:
        """In rank 0's thread: what all ranks wrote, once they have; None where one has failed.

        A rank takes as long as its disk does. Once all have voted that they are done, their shares must show: a shared
        file system may be late with them, but not for ever.

        Raises:
            OSError: a share that was written does not show.
            FencedError: a newer attempt has begun.
        """
        while not flight.cancelled.is_set():
            late = flight.all_written_s is not None and time.monotonic() > flight.all_written_s + VISIBLE_S
            try:
                return self._shelf.shares(flight.step, self._world)
            except (OSError, ValueError):
                if late:
                    raise
            flight.cancelled.wait(SHARES_POLL_S)
        return None

    def _wait(self, flight: _Flight) -> None:
        """Until this rank's share is written; as long as bytes move, whoever watches is told."""
        moved = -1
        while not flight.written.wait(WAIT_S):
            if flight.moved_bytes != moved:
                moved = flight.moved_bytes
                self._waiting()

    def _moved(self, flight: _Flight, size: int) -> None:
        flight.moved_bytes += size
        if threading.current_thread() is threading.main_thread():
            self._waiting()

    # --- reading -------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """The newest checkpoint whose every byte verifies, or None where the run never finished one.

        Raises:
            JobFailedError: there are checkpoints and none verifies; training from step 0 would hide that.
        """
        self._together(f"sweep {self._folder}", lambda: self._on_rank_zero(self._shelf.sweep))
        found = self._listed()
        for path in found:
            trouble = [line for part in self._together(f"verify {path}", partial(self._damage, path)) for line in part]
            if not trouble:
                self._tell_lost(found[0], path)
                return path
            self._shelf.damaged.add(path)
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
        load_random_state(path, self._rank, int(read_manifest(path)["world_size"]))
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True)

    def _tell_lost(self, newest: Path, used: Path) -> None:
        lost = step_of(newest) - step_of(used)
        if lost:
            steps = "1 step of training is" if lost == 1 else f"{lost} steps of training are"
            self.notices.append(f"{steps} lost and done again: going on from {used.name}, not from {newest.name}")

    def _listed(self) -> list[Path]:
        """Finished checkpoints, newest first, in rank 0's view of the folder."""
        first = self._together(f"list {self._folder}", lambda: self._shelf.listed() if self._rank == 0 else [])[0]
        return [self._folder / name for name in first]

    def _damage(self, path: Path) -> list[str]:
        """What is wrong with this rank's share of a checkpoint's files; the ranks divide the hashing."""
        manifest = read_manifest(path)
        if not manifest:
            return [f"{MANIFEST} is missing or unreadable"] if self._rank == 0 else []
        names = sorted(manifest["files"])[self._rank :: self._world]
        problems = [compare(path / name, manifest["files"][name]) for name in names]
        if self._rank == 0:
            problems += strangers(path, manifest["files"].keys())
        return [problem for problem in problems if problem]

    def _reshaped(self, path: Path) -> dict[str, int] | None:
        manifest, identity = read_manifest(path), self._identity
        facts = {
            "from_world": int(manifest["world_size"]),
            "to_world": identity.world_size,
            "from_stage": int(manifest["zero_stage"]),
            "to_stage": identity.zero_stage,
        }
        same = facts["from_world"] == facts["to_world"] and facts["from_stage"] == facts["to_stage"]
        return None if same else facts

    def _refuse_other_run(self, path: Path) -> None:
        manifest = read_manifest(path)
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
        except FencedError as error:
            cause, outcome = error, (str(error), FencedError)
        except Exception as error:  # whatever it is, a rank that went away here would leave the others waiting
            cause, outcome = error, (f"rank {self._rank}: {_words(error)}", None)
        outcomes: list[Any] = [outcome]
        if dist.is_initialized() and dist.get_world_size() > 1:
            outcomes = [None] * dist.get_world_size()
            dist.all_gather_object(outcomes, outcome)
        failures = [error for error, _ in outcomes if error]
        fenced = [error for error, kind in outcomes if error and kind is FencedError]
        if fenced:
            raise FencedError(fenced[0]) from cause
        if failures:
            raise JobFailedError(f"could not {name}; checkpoints written before are untouched", *failures) from cause
        return [result for _, result in outcomes]


# --- files -------------------------------------------------------------------------------------


def _told(flight: _Flight) -> None:
    """A rank's error, where it has one."""
    if flight.failure is not None:
        raise flight.failure


def _ended(flight: _Flight) -> None:
    """The end of a rank's thread, and its error."""
    if flight.thread is not None:
        flight.thread.join()
    _told(flight)


def _words(error: Exception) -> str:
    """An error as a sentence; a file system's one with the path in front."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) if isinstance(error, RuntimeError | OSError) else f"{type(error).__name__}: {error}"
