"""trial_ending: a whole trial ended by a person: what waits for its array first, then every job of its runs.

The word is written into the trial's ledger before anything else, and whoever takes the trial on looks for it before and
after sending or starting anything. So what was sent meanwhile is ended by the one or by the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from launcher.errors import ClusterError, JobFailedError, LauncherError, TemporaryError, raise_all
from launcher.runs import status
from launcher.runs.folder import RunFolder
from launcher.runs.lock import holder
from launcher.runs.process import is_here
from launcher.runs.slurm import SlurmJob, cancel_job, find_named
from launcher.runs.trial_folder import Trial

_LOOKS = 4
"""A job that was ending may have sent a follow-up before it was told; nobody sends a third."""
_LEAVE_S = 30.0
"""How long is waited for who takes the trial on just now to see the word."""
_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Living:
    """A job of a trial that waits or runs."""

    job_id: str
    name: str
    """The run that it takes on, or the name of the job that goes on with the trial."""
    state: str
    run: RunFolder | None = None

    def __str__(self) -> str:
        return f"job {self.job_id} ({self.name}, {self.state})"


def living(trial: Trial) -> list[Living]:
    """Everything of a trial that waits or runs now: who would send more first.

    Raises:
        TemporaryError: Slurm does not answer.
    """
    return list(_processes(trial) if trial.executor == "local" else _jobs(trial))


def cancel(trial: Trial) -> list[Living]:
    """End a trial and return what was ended; nobody but a person goes on with it, and checkpoints stay.

    Raises:
        TemporaryError: Slurm does not answer; nothing more will be sent.
        ClusterError: a job belongs to somebody else, or a run was started on another machine.
    """
    trial.folder.record("cancelled")
    try:
        ended = end_jobs(trial)
    except TemporaryError as error:
        raise TemporaryError(
            *error.problems, f"nothing more of {trial.name} will be sent; for what runs: launcher cancel {trial.name}"
        ) from error
    _wait_until(lambda: not _taken_on_here(trial))
    return ended


def _taken_on_here(trial: Trial) -> bool:
    held = holder(trial.folder)
    return held is not None and is_here(held.process)


def halt_if_cancelled(trial: Trial) -> None:
    """For whoever takes a trial on: leave where a person has ended it, and end what was sent or started meanwhile.

    Raises:
        JobFailedError: it was ended; with what could not be ended now.
    """
    if not trial.cancelled:
        return
    problems: tuple[str, ...] = ()
    try:
        end_jobs(trial)
    except LauncherError as error:
        problems = error.problems
    raise JobFailedError(f"trial {trial.name} was cancelled; go on with: launcher trial {trial.name}", *problems)


def end_jobs(trial: Trial) -> list[Living]:
    """End everything that lives, and look again for what was sent meanwhile.

    Raises:
        TemporaryError: Slurm does not answer.
        ClusterError: something could not be ended; everything else was.
    """
    ended: dict[str, Living] = {}
    problems: list[str] = []
    for _ in range(_LOOKS):
        found = [each for each in living(trial) if each.job_id not in ended]
        senders = [each for each in found if each.run is None]
        for each in senders or found:
            ended[each.job_id] = each
            try:
                _end(each, local=trial.executor == "local")
            except ClusterError as error:
                problems += error.problems
        if not found:
            break
        _let_senders_leave(trial, senders)
    raise_all(ClusterError, problems)
    return list(ended.values())


def _end(each: Living, *, local: bool) -> None:
    if local and each.run is not None:
        status.cancel(each.run)
        return
    cancel_job(each.job_id)
    if each.run is not None:
        each.run.record("cancelled", job_id=each.job_id)


def _let_senders_leave(trial: Trial, senders: Sequence[Living]) -> None:
    """One that was at work may have sent an array the moment before: it is looked for after that."""
    at_work = {each.job_id for each in senders if each.state != "PENDING"}
    if at_work:
        _wait_until(lambda: not any(job.job_id in at_work for job in _active([_next(trial)])))


def _wait_until(happened: Callable[[], bool]) -> None:
    """Until it has, but not for ever."""
    until = time.monotonic() + _LEAVE_S
    while not happened() and time.monotonic() < until:
        time.sleep(_POLL_S)


# ---------------------------------------------------------------- what lives


def _processes(trial: Trial) -> Iterator[Living]:
    """Runs of this machine."""
    for run in trial.made():
        now = status.run_status(run)
        if not now.ended and now.state != "NOT_SUBMITTED":
            yield Living(job_id=now.job_id or "-", name=run.run_id, state=now.state, run=run)


def _jobs(trial: Trial) -> Iterator[Living]:
    """Jobs of a cluster, by their names: also those of which no ledger knows yet."""
    runs = {run.run_id: run for run in trial.made()}
    arrays = {path.name: path for path in trial.arrays()}
    own = os.environ.get("SLURM_JOB_ID")
    found = find_named([_next(trial), *arrays, *runs])
    for job in _still_active(found.get(_next(trial), [])):
        if job.job_id != own:
            yield Living(job_id=job.job_id, name=_next(trial), state=job.state)
    for name, folder in arrays.items():
        for job in _still_active(found.get(name, [])):
            run = RunFolder((folder / job.job_id.partition("_")[2]).resolve())
            yield Living(job_id=job.job_id, name=run.run_id, state=job.state, run=run)
    for name, run in runs.items():
        for job in _still_active(found.get(name, [])):
            yield Living(job_id=job.job_id, name=name, state=job.state, run=run)


def _next(trial: Trial) -> str:
    return f"{trial.name}-next"


def _active(names: Sequence[str]) -> Iterator[SlurmJob]:
    for jobs in find_named(names).values():
        yield from _still_active(jobs)


def _still_active(jobs: Iterable[SlurmJob]) -> Iterator[SlurmJob]:
    return (job for job in jobs if job.active)
