"""Pulse: how a rank tells its supervisor that it goes on, through a page of memory that both have mapped.

No lock and no system call: a rank that holds the GIL for ever, or is stopped in the middle of a beat, must not be
able to hold up the process that watches it. Beats go to a ring of slots and the counter that names the newest slot is
written last; a reader that was held up until the ring came round sees it by the counter and looks again. No torch.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

PHASES = (
    "starting",
    "tokenizing",
    "joining",
    "building",
    "loading",
    "training",
    "evaluating",
    "saving",
    "finishing",
    "stopped",
    "done",
)
ORDERLY = ("stopped", "done")
"""A rank that says this before it exits has done what it had to do; any other exit is a death."""
DESCRIPTOR = "LAUNCHER_PULSE_FD"
"""Environment variable with the number of the open memory file."""

_MAGIC = int.from_bytes(b"lchpulse", "little")
_SIZE_BYTES = 4096
_COUNTER = 1
"""Which 8-byte word of the page holds the number of the newest beat; word 0 is the magic number."""
_SLOT = struct.Struct("=QqIId")
"""Beat number, step, phase, position, CLOCK_MONOTONIC in seconds."""
_SLOT_OFFSETS = tuple(range(64, 64 * 9, 64))
"""Of the ring; one cache line each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PulseReading:
    """What a rank said last."""

    phase: str
    step: int
    """Optimizer steps done."""
    position: int
    """Phases entered since the step changed. With `step` it says how far a rank came: ranks change phase at the same
    places of the program, whatever each of them beats within a phase."""
    beats: int
    """Beats so far; 0: the rank has not spoken yet."""
    age_s: float
    """Since the last beat (since the page was made, before the first)."""


class Pulse:
    """Both ends of the page; without a page (a rank started by hand) every beat does nothing."""

    def __init__(self, page: mmap.mmap | None, descriptor: int | None = None) -> None:
        self.descriptor = descriptor
        self._page = page
        self._words = memoryview(page).cast("Q") if page is not None else None
        self._beats = self._position = self._step = 0
        self._phase = PHASES[0]
        self._last = PulseReading(phase=PHASES[0], step=0, position=0, beats=0, age_s=0.0)
        self._made_s = time.monotonic()

    @classmethod
    def create(cls) -> Pulse:
        """A new page, for the supervisor; give `descriptor` and `environment` to the rank.

        Raises:
            OSError: no memory file can be made.
        """
        descriptor = os.memfd_create("launcher-pulse", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _SIZE_BYTES)
        pulse = cls(mmap.mmap(descriptor, _SIZE_BYTES), descriptor)
        if pulse._words is not None:
            pulse._words[0] = _MAGIC
        return pulse

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Pulse:
        """The page a supervisor made, for the rank; a null pulse when there is none or it is something else."""
        number = (os.environ if environ is None else environ).get(DESCRIPTOR, "")
        if not number.isdigit():
            return cls(None)
        try:
            page = mmap.mmap(int(number), _SIZE_BYTES)
        except (OSError, ValueError):  # the variable was inherited, the open file was not
            return cls(None)
        pulse = cls(page, int(number))
        return pulse if pulse._words is not None and pulse._words[0] == _MAGIC else cls(None)

    @property
    def environment(self) -> dict[str, str]:
        """What the rank's environment needs to find the page."""
        return {DESCRIPTOR: str(self.descriptor)}

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """Say "I go on": in this phase, after so many steps (None: as before). From the main thread only.

        Raises:
            ValueError: there is no such phase.
        """
        if phase is not None and phase not in PHASES:
            raise ValueError(f"no phase {phase!r}; there are {', '.join(PHASES)}")
        entered = phase is not None and phase != self._phase
        self._position = 0 if step not in (None, self._step) else self._position + entered
        self._phase, self._step = phase or self._phase, self._step if step is None else step
        if self._page is None or self._words is None:
            return
        beats = self._beats + 1
        where = _SLOT_OFFSETS[beats % len(_SLOT_OFFSETS)]
        told = (beats, self._step, PHASES.index(self._phase), self._position, time.monotonic())
        _SLOT.pack_into(self._page, where, *told)
        self._words[_COUNTER] = self._beats = beats

    def read(self) -> PulseReading:
        """The newest beat; never waits for the rank."""
        if self._page is None or self._words is None:
            return self._last
        for _ in range(100):  # again only when the rank went round the whole ring during one look
            beats = self._words[_COUNTER]
            if beats == 0:
                break
            where = _SLOT_OFFSETS[beats % len(_SLOT_OFFSETS)]
            number, step, phase, position, time_s = _SLOT.unpack_from(self._page, where)
            # Beat `beats + len(_SLOT_OFFSETS)` writes this slot again, and the counter tells it only afterwards.
            overtaken = self._words[_COUNTER] - beats >= len(_SLOT_OFFSETS) - 1
            if number == beats and not overtaken and phase < len(PHASES):
                age_s = max(0.0, time.monotonic() - time_s)
                self._last = PulseReading(phase=PHASES[phase], step=step, position=position, beats=beats, age_s=age_s)
                return self._last
        age_s = time.monotonic() - self._made_s
        if self._last.beats:
            return self._last
        return PulseReading(phase=PHASES[0], step=0, position=0, beats=0, age_s=age_s)
