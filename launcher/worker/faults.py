"""Injected faults: what LAUNCHER_FAULT says happens at named places of the training code, for tests and rehearsals.

    LAUNCHER_FAULT="at=step,rank=1,step=25,do=kill;at=before_manifest,step=30,do=killall"

Clauses are separated by semicolons. `at` and `do` are needed; `rank`, `step` and `attempt` narrow a clause down:
without them any rank, step or attempt will do. A clause happens once in the life of a run, whichever rank comes first:
before it acts it leaves a mark in the run's `faults/` folder, so that the retry of a run passes the place unharmed.
The word `always` lifts that. Attempts are counted from 1, in the order in which they started.

Without the variable nothing is read, nothing written, and every call is one comparison with None. Light: no torch.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import RecipeError
from launcher.runs.folder import RunFolder, read_json_lines, write_json

VARIABLE = "LAUNCHER_FAULT"

STAGES = {
    "start": "a rank has read its recipe and plan; nothing heavy is imported",
    "step": "before the forward pass of optimizer step `step`",
    "after_step": "after the update of `step` and its line in metrics.jsonl",
    "snapshot": "while the state of `step` is copied to host memory",
    "after_share": "a rank has written its files of the checkpoint of `step`",
    "before_manifest": "every file of the checkpoint is there, its manifest is not (rank 0)",
    "before_rename": "the manifest is there, the checkpoint still has its temporary name (rank 0)",
    "in_prune": "a superseded checkpoint is about to be deleted (rank 0)",
    "export": "the artifact is written and not yet proved (rank 0)",
}
ACTIONS = {
    "kill": "SIGKILL to this rank",
    "killall": "SIGKILL to every rank of the attempt on this machine",
    "stop": "SIGSTOP to this rank",
    "term": "SIGTERM to this rank, as at a preemption",
    "usr2": "SIGUSR2 to this rank, as before a time limit",
    "exit0": "the process ends at once with exit code 0",
    "raise": "an exception that is nobody's fault but the program's",
    "segv": "a segmentation fault",
    "abort": "abort(), as failed assertions in C++ do",
    "gil": "a C call that never returns and keeps Python's lock",
    "nan": "the forward pass of this step gives NaN (only at `step`)",
    "sleep:SECONDS": "this rank is late by so many seconds",
    "enospc": "the disk is full",
    "memory": "memory is allocated until the machine refuses more",
    "oom": "the accelerator is out of memory, in PyTorch's words",
    "child": "a process in a session of its own is left behind that ignores SIGTERM",
}
_KEYS = ("at", "do", "rank", "step", "attempt")
_SPARE_BYTES = 256 * 2**20
"""What `memory` may allocate beyond what the process has; a real machine is not brought down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One clause: where, and what."""

    at: str
    do: str
    rank: int | None = None
    step: int | None = None
    attempt: int | None = None
    always: bool = False

    def matches(self, stage: str, *, rank: int, step: int, attempt: int) -> bool:
        """Whether this is the place; what the clause leaves open matches anything."""
        asked = ((self.rank, rank), (self.step, step), (self.attempt, attempt))
        return self.at == stage and all(wanted in (None, found) for wanted, found in asked)


@dataclass(frozen=True, kw_only=True, slots=True)
class Armed:
    """The faults of this process, and where it stands."""

    run: RunFolder
    attempt: str
    number: int
    """Of the attempt, from 1."""
    faults: tuple[Fault, ...]


_armed: Armed | None = None


def parse(text: str) -> tuple[Fault, ...]:
    """The faults that LAUNCHER_FAULT describes.

    Raises:
        RecipeError: with everything in it that cannot be understood.
    """
    problems: list[str] = []
    faults = [_clause(words, problems) for words in text.split(";") if words.strip()]
    if not faults:
        problems.append("no fault in it; an example: at=step,rank=1,step=25,do=kill")
    if problems:
        raise RecipeError(*(f"{VARIABLE}: {problem}" for problem in problems))
    return tuple(fault for fault in faults if fault)


def arm(run: RunFolder, *, rank: int, attempt: str) -> None:
    """Read LAUNCHER_FAULT for this process; without it, disarm.

    Raises:
        RecipeError: the variable cannot be understood.
    """
    global _armed
    text = os.environ.get(VARIABLE)
    if not text:
        _armed = None
        return
    faults = parse(text)
    earlier = {line.get("attempt") for line in read_json_lines(run.attempts) if line.get("event") == "started"}
    (run.faults / attempt).mkdir(mode=0o700, parents=True, exist_ok=True)
    # killall looks here; the start time tells this process from a later one with the same number.
    write_json(run.faults / attempt / f"rank-{rank}.json", {"pid": os.getpid(), "start_ticks": _start_ticks("self")})
    _armed = Armed(run=run, attempt=attempt, number=len(earlier - {attempt, None}) + 1, faults=faults)


def at(stage: str, *, rank: int, step: int = 0, model: Any = None) -> None:
    """Do what LAUNCHER_FAULT says for this place, at most once per run; most often nothing.

    `model` is the module of which `nan` poisons the next forward pass.

    Raises:
        RuntimeError: `raise`, `oom`, and `memory` where PyTorch is the one that notices.
        OSError: `enospc`.
        MemoryError: `memory`.
    """
    armed = _armed
    if armed is None:
        return
    for index, fault in enumerate(armed.faults):
        here = fault.matches(stage, rank=rank, step=step, attempt=armed.number)
        if here and _mark(armed, index, fault, rank, step):
            print(f"injected fault: {fault.do} at {stage}, rank {rank}, step {step}", flush=True)
            _do(fault.do, armed, model)


# --- reading -----------------------------------------------------------------------------------


def _clause(words: str, problems: list[str]) -> Fault | None:
    """One clause, or None with its problems noted."""
    before = len(problems)
    values: dict[str, Any] = {}
    for word in (word.strip() for word in words.split(",")):
        key, _, value = word.partition("=")
        if word == "always":
            values["always"] = True
        elif key not in _KEYS or not value:
            problems.append(f"{word!r} in {words.strip()!r} is none of {', '.join(_KEYS)} with a value, nor 'always'")
        elif key in ("rank", "step", "attempt"):
            if value.isdecimal():
                values[key] = int(value)
            else:
                problems.append(f"{key}={value} in {words.strip()!r} is not a whole number")
        else:
            values[key] = value
    problems += _choices(values, words.strip())
    return Fault(**values) if len(problems) == before else None


def _choices(values: dict[str, Any], words: str) -> list[str]:
    stage, action = values.get("at"), values.get("do", "")
    problems = []
    if stage not in STAGES:
        problems.append(f"at={stage} in {words!r}: there is {', '.join(STAGES)}")
    name, _, seconds = action.partition(":")
    known = seconds.replace(".", "", 1).isdecimal() if name == "sleep" else action in ACTIONS
    if not known:
        problems.append(f"do={action or None} in {words!r}: there is {', '.join(ACTIONS)}")
    if action == "nan" and stage in STAGES and stage != "step":
        problems.append(f"do=nan in {words!r}: only at=step has a forward pass to poison")
    return problems


# --- doing -------------------------------------------------------------------------------------


def _mark(armed: Armed, index: int, fault: Fault, rank: int, step: int) -> bool:
    """Claim the fault; False when it has happened already, in any rank of any attempt."""
    facts = {"fault": index, "at": fault.at, "do": fault.do, "rank": rank, "step": step, "attempt": armed.attempt}
    text = json.dumps(facts | {"time_s": time.time(), "pid": os.getpid()}, sort_keys=True) + "\n"
    mode = os.O_APPEND if fault.always else os.O_EXCL
    try:
        descriptor = os.open(armed.run.faults / f"{index:03d}.json", os.O_WRONLY | os.O_CREAT | mode, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    return True


def _do(action: str, armed: Armed, model: Any) -> None:
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr2": signal.SIGUSR2}
    if action in signals:
        os.kill(os.getpid(), signals[action])
    elif action == "killall":
        _kill_all(armed)
    elif action == "exit0":
        os._exit(0)
    elif action == "raise":
        raise RuntimeError("injected fault")
    elif action == "segv":
        ctypes.string_at(0)
    elif action == "abort":
        os.abort()
    elif action == "gil":
        _hold_the_lock()
    elif action == "nan":
        _poison(model)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(armed.run.checkpoints))
    elif action == "memory":
        _use_memory()
    elif action == "oom":
        _accelerator_full()
    elif action == "child":
        _leave_child(armed.run.path)
    else:
        time.sleep(float(action.partition(":")[2]))


def _kill_all(armed: Armed) -> None:
    """Every rank of this attempt whose process is on this machine, oneself last."""
    for file in (armed.run.faults / armed.attempt).glob("rank-*.json"):
        process = json.loads(file.read_text(encoding="utf-8"))
        if process["pid"] != os.getpid() and _start_ticks(process["pid"]) == process["start_ticks"]:
            os.kill(process["pid"], signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _start_ticks(pid: int | str) -> int | None:
    """Clock ticks between boot and a process's start (/proc/PID/stat, field 22); None where there is no process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def _hold_the_lock() -> None:
    """Lock a mutex twice: unlike a sleep, it goes on after the signal that asks for stacks."""
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)  # PyDLL, unlike CDLL, keeps Python's lock
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def _poison(model: Any) -> None:
    """The next forward pass of `model` gives NaN logits, and so a NaN loss; weights stay as they are."""

    def spoil(_module: Any, _arguments: Any, output: Any) -> Any:
        hook.remove()
        output["logits"] = output["logits"] * float("nan")
        return output

    hook = model.register_forward_hook(spoil)


def _use_memory() -> None:
    """Allocate under a lowered limit until the kernel says no, as a container or a batch node would."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _SPARE_BYTES, hard))
    kept = []
    while True:
        kept.append(bytearray(_SPARE_BYTES // 8))


def _accelerator_full() -> None:
    import torch

    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 39.39 GiB of which 1.06 GiB is "
        "free. (injected fault)"
    )


def _leave_child(run: Path) -> None:
    """A process that outlives its rank's session and signals unless somebody looks for it; its words name the run."""
    script = f"trap '' TERM HUP INT; while :; do sleep 1; done # {run}"
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen(["/bin/bash", "-c", script], start_new_session=True, **silent)  # type: ignore[call-overload]
