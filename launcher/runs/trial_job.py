"""trial_job: what goes on with a trial when a rung's array has ended: `python -m launcher.runs.trial_job TRIAL_DIR`.

It does what `launcher trial TRIAL` does, but starts nothing again that a person has ended.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType

from launcher.errors import ConflictError, LauncherError
from launcher.runs.trial import advance, remember
from launcher.runs.trial_folder import Trial, read_trial
from launcher.runs.trial_standing import Standing

_PATIENCE_S = 120.0


def main(argv: list[str]) -> int:
    """Take the trial as far as it goes; the exit code of the error's class."""
    if len(argv) != 2:
        print("usage: python -m launcher.runs.trial_job TRIAL_DIR", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _leave)
    try:
        trial = read_trial(Path(argv[1]))
        standing = _advance(trial)
        remember(trial, standing)
    except LauncherError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return error.exit_code
    print(f"{trial.name}: {'finished' if standing.finished else f'rung {standing.rung + 1} was sent'}")
    return 0


def _leave(number: int, _frame: FrameType | None) -> None:
    """End in order: a lock that stayed behind on this node would keep everybody elsewhere out for a quarter hour."""
    sys.exit(128 + number)


def _advance(trial: Trial) -> Standing:
    """As far as it goes. Who sent this job may not have let go of the trial yet.

    Raises:
        LauncherError: as `advance`.
    """
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return advance(trial, lambda words: print(words, flush=True), by_hand=False, wait=False)
        except ConflictError:
            if time.monotonic() > until:
                raise
            time.sleep(5)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
