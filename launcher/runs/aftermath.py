"""aftermath: the last words of a job: what ended the attempt, what happens next, and one line about it in the ledger.

    python -m launcher.runs.aftermath RUN_DIR before       in the batch script, ahead of srun
    python -m launcher.runs.aftermath RUN_DIR EXIT_CODE    after srun; exits with EXIT_CODE

The ranks have saved and ended by now, so their GPUs are free; what keeps the job alive is this process. That matters:
a job that ends politely while it is being preempted is not put back into the queue (seen on Slurm 22.05). So after a
preemption it stays until Slurm ends it, and everywhere else it asks for the comeback itself.

`before` decides late about a start of the job that had no last words (a lost node, no time at all), and does not let
the ranks start where the result is there or a bound is reached.

Exit codes of its own: NOT_AGAIN where the ranks ended well but the run has not finished and nothing brings it back,
TEMPORARY where Slurm did not answer. Otherwise srun's, whatever happens here.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Slurm may be ending the job by now; these words come first
    for _number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(_number, signal.SIG_IGN)

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import LauncherError, TemporaryError
from launcher.recipe.load import load_recipe
from launcher.runs.diagnosis import Cause, Diagnosis, diagnose
from launcher.runs.folder import RunFolder, make_folder
from launcher.runs.policy import Action, Decision, History, Limits, decide
from launcher.runs.remains import text
from launcher.runs.requeue import RefusedError, follow_up, nodes_there, put_back, stored_request
from launcher.runs.slurm import find_jobs
from launcher.runs.smaller import use_micro_batch
from launcher.runs.state import Evidence, newest_checkpoint, read_evidence
from launcher.runs.train_job import run_of_task
from launcher.runs.view import JobView, earlier_state, job_view, preemption_requeues

NOTHING_TO_DO = 92
"""Answer of `before` where the run has finished; the batch script then ends well."""
NOT_AGAIN = 93
"""Exit status of a job whose ranks left without error and whose run was ended by a bound."""
TEMPORARY = TemporaryError.exit_code
PATIENCE_S = 600.0
"""How long Slurm may be silent before we give up; LAUNCHER_AFTERMATH_PATIENCE_S overrules it."""
_STAY_S = 600.0
"""After the end of a preemption's grace Slurm should have ended us; then we ask for the requeue ourselves."""
_POLL_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Which start of which job this is."""

    job_id: str
    restart: int
    task: str | None = None
    """ARRAY_TASK where the job is part of an array: Slurm's commands would take the number alone for all of it."""

    @property
    def name(self) -> str:
        """As Slurm's commands want it."""
        return self.task or self.job_id

    @property
    def attempt(self) -> str:
        """As the ranks of this start call it."""
        return f"{self.job_id}.{self.restart}"

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Start | None:
        """From Slurm's variables; None outside a job."""
        job_id, restart = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_RESTART_COUNT") or "0"
        array, task = environ.get("SLURM_ARRAY_JOB_ID", ""), environ.get("SLURM_ARRAY_TASK_ID", "")
        if not (job_id.isdecimal() and restart.isdecimal()):
            return None
        part = f"{array}_{task}" if array.isdecimal() and task.isdecimal() else None
        return cls(job_id=job_id, restart=int(restart), task=part)


# ---------------------------------------------------------------- one attempt, one decision


def conclude(
    run: RunFolder, attempt: str, *, exit_code: int | None, slurm: JobView | None = None, local: bool = False
) -> tuple[Diagnosis, Decision]:
    """What ended an attempt and what should follow; nothing is written and nothing is done."""
    evidence = read_evidence(run)
    diagnosis = diagnose(evidence, attempt=attempt, exit_code=exit_code, slurm=slurm)
    now_s, ended_at = time.time(), newest_checkpoint(run) or 0
    history = History.of(evidence.events).deciding(attempt, diagnosis, ended_at=ended_at, now_s=now_s)
    limits = limits_of(run, local=local)
    decision = decide(diagnosis, history, limits, now_s=now_s)
    if decision.changes.exclude and not local:
        limits = replace(limits, nodes_there=nodes_there(slurm.partition if slurm else None))
        decision = decide(diagnosis, history, limits, now_s=now_s)
    return diagnosis, decision


def limits_of(run: RunFolder, *, local: bool = False) -> Limits:
    """What the run's recipe and plan allow; the usual bounds where they cannot be read."""
    accumulation = 1
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        accumulation = int(json.loads(run.plan.read_text(encoding="utf-8"))["chosen"]["gradient_accumulation"])
    try:
        return Limits.of(load_recipe(run.resolved), accumulation=accumulation, local=local)
    except (LauncherError, OSError):
        return Limits(other_nodes=not local)


def change(run: RunFolder, decision: Decision) -> Decision:
    """Make the plan what the decision says; a decision to stop where that cannot be done."""
    if not decision.again or decision.changes.micro_batch is None:
        return decision
    try:
        use_micro_batch(run, decision.changes.micro_batch)
    except (LauncherError, OSError, ValueError, KeyError) as error:
        return Decision(action=Action.STOP, reason=f"the plan could not be made smaller: {error}")
    return decision


def claim(run: RunFolder, attempt: str) -> bool:
    """Be the one who decides about an attempt; False for whoever comes second."""
    make_folder(run.decisions)
    try:
        descriptor = os.open(run.decisions / f"{attempt}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"attempt": attempt, "pid": os.getpid(), "host": os.uname().nodename, "time_s": time.time()}, file)
    return True


def write_down(run: RunFolder, attempt: str, diagnosis: Diagnosis, decision: Decision, **facts: Any) -> None:
    """The one line of the ledger about what follows an attempt, and the same words in the log."""
    note(run, attempt, diagnosis, decision, **facts)
    say(f"{attempt} {diagnosis.sentence} [{diagnosis.cause}]")
    say(f"{_ACTIONS[decision.action]}: {decision.reason}")


def note(run: RunFolder, attempt: str, diagnosis: Diagnosis, decision: Decision, **facts: Any) -> None:
    """The one line of the ledger about what follows an attempt."""
    run.record(
        "decided",
        attempt=attempt,
        job_id=attempt.rpartition(".")[0],
        action=decision.action.value,
        cause=diagnosis.cause.value,
        reason=decision.reason,
        changes=decision.changes.to_json(),
        sentence=diagnosis.sentence,
        evidence=diagnosis.evidence,
        where=diagnosis.where,
        rank=diagnosis.rank,
        culprit=diagnosis.host,
        step=newest_checkpoint(run) or 0,
        **facts,
    )


_ACTIONS = {
    Action.FINISH: "done",
    Action.STOP: "not started again",
    Action.WAIT: "comes back by itself",
    Action.REQUEUE: "starts again",
    Action.FOLLOW_UP: "goes on in a new job",
}


def say(words: str) -> None:
    """One line in the log of the batch script."""
    print(f"launcher: {words}", flush=True)


def decided(evidence: Evidence, attempt: str) -> Mapping[str, Any] | None:
    """The ledger's line about an attempt; None while nobody has decided."""
    lines = (event for event in evidence.events if event.get("event") == "decided")
    return next((line for line in lines if line.get("attempt") == attempt), None)


# ---------------------------------------------------------------- after srun


def after(run: RunFolder, start: Start, exit_code: int) -> int:
    """Decide about this start of the job and do it; returns the job's exit status."""
    if decided(read_evidence(run), start.attempt) is not None or not claim(run, start.attempt):
        return exit_code
    slurm, silent = ask(start.name)
    diagnosis, decision = conclude(run, start.attempt, exit_code=exit_code, slurm=slurm)
    if silent and diagnosis.cause is Cause.STOPPED:
        diagnosis = replace(diagnosis, sentence=f"{diagnosis.sentence}; Slurm does not answer, so why is not known")
    returning = slurm is not None and slurm.restarts is not None and slurm.restarts > start.restart
    try:
        decision = _act(run, start, decision, slurm, returning=returning)
    except TemporaryError as error:
        decision = Decision(
            action=Action.STOP, reason=f"{error.problems[0]}; resume it by hand", changes=decision.changes
        )
        write_down(run, start.attempt, diagnosis, decision, returning=returning)
        return exit_code or TEMPORARY
    write_down(run, start.attempt, diagnosis, decision, returning=returning)
    if decision.action is Action.WAIT and not returning:
        _stay(run, start, slurm)
    unfinished = decision.action is Action.STOP and diagnosis.cause is not Cause.STOPPED
    return exit_code or (NOT_AGAIN if unfinished else 0)


def ask(job_id: str) -> tuple[JobView | None, bool]:
    """What Slurm says of our job, and whether it was silent to the end of our patience."""
    give_up, pause_s = time.monotonic() + patience_s(), 1.0
    while True:
        try:
            return job_view(job_id), False
        except TemporaryError as error:
            if time.monotonic() + pause_s > give_up or "PATH" in str(error):
                return None, True
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 20.0)


def patience_s() -> float:
    """Seconds for which a silent Slurm is asked again."""
    try:
        return float(os.environ.get("LAUNCHER_AFTERMATH_PATIENCE_S", ""))
    except ValueError:
        return PATIENCE_S


def _act(run: RunFolder, start: Start, decision: Decision, slurm: JobView | None, *, returning: bool) -> Decision:
    """Bring the run back in the way that Slurm allows; what was done in the end, as a decision.

    Raises:
        TemporaryError: Slurm does not answer.
    """
    decision = change(run, decision)
    if not decision.again:
        return decision
    if returning:
        return replace(decision, action=Action.WAIT)
    allowed = slurm is None or slurm.requeue
    if decision.action is Action.WAIT and allowed and preemption_requeues(slurm.partition if slurm else None):
        return decision
    if decision.action is not Action.FOLLOW_UP and allowed:
        try:
            put_back(start.name, patience_s=patience_s())
            return replace(decision, action=Action.REQUEUE)
        except RefusedError as error:
            refusal = error.problems[0]
    else:
        refusal = "" if allowed else "this job may not be requeued (Requeue=0)"
    return _follow(run, start, decision, refusal)


def _follow(run: RunFolder, start: Start, decision: Decision, refusal: str) -> Decision:
    """A new job after this one; with what Slurm said against a requeue, if it was asked."""
    request = stored_request(read_evidence(run).job)
    why = f"; {refusal}" if refusal else ""
    if request is None:
        reason = f"{decision.reason}{why}; job.json does not hold a request this launcher can send again"
        return Decision(action=Action.STOP, reason=reason)
    try:
        job_id = follow_up(request, after=start.name, exclude=decision.changes.exclude)
    except TemporaryError:
        raise
    except LauncherError as error:
        return Decision(action=Action.STOP, reason=f"{decision.reason}{why}; no new job either: {error.problems[0]}")
    return replace(decision, action=Action.FOLLOW_UP, reason=f"{decision.reason}{why}; job {job_id} goes on after it")


def _stay(run: RunFolder, start: Start, slurm: JobView | None) -> None:
    """Stay until Slurm ends us. Where it does not in good time, ask for the requeue after all."""
    end_s = slurm.end_s if slurm is not None and slurm.end_s is not None else time.time()
    until = time.monotonic() + min(max(0.0, end_s - time.time()) + _STAY_S, 4 * 3600.0)
    while time.monotonic() < until:
        time.sleep(_POLL_S)
        with contextlib.suppress(TemporaryError):
            view = job_view(start.name)
            if view is None or view.state != "RUNNING" or (view.restarts or 0) > start.restart:
                time.sleep(_POLL_S)  # the end is on its way to us
                return
            if not view.preempted:
                break
    say("Slurm has not ended this job; asking for the requeue")
    try:
        put_back(start.name, patience_s=patience_s())
    except LauncherError as error:
        say(f"it cannot be put back: {error.problems[0]}")
        run.record("not_requeued", attempt=start.attempt, job_id=start.job_id, why=error.problems[0])


# ---------------------------------------------------------------- before srun


def before(run: RunFolder, start: Start) -> int:
    """Whether the ranks may start: 0, or NOTHING_TO_DO or NOT_AGAIN where they must not."""
    if run.result.exists():
        say(f"{run.run_id} is finished already ({run.result}); nothing to do")
        return NOTHING_TO_DO
    last = replace(start, restart=start.restart - 1)
    if last.restart < 0:
        return 0
    evidence = read_evidence(run)
    line = decided(evidence, last.attempt)
    stop = _decide_late(run, last) if line is None else _was_to_stop(line)
    if stop is None:
        return 0
    claim(run, start.attempt)
    run.record(
        "decided", attempt=start.attempt, job_id=start.job_id, action=Action.STOP.value, cause=stop[0],
        reason=stop[1], changes={}, step=newest_checkpoint(run) or 0, held_back=True,
    )  # fmt: skip
    say(f"{start.attempt} is not started: {stop[1]}; launcher resume {run.run_id} goes on")
    return NOT_AGAIN


def _was_to_stop(line: Mapping[str, Any]) -> tuple[str, str] | None:
    """Cause and reason of a decision to stop that came too late to keep Slurm from starting the job again."""
    if line.get("action") != Action.STOP.value or not line.get("returning"):
        return None
    return text(line.get("cause")) or Cause.UNKNOWN.value, text(line.get("reason")) or "it was to stop"


def _decide_late(run: RunFolder, last: Start) -> tuple[str, str] | None:
    """Decide about a start that had no last words; cause and reason where it must not go on."""
    claim(run, last.attempt)
    state = earlier_state(last.job_id, last.restart)
    slurm = None if state is None else JobView(job_id=last.job_id, state=state, preempted=state == "PREEMPTED")
    diagnosis, decision = conclude(run, last.attempt, exit_code=None, slurm=slurm)
    decision = change(run, decision)
    if decision.again:
        decision = replace(decision, action=Action.WAIT)
    write_down(run, last.attempt, diagnosis, decision, late=True)
    return None if decision.again else (diagnosis.cause.value, decision.reason)


def close_last(run: RunFolder) -> None:
    """Write down what ended the last attempt where nobody has: a job killed before its last words, resumed by hand.

    The caller knows that no job of the run lives, and that another one follows.

    Raises:
        TemporaryError: Slurm does not answer.
    """
    evidence = read_evidence(run)
    attempt = next(
        (text(event.get("attempt")) for event in evidence.events[::-1] if event.get("event") == "started"), None
    )
    if attempt is None or decided(evidence, attempt) is not None:
        return
    job_id, local = evidence.slurm_id, evidence.cluster == "local"
    job = None if local or job_id is None else find_jobs([job_id]).get(job_id)
    claim(run, attempt)
    slurm = None if job is None else JobView.of(job)
    diagnosis, _ = conclude(run, attempt, exit_code=None, slurm=slurm, local=local)
    decision = Decision(action=Action.STOP, reason="its job had no last words; it is resumed by hand")
    note(run, attempt, diagnosis, decision, late=True)


# ---------------------------------------------------------------- the process


def main(argv: list[str]) -> int:
    """`python -m launcher.runs.aftermath RUN_DIR before|EXIT_CODE`; never worse than srun's own status."""
    if len(argv) != 3 or not (argv[2] == "before" or argv[2].isdecimal()):
        print("usage: python -m launcher.runs.aftermath RUN_DIR before|EXIT_CODE", file=sys.stderr)
        return 2
    run, code = RunFolder(run_of_task(argv[1]).resolve()), int(argv[2]) if argv[2].isdecimal() else 0
    start = Start.of(os.environ)
    if start is None:
        print("launcher: not inside a Slurm job; nothing is decided", file=sys.stderr)
        return code
    try:
        return before(run, start) if argv[2] == "before" else after(run, start, code)
    except Exception:
        traceback.print_exc()
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
