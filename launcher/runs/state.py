"""State: which of Slurm's words describes a run, from its files first and Slurm second.

Success is result.json and nothing else: Slurm calls a job COMPLETED whose ranks saved, left politely and were never
started again. So a job that has ended without it is a failure, stopped or cancelled, whatever Slurm says.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.runs import story
from launcher.runs.adoption import has_settled, open_submission
from launcher.runs.folder import RunFolder, read_json_lines
from launcher.runs.lock import holder
from launcher.runs.process import Process, is_alive, is_here, process_from_json
from launcher.runs.reasons import reason_words, state_words
from launcher.runs.slurm import SlurmJob

ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "STOPPED",
        "TIMEOUT",
    }
)
"""States after which nothing more happens by itself. STOPPED is ours: told to stop, it saved and left."""
_HELD = frozenset({"REQUEUE_HOLD", "SPECIAL_EXIT"})
_NEW_JOB = ("submitted", "started")
"""Events of which the last names the newest job; later lines about an older job do not make it the newest."""
_JOB = re.compile(r"[A-Za-z0-9_.\[\]+-]{1,64}")
FORGOTTEN_AFTER_S = 600.0
"""A job that neither queue nor accounting knows counts as ended only this long after its last sign of life."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What the files of a run say."""

    run: RunFolder
    job: Mapping[str, Any]
    """job.json; empty before submission."""
    events: tuple[Mapping[str, Any], ...]
    """The attempts ledger."""
    heartbeat: Mapping[str, Any]
    result: Mapping[str, Any] | None

    @property
    def job_id(self) -> str | None:
        """The newest job: of the ledger (which knows jobs submitted by hand), else of job.json."""
        lines = (event.get("job_id") for event in self.events if event.get("event") in _NEW_JOB)
        named = [number for line in lines if (number := _number_of_job(line))]
        return named[-1] if named else _number_of_job(self.job.get("job_id"))

    @property
    def slurm_id(self) -> str | None:
        """The same job as Slurm's commands take it: ARRAY_TASK for a task, one of which has its array's own number."""
        sent = [_number_of_job(event.get("job_id")) for event in self.events if event.get("event") == "submitted"]
        return sent[-1] if sent and "_" in (sent[-1] or "") else self.job_id

    @property
    def cluster(self) -> str:
        """One of slurm and local."""
        return str(self.job.get("request", {}).get("cluster", "slurm"))

    @property
    def unanswered(self) -> bool:
        """Whether a submission was begun of which nobody knows how it ended."""
        return open_submission(self.events) is not None

    @property
    def process(self) -> Process | None:
        """Controller of a local job."""
        return process_from_json(self.job.get("process"))

    @property
    def restarts(self) -> int:
        """How often the ranks were started again."""
        return story.restarts(self.events)

    @property
    def last_sign_s(self) -> float:
        """When the run was last heard of, in seconds since the epoch; 0 = never."""
        times = [
            self.heartbeat.get("time_s"),
            self.job.get("submitted_s"),
            *(e.get("time_s") for e in self.events[-1:]),
        ]
        return max((float(moment) for moment in times if isinstance(moment, int | float)), default=0.0)

    def last(self, name: str) -> Mapping[str, Any] | None:
        """The last event of that name since the job was last submitted or started; None when there is none."""
        for event in self.events[::-1]:
            if event.get("event") == name:
                return event
            if event.get("event") in ("submitted", "started"):
                return None
        return None

    @property
    def cancelled(self) -> bool:
        """Whether this job was cancelled through the launcher, and not put back by hand after that."""
        cancelled = False
        for event in self.events:
            if str(event.get("job_id")) not in (self.job_id, self.slurm_id):
                continue
            if event.get("event") == "cancelled":
                cancelled = True
            elif event.get("event") == "started" and not str(event.get("attempt", ".0")).endswith(".0"):
                cancelled = False
        return cancelled

    @property
    def first_failure(self) -> str | None:
        """What went wrong in the last attempt, by whoever saw it best."""
        return story.trouble(self.events)


def _number_of_job(value: Any) -> str | None:
    """A job's number as files and commands may have it; None for whatever else a damaged ledger holds."""
    return str(value) if isinstance(value, str | int) and _JOB.fullmatch(str(value)) else None


def read_evidence(run: RunFolder) -> Evidence:
    """Read the files of a run; what is missing or half-written counts as not there."""
    return Evidence(
        run=run,
        job=_json(run.job) or {},
        events=tuple(read_json_lines(run.attempts)),
        heartbeat=_json(run.heartbeat) or {},
        result=_json(run.result),
    )


def _json(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """One word of Slurm's, and what it means here."""

    word: str
    sentence: str
    reason: str | None = None
    """Slurm's own word for why."""
    nodes: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.word in ENDED


def judge(evidence: Evidence, job: SlurmJob | None, *, unreachable: str | None = None) -> State:
    """The state of a run. `job` is what Slurm says; `unreachable` why it could not be asked."""
    if evidence.result is not None:
        steps = evidence.result.get("step")
        return State(
            word="COMPLETED", sentence=f"finished{f' after step {steps}' if steps else ''}; the result is verified"
        )
    if evidence.job_id is None or evidence.unanswered:
        undecided = _judge_unanswered(evidence, unreachable)
        if undecided is not None:
            return undecided
    if evidence.cluster == "local":
        return _judge_local(evidence)
    if job is None:
        return _judge_unseen(evidence, unreachable)
    if not job.active:
        return _ended(evidence, job.state, reason=job.reason, nodes=job.nodes)
    return State(word=job.state, sentence=_active_sentence(evidence, job), reason=job.reason, nodes=job.nodes)


def _judge_unanswered(evidence: Evidence, unreachable: str | None) -> State | None:
    """No job is known of, or not whether the last submission made one; None where the job before it tells."""
    submitting = open_submission(evidence.events)
    if submitting is None:
        return State(word="NOT_SUBMITTED", sentence="the run folder is there; no job was submitted yet")
    if (busy := holder(evidence.run)) is not None:
        return State(word="NOT_SUBMITTED", sentence=f"is being submitted by {busy}")
    if unreachable is not None:
        return State(word="UNKNOWN", sentence=f"cannot be told (whether it was submitted either): {unreachable}")
    if not has_settled(submitting):
        return State(word="UNKNOWN", sentence="its launcher ended while submitting it; Slurm shows no job of it yet")
    if evidence.job_id is not None:
        return None
    again = f"launcher resume {evidence.run.run_id}"
    return State(
        word="NOT_SUBMITTED", sentence=f"its launcher ended while submitting it, and no job came of it; {again}"
    )


def _active_sentence(evidence: Evidence, job: SlurmJob) -> str:
    if evidence.cancelled:
        return "is being cancelled"
    if job.state == "RUNNING":
        return _running_sentence(evidence)
    words = reason_words(job.state, job.reason, job.job_id)
    start = f" (expected start {job.start})" if job.state == "PENDING" and job.start else ""
    again = _before(evidence) if job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING") else ""
    if again and is_held(job):
        return f"held (requeued); release it with: scontrol release {job.job_id}{again}"
    return f"{state_words(job.state, job.job_id)}{f': {words}' if words else ''}{again}{start}"


def is_held(job: SlurmJob) -> bool:
    """Whether it waits for somebody to release it."""
    return job.state in _HELD or (job.state == "PENDING" and "held" in (job.reason or "").lower())


def _before(evidence: Evidence) -> str:
    """What a waiting job did before; nothing where it has not run yet."""
    starts = sum(1 for event in evidence.events if event.get("event") == "started")
    if not starts:
        return ""
    why = story.coming_back(evidence.events)
    times = "once" if starts == 1 else f"{starts} times"
    return f"; it was started {times} before{f' ({why})' if why else ''}"


def _running_sentence(evidence: Evidence) -> str:
    beat = evidence.heartbeat
    if beat.get("job_id") not in (None, evidence.job_id) or "state" not in beat:
        return "runs; the ranks are starting (importing PyTorch takes a while)"
    silent_s = time.time() - float(beat.get("time_s", 0))
    silent = f"; no sign of life for {silent_s / 60:.0f} min" if silent_s > FORGOTTEN_AFTER_S else ""
    step = f", step {beat['step']} of {beat.get('total_steps', '?')}" if beat.get("step") is not None else ""
    trouble = evidence.first_failure
    return f"runs: {beat['state']}{step}{_slow_words(beat)}{silent}{f'; {trouble}' if trouble else ''}"


def _slow_words(beat: Mapping[str, Any]) -> str:
    """Which rank the others wait for, where the heartbeat says so."""
    slow = beat.get("slow")
    if not isinstance(slow, Mapping):
        return ""
    times = slow.get("times")
    how = f"{times:.1f} times as long as the others" if isinstance(times, int | float) else "longer than the others"
    return f"; rank {slow.get('rank')} on {slow.get('host')} is slow: it takes {how}"


def _judge_local(evidence: Evidence) -> State:
    process = evidence.process
    if process is not None and not is_here(process):
        fresh = time.time() - evidence.last_sign_s < FORGOTTEN_AFTER_S
        if fresh:
            return State(word="UNKNOWN", sentence=f"was started on {process.host}; ask there", nodes=process.host)
    elif process is not None and is_alive(process):
        sentence = "is being cancelled" if evidence.cancelled else _running_sentence(evidence)
        return State(word="RUNNING", sentence=sentence, nodes=process.host)
    return _ended(evidence, "COMPLETED", nodes=process.host if process else None)


def _judge_unseen(evidence: Evidence, unreachable: str | None) -> State:
    """Slurm was not asked, or does not know the job (any more)."""
    if unreachable is not None:
        return State(word="UNKNOWN", sentence=f"cannot be told: {unreachable}{_own_word(evidence)}")
    if evidence.cancelled or evidence.last("stopped") or evidence.first_failure:
        return _ended(evidence, "COMPLETED")
    if time.time() - evidence.last_sign_s < FORGOTTEN_AFTER_S:
        return State(
            word="UNKNOWN", sentence=f"cannot be told: Slurm does not know job {evidence.job_id} (yet, or any more)"
        )
    return _ended(evidence, "FAILED", reason="Slurm has forgotten the job")


def _own_word(evidence: Evidence) -> str:
    """What the run said of itself lately, where nobody else can be asked."""
    beat = evidence.heartbeat
    age_s = time.time() - float(beat.get("time_s", 0))
    if age_s > FORGOTTEN_AFTER_S or "state" not in beat:
        return ""
    step = f", step {beat['step']}" if beat.get("step") is not None else ""
    return f"; the run itself said {age_s:.0f} s ago: {beat['state']}{step}"


def _ended(evidence: Evidence, word: str, *, reason: str | None = None, nodes: str | None = None) -> State:
    """The state of a job that has ended without result.json; `word` is Slurm's (COMPLETED for a local job)."""
    stopped = evidence.last("stopped")
    if evidence.cancelled or word == "CANCELLED":
        word, why, reason = "CANCELLED", "was cancelled", None
    elif stopped and word == "COMPLETED":
        word, why = "STOPPED", _stopped_words(stopped)
    elif word == "COMPLETED":
        word, why = "FAILED", _failure_words(evidence)
    else:
        failure = evidence.first_failure or reason_words(word, reason, evidence.job_id)
        why = f"{state_words(word, evidence.job_id)}{f': {failure}' if failure else ''}"
    decided = None if word == "CANCELLED" else story.decision(evidence.events)
    saved = newest_checkpoint(evidence.run)
    left = f"a checkpoint of step {saved} is there" if saved else "no checkpoint was written"
    return State(
        word=word,
        sentence="; ".join(filter(None, (why, decided, left))),
        reason=reason,
        nodes=nodes,
    )


def _stopped_words(stopped: Mapping[str, Any]) -> str:
    if stopped.get("reason") == "paused":
        return f"paused after step {stopped.get('step')}, as asked"
    return f"was told to stop ({stopped.get('reason')}), saved and left"


def _failure_words(evidence: Evidence) -> str:
    """Why a job failed whose end looked clean to Slurm, or that ran here."""
    if evidence.first_failure:
        return f"failed: {evidence.first_failure}"
    ended = evidence.last("ended")
    bad = [(rank, code) for rank, code in enumerate((ended or {}).get("exit_codes", ())) if code]
    if bad:
        # A rank that was killed is mostly one that was ended because another had failed.
        rank, code = max(bad, key=lambda one: (one[1] > 0, -one[0]))
        return f"failed: rank {rank} {f'was killed by signal {-code}' if code < 0 else f'ended with exit code {code}'}"
    if evidence.cluster == "local" and ended is None:
        said = _last_line(evidence.run.logs / "controller.out")
        return f"failed: {said or 'its processes are gone without a word (killed, or the machine was restarted)'}"
    return "ended without result.json, so it counts as failed although its exit status was 0"


def _last_line(path: Path) -> str | None:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return None
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:400] if said else None


def newest_checkpoint(run: RunFolder) -> int | None:
    """Step of the newest complete-looking checkpoint folder; whether it is sound only loading tells."""
    if not run.checkpoints.is_dir():
        return None
    names = [path.name.removeprefix("step-") for path in run.checkpoints.glob("step-*") if path.is_dir()]
    return max((int(name) for name in names if name.isdecimal()), default=None)
