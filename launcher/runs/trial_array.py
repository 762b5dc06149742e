"""trial_array: a rung of a trial as one job array, and the small job that waits for it and sends the next.

An array's folder is <trial>/arrays/<trial>-N: a link per task to the run that it goes on with, and a ledger of its
own, as its submission may be lost like any other. The tasks are ordinary jobs of ordinary runs: each pauses at its
rung, comes back by itself after a preemption, and writes its own last words. Only when no job of the rung lives any
more does anybody look at the losses.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import JobFailedError, LauncherError, RecipeError, TemporaryError, raise_all
from launcher.facts.command import run_slurm
from launcher.runs.adoption import has_settled, ledger, open_submission
from launcher.runs.folder import RunFolder, write_atomic
from launcher.runs.lock import renew
from launcher.runs.request import INDEX, JobRequest
from launcher.runs.resume import Resumed, resume
from launcher.runs.sbatch import setup_lines
from launcher.runs.sending import MaybeSubmittedError, Say, clean_environment, send_to_slurm
from launcher.runs.slurm import find_named
from launcher.runs.state import read_evidence
from launcher.runs.status import run_status, statuses
from launcher.runs.submission import remember as remember_job
from launcher.runs.trial import first_request, is_last, make_runs, remember, set_pause, settle
from launcher.runs.trial_ending import halt_if_cancelled
from launcher.runs.trial_folder import Task, Trial
from launcher.runs.trial_scores import failure_of, reached
from launcher.runs.trial_standing import Standing, stand
from launcher.runs.variables import leave_secrets, private_files

_POLL_S = 3.0
_FILES_LAG_S = 15.0
"""A shared file system may show a run's last lines a moment after Slurm shows the end of its job."""
_LEAVE_S = 120.0
"""Slurm kills what does not leave after KillWait (30 s), and then runs the site's epilog."""
_NEXT_TIME_MIN = 30
_NEXT_DELAY_S = 60
"""A job that found others still at work looks again no sooner than this."""
_SIZE = re.compile(r"(\d+)([KMGT]?)")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rung:
    """What the tasks of a rung are doing."""

    living: tuple[str, ...]
    """Ids of jobs that wait or run."""
    fresh: tuple[Task, ...]
    """Tasks for which a job is to be sent."""


def advance_on_cluster(trial: Trial, say: Say, *, by_hand: bool, wait: bool) -> Standing:
    """See `trial.advance`: send what is to be sent; with `wait`, until nothing is left."""
    waited = False
    while not (standing := stand(trial)).finished:
        remember(trial, standing)
        halt_if_cancelled(trial)
        _adopt(trial, say)
        make_runs(trial, standing.todo, say)
        if by_hand:
            _let_leave(trial, standing.todo, say)
        rung = _look(trial, standing, by_hand=by_hand)
        if rung is None:
            continue
        sent = [_send(trial, rung.fresh, standing.rung, say)] if rung.fresh else []
        by_hand = False
        if not wait:
            _send_next(trial, [*rung.living, *sent], standing.todo, say, again=not sent)
            halt_if_cancelled(trial)
            return standing
        if sent or not waited:
            say(f"waiting for {len(standing.todo)} runs of rung {standing.rung + 1}")
        waited = True
        renew(trial.folder)
        time.sleep(_POLL_S)
    return standing


# ---------------------------------------------------------------- where a rung stands


def _let_leave(trial: Trial, tasks: Sequence[Task], say: Say) -> None:
    """Wait for jobs that a person has cancelled and Slurm is still ending: what goes on is sent anew, not waited for.

    Raises:
        TemporaryError: they do not leave.
    """
    until, said = time.monotonic() + _LEAVE_S, False
    runs = [run for run in (_run(trial, task) for task in tasks) if read_evidence(run).cancelled]
    while leaving := [one.run for one in statuses(runs) if not one.ended]:
        if time.monotonic() > until:
            raise TemporaryError(f"was cancelled, and Slurm is still ending it: {', '.join(leaving)}; try again")
        if not said:
            say(f"waiting for {len(leaving)} cancelled runs to leave")
        said = True
        time.sleep(_POLL_S)


def _look(trial: Trial, standing: Standing, *, by_hand: bool) -> _Rung | None:
    """What lives and what is to be sent; None where the trial has changed meanwhile and must be looked at anew.

    Raises:
        JobFailedError: a run ended before its rung, it is not the candidate's fault, and nobody asks to go on.
    """
    living: list[str] = []
    fresh: list[Task] = []
    for task in standing.todo:
        run = _run(trial, task)
        status = run_status(run)
        if not status.ended and status.state != "NOT_SUBMITTED":
            living += [status.job_id] if status.job_id else []
        elif not trial.sent(run.run_id, standing.rung):
            fresh.append(task)
        elif _arrived(trial, task, run, standing.rung):
            return None
        elif by_hand and failure_of(run) is None:
            fresh.append(task)
        else:
            settle(trial, task, run, standing.rung, status.sentence)
            return None
    return _Rung(living=tuple(living), fresh=tuple(fresh))


def _arrived(trial: Trial, task: Task, run: RunFolder, rung: int) -> bool:
    """Whether the run has reached its rung after all, once the file system shows it."""
    until = time.monotonic() + (0.0 if read_evidence(run).cancelled else _FILES_LAG_S)
    step, last = trial.steps(task.candidate, rung), is_last(trial, rung)
    while not (there := reached(run, step, last=last)) and time.monotonic() < until:
        time.sleep(0.5)
    return there


def _run(trial: Trial, task: Task) -> RunFolder:
    run = trial.run_of(task)
    if run is None:
        raise RuntimeError(f"{task} has no run after it was made")
    return run


# ---------------------------------------------------------------- sending a rung


def _send(trial: Trial, tasks: Sequence[Task], rung: int, say: Say) -> str:
    """Send one array with a task per run; returns its id.

    Raises:
        LauncherError: a check or Slurm refuses, or Slurm does not answer.
    """
    array = _new_folder(trial)
    prepared = [_prepare(trial, task, rung, array.path / str(index)) for index, task in enumerate(tasks)]
    for notice in dict.fromkeys(notice for _, _, notices in prepared for notice in notices):
        say(notice)
    request = array_request(trial, array, [each for _, each, _ in prepared])
    raise_all(RecipeError, request.problems())
    token, runs = secrets.token_hex(8), [run.run_id for run, _, _ in prepared]
    for run, each, _ in prepared:
        remember_job(each, run, job_id=None)
        leave_secrets(run.path)
    array.record("submitting", token=token, rung=rung, runs=runs, cluster="slurm", job_name=request.name)
    try:
        with clean_environment(), private_files():
            job_id = send_to_slurm(request, array, say).partition("_")[0]
    except MaybeSubmittedError:
        raise
    except LauncherError as error:
        array.record("not_submitted", token=token, why=error.problems[0])
        raise
    _note(trial, array, job_id, rung, runs)
    say(f"rung {rung + 1} of {len(trial.shares)}: {len(runs)} runs as job array {job_id}")
    return job_id


def _new_folder(trial: Trial) -> RunFolder:
    """A folder for one array; its name is the name of the job, so that a lost answer can be looked for."""
    with private_files():
        parent = trial.path / "arrays"
        parent.mkdir(mode=0o700, exist_ok=True)
        folder = parent / f"{trial.name}-{len(list(parent.iterdir())) + 1}"
        folder.mkdir(mode=0o700)
        return RunFolder(folder)


def _prepare(trial: Trial, task: Task, rung: int, link: Path) -> tuple[RunFolder, JobRequest, tuple[str, ...]]:
    """Everything of one task but its submission: where its run is to pause, the job it would be alone, and notices."""
    run = _run(trial, task)
    set_pause(trial, task, run, rung)
    link.symlink_to(os.path.relpath(run.path, link.parent))
    if not run.job.exists():
        return run, first_request(run), ()
    resumed = resume(run, dry_run=True)
    if not isinstance(resumed, Resumed):
        raise RuntimeError(f"{run.run_id} is finished and was to be taken to rung {rung + 1}")
    return run, resumed.request, resumed.notices


def array_request(trial: Trial, array: RunFolder, requests: Sequence[JobRequest]) -> JobRequest:
    """One request for all tasks: their common shape, and of each amount the most that one of them asks for."""
    throttle = f"%{trial.parallel}" if trial.parallel else ""
    most = max(requests, key=lambda one: one.cpus_per_task)
    return replace(
        most,
        run_dir=f"{array.path}/{INDEX}",
        name=array.run_id,
        nodes=max(one.nodes for one in requests),
        tasks_per_node=max(one.tasks_per_node for one in requests),
        node_counts=(),
        mem=max((one.mem for one in requests), key=_bytes),
        time_min=max((one.time_min for one in requests if one.time_min is not None), default=None),
        signal_lead_s=max(one.signal_lead_s for one in requests),
        extra=most.extra | {"comment": f"launcher:{trial.name}"},
        array=f"0-{len(requests) - 1}{throttle}",
    )


def _bytes(mem: str | None) -> int:
    """sbatch's memory, megabytes where there is no unit; the whole node (0) is the most, no word of it the least."""
    match = _SIZE.fullmatch((mem or "").upper())
    if match is None:
        return -1
    return int(match[1]) << (10 * ("KMGT".index(match[2] or "M") + 1)) if int(match[1]) else sys.maxsize


def _note(trial: Trial, array: RunFolder, job_id: str, rung: int, runs: Sequence[str]) -> None:
    """Write down that this array is ours, in its ledger, the trial's and every run's."""
    for index, name in enumerate(runs):
        run = RunFolder((trial.runs / name).resolve())
        run.record("submitted", job_id=f"{job_id}_{index}", cluster="slurm", purpose="trial")
        trial.folder.record("sent", run=name, rung=rung, job_id=f"{job_id}_{index}")
    array.record("submitted", job_id=job_id, cluster="slurm")


def _adopt(trial: Trial, say: Say) -> None:
    """Arrays whose submission was never answered: taken over where Slurm knows them.

    Raises:
        TemporaryError: it cannot be told yet.
    """
    for path in trial.arrays():
        array = RunFolder(path)
        line = open_submission(ledger(array))
        if line is None:
            continue
        jobs = find_named([array.run_id], since_s=float(line["time_s"]) - 120.0).get(array.run_id, [])
        if jobs:
            job_id = jobs[0].job_id.partition("_")[0]
            say(f"the array {job_id} was sent by a launcher that was killed before it could say so; it was taken over")
            _note(trial, array, job_id, int(line["rung"]), line["runs"])
        elif has_settled(line):
            array.record("not_submitted", why="Slurm knows no such job")
        else:
            raise TemporaryError(
                "an earlier submission was never answered, and Slurm shows no job of it yet; try again"
            )


# ---------------------------------------------------------------- the job that sends the next rung


def _send_next(trial: Trial, jobs: Sequence[str], tasks: Sequence[Task], say: Say, *, again: bool) -> None:
    """A small job that may start when these have ended, and goes on with the trial. Without it a person does."""
    name = f"{trial.name}-next"
    try:
        if any(job.state == "PENDING" for job in find_named([name]).get(name, [])):
            return
        request = sent_request(trial, tasks[0])
        with private_files(), clean_environment():
            job_id = run_slurm(next_command(trial, request, jobs, again=again)).strip().split(";")[0]
    except LauncherError as error:
        say(f"warning: nothing waits for the array ({error.problems[0]})")
        say(f"when it has ended, go on with: launcher trial {trial.name}")
        return
    trial.folder.record("next", job_id=job_id, after=list(jobs))
    say(f"job {job_id} waits for it and goes on with the trial")


def sent_request(trial: Trial, task: Task) -> JobRequest:
    """The request of a task's run, as it was sent."""
    from launcher.runs.requeue import stored_request

    request = stored_request(read_evidence(_run(trial, task)).job)
    if request is None:
        raise JobFailedError(f"{_run(trial, task).job}: holds no request that this launcher can read")
    return request


def next_command(trial: Trial, request: JobRequest, jobs: Sequence[str], *, again: bool) -> list[str]:
    """The sbatch call for that job, whose script is written beside the trial; no word of a recipe is in it."""
    script = trial.path / "next.sh"
    write_atomic(script, next_script(trial, request))
    options = {
        "job-name": f"{trial.name}-next",
        "ntasks": "1",
        "time": str(min(_NEXT_TIME_MIN, request.time_min or _NEXT_TIME_MIN)),
        "output": str(trial.folder.logs / "next-%j.out"),
        "open-mode": "append",
        "chdir": trial.working_folder,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "dependency": f"afterany:{':'.join(dict.fromkeys(jobs))}" if jobs else None,
        "begin": f"now+{_NEXT_DELAY_S}" if again else None,
        "export": ",".join(request.export) or "NONE",
    }
    return ["sbatch", "--parsable", *(f"--{key}={value}" for key, value in options.items() if value), str(script)]


def next_script(trial: Trial, request: JobRequest) -> str:
    """Fixed lines, the site's own set-up, and two quoted paths of ours."""
    python = request.python if request.container.runtime == "none" else sys.executable
    words = [python, "-u", "-m", "launcher.runs.trial_job", str(trial.path)]
    return "\n".join(["#!/bin/bash", *setup_lines(request), f"exec {shlex.join(words)}"]) + "\n"
