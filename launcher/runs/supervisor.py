"""Supervisor: the parent of one rank. It watches the rank's pulse, ends what hangs and leaves no process behind.

    srun -> python -m launcher.runs.train_job RUN_DIR -> python -m launcher.worker.main RUN_DIR

A process of its own, because nothing inside a Python process can be relied on to notice that it is stopped, that its
GIL is held or that its main thread sits in a collective. It opens no port, keeps no state and does not import the
training stack. It waits for signals with `sigtimedwait`, so it has no handlers and cannot be interrupted half-way.

Exit code: the rank's own; 128 + signal when a signal ended it; HUNG_EXIT when it was silent for too long;
VANISHED_EXIT when it exited with 0 without having said that its work is done.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError
from launcher.runs import autopsy, orphans, process, shared_memory, stacks
from launcher.runs.folder import RunFolder
from launcher.runs.pulse import ORDERLY, Pulse, PulseReading
from launcher.runs.redaction import redact_all, redact_output
from launcher.runs.stacks import Stacks
from launcher.runs.variables import read_secrets
from launcher.runs.watch import Limits, Watch
from launcher.worker.place import Place, place_from_environment

HUNG_EXIT = 94
VANISHED_EXIT = 95
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""What Slurm sends before a limit or a preemption; the rank decides with the others what follows."""
_HANDLED = (*STOP_SIGNALS, signal.SIGINT, signal.SIGCHLD)
_FROM_TERMINAL = 0x80
"""si_code SI_KERNEL: Ctrl-C, which the kernel sends to the rank too."""
_TICK_S = 1.0
_STACKS_S = 1.0
_FILES_S = 3.0
"""A shared file system that does not answer must not keep a hung rank alive."""
_FAMILY_S = 5.0
_LEAVE_S = 2.0
"""Helpers of a rank that ended in order (W&B's service) may take so long to end by themselves."""


def supervise(run_dir: Path, command: Sequence[str] | None = None) -> int:
    """Start the rank of this task, stay until it has ended, and return the exit code of the task.

    `command` is what to start in the rank's place, for tests.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    try:
        words = command or [sys.executable, "-u", "-m", "launcher.worker.main", str(run_dir)]
        return Supervisor(RunFolder(Path(run_dir).resolve()), list(words), held).run()
    finally:
        for number in STOP_SIGNALS:  # one that comes now has nobody left to stop
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How the rank's process ended."""

    code: int
    """Exit code, or minus the signal's number."""
    max_rss_bytes: int

    @property
    def signal(self) -> int | None:
        """The signal that ended it."""
        return -self.code if self.code < 0 else None


class Supervisor:
    """One rank's supervisor; `run` is its life."""

    def __init__(self, run: RunFolder, command: list[str], mask: set[signal.Signals | int]) -> None:
        self._run = run
        self._command = command
        self._mask = mask
        self._family = orphans.environment(run.path)
        self._place = _place({**os.environ, **self._family})
        self._pulse = Pulse.create()
        self._stacks = Stacks()
        self._watch = Watch(Limits.of(run))
        self._told: tuple[str, float] | None = None
        """The first stop signal and when it came (CLOCK_MONOTONIC)."""
        self._not_ours = set(process.descendants(os.getpid()))
        self._ending: Ending | None = None
        self._cpu_s = 0.0
        """CPU time of the rank when it was last heard."""
        self._deaf = False
        """The shared file system did not answer a question about other ranks; it is not asked again."""

    def run(self) -> int:
        """Start the rank, watch it, end its family; the exit code."""
        orphans.guard(self._run.path)
        process.adopt_orphans()
        for told in orphans.end_orphans(self._run.path):
            _say(f"ended {told}, left behind by an earlier attempt whose supervisor was killed")
        shared_memory.sweep()
        self._start()
        while True:
            self._signals()
            self._reap()
            if self._ending is not None:
                return self._ended(self._ending)
            limit_s = self._overdue()
            if limit_s is not None:
                return self._hung(limit_s)

    # --- the rank's process --------------------------------------------------------------------

    def _start(self) -> None:
        """Start the rank with the stop signals blocked: it unblocks them when its handlers stand, and loses none."""
        mask, parent = {*self._mask, *STOP_SIGNALS}, os.getpid()

        def prepare() -> None:
            process.die_with(parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

        environment = {**self._pulse.environment, **self._stacks.environment, **self._family}
        os.environ |= self._secrets()
        redact_output()
        self._child = subprocess.Popen(
            self._command,
            env={**os.environ, **environment},
            pass_fds=[self._stacks.descriptor, *([self._pulse.descriptor] if self._pulse.descriptor else [])],
            preexec_fn=prepare,
        )

    def _secrets(self) -> dict[str, str]:
        """Keys of the hub and of W&B, left by the submission; what the environment says already stays."""
        try:
            found = read_secrets(self._run.path)
        except (ClusterError, OSError) as error:
            _say(f"warning: no key is used: {error}")
            return {}
        return {name: value for name, value in found.items() if name not in os.environ}

    def _signals(self) -> None:
        """Wait one tick, or until a signal comes; hand the rank what it may not have got itself.

        Slurm signals every process of a step, the local controller only the task: a rank may hear the same stop signal
        twice, and heeds the first.
        """
        got = signal.sigtimedwait(_HANDLED, _TICK_S)
        # After a SIGCONT past the time-out, Python hands back a structure that nobody has filled in.
        if got is None or got.si_signo not in (*STOP_SIGNALS, signal.SIGINT):
            return
        if got.si_signo in STOP_SIGNALS and self._told is None:
            self._told = signal.Signals(got.si_signo).name, time.monotonic()
        if got.si_code != _FROM_TERMINAL and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, got.si_signo)

    def _reap(self) -> None:
        """Collect the rank if it has ended, and adopted processes that have."""
        if self._child.returncode is None:
            pid, status, usage = os.wait4(self._child.pid, os.WNOHANG)
            if pid:
                code = self._child.returncode = os.waitstatus_to_exitcode(status)
                self._ending = Ending(code=code, max_rss_bytes=usage.ru_maxrss * 1024)
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in self._not_ours or ended.si_pid == self._child.pid:
                return
            os.waitpid(ended.si_pid, 0)

    def _end_family(self, *, patience_s: float = 0.0) -> None:
        """Kill everything the rank left, the rank included; orphans have become our own children by now."""
        gentle_until = time.monotonic() + patience_s
        deadline = gentle_until + _FAMILY_S
        told: set[int] = set()
        while left := [pid for pid in process.descendants(os.getpid()) if pid not in self._not_ours]:
            now = time.monotonic()
            if now > deadline:
                _say(f"cannot end {_names(left)}: the kernel does not let go of them")
                return
            if now >= gentle_until:
                if new := [pid for pid in left if pid not in told and pid != self._child.pid]:
                    _say(f"ending what the rank left behind: {_names(new)}")
                    told.update(new)
                for pid in left:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            self._reap()

    # --- the two ways to end -------------------------------------------------------------------

    def _ended(self, ending: Ending) -> int:
        """The rank's process has ended by itself or by a signal."""
        reading = self._pulse.read()
        # Python gives its handlers back on the way out: a second stop signal ends a rank that has done its work.
        orderly = reading.phase in ORDERLY and (ending.code == 0 or ending.signal in STOP_SIGNALS)
        stack = self._stacks.read()
        if stack:
            print(stack, file=sys.stderr, flush=True)
        if not orderly:
            _bounded(lambda: self._write_death(ending, reading, stack), _FILES_S)
        self._end_family(patience_s=_LEAVE_S if orderly else 0.0)
        _bounded(lambda: orphans.end_orphans(self._run.path), _FILES_S)
        if not orderly:
            shared_memory.sweep()
        if orderly:
            return 0
        if ending.signal is not None:
            return 128 + ending.signal
        return ending.code or VANISHED_EXIT

    def _overdue(self) -> float | None:
        """The limit that the rank has passed, its own or (0) because another rank's supervisor raised the alarm."""
        reading = self._pulse.read()
        activity = process.activity(self._child.pid)
        stopped = activity is not None and activity.stopped
        limit_s = self._watch.look(reading, time.monotonic(), stopped=stopped, told_to_stop=self._told is not None)
        if activity is not None and self._watch.silent_s == 0.0:
            self._cpu_s = activity.cpu_s
        if limit_s is None and self._watch.suspicious and reading.phase not in ORDERLY and not self._deaf:
            answers: list[bool] = []
            self._deaf = not _bounded(lambda: answers.append(autopsy.alarm(self._run, self._attempt)), _FILES_S)
            return 0.0 if any(answers) else None
        return limit_s

    def _hung(self, limit_s: float) -> int:
        """The rank is silent: write down what it does, find out with the others whose fault it is, and end it."""
        reading = self._pulse.read()
        if reading.phase in ORDERLY:  # its work is done and written; only the way out is blocked
            _say(f"{self._who} has done its work but does not exit; ended after {limit_s:.0f} s")
            self._end_family()
            return 0
        report, stack = self._look(reading)
        _say(f"{self._who} has given no sign of life for {report.silent_s:.0f} s, {_doing(report)}")
        if stack:
            print(stack, file=sys.stderr, flush=True)
        _bounded(lambda: self._blame(report, stack), _FILES_S + autopsy.GATHER_S)
        self._end_family()
        return HUNG_EXIT

    def _look(self, reading: PulseReading) -> tuple[autopsy.HangReport, str]:
        """What the silent rank's process does; its stacks, unless it is stopped and cannot answer."""
        now = process.activity(self._child.pid)
        share = (now.cpu_s - self._cpu_s) / max(reading.age_s, 1e-3) if now else 0.0
        stack = ""
        if reading.beats and now and not now.stopped:
            stack = self._stacks.ask(self._child.pid, patience_s=_STACKS_S)
            # The question may have woken it up (a signal ends a sleep); it must not go on while it is being judged.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGSTOP)
        report = autopsy.HangReport(
            rank=self._rank,
            host=self._host,
            phase=reading.phase,
            step=reading.step,
            position=reading.position,
            silent_s=self._watch.silent_s,
            state=now.state if now else "",
            cpu_share=round(share, 2),
            at=stacks.innermost(stack),
            waits_for_others=stacks.waits_for_others(stack),
            time_s=time.time(),
        )
        return report, stack

    # --- files ---------------------------------------------------------------------------------

    def _blame(self, report: autopsy.HangReport, stack: str) -> None:
        """Report, gather, decide; the first of the supervisors writes it into the ledger."""
        run, attempt = self._run, self._attempt
        autopsy.report_hang(run, attempt, report, stack)
        world = self._place.world_size if self._place else 1
        reports = autopsy.gather(run, attempt, world)
        culprit = autopsy.find_culprit(reports, world)
        where = {"phase": report.phase, "step": report.step}
        told, first = autopsy.settle(run, attempt, culprit, self._names | where)
        blamed = f"rank {told['rank']} on {told['host']} kept the others waiting: {told['why']}"
        if told["rank"] is None:
            blamed = f"whose fault it is, is not known: {told['why']}"
        _say(f"hung: {blamed}")
        if first:
            run.record("hung", **self._names, **{key: told[key] for key in ("rank", "host", "why")}, **where)
        autopsy.write_death(
            run,
            attempt,
            self._facts(self._pulse.read())
            | {
                "type": "Hung",
                "message": f"no sign of life for {report.silent_s:.0f} s, {_doing(report)}; {blamed}",
                "exit_code": HUNG_EXIT,
                "stack": stack,
                "culprit": told["rank"],
            },
        )

    def _write_death(self, ending: Ending, reading: PulseReading, stack: str) -> None:
        """What the supervisor saw, for a rank that could not write it itself; then the ledger too."""
        kind, message = _cause(ending)
        code = 128 + ending.signal if ending.signal else ending.code or VANISHED_EXIT
        facts = self._facts(reading) | {
            "type": kind,
            "message": f"{self._who} {message} ({reading.phase}, after step {reading.step})",
            "exit_code": code,
            "signal": ending.signal,
            "max_rss_bytes": ending.max_rss_bytes,
            "stack": stack,
        }
        if not self._run.path.is_dir() or not autopsy.write_death(self._run, self._attempt, redact_all(facts)):
            return
        how = {"signal": ending.signal} if ending.signal else {"exit_code": code}
        self._run.record("died", **{**self._names, "rank": self._rank, "host": self._host, **how})
        _say(facts["message"])

    def _facts(self, reading: PulseReading) -> dict[str, Any]:
        """What every record of this rank carries."""
        facts: dict[str, Any] = {
            "rank": self._rank,
            "host": self._host,
            **self._names,
            "phase": reading.phase,
            "step": reading.step,
            "time_s": time.time(),
        }
        if self._told is not None:
            facts["stop_signal"] = {"name": self._told[0], "age_s": time.monotonic() - self._told[1]}
        return facts

    # --- names ---------------------------------------------------------------------------------

    @property
    def _rank(self) -> int:
        return self._place.rank if self._place else -1

    @property
    def _host(self) -> str:
        return self._place.host if self._place else os.uname().nodename

    @property
    def _attempt(self) -> str:
        return self._place.attempt if self._place else "unknown"

    @property
    def _names(self) -> dict[str, str]:
        return self._place.names if self._place else {}

    @property
    def _who(self) -> str:
        return f"rank {self._rank} on {self._host}"


def _place(environ: Mapping[str, str]) -> Place | None:
    """Which rank this is; None when the environment contradicts itself, which the rank will say."""
    with contextlib.suppress(ClusterError):
        return place_from_environment(environ)
    return None


def _cause(ending: Ending) -> tuple[str, str]:
    """Kind and sentence of a death that the rank did not write down."""
    if ending.signal is not None:
        with contextlib.suppress(ValueError):
            name = signal.Signals(ending.signal).name
            return name, f"was ended by {name}"
        return f"signal {ending.signal}", f"was ended by signal {ending.signal}"
    if ending.code == 130:
        return "Interrupted", "was interrupted (Ctrl-C)"
    if ending.code == 0:
        return "Vanished", "exited with 0 before its work was done"
    return "Exited", f"exited with {ending.code} without saying why"


def _doing(report: autopsy.HangReport) -> str:
    """What a silent rank does, in words."""
    if report.stopped:
        what = f"its process is stopped (state {report.state}) and cannot show its stacks"
    elif not report.at:
        what = f"its process (state {report.state or 'ended'}) did not show its stacks"
    else:
        what = f"at {report.at}"
    return f"{report.phase} after step {report.step}: {what}"


def _names(pids: Sequence[int]) -> str:
    return ", ".join(f"{process.name(pid)} ({pid})" for pid in pids)


def _bounded(work: Callable[[], Any], seconds: float) -> bool:
    """Do something with files in a thread that may be left behind; whether it was done in time."""
    failures: list[Exception] = []

    def guarded() -> None:
        try:
            work()
        except Exception as error:  # the disk may be what failed; the exit code still tells
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)
    for error in failures:
        _say(f"cannot write it down: {type(error).__name__}: {error}")
    return not thread.is_alive()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"supervisor: {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """`python -m launcher.runs.supervisor RUN_DIR`."""
    if len(argv) != 2:
        print("usage: python -m launcher.runs.supervisor RUN_DIR", file=sys.stderr)
        return 2
    return supervise(Path(argv[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
