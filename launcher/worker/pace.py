"""Pace: which rank the others wait for.

Collectives make all ranks equally slow, so a rank times what it does alone: from the beginning of a step to the end of
its first forward pass. The times travel with the votes of the step, each rank's in a place of its own, where summing
them up is collecting them; no collective is added. At ZeRO-3 the forward pass gathers weights and waits for the others
too: there only the time before it counts, and a slow GPU goes unnoticed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from launcher.worker.progress import Progress

_WINDOW_STEPS = 20
_WINDOW_S = 60.0
"""A window ends after so many steps, or so many seconds and a few steps."""
_FEW_STEPS = 3
_SLOW = 2.0
"""Slow: so many times the median of the other ranks, in so many windows in a row..."""
_WINDOWS = 3
_WORTH = 0.05
"""... and so that it costs this share of the time at least."""


class Stopwatch:
    """One rank's own time in a step."""

    def __init__(self, module: nn.Module, *, device: torch.device, zero_stage: int) -> None:
        self._gpu = torch.cuda.Event if device.type == "cuda" else None
        self._running = False
        self._began: Any = None
        self._ended: Any = None
        if zero_stage == 3:
            module.register_forward_pre_hook(self._mark, prepend=True)
        else:
            module.register_forward_hook(self._mark)

    def start(self) -> None:
        """A step begins."""
        self._began, self._ended, self._running = self._now(), None, True

    def read_s(self) -> float:
        """Seconds of the step that began last; once its first forward pass is through, and the GPU with it."""
        if self._began is None or self._ended is None:
            return 0.0
        if self._gpu is not None:
            return float(self._began.elapsed_time(self._ended)) / 1e3
        return float(self._ended - self._began)

    def _now(self) -> Any:
        if self._gpu is None:
            return time.monotonic()
        event = self._gpu(enable_timing=True)
        event.record()
        return event

    def _mark(self, *_: Any) -> None:
        if self._running:
            self._ended, self._running = self._now(), False


@dataclass(kw_only=True)
class Stragglers:
    """What rank 0 makes of the times of all ranks."""

    hosts: Sequence[str]
    """Of each rank."""
    share: float = 1.0
    """Of a rank's work that is timed: one micro-batch of so many."""
    slow: dict[str, Any] | None = None
    """rank, host, times (as long as the median of the others): as `status` shows it."""
    _own_s: list[float] = field(default_factory=list)
    _steps: int = 0
    _wall_s: float = 0.0
    _suspect: int = -1
    _strikes: int = 0

    def heard(self, own_s: Sequence[float], wall_s: float) -> bool:
        """The ranks' own times of a step that took `wall_s`; whether `slow` may have changed."""
        self._own_s = [sum(pair) for pair in zip(self._own_s or [0.0] * len(own_s), own_s, strict=True)]
        self._steps, self._wall_s = self._steps + 1, self._wall_s + wall_s
        if self._steps < _WINDOW_STEPS and (self._wall_s < _WINDOW_S or self._steps < _FEW_STEPS):
            return False
        self._judge()
        self._own_s, self._steps, self._wall_s = [], 0, 0.0
        return True

    def _judge(self) -> None:
        slowest = max(range(len(self._own_s)), key=self._own_s.__getitem__)
        usual_s = median(self._own_s[:slowest] + self._own_s[slowest + 1 :])
        lost_s = self._own_s[slowest] - usual_s
        if lost_s < _WORTH * self._wall_s * self.share or self._own_s[slowest] < _SLOW * usual_s:
            self._suspect, self._strikes, self.slow = -1, 0, None
            return
        self._strikes = self._strikes + 1 if slowest == self._suspect else 1
        self._suspect, self.slow = slowest, None
        if self._strikes >= _WINDOWS:
            times = round(self._own_s[slowest] / max(usual_s, 1e-6), 1)
            self.slow = {"rank": slowest, "host": self.hosts[slowest], "times": times}


class Pace:
    """One rank's side: its own time among the votes, and on rank 0 what all of them mean."""

    def __init__(self, stopwatch: Stopwatch, *, rank: int, stragglers: Stragglers, progress: Progress) -> None:
        self._stopwatch = stopwatch
        self._rank = rank
        self._stragglers = stragglers
        self._progress = progress
        self._named = -1

    def start(self) -> None:
        """A step begins."""
        self._stopwatch.start()

    def votes(self) -> list[int]:
        """Microseconds of this rank in its place, zeros for the others."""
        places = [0] * len(self._stragglers.hosts)
        places[self._rank] = round(self._stopwatch.read_s() * 1e6)
        return places

    def heard(self, votes: Sequence[int], wall_s: float) -> None:
        """All ranks' microseconds of a step that took `wall_s`."""
        if self._rank != 0 or not self._stragglers.heard([vote / 1e6 for vote in votes], wall_s):
            return
        slow = self._stragglers.slow
        self._progress.slow(slow)
        if slow is not None and slow["rank"] != self._named:
            self._named = slow["rank"]
            self._progress.say(
                f"warning: rank {slow['rank']} on {slow['host']} takes {slow['times']:.1f} times as long as the "
                "others, and they wait for it"
            )
