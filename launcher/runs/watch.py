"""Watch: when a rank without a sign of life counts as hung.

Time in which the supervisor itself did not run (a suspended job or machine) does not count: both were stopped alike.
Light: no torch.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass

from launcher.runs.folder import RunFolder
from launcher.runs.pulse import PulseReading

DEFAULT_HANG_S = 600.0
"""Where the resolved recipe names no limit."""
JOINING_S = 960.0
"""The rank's own time-out for the rendezvous, and a minute: it can name the missing ranks, so it goes first."""
LEAVING_S = 300.0
"""A rank whose work is done but which does not exit (a library's clean-up) is ended after this long."""
_GENEROUS = {"starting": (6, 1800.0), "building": (12, 7200.0), "loading": (12, 7200.0), "finishing": (24, 14700.0)}
"""Phase -> hang limits and seconds, of which the longer counts. These phases read or write whole models, sometimes on
one rank while the others wait, and beat rarely: imports from a cold file system take minutes, a 70B model read by 32
ranks from a slow one an hour, and `finishing` covers the four hours that ranks wait for rank 0's artifact."""
_SLOW_SAVE = 5.0
"""Times the planned seconds of a checkpoint; a large one on a busy file system takes longer than any step."""
_TOLD_TO_STOP = (30.0, 3.0)
"""After a stop signal the scheduler's patience is short: seconds, and longest silences seen, of which the longer
counts (never more than the hang limit)."""
_LONGEST_NAP_S = 2.0
"""Between two looks no more than this counts as watched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long a rank may be silent."""

    hang_s: float
    save_s: float = 0.0
    """Seconds that the plan says a checkpoint takes."""

    @classmethod
    def of(cls, run: RunFolder) -> Limits:
        """From the run's resolved recipe and plan; defaults where they cannot be read (the rank will say why)."""
        import yaml

        hang_s, save_s = DEFAULT_HANG_S, 0.0
        with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
            hang_s = 60.0 * float(yaml.safe_load(run.resolved.read_text(encoding="utf-8"))["survival"]["hang_minutes"])
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
            save_s = float(json.loads(run.plan.read_text(encoding="utf-8"))["chosen"]["save_s"])
        return cls(hang_s=hang_s, save_s=save_s)

    def of_phase(self, phase: str) -> float | None:
        """Seconds of silence that are allowed in a phase; None: the job's time limit is the only one.

        Tokenizing has no limit: rank 0 counts a corpus of any size while the others wait.
        """
        if phase == "tokenizing":
            return None
        if phase == "joining":
            return JOINING_S
        if phase in ("done", "stopped"):
            return LEAVING_S
        if phase in _GENEROUS:
            times, least_s = _GENEROUS[phase]
            return max(times * self.hang_s, least_s, _SLOW_SAVE * self.save_s)
        return max(self.hang_s, _SLOW_SAVE * self.save_s) if phase == "saving" else self.hang_s


class Watch:
    """Counts a rank's silence, look by look."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._beats = -1
        self._looked_s: float | None = None
        self._longest_s = 0.0
        self._still_s = 0.0
        self.silent_s = 0.0
        """Watched time since the last beat."""

    def look(self, reading: PulseReading, now_s: float, *, stopped: bool, told_to_stop: bool) -> float | None:
        """The limit that the rank's silence has passed, or None.

        Args:
            reading: the pulse now.
            now_s: CLOCK_MONOTONIC.
            stopped: whether the process is in state T; then the hang limit counts in every phase.
            told_to_stop: whether a stop signal arrived; then a rank that has gone silent is given up sooner.
        """
        watched_s = 0.0 if self._looked_s is None else min(now_s - self._looked_s, _LONGEST_NAP_S)
        self._looked_s = now_s
        if reading.beats != self._beats:
            if reading.phase == "training":
                self._longest_s = max(self._longest_s, self.silent_s)
            self._beats, self.silent_s, self._still_s = reading.beats, 0.0, 0.0
            return None
        self.silent_s += watched_s
        self._still_s = self._still_s + watched_s if stopped else 0.0
        limit_s = self._limit(reading.phase, told_to_stop=told_to_stop)
        if limit_s is not None and self.silent_s >= limit_s:
            return limit_s
        return self._limits.hang_s if self._still_s >= self._limits.hang_s else None

    @property
    def suspicious(self) -> bool:
        """Silent for long enough to ask whether another rank's supervisor has raised the alarm."""
        return self.silent_s >= min(self._limits.hang_s / 2, 60.0)

    def _limit(self, phase: str, *, told_to_stop: bool) -> float | None:
        limit_s = self._limits.of_phase(phase)
        if told_to_stop and phase == "training":
            least_s, times = _TOLD_TO_STOP
            return min(self._limits.hang_s, max(least_s, times * self._longest_s))
        return limit_s
