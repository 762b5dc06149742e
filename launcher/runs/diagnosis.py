"""diagnosis: what ended an attempt: one cause, its evidence, one command that helps.

Order of belief, highest first:

    1. result.json: nothing ended badly, whatever else is lying about
    2. the ranks agreed to stop and saved: then Slurm's word says why they were told to
    3. a rank's own report of an error, a crash or a hang: the origin, never what the others saw of it
    4. Slurm's word: preemption, time limit, requeue, cancellation, lost node, out of memory
    5. a rank killed from outside, srun's complaint, exit codes
    6. what peers saw, ranks that said nothing at all
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.runs.remains import Report, Said, is_there, last_words, number, one_line, read_reports, slurm_lines, text
from launcher.runs.remedies import command_for
from launcher.runs.state import Evidence
from launcher.runs.symptoms import AGAIN, CONSEQUENCES, Cause, cause_of_error, cause_of_exit, cause_of_signal
from launcher.runs.view import JobView

__all__ = ["Attempt", "Cause", "Diagnosis", "diagnose", "newest_attempt"]

_ATTEMPT = re.compile(r"[A-Za-z0-9_.+-]{1,80}")
"""What may be an attempt's name, and so part of a path; a damaged ledger may hold anything."""
PAUSED = "paused"
"""What a worker gives as reason where it left at the step of pause.json."""
SIGNAL_MAY_BE_EARLY_S = 90.0
"""Slurm sends the warning up to 60 s before it is due; and a save takes a while."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What ended an attempt."""

    cause: Cause
    sentence: str
    """One sentence for people, without a full stop."""
    evidence: str | None = None
    """The line that shows it, as it stands in `where`."""
    where: str | None = None
    """File of the evidence."""
    command: str | None = None
    """One command that helps, when nothing happens by itself."""
    rank: int | None = None
    host: str | None = None
    attempt: str | None = None

    @property
    def retry(self) -> bool:
        """Whether the same job may do better next time."""
        return self.cause in AGAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of a job of the run, as the ledger tells it."""

    name: str
    """JOB.RESTART."""
    events: tuple[Mapping[str, Any], ...]
    """From its start to the next; with it what was written by processes that do not say which attempt they are."""

    @property
    def job_id(self) -> str:
        """Slurm's or the local controller's number."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def restart(self) -> int:
        """How often the job had been started before."""
        tail = self.name.rpartition(".")[2]
        return int(tail) if tail.isdecimal() else 0

    def last(self, name: str) -> Mapping[str, Any] | None:
        """Its last event of that name."""
        return next((event for event in self.events[::-1] if event.get("event") == name), None)

    @property
    def world_size(self) -> int:
        """Ranks that took part; 0 when it never started."""
        return number((self.last("started") or {}).get("world_size")) or 0

    @property
    def began(self) -> bool:
        """Whether a rank of it ever said anything."""
        return any(event.get("event") in ("started", "joined", "failed", "died", "hung") for event in self.events)


def newest_attempt(events: tuple[Mapping[str, Any], ...]) -> str | None:
    """The attempt that wrote last."""
    named = (text(event.get("attempt")) for event in events[::-1])
    return next((name for name in named if name and _ATTEMPT.fullmatch(name)), None)


def attempt_of(events: tuple[Mapping[str, Any], ...], name: str) -> Attempt:
    """The events of one attempt. Lines without an attempt belong to the attempt before them, or to their job."""
    job_id = name.rpartition(".")[0]
    own: list[Mapping[str, Any]] = []
    current: str | None = None
    for event in events:
        if event.get("event") in ("submitted", "submitting"):
            current = None
        said = text(event.get("attempt"))
        current = said or current
        of_job = event.get("event") in ("cancelled", "ended") and str(event.get("job_id")) == job_id
        unclaimed = current is None and (of_job or event.get("event") == "failed")
        if said == name or (said is None and (current == name or unclaimed)):
            own.append(event)
    return Attempt(name=name, events=tuple(own))


def diagnose(
    evidence: Evidence, *, attempt: str | None = None, exit_code: int | None = None, slurm: JobView | None = None
) -> Diagnosis:
    """What ended an attempt (the newest one where none is named).

    `exit_code`: of srun or of the local job. `slurm`: what the controller says of the job now; None = it was not asked
    or does not answer. Nothing is raised whatever the files hold.
    """
    name = attempt or newest_attempt(evidence.events) or (f"{evidence.job_id}.0" if evidence.job_id else None)
    if name is None:
        return _finish(evidence, _found(Cause.NEVER_STARTED, "the run was never submitted"), None)
    case = _Case(evidence, attempt_of(evidence.events, name), exit_code, slurm)
    return _finish(evidence, case.decide(), name)


def _found(cause: Cause, sentence: str, **facts: Any) -> Diagnosis:
    return Diagnosis(cause=cause, sentence=sentence, **facts)


def _finish(evidence: Evidence, found: Diagnosis, name: str | None) -> Diagnosis:
    values = {field: getattr(found, field) for field in ("cause", "sentence", "evidence", "where", "rank", "host")}
    command = command_for(found.cause, evidence, rank=found.rank)
    return Diagnosis(**values, command=command, attempt=name)


class _Case:
    """One attempt, and everything known of its end."""

    def __init__(self, evidence: Evidence, attempt: Attempt, exit_code: int | None, slurm: JobView | None) -> None:
        self.evidence, self.attempt, self.exit_code, self.slurm = evidence, attempt, exit_code, slurm
        run = evidence.run
        self.reports = read_reports(run, attempt.name)
        self.said = slurm_lines(run, attempt.job_id, attempt.name)

    def decide(self) -> Diagnosis:
        """The first of these that knows something."""
        looks = (
            self._finished, self._cancelled, self._stopped, self._reported, self._by_slurm, self._killed,
            self._complained, self._told, self._by_codes, self._consequences, self._silent,
        )  # fmt: skip
        return next(found for look in looks for found in look())

    # --- the looks, in the order of belief -------------------------------------------------------

    def _finished(self) -> Iterator[Diagnosis]:
        if self.evidence.result is not None:
            step = self.evidence.result.get("step")
            sentence = f"finished{f' after step {step}' if step else ''}; the result is verified"
            yield _found(Cause.FINISHED, sentence, where=str(self.evidence.run.result))

    def _cancelled(self) -> Iterator[Diagnosis]:
        if self.attempt.last("cancelled") or (self.evidence.cancelled and self._is_newest()):
            yield _found(Cause.CANCELLED, "was cancelled through the launcher", where=str(self.evidence.run.attempts))

    def _is_newest(self) -> bool:
        return self.evidence.job_id == self.attempt.job_id

    def _stopped(self) -> Iterator[Diagnosis]:
        """The ranks saved together and left; why is Slurm's to say."""
        event = self.attempt.last("stopped")
        if event is None:
            return
        why = self._slurm_word()
        step, reason = event.get("step"), event.get("reason")
        if reason == PAUSED:  # whatever Slurm does to the job meanwhile: its ranks have done what they were asked for
            yield _found(Cause.STOPPED, f"paused after step {step}, as asked", where=str(self.evidence.run.attempts))
            return
        saved = f"; the ranks saved after step {step} and left"
        if why is not None:
            cause, words, line = why
            yield _found(cause, f"{words}{saved}", **_of_line(line, self.evidence.run.attempts))
        elif self._warned_of_the_limit():
            yield _found(Cause.TIME_LIMIT, f"came near its time limit{saved}", where=str(self.evidence.run.attempts))
        else:
            sentence = f"was told to stop ({reason}) by somebody, not by Slurm{saved}"
            yield _found(Cause.STOPPED, sentence, where=str(self.evidence.run.attempts))

    def _warned_of_the_limit(self) -> bool:
        """Whether the signal is the one that Slurm sends ahead of the time limit."""
        request = self.evidence.job.get("request", {})
        lead_s = number(request.get("signal_lead_s")) if isinstance(request, Mapping) else None
        if self.slurm is None or self.slurm.end_s is None or self.slurm.state != "RUNNING":
            return False
        return self.slurm.end_s - time.time() <= (lead_s or 0) + SIGNAL_MAY_BE_EARLY_S

    def _reported(self) -> Iterator[Diagnosis]:
        """The rank that said what happened to it; where several did, the first."""
        own = [report for report in self.reports if report.cause not in CONSEQUENCES and not report.killed]
        ordered = sorted(own, key=lambda report: (report.cause is not Cause.HUNG, report.cause is Cause.SUPERSEDED))
        for report in ordered[:1]:
            if report.cause is Cause.RANK_EXITED and self._slurm_word() is not None:
                continue
            yield _of_report(report)

    def _by_slurm(self) -> Iterator[Diagnosis]:
        why = self._slurm_word()
        if why is not None:
            cause, words, line = why
            lost = [report for report in self.reports if report.killed]
            host = (line.host if line else None) or (lost[0].host if lost and cause not in _WHOLE_JOB else None)
            rank = lost[0].rank if lost and cause is Cause.HOST_OUT_OF_MEMORY else None
            if cause is Cause.CANCELLED and not self.attempt.began:
                words = f"{words} before it started"
            yield _found(cause, words, host=host, rank=rank, **_of_line(line, None))

    def _killed(self) -> Iterator[Diagnosis]:
        """A rank killed from outside; not one that was told to end because another had failed."""
        killed = sorted(
            (report for report in self.reports if report.killed), key=lambda report: report.signal != "SIGKILL"
        )
        for report in killed[:1]:
            if self._oom_lines():
                line = self._oom_lines()[0]
                yield _found(
                    Cause.HOST_OUT_OF_MEMORY,
                    f"{_who(report)} was killed because its node ran out of the memory the job asked for",
                    rank=report.rank,
                    host=report.host,
                    **_of_line(line, None),
                )
            else:
                yield _of_report(report)

    def _oom_lines(self) -> list[Said]:
        return [said for said in self.said if said.cause is Cause.HOST_OUT_OF_MEMORY]

    def _complained(self) -> Iterator[Diagnosis]:
        """srun names the first task that failed; of ranks without a report that is all there is."""
        for said in self.said[:1]:
            who = "a rank" if said.rank is None else f"rank {said.rank}"
            on = f" on {said.host}" if said.host else ""
            if said.cause is Cause.LAUNCH_FAILED:
                sentence = "Slurm could not start the ranks"
            else:
                sentence = f"{who}{on} ended without a report"
            cause = said.cause
            if not self.attempt.began and cause in (Cause.OUR_BUG, Cause.RECIPE_ERROR, Cause.UNKNOWN):
                cause, sentence = Cause.LAUNCH_FAILED, f"{who}{on} ended before it could begin"
            yield _found(cause, sentence, rank=said.rank, host=said.host, **_of_line(said, None))

    def _told(self) -> Iterator[Diagnosis]:
        """A rank's words in the ledger, where it could not write its report."""
        for event in self.attempt.events if not self.reports else ():
            error = text(event.get("error"))
            if event.get("event") != "failed" or error is None:
                continue
            kind, _, message = error.partition(": ")
            cause = cause_of_error(kind, message)
            if cause not in CONSEQUENCES:
                rank, words = number(event.get("rank")), one_line(error)
                where = str(self.evidence.run.attempts)
                yield _found(cause, f"rank {rank} failed: {words}", evidence=words, where=where, rank=rank)

    def _by_codes(self) -> Iterator[Diagnosis]:
        """Exit codes that the local controller wrote down."""
        ended = self.attempt.last("ended") or {}
        codes = ended.get("exit_codes")
        numbered = list(enumerate(codes)) if isinstance(codes, list | tuple) else []
        bad = [(rank, code) for rank, code in numbered if number(code)]
        if bad and not self.reports:
            # One that was killed is mostly one that was ended because another had failed.
            rank, code = max(bad, key=lambda one: (one[1] > 0, -one[0]))
            name = -code if code < 0 else code - 128 if code > 128 else 0
            cause = cause_of_signal(_signal(name)) if name else cause_of_exit(code)
            how = f"was killed by {_signal(name)}" if name else f"ended with exit code {code}"
            log = self.evidence.run.log(self.attempt.job_id, rank)
            yield _found(
                cause,
                f"rank {rank} {how}",
                evidence=last_words(log),
                where=str(log),
                rank=rank,
                host=text(ended.get("host")),
            )

    def _consequences(self) -> Iterator[Diagnosis]:
        """Only what peers saw: the missing rank said nothing."""
        seen = sorted(
            (report for report in self.reports if report.cause in CONSEQUENCES),
            key=lambda report: (report.cause is not Cause.RENDEZVOUS, report.time_s),
        )
        if not seen:
            return
        first, spoke = seen[0], {report.rank for report in self.reports}
        silent = sorted(set(range(self.attempt.world_size)) - spoke)
        if first.cause is Cause.PEER_LOST and 0 < len(silent) < self.attempt.world_size:
            who = ", ".join(str(rank) for rank in silent[:4])
            yield _found(
                Cause.RANK_EXITED,
                f"rank {who} left without a word while the others trained; {_who(first)} noticed",
                evidence=first.words,
                where=str(first.path),
                rank=silent[0],
            )
        else:
            yield _of_report(first)

    def _silent(self) -> Iterator[Diagnosis]:
        """Nobody said anything."""
        log = self.evidence.run.log(self.attempt.job_id, 0)
        controller = self.evidence.run.logs / "controller.out"
        path = controller if controller.exists() and not is_there(log) else log
        words = last_words(path)
        facts = {"evidence": words, "where": str(path) if words else None}
        if not self.attempt.began and self.exit_code:
            yield _found(Cause.LAUNCH_FAILED, f"no rank ever began (exit status {self.exit_code})", **facts)
        elif not self.attempt.began and self.exit_code is None:
            yield _found(Cause.NEVER_STARTED, "no rank ever began", **facts)
        elif self.exit_code == 0:
            yield _found(Cause.RANK_EXITED, "the ranks left with exit status 0 and without a result", **facts)
        else:
            status = f" (exit status {self.exit_code})" if self.exit_code else ""
            yield _found(Cause.UNKNOWN, f"ended without saying why{status}", **facts)

    # --- Slurm ------------------------------------------------------------------------------------

    def _slurm_word(self) -> tuple[Cause, str, Said | None] | None:
        """Why Slurm ended the job, in words, with the line of a log that says so; None when Slurm did not."""
        line = next((said for said in self.said if said.cause in _WORDS), None)
        cause = self._slurm_state() or (line.cause if line else None)
        if cause is None:
            return None
        if cause is Cause.OPERATOR_REQUEUE and line is not None and line.cause in (Cause.PREEMPTED, Cause.NODE_LOST):
            cause = line.cause
        return cause, _WORDS[cause], line if line is not None and line.cause is cause else None

    def _slurm_state(self) -> Cause | None:
        view = self.slurm
        if view is None:
            return None
        came_back = view.restarts is not None and view.restarts > self.attempt.restart
        if view.preempted and not came_back:
            return Cause.PREEMPTED
        if view.reason == "TimeLimit":
            return Cause.TIME_LIMIT
        if came_back or view.state in _PUT_BACK:
            return Cause.OPERATOR_REQUEUE
        if view.state == "COMPLETING" and self.exit_code is not None:
            return Cause.CANCELLED  # our batch script still runs: it is being ended, and not to come back
        return _STATES.get(view.state)


_PUT_BACK = frozenset({"REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
_STATES = {
    "PREEMPTED": Cause.PREEMPTED,
    "TIMEOUT": Cause.TIME_LIMIT,
    "DEADLINE": Cause.TIME_LIMIT,
    "CANCELLED": Cause.CANCELLED,
    "NODE_FAIL": Cause.NODE_LOST,
    "BOOT_FAIL": Cause.NODE_LOST,
    "OUT_OF_MEMORY": Cause.HOST_OUT_OF_MEMORY,
}
_WORDS = {
    Cause.PREEMPTED: "was preempted to make room for a job of higher priority",
    Cause.TIME_LIMIT: "reached its time limit",
    Cause.OPERATOR_REQUEUE: "was put back into the queue by an operator or by Slurm",
    Cause.CANCELLED: "was cancelled",
    Cause.NODE_LOST: "lost a node",
    Cause.HOST_OUT_OF_MEMORY: "ran out of the host memory it asked for",
}
"""What Slurm does to a job, as the end of a sentence that begins with the attempt."""
_WHOLE_JOB = frozenset({Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.OPERATOR_REQUEUE, Cause.CANCELLED})


def _signal(value: int) -> str:
    import signal

    try:
        return signal.Signals(value).name
    except ValueError:
        return f"signal {value}"


def _who(report: Report) -> str:
    rank = "a rank" if report.rank is None or report.rank < 0 else f"rank {report.rank}"
    return f"{rank}{f' on {report.host}' if report.host else ''}"


def _of_report(report: Report) -> Diagnosis:
    """One rank's end as a sentence."""
    at = f" ({report.phase}{f', after step {report.step}' if report.step else ''})" if report.phase else ""
    sentence = {
        Cause.HUNG: f"{_who(report)} hung{at}: {report.words}",
        Cause.CRASHED: f"{_who(report)} crashed{at}: it {report.words}",
        Cause.RANK_KILLED: f"{_who(report)} was killed from outside{at}: it {report.words}",
        Cause.RANK_EXITED: f"{_who(report)} {report.words}{at}",
        Cause.GPU_OUT_OF_MEMORY: f"{_who(report)} ran out of GPU memory{at}",
        Cause.HOST_OUT_OF_MEMORY: f"{_who(report)} ran out of host memory{at}",
        Cause.DISK_FULL: f"{_who(report)} could not write{at}: the disk is full, or a quota is used up",
        Cause.SUPERSEDED: "a newer attempt of the run began, so this one left",
        Cause.RENDEZVOUS: f"the ranks did not find each other: {report.words}",
        Cause.PEER_LOST: f"{_who(report)} lost another rank{at}: {report.words}",
    }.get(report.cause, f"{_who(report)} failed{at}: {report.words}")
    return _found(
        report.cause, sentence, evidence=report.words, where=str(report.path), rank=report.rank, host=report.host
    )


def _of_line(said: Said | None, otherwise: Path | None) -> dict[str, Any]:
    if said is None:
        return {"where": str(otherwise)} if otherwise else {}
    return {"evidence": said.line, "where": str(said.path)}
