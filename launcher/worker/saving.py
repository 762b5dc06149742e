"""Saving: when a checkpoint is due, in the background or not, and what is said and recorded of it.

The loop asks for a save and passes on the votes of each step; what fails on the way is a warning and tried again when
the next save is due; what fails at the end of an attempt is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import JobFailedError
from launcher.runs.fence import FencedError
from launcher.runs.folder import RunFolder
from launcher.worker.checkpoint import Checkpoints, Outcome, Saves
from launcher.worker.place import Place
from launcher.worker.progress import Progress
from launcher.worker.snapshot import NoRoomError

GB = 1e9


@dataclass(kw_only=True)
class Saving:
    """One rank's side of all saves of an attempt; every call but `votes` is collective."""

    checkpoints: Checkpoints
    engine: Saves
    extra: Callable[[], dict[str, Any]]
    """What the method wants kept besides weights (adalora's allocation)."""
    background: bool
    folder: RunFolder
    place: Place
    progress: Progress
    predicted_s: float | None = None
    """What the plan says a save takes."""
    lead_s: float | None = None
    """Seconds between the warning of a stop and the end of the job."""
    saved_step: int = -1
    """Newest step of which a checkpoint is on disk."""
    _failed_step: int = -1
    _compared: bool = field(default=False)

    def votes(self) -> tuple[int, int, int]:
        """What this rank adds to a step's votes."""
        return self.checkpoints.votes()

    def heard(self, votes: Sequence[int]) -> None:
        """The summed votes of a step; notes a save that has landed."""
        self._note(self.checkpoints.heard(votes))

    def save(self, memory: Any) -> None:
        """A save that is due on the way; returns as soon as training may go on."""
        self.join()
        if memory.step in (self.saved_step, self._failed_step):
            return
        self._announce(memory.step)
        state = self._state(memory)
        if self.background:
            try:
                self._note(self.checkpoints.begin(memory.step, self.engine, state))
                return
            except NoRoomError as error:
                self.background = False
                self.progress.say(f"warning: {error}; checkpoints are written while training waits")
        self._note(self.checkpoints.save_now(memory.step, self.engine, state))

    def save_last(self, memory: Any) -> None:
        """The save before a stop: on return the checkpoint of this step is on disk.

        Raises:
            JobFailedError: it could not be written.
        """
        self.join()
        if memory.step == self.saved_step:
            return
        self._announce(memory.step)
        outcome = self.checkpoints.save_now(memory.step, self.engine, self._state(memory))
        self._note(outcome)
        if outcome.problem:
            raise JobFailedError(outcome.problem)

    def join(self) -> None:
        """Wait for a save on its way."""
        self._note(self.checkpoints.join())

    def _state(self, memory: Any) -> dict[str, Any]:
        return {"memory": dataclasses.asdict(memory), **self.extra()}

    def _announce(self, step: int) -> None:
        if self.place.rank != 0:
            return
        with contextlib.suppress(FencedError):  # the save itself finds a newer attempt, and then all ranks know
            self.folder.record("saving", **self.place.names, step=step)

    def _note(self, outcome: Outcome | None) -> None:
        """Remember, say and record how a save ended."""
        if outcome is None:
            return
        if outcome.path is None:
            self._failed_step = outcome.step
            self.progress.say(f"warning: no checkpoint of step {outcome.step}: {outcome.problem}")
            if self.place.rank == 0:
                self._record_failure(outcome)
            return
        self.saved_step = outcome.step
        self.progress.line(
            f"saved {outcome.path.name}  {outcome.bytes / GB:.3f} GB in {outcome.seconds:.1f} s, "
            f"training waited {outcome.stall_s:.2f} s"
        )
        if self.place.rank == 0:
            self.folder.record(
                "saved",
                **self.place.names,
                step=outcome.step,
                seconds=round(outcome.seconds, 3),
                stall_s=round(outcome.stall_s, 4),
                bytes=outcome.bytes,
            )
        self._compare(outcome)

    def _record_failure(self, outcome: Outcome) -> None:
        try:
            self.folder.record("save_failed", **self.place.names, step=outcome.step, error=outcome.problem)
        except OSError as error:  # the disk that is too full for a checkpoint may be too full for a line
            self.progress.say(f"warning: {self.folder.attempts.name} cannot be written: {error}")

    def _compare(self, outcome: Outcome) -> None:
        """Once: whether the first save took what the plan counts on."""
        if self._compared or self.lead_s is None:
            return
        self._compared = True
        if outcome.seconds > self.lead_s:
            predicted = "" if self.predicted_s is None else f", the plan says {self.predicted_s:.0f} s"
            self.progress.say(
                f"warning: the checkpoint took {outcome.seconds:.0f} s{predicted}; the job is told to stop only "
                f"{self.lead_s:.0f} s before its end, so a stop may lose the work since the last checkpoint; "
                "save more often (checkpoint.save_minutes) or on a faster file system"
            )
