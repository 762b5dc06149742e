"""The job of this machine: submitit's local executor and controller, with the manners of a Slurm job.

What submitit's own controller does not do: live in a session of its own (so that Ctrl-C or a closed terminal ends the
watching, not the training), name logs as Slurm's do, end the other ranks when one has failed, leave no process behind,
and decide between attempts whether the ranks are started again.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from submitit.local import local as submitit_local

from launcher.runs import process
from launcher.runs.folder import RunFolder, read_json_lines
from launcher.runs.policy import Action, Decision
from launcher.runs.request import JobRequest
from launcher.runs.sbatch import python_words
from launcher.runs.train_job import nothing, task_words, without_pickle

PEERS_MAY_FINISH_S = 8.0
"""After one rank has failed, the others have this long to notice by themselves and say so in their logs."""
_PAUSE_S = 1.0
"""Between two attempts; doubled while they follow each other fast."""
_LONGEST_PAUSE_S = 60.0
_POLL_S = 0.1
_RESTART = "LAUNCHER_RESTART"
"""What worker/place.py reads: the number of this start."""


class LocalExecutor(submitit_local.LocalExecutor):  # type: ignore[misc]
    """submitit's local executor for one JobRequest; the job id is the controller's process number."""

    def __init__(self, request: JobRequest) -> None:
        super().__init__(RunFolder(Path(request.run_dir)).submission)
        self._request = request

    def _submit_command(self, command: str) -> Any:
        """Start the controller in a new session."""
        request, run = self._request, RunFolder(Path(self._request.run_dir))
        controller = shlex.join([sys.executable, "-m", "launcher.runs.local", request.run_dir])
        # `exec`: the controller keeps the shell's process number, which is the job id.
        script = "\n".join(["set -e", *request.setup, f"exec {controller}"])
        with (run.logs / "controller.out").open("ab") as log:
            controlling = subprocess.Popen(
                ["/bin/bash", "-c", script],
                env=_environment(request, command),
                cwd=request.chdir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return submitit_local.LocalJob(
            folder=self.folder,
            job_id=str(controlling.pid),
            process=controlling,
            tasks=list(range(request.tasks_per_node)),
        )


def _environment(request: JobRequest, command: str) -> dict[str, str]:
    """The controller's environment: ours, the request's, and what submitit's controller reads."""
    return {
        **os.environ,
        **request.env,
        "CUDA_VISIBLE_DEVICES": _visible_gpus(request),
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_COMMAND": command,
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_NTASKS": str(request.tasks_per_node),
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(request.signal_lead_s),
        "SUBMITIT_LOCAL_TIMEOUT_S": "0",
        "SUBMITIT_LOCAL_WITH_SHELL": "",
        "SUBMITIT_STDERR_TO_STDOUT": "1",
    }


def _visible_gpus(request: JobRequest) -> str:
    """The first GPUs of those this shell may use; none when the job asks for none."""
    offered = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    wanted = request.gpus_per_node or 0
    devices = offered.split(",") if offered else [str(index) for index in range(wanted)]
    return ",".join(devices[:wanted])


class Controller(submitit_local.Controller):  # type: ignore[misc]
    """Starts the ranks of one job, again where that may help; runs as `python -m launcher.runs.local`."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(run.submission)
        self._run = run
        self._restart = 0
        self._told_to_stop = False
        self.tasks: list[subprocess.Popen[str]] = []
        self.stdouts: list[IO[str]] = []
        self.stderrs: list[IO[str]] = []

    @property
    def attempt(self) -> str:
        """This start of the job, as its ranks call it."""
        return f"{self.pid}.{self._restart}"

    def _forward_signal(self, signum: signal.Signals, *args: Any) -> None:
        """Handler of SIGTERM: the ranks save and leave, and are not started again."""
        self._told_to_stop = True
        super()._forward_signal(signum, *args)

    def start_tasks(self) -> None:
        """Start one process per rank, each with its own log file."""
        for rank in range(self.ntasks):
            log = self._run.log(self.pid, rank).open("a", encoding="utf-8")
            self.stdouts.append(log)
            self.tasks.append(self._start(rank, log))
        self.stderrs = self.stdouts

    def _start(self, rank: int, log: IO[str]) -> subprocess.Popen[str]:
        names = {"LOCALID": rank, "GLOBALID": rank, "JOB_ID": self.pid}
        environ = {f"SUBMITIT_LOCAL_{name}": str(value) for name, value in names.items()}
        parent = os.getpid()
        return subprocess.Popen(
            self.command,
            env={**os.environ, **environ, _RESTART: str(self._restart)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            encoding="utf-8",
            preexec_fn=lambda: process.die_with(parent),
        )

    def wait(self, freq: int = 24) -> list[int | None]:  # noqa: ARG002 - submitit's signature
        """Wait for every rank; when one fails the others follow. Returns their exit codes."""
        failed_at_s: float | None = None
        while True:
            codes = [task.poll() for task in self.tasks]
            if all(code is not None for code in codes):
                return codes
            if failed_at_s is None and any(code not in (None, 0) for code in codes):
                failed_at_s = time.monotonic()
            if failed_at_s is not None and time.monotonic() > failed_at_s + PEERS_MAY_FINISH_S:
                super()._forward_signal(signal.SIGKILL)
            time.sleep(_POLL_S)

    def run(self, max_retry: int = 20) -> None:
        """Run the ranks until nothing speaks for another attempt; the ledger gets their exit codes.

        `max_retry`: how often the ranks may ask for another start with submitit's requeue code.
        """
        process.adopt_orphans()
        pause_s, saved = 0.0, self._saved_step()
        while True:
            began_s = time.monotonic()
            try:
                self.start_tasks()
                codes = self.wait()
            finally:
                self.kill_tasks()
            self._run.record("ended", job_id=self.pid, attempt=self.attempt, exit_codes=codes)
            asked = submitit_local.LOCAL_REQUEUE_RETURN_CODE in codes and self._restart < max_retry
            if not (asked or self._goes_on(codes)):
                return
            self._restart += 1
            before, saved = saved, self._saved_step()
            pause_s = next_pause(pause_s, progressed=saved > before, lasted_s=time.monotonic() - began_s)
            if not self._rest(0.0 if asked else pause_s):
                return

    def _saved_step(self) -> int:
        """Step of the newest checkpoint; 0 = none."""
        saved = (line for line in read_json_lines(self._run.attempts) if line.get("event") == "saved")
        return max((int(line.get("step") or 0) for line in saved), default=0)

    def _rest(self, seconds: float) -> bool:
        """Pause; whether nobody told us to stop meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._told_to_stop:
            time.sleep(_POLL_S)
        return not self._told_to_stop

    def _goes_on(self, codes: list[int | None]) -> bool:
        """Decide about the attempt that has just ended, write it down, and say whether there is another one."""
        from launcher.runs import aftermath

        if not aftermath.claim(self._run, self.attempt):
            return False
        code = max((abs(code or 0) for code in codes), default=0)
        diagnosis, decision = aftermath.conclude(self._run, self.attempt, exit_code=code, local=True)
        if decision.again and self._told_to_stop:
            decision = Decision(action=Action.STOP, reason="the job was told to end")
        decision = aftermath.change(self._run, decision)
        aftermath.write_down(self._run, self.attempt, diagnosis, decision)
        return decision.again

    def kill_tasks(self) -> None:
        """Leave nothing behind: no rank, nothing that a rank has started, no open log."""
        for task in self.tasks:
            if task.poll() is None:
                task.kill()
                task.wait()
        for pid in process.descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _collect_children()
        for log in self.stdouts:
            log.close()
        self.tasks, self.stdouts, self.stderrs = [], [], []


def next_pause(before_s: float, *, progressed: bool, lasted_s: float) -> float:
    """Seconds until the next attempt: twice as many each time, unless the last one got somewhere or lasted long."""
    if progressed or lasted_s > _LONGEST_PAUSE_S:
        return _PAUSE_S
    return min(max(2 * before_s, _PAUSE_S), _LONGEST_PAUSE_S)


def _collect_children() -> None:
    """Read the ends of adopted processes, so that they are not kept as zombies."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def start(request: JobRequest) -> str:
    """Start a local job through submitit and return its id."""
    words = task_words(python_words(request), request.run_dir)
    return str(without_pickle(LocalExecutor, words)(request).submit(nothing).job_id)


if __name__ == "__main__":
    Controller(RunFolder(Path(sys.argv[1]))).run()
