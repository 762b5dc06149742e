"""lost_srun: ends an srun that does not notice that its attempt is over.

Two nodes that lose each other, while the controller still sees both, leave srun waiting for the last word of a rank
it cannot hear: Slurm has ended the step, srun has not, and the job would hold its nodes until the time limit (seen
with Slurm 22.05). This process stands beside srun in the batch script; once a rank has died or hung, which the rank's
supervisor has written down, srun gets PATIENCE_S to end. Then it is killed, and the script goes on to its last words,
which tell the cause and ask for the next attempt. Light: no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

from launcher.runs import process
from launcher.runs.folder import RunFolder
from launcher.runs.train_job import run_of_task

PATIENCE_S = 120.0
"""Longer than any orderly end: Slurm kills the other ranks KillWait (30 s) after it has asked them to stop."""
_POLL_S = 10.0


def is_over(run: RunFolder, attempt: str) -> bool:
    """Whether a rank of this attempt died or hung; listing, because NFS remembers that a name was not there."""
    try:
        names = os.listdir(run.errors / attempt)  # noqa: PTH208
    except OSError:
        return False
    return any(name.startswith("rank-") or name == "hung.json" for name in names)


def end_srun(shell: int) -> list[int]:
    """Kill every srun below the batch script's shell; their process numbers."""
    found = [pid for pid in process.descendants(shell) if process.name(pid) == "srun"]
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def watch(
    run: RunFolder, attempt: str, shell: int, *, patience_s: float = PATIENCE_S, poll_s: float = _POLL_S
) -> list[int]:
    """Wait while `shell` is our parent; what was killed, if anything."""
    over_s: float | None = None
    while os.getppid() == shell:
        if over_s is None and is_over(run, attempt):
            over_s = time.monotonic()
        if over_s is not None and time.monotonic() - over_s >= patience_s:
            return end_srun(shell)
        time.sleep(poll_s)
    return []


def main(arguments: list[str]) -> int:
    """`python -m launcher.runs.lost_srun RUN ATTEMPT SHELL`; ended by the script when srun has ended."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # meant for the ranks
    run, attempt, shell = RunFolder(run_of_task(arguments[0])), arguments[1], int(arguments[2])
    if killed := watch(run, attempt, shell):
        print(f"launcher: attempt {attempt} is over and srun ({killed[0]}) did not notice; it was ended", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
