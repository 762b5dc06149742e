"""StopFlag: signals only raise a flag; the ranks agree on it at the next step boundary.

A Python handler does not run while the main thread waits inside a collective, and nothing collective may
happen inside one, so a handler that saved a checkpoint would hang or tear it. Light: no torch, because the
handlers must stand before the imports that take half a minute.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

EARLY_SIGNAL = "LAUNCHER_EARLY_SIGNAL"
"""Environment variable in which a signal is noted that came before these handlers stood."""


class StopFlag:
    """Remembers the first stop signal this process received."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
    """Never SIGUSR1: NCCL uses it."""

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason

    @property
    def raised(self) -> bool:
        """Whether this rank was told to stop."""
        return self.reason is not None

    def raise_(self, number: int, _frame: FrameType | None = None) -> None:
        """Signal handler: note the signal, nothing else."""
        if self.reason is None:
            self.reason = signal.Signals(number).name

    @classmethod
    def install(cls) -> StopFlag:
        """Take over the stop signals; one that arrived earlier counts.

        The supervisor starts the rank with these signals blocked, so that none ends it or is lost before the
        handlers stand. Data-loader processes would inherit the handlers; the worker has none.
        """
        flag = cls(os.environ.get(EARLY_SIGNAL))
        for number in cls.SIGNALS:
            signal.signal(number, flag.raise_)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, cls.SIGNALS)
        return flag
