"""living: whether a job of a run still lives, so that there is never a second one."""

from __future__ import annotations

import time

from launcher.errors import ConflictError, TemporaryError
from launcher.runs.adoption import controller_of
from launcher.runs.folder import RunFolder
from launcher.runs.process import is_alive, is_here
from launcher.runs.reasons import reason_words, state_words
from launcher.runs.slurm import SlurmJob, find_jobs, find_named
from launcher.runs.state import FORGOTTEN_AFTER_S, Evidence, is_held, read_evidence

_ENDING = frozenset({"COMPLETING", "STAGE_OUT", "SIGNALING"})


def refuse_living(run: RunFolder) -> None:
    """Refuse while a job of the run waits, runs, is held or is being cleaned up.

    Slurm is asked for every job of the run's name, so that one nobody wrote down counts too.

    Raises:
        ConflictError: a job lives; names it, its state and the one command.
        TemporaryError: Slurm does not answer, so it cannot be told.
    """
    evidence = read_evidence(run)
    _refuse_local(evidence)
    if evidence.cluster == "slurm":
        _refuse_in_queue(evidence)


def _refuse_in_queue(evidence: Evidence) -> None:
    run = evidence.run
    try:
        jobs = list(find_jobs([evidence.slurm_id] if evidence.slurm_id else []).values())
        jobs += find_named([run.run_id]).get(run.run_id, [])
    except TemporaryError as error:
        raise TemporaryError(
            f"whether a job of {run.run_id} still lives cannot be told, so nothing was submitted: {error.problems[0]}"
        ) from error
    living = next((job for job in jobs if job.active), None)
    if living is not None:
        raise ConflictError(f"run {run.run_id} has a job already: {_words(living)}; {_command(living, run)}")


def _words(job: SlurmJob) -> str:
    why = reason_words(job.state, job.reason, job.job_id)
    return f"job {job.job_id} ({job.state}) {state_words(job.state, job.job_id)}{f': {why}' if why else ''}"


def _command(job: SlurmJob, run: RunFolder) -> str:
    """The one thing to type."""
    if job.state in _ENDING:
        return f"try again when it is gone: squeue --jobs={job.job_id}"
    if is_held(job):
        return f"let it go on with: scontrol release {job.job_id}"
    if job.state == "RUNNING":
        return f"follow it with launcher logs -f {run.run_id}, or end it with: launcher cancel {run.run_id}"
    return f"it goes on by itself; to ask for something else, first type: launcher cancel {run.run_id}"


def _refuse_local(evidence: Evidence) -> None:
    """A controller on this machine, or one on another that was heard of lately."""
    run, process = evidence.run, evidence.process
    here = controller_of(run)
    if here is None and process is not None and is_alive(process):
        here = process
    if here is not None:
        raise ConflictError(
            f"run {run.run_id} runs on this machine (process {here.pid}); end it with: launcher cancel {run.run_id}"
        )
    elsewhere = process is not None and not is_here(process) and evidence.cluster == "local"
    if elsewhere and process is not None and time.time() - evidence.last_sign_s < FORGOTTEN_AFTER_S:
        raise ConflictError(
            f"run {run.run_id} was started on {process.host} and was heard of lately; resume it there, or wait until "
            f"it was silent for {FORGOTTEN_AFTER_S / 60:.0f} min"
        )
