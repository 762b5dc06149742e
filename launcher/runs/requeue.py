"""requeue: the ways Slurm allows a job to come back, each tried once.

    scontrol requeue     the same job, the same id; refused where the site or the job says --no-requeue
    a follow-up          a new job of the same request, allowed to start when this one has ended

Whether a job of the run is there already is asked before anything is sent: two jobs of one run would fight over it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, LauncherError, TemporaryError
from launcher.facts.command import run_command, run_slurm
from launcher.runs.folder import RunFolder
from launcher.runs.policy import FOLLOW_UP
from launcher.runs.request import JobRequest, request_from_json
from launcher.runs.slurm import find_named

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 20.0


class RefusedError(ClusterError):
    """Slurm will not put this job back into the queue; a new job may be allowed."""


def put_back(job_id: str, *, patience_s: float) -> None:
    """Put the job we run in back into its queue; it is ended by that. Asked again while Slurm is silent.

    Raises:
        RefusedError: Slurm says no ("presently disabled"), or there is no scontrol here.
        TemporaryError: Slurm did not answer for `patience_s` seconds.
    """
    if shutil.which("scontrol") is None:
        raise RefusedError("there is no scontrol on this node")
    give_up, pause_s = time.monotonic() + patience_s, _FIRST_PAUSE_S
    while True:
        try:
            run_slurm(["scontrol", "requeue", job_id])
        except TemporaryError:
            if time.monotonic() + pause_s > give_up:
                raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except ClusterError as error:
            raise RefusedError(error.problems[0]) from error
        else:
            return


def follow_up(request: JobRequest, *, after: str, exclude: tuple[str, ...] = ()) -> str:
    """Submit a new job of the same run that may start when job `after` has ended; returns its id.

    A job of this run that waits or runs beside `after` is taken for the follow-up, and nothing is sent.

    Raises:
        LauncherError: Slurm refuses or does not answer, or somebody is submitting this run just now.
    """
    from launcher.runs.lock import hold
    from launcher.runs.submission import submit_held

    run = RunFolder(Path(request.run_dir))
    with hold(run, FOLLOW_UP):
        there = _other_job(run.run_id, after)
        if there is not None:
            run.record("submitted", job_id=there, cluster=request.cluster, purpose=FOLLOW_UP, found=True)
            return there
        return submit_held(_following(request, after=after, exclude=exclude), purpose=FOLLOW_UP)


def _following(request: JobRequest, *, after: str, exclude: tuple[str, ...]) -> JobRequest:
    """The request, waiting for `after`, without the nodes to leave out beside those the recipe leaves out."""
    return without_nodes(replace(request, extra={**_words(request), "dependency": f"afterany:{after}"}), exclude)


def without_nodes(request: JobRequest, exclude: Sequence[str]) -> JobRequest:
    """The request without these nodes, beside those the recipe leaves out."""
    extra = _words(request)
    asked = [name for name in str(extra.get("exclude") or "").split(",") if name]
    left_out = [*asked, *(name for name in exclude if name not in asked)]
    if left_out:
        extra["exclude"] = ",".join(left_out)
    return replace(request, extra=extra)


def _words(request: JobRequest) -> dict[str, Any]:
    return {key.removeprefix("--").replace("_", "-"): value for key, value in request.extra.items()}


def _other_job(name: str, after: str) -> str | None:
    """Id of a job of this name, other than `after`, that waits or runs; nothing is known where squeue is silent."""
    jobs = find_named([name]).get(name, [])
    return next((job.job_id for job in jobs[::-1] if job.active and job.job_id != after), None)


def nodes_there(partition: str | None) -> int | None:
    """Nodes of a partition that take jobs now or soon; None where that cannot be told."""
    where = [f"--partition={partition}"] if partition else []
    command = ["sinfo", "--noheader", "--responding", "--states=idle,alloc,mixed,completing", "--format=%D", *where]
    try:
        ran = run_command(command, timeout_s=15.0)
    except TemporaryError:
        return None
    counts = [line.strip() for line in ran.stdout.splitlines()]
    if ran.returncode != 0 or not counts or not all(count.isdecimal() for count in counts):
        return None
    return sum(int(count) for count in counts)


def stored_request(job: Mapping[str, object]) -> JobRequest | None:
    """The request of job.json; None where another version wrote it."""
    document = job.get("request")
    try:
        return request_from_json(document) if isinstance(document, Mapping) else None
    except LauncherError:
        return None
