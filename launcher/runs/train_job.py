"""train_job: what srun, or this machine's controller, starts for every rank: `python -m launcher.runs.train_job RUN`.

The path of the run folder is all that travels. submitit submits the job, but its own entry is not used: it would
unpickle a file of the submission folder, and whoever could write there would run code in our name. Nor are its signal
handlers: on USR2 rank 0's would requeue the job at once, or end it, before anything could be saved.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

EARLY_SIGNAL = "LAUNCHER_EARLY_SIGNAL"
"""Environment variable that carries a stop signal from before the supervisor stood; the rank inherits it."""


def task_words(python: list[str], run_dir: str) -> list[str]:
    """The command of one task; `python`: how Python is started, as argv."""
    return [*python, "-u", "-m", "launcher.runs.train_job", run_dir]


def run_of_task(word: str) -> Path:
    """The run folder that a job was given; in a job array (see runs/trial_array.py) the one that its index leads to."""
    index = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    return Path(word.replace("%a", index)).resolve() if index.isdecimal() else Path(word)


def without_pickle(executor_class: type, words: list[str]) -> type:
    """A class of submitit's executors that starts `words` in place of submitit's entry, and pickles nothing."""

    class Executor(executor_class):  # type: ignore[misc]
        @property
        def _submitit_command_str(self) -> str:
            return shlex.join(words)

        def _internal_process_submissions(self, delayed_submissions: list[Any]) -> list[Any]:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return [self._submit_command(self._submitit_command_str) for _ in delayed_submissions]

    return Executor


def nothing() -> None:
    """What submitit is told to run; the command that it submits is ours."""


def _note(number: int, _frame: FrameType | None) -> None:
    os.environ[EARLY_SIGNAL] = signal.Signals(number).name


def main(argv: list[str]) -> int:
    """Supervise this task's rank, a child process; the training stack is imported there only. Its exit code."""
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, _note)
    os.umask(0o077)
    if len(argv) != 2:
        print("usage: python -m launcher.runs.train_job RUN_DIR", file=sys.stderr)
        return 2
    from launcher.runs.supervisor import supervise
    from launcher.runs.variables import not_ours

    run_dir = run_of_task(argv[1])
    trouble = not_ours(run_dir)
    if trouble:
        print(f"error: run folder {run_dir}: {trouble}; nothing in it is read", file=sys.stderr)
        return 5
    show_logs(run_dir)
    return supervise(run_dir)


def show_logs(run_dir: Path) -> None:
    """Slurm makes the logs, for their owner alone; in a run that a group may read, it may read them, too."""
    from launcher.runs.folder import RunFolder, for_group, show_group

    logs = RunFolder(run_dir).logs
    for path in logs.iterdir() if for_group(logs) else ():
        show_group(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
