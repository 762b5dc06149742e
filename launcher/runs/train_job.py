"""TrainJob: the only thing that is pickled, a path and nothing more.

It holds no state of the run: after a node failure Slurm runs the old pickle again, so a resume point in it would be
stale. It has no `checkpoint` method: submitit calls that on rank 0 only, in a signal handler, where a collective hangs.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

EARLY_SIGNAL = "LAUNCHER_EARLY_SIGNAL"
"""Environment variable that carries a stop signal from before the supervisor stood; the rank inherits it."""


def _note(number: int, _frame: FrameType | None) -> None:
    os.environ[EARLY_SIGNAL] = signal.Signals(number).name


@dataclass(frozen=True)
class TrainJob:
    """What every task of a job runs."""

    run_dir: str

    def __call__(self) -> None:
        """Supervise this task's rank, which is a child process; the training stack is imported there only.

        submitit's own handlers are replaced first. On USR2 its handler on rank 0 would requeue the job at once
        (limit above 10 minutes) or end it with an exception (10 minutes or less), before anything could be saved.

        Raises:
            SystemExit: the rank ended with a non-zero exit code.
        """
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, _note)
        from launcher.runs.supervisor import supervise

        code = supervise(Path(self.run_dir))
        if code:
            raise SystemExit(code)
