"""remains: what an attempt left behind, read with bounds: reports of its ranks, words of Slurm in its logs.

    errors/<attempt>/rank-N.json, hung.json    written by the worker and the supervisor (autopsy.py)
    logs/<job>_0.out                           rank 0's words, and those of the batch script, srun and slurmstepd

Nothing here believes a field to be there or to have the right type: a report may be written by a dying process.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.runs.folder import RunFolder
from launcher.runs.symptoms import Cause, cause_of_error, cause_of_exit, cause_of_signal

MARKER = "launcher: attempt"
"""Begins a line of the batch script's log when a start of the job begins; older starts lie before it."""
TAIL_BYTES = 1 << 16
"""How much of the end of a log is looked at."""
_RANK = re.compile(r"rank--?\d+\.json|rank-\d+\.json")
_REPORTS = 4096
"""So many reports of one attempt are read at most."""
_REPORT_BYTES = 1 << 20
_LINE_LENGTH = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One rank's end, as its own file tells it."""

    path: Path
    cause: Cause
    rank: int | None
    host: str | None
    words: str
    """Class and message of the exception, or the signal; one line."""
    time_s: float
    step: int | None
    phase: str | None
    signal: str | None = None
    killed: bool = False
    """Ended by SIGKILL or SIGTERM: by somebody outside, perhaps because the whole job was being ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """A line of Slurm's in a log."""

    path: Path
    line: str
    cause: Cause
    host: str | None = None
    rank: int | None = None


# ---------------------------------------------------------------- reports


def read_reports(run: RunFolder, attempt: str) -> tuple[Report, ...]:
    """The reports of an attempt's ranks, oldest first; files that cannot be read are left out."""
    folder = run.errors / attempt
    try:
        names = (path for path in folder.iterdir() if path.name == "hung.json" or _RANK.fullmatch(path.name))
        paths = sorted(names)[:_REPORTS]
    except (OSError, ValueError):
        return ()
    found = [report for path in paths if (report := _report(path)) is not None]
    return tuple(sorted(found, key=lambda report: (report.time_s, report.rank or 0)))


def _report(path: Path) -> Report | None:
    try:
        if path.stat().st_size > _REPORT_BYTES:
            return None
        facts = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return None
    if not isinstance(facts, dict):
        return None
    return _of_hang(path, facts) if path.name == "hung.json" else _of_rank(path, facts)


def _of_hang(path: Path, facts: dict[str, Any]) -> Report:
    why = one_line(text(facts.get("why")) or "made no progress")
    return Report(
        path=path,
        cause=Cause.HUNG,
        rank=number(facts.get("culprit", facts.get("rank"))),
        host=text(facts.get("host")),
        words=why,
        time_s=seconds(facts.get("time_s")),
        step=number(facts.get("step")),
        phase=text(facts.get("phase")),
    )


def _of_rank(path: Path, facts: dict[str, Any]) -> Report:
    name = signal_name(facts.get("signal"))
    kind, message = text(facts.get("type")) or "", text(facts.get("message")) or ""
    code = number(facts.get("exit_code"))
    if kind == "Hung":
        cause, words = Cause.HUNG, one_line(message) or "made no progress"
    elif name:
        cause, words = cause_of_signal(name), f"was ended by {name}"
    elif kind == "Vanished" or (not kind and code == 0):
        cause, words = Cause.RANK_EXITED, "left with exit code 0 before its work was done"
    elif not kind or kind == "Exited":
        cause, words = cause_of_exit(code or 0), f"ended with exit code {code} without saying why"
    else:
        cause, words = cause_of_error(kind, message), one_line(f"{kind}: {message}" if message else kind)
    return Report(
        path=path,
        cause=cause,
        rank=number(facts.get("rank")),
        host=text(facts.get("host")),
        words=words,
        time_s=seconds(facts.get("time_s")),
        step=number(facts.get("step")),
        phase=text(facts.get("phase")),
        signal=name,
        killed=name in ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"),
    )


def signal_name(value: Any) -> str | None:
    """SIGKILL for 9, "9", "KILL" or "SIGKILL"; None for anything that is no signal."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    try:
        if isinstance(value, int) and not isinstance(value, bool):
            return signal.Signals(abs(value)).name
        if isinstance(value, str):
            return signal.Signals[value if value.startswith("SIG") else f"SIG{value}"].name
    except (ValueError, KeyError):
        pass
    return None


def whole_message(path: Path) -> tuple[str, ...]:
    """Every line of the message in a rank's report, with its class: problems are collected and raised together.

    Empty where it is one line, which the report's `words` have already, or where the file is no report.
    """
    try:
        if path.suffix != ".json" or path.stat().st_size > _REPORT_BYTES:
            return ()
        facts = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return ()
    message = text(facts.get("message")) if isinstance(facts, dict) else None
    return all_lines(f"{text(facts.get('type')) or 'error'}: {message}") if message else ()


def all_lines(words: str) -> tuple[str, ...]:
    """The lines that say something, where there are several."""
    lines = tuple(line.rstrip()[:_LINE_LENGTH] for line in words.splitlines() if line.strip())
    return lines if len(lines) > 1 else ()


def one_line(words: str) -> str:
    """The first line that says something, cut at 400 characters."""
    return next((line.strip()[:400] for line in words.splitlines() if line.strip()), "")


def is_there(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have, out of a damaged ledger, is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def text(value: Any) -> str | None:
    """The value if it is a string with something in it."""
    return value if isinstance(value, str) and value else None


def number(value: Any) -> int | None:
    """The value if it is a whole number."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def seconds(value: Any) -> float:
    """The value if it is a number, else 0."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


# ---------------------------------------------------------------- Slurm's words in logs

_SLURM_SAYS: tuple[tuple[Cause, re.Pattern[str]], ...] = tuple(
    (cause, re.compile(pattern))
    for cause, pattern in (
        (Cause.PREEMPTED, r"^slurmstepd\S*: .*CANCELLED AT \S+ DUE TO PREEMPTION"),
        (Cause.TIME_LIMIT, r"^slurmstepd\S*: .*CANCELLED AT \S+ DUE TO TIME LIMIT"),
        (Cause.OPERATOR_REQUEUE, r"^slurmstepd\S*: .*CANCELLED AT \S+ DUE TO JOB REQUEUE"),
        (Cause.NODE_LOST, r"^slurmstepd\S*: .*CANCELLED AT \S+ DUE TO NODE FAILURE"),
        (Cause.NODE_LOST, r"^srun: error: Node failure on (?P<host>\S+)"),
        (Cause.HOST_OUT_OF_MEMORY, r"^(slurmstepd\S*|srun): error: .*(oom[-_ ]kill|Out Of Memory)"),
        (
            Cause.LAUNCH_FAILED,
            r"^(slurmstepd\S*|srun): .*(execve\(\)|Unable to create step|[Tt]ask launch.*fail|Job credential"
            r"|couldn't chdir|failed to (import|create) container|Unable to confirm allocation)",
        ),
        # Of the whole job only: srun ends the step in the same words when one rank has failed.
        (Cause.CANCELLED, r"^slurmstepd\S*: error: \*\*\* JOB \d+ ON \S+ CANCELLED AT \S+ \*\*\*"),
    )
)
_TASK = re.compile(r"^srun: error: (?P<host>[^\s:]+): tasks? (?P<ranks>[\d,\-]+): (?P<what>.+)$")
_TASK_ENDS = (
    ("Killed", "SIGKILL"),
    ("Segmentation fault", "SIGSEGV"),
    ("Aborted", "SIGABRT"),
    ("Bus error", "SIGBUS"),
    ("Floating point exception", "SIGFPE"),
    ("Illegal instruction", "SIGILL"),
)


def slurm_lines(run: RunFolder, job_id: str, attempt: str) -> tuple[Said, ...]:
    """What Slurm wrote about an attempt into the log of the batch script, in order."""
    path = run.log(job_id, 0)
    return tuple(said for line in _of_attempt(tail_lines(path), attempt) if (said := _slurm_said(path, line)))


def _slurm_said(path: Path, line: str) -> Said | None:
    for cause, pattern in _SLURM_SAYS:
        if match := pattern.search(line):
            return Said(path=path, line=line[:400], cause=cause, host=match.groupdict().get("host"))
    if task := _TASK.match(line):
        first = re.split(r"[,\-]", task["ranks"])[0]
        rank = int(first) if first.isdecimal() else None
        return Said(path=path, line=line[:400], cause=_task_cause(task["what"]), host=task["host"], rank=rank)
    return None


def _task_cause(what: str) -> Cause:
    for words, ended_by in _TASK_ENDS:
        if words in what:
            return cause_of_signal(ended_by)
    code = re.search(r"Exited with exit code (\d+)", what)
    if not code:
        return Cause.UNKNOWN
    return cause_of_exit(int(code[1]))


def _of_attempt(lines: list[str], attempt: str) -> Iterator[str]:
    """The lines after the mark of this attempt and before that of the next; all lines where there are no marks."""
    marks = [index for index, line in enumerate(lines) if line.startswith(MARKER)]
    own = [index for index in marks if lines[index].split()[2:3] == [attempt]]
    first = own[-1] + 1 if own else 0
    last = next((index for index in marks if index >= first and own), len(lines))
    yield from lines[first:last]


def tail_lines(path: Path, limit_bytes: int = TAIL_BYTES) -> list[str]:
    """The last lines of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - limit_bytes))
            data = file.read(limit_bytes)
    except OSError:
        return []
    lines = data.decode(errors="replace").splitlines()
    return lines[1:] if size > limit_bytes else lines


def last_words(path: Path) -> str | None:
    """The last line of a log that says something of its own: no marks of ours."""
    said = [line.strip() for line in tail_lines(path, 1 << 13) if line.strip() and not line.startswith("launcher:")]
    return said[-1][:400] if said else None
