"""explanation: why a run is as it is: one sentence, the line that shows it, one command. For `launcher why`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError
from launcher.runs.diagnosis import Cause, Diagnosis, diagnose, newest_attempt
from launcher.runs.folder import RunFolder
from launcher.runs.reasons import never_starts
from launcher.runs.remains import all_lines, last_words, number, one_line, tail_lines, text, whole_message
from launcher.runs.remedies import command_for
from launcher.runs.slurm import SlurmJob, find_jobs
from launcher.runs.state import Evidence, is_held, read_evidence
from launcher.runs.status import RunStatus, run_status
from launcher.runs.view import JobView

_SILENT_S = 120.0
"""A step takes seconds or tens of seconds; without one for so long it is worth a remark."""
_SLOW_SHARE = 0.5
"""Training at less than this share of its usual speed is worth a remark."""
_FEW_LINES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """One attempt, as it was decided about."""

    attempt: str
    cause: str
    action: str
    reason: str
    step: int | None
    """Of the newest checkpoint when it ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Why a run is as it is."""

    run: str
    state: str
    """Slurm's word, as in `launcher status`."""
    sentence: str
    cause: str | None = None
    """What ended the newest attempt; None while it waits or runs."""
    evidence: str | None = None
    """The line that shows it."""
    message: tuple[str, ...] = ()
    """All lines of the error, where it has several; `evidence` is the first."""
    where: str | None = None
    """File of that line, or the command that prints it."""
    command: str | None = None
    """The one command that helps."""
    rank: int | None = None
    host: str | None = None
    attempt: str | None = None
    decision: str | None = None
    """What was decided to follow, and why."""
    history: tuple[Past, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the schema's number."""
        return {"schema": 1, **asdict(self), "history": [asdict(past) for past in self.history]}


def explain(run: RunFolder) -> Explanation:
    """Why the run is as it is; Slurm being down is an explanation, not an error."""
    evidence, status = read_evidence(run), run_status(run)
    if status.state in ("UNKNOWN", "NOT_SUBMITTED"):
        found = _undetermined(evidence, status)
    elif status.ended:
        found = _ended(evidence, status)
    elif status.state in ("RUNNING", "COMPLETING"):
        found = _running(evidence, status)
    else:
        found = _waiting(evidence, status)
    return replace(found, history=_history(evidence))


def _history(evidence: Evidence) -> tuple[Past, ...]:
    lines = (event for event in evidence.events if event.get("event") == "decided")
    return tuple(
        Past(
            attempt=str(line.get("attempt")),
            cause=str(line.get("cause")),
            action=str(line.get("action")),
            reason=str(line.get("reason")),
            step=number(line.get("step")),
        )
        for line in lines
    )


def _undetermined(evidence: Evidence, status: RunStatus) -> Explanation:
    submit = f"launcher submit {evidence.run.recipe}"
    command = submit if status.state == "NOT_SUBMITTED" else f"launcher status {status.run}"
    if "launcher resume" in status.sentence:
        command = f"launcher resume {status.run}"
    return Explanation(run=status.run, state=status.state, sentence=status.sentence, command=command)


# ---------------------------------------------------------------- ended


def _ended(evidence: Evidence, status: RunStatus) -> Explanation:
    """The diagnosis that was written down, where it still holds; else one from what there is."""
    name = newest_attempt(evidence.events)
    of_newest_job = name is not None and name.rpartition(".")[0] == evidence.job_id
    line = _decided(evidence, name) if of_newest_job else None
    if line is not None and line.get("action") in ("stop", "finish") and status.state != "CANCELLED":
        found = _of_line(evidence, line)
    else:
        attempt = name if of_newest_job else f"{evidence.job_id}.0"
        found = diagnose(evidence, attempt=attempt, slurm=_view(evidence))
        if status.state == "CANCELLED" and found.cause not in (Cause.CANCELLED, Cause.FINISHED):
            command = command_for(Cause.CANCELLED, evidence, rank=None)
            found = Diagnosis(cause=Cause.CANCELLED, sentence="was cancelled", command=command, attempt=attempt)
    return Explanation(
        run=status.run,
        state=status.state,
        sentence=found.sentence,
        cause=found.cause.value,
        evidence=found.evidence,
        message=_message(evidence, found),
        where=found.where,
        command=found.command,
        rank=found.rank,
        host=found.host,
        attempt=found.attempt,
        decision=None if line is None else f"{line.get('action')}: {line.get('reason')}",
    )


def _message(evidence: Evidence, found: Diagnosis) -> tuple[str, ...]:
    """All lines of the error that was found, from the rank's report, or from the ledger where it could write none."""
    if found.where != str(evidence.run.attempts):
        return whole_message(Path(found.where)) if found.where else ()
    told = [text(event.get("error")) for event in evidence.events if event.get("event") == "failed"]
    errors = [error for error in told if error is not None and one_line(error) == found.evidence]
    return all_lines(errors[-1]) if errors else ()


def _decided(evidence: Evidence, name: str | None) -> Mapping[str, Any] | None:
    lines = [e for e in evidence.events if e.get("event") == "decided" and e.get("attempt") == name]
    return lines[-1] if lines else None


def _of_line(evidence: Evidence, line: Mapping[str, Any]) -> Diagnosis:
    """A diagnosis as the aftermath wrote it down."""
    try:
        cause = Cause(str(line.get("cause")))
    except ValueError:
        cause = Cause.UNKNOWN
    rank = number(line.get("rank"))
    return Diagnosis(
        cause=cause,
        sentence=text(line.get("sentence")) or text(line.get("reason")) or "ended",
        evidence=text(line.get("evidence")),
        where=text(line.get("where")),
        command=command_for(cause, evidence, rank=rank),
        rank=rank,
        host=text(line.get("culprit")),
        attempt=text(line.get("attempt")),
    )


def _view(evidence: Evidence) -> JobView | None:
    job = _job(evidence)
    return None if job is None else JobView.of(job)


def _job(evidence: Evidence) -> SlurmJob | None:
    if evidence.cluster != "slurm" or evidence.job_id is None:
        return None
    try:
        return find_jobs([str(evidence.slurm_id)]).get(str(evidence.slurm_id))
    except LauncherError:
        return None


# ---------------------------------------------------------------- waiting and running


def _waiting(evidence: Evidence, status: RunStatus) -> Explanation:
    """Slurm's reason, and what ended the attempt before."""
    job = _job(evidence) or SlurmJob(job_id=str(status.job_id), state=status.state, reason=status.reason)
    if is_held(job):
        command = f"scontrol release {job.job_id}"
    elif never_starts(job.reason):
        command = f"launcher cancel {status.run}"
    else:
        command = f"launcher status {status.run}"
    line = _decided(evidence, newest_attempt(evidence.events))
    return Explanation(
        run=status.run,
        state=status.state,
        sentence=status.sentence,
        evidence=f"{job.state} ({job.reason or 'None'})",
        where=f"squeue --jobs={job.job_id}",
        command=command,
        attempt=None if line is None else text(line.get("attempt")),
        decision=None if line is None else f"{line.get('action')}: {line.get('sentence')}; {line.get('reason')}",
    )


def _running(evidence: Evidence, status: RunStatus) -> Explanation:
    """That it runs, and what is odd about it: silence, a rank that raised the alarm, less speed than before."""
    found = Explanation(
        run=status.run,
        state=status.state,
        sentence=status.sentence,
        command=f"launcher logs -f {status.run}",
        attempt=newest_attempt(evidence.events),
    )
    for look in (_alarm, _silence, _slowness):
        odd = look(evidence)
        if odd is not None:
            remark, line, where = odd
            return replace(found, sentence=f"{status.sentence}, but {remark}", evidence=line, where=where)
    log = evidence.run.log(str(status.job_id), 0)
    return replace(found, evidence=last_words(log), where=str(log) if log.exists() else None)


Odd = tuple[str, str | None, str]


def _alarm(evidence: Evidence) -> Odd | None:
    """A supervisor that saw its rank silent."""
    name = newest_attempt(evidence.events)
    paths = sorted((evidence.run.errors / name).glob("hang-rank-*.json")) if name else []
    for path in paths:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            silent_s = float(report.get("silent_s", 0))
        except (OSError, ValueError, AttributeError, TypeError):
            continue
        where = f"rank {report.get('rank')} on {report.get('host')}"
        return f"{where} gives no sign of life for {silent_s:.0f} s", text(report.get("at")), str(path)
    return None


def _silence(evidence: Evidence) -> Odd | None:
    beat = evidence.heartbeat
    time_s, state = beat.get("time_s"), beat.get("state")
    if not isinstance(time_s, int | float) or state not in ("training", "evaluating"):
        return None
    silent_s = time.time() - time_s
    if silent_s < _SILENT_S:
        return None
    remark = f"rank 0 took no step for {silent_s / 60:.0f} min: a rank or its node may hang or be slow"
    return remark, f"{state}, step {beat.get('step')}", str(evidence.run.heartbeat)


def _slowness(evidence: Evidence) -> Odd | None:
    """The newest speed beside the usual one: a straggler slows every rank down."""
    lines = []
    for line in tail_lines(evidence.run.metrics):
        try:
            numbers = json.loads(line)
        except ValueError:
            continue
        if isinstance(numbers, dict) and isinstance(numbers.get("tokens_per_s"), int | float):
            lines.append((float(numbers["tokens_per_s"]), line))
    if len(lines) < 2 * _FEW_LINES:
        return None
    usual = statistics.median(speed for speed, _ in lines[:-_FEW_LINES])
    now = statistics.median(speed for speed, _ in lines[-_FEW_LINES:])
    if now >= _SLOW_SHARE * usual:
        return None
    remark = f"it became slow: {now:,.0f} tokens/s instead of {usual:,.0f}; one slow rank or node slows all"
    return remark, lines[-1][1], str(evidence.run.metrics)
