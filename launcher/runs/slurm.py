"""slurm: list-form calls about jobs to Slurm's commands, parsed defensively; works with and without accounting."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from launcher.errors import ClusterError, TemporaryError
from launcher.facts.command import is_temporary, run_command, run_slurm
from launcher.facts.probe import user_name

__all__ = ["ACTIVE", "SlurmJob", "cancel_job", "controller_is_away", "find_jobs", "find_named", "run_slurm"]

ACTIVE = frozenset(
    {
        "PENDING",
        "RUNNING",
        "CONFIGURING",
        "COMPLETING",
        "SUSPENDED",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "RESIZING",
        "SIGNALING",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "STOPPED",
    }
)
"""States from which a job can still go on."""
_JOB = re.compile(r"\d+(_\d+)?")
"""A job, or ARRAY_TASK."""
_SQUEUE_FORMAT = "%i|%T|%N|%S|%r|%A"
"""The last is the number that a task of an array has beside ARRAY_TASK."""
_SACCT_FORMAT = "JobIDRaw,State,ExitCode,NodeList,Restarts"
_NAMES_AT_ONCE = 100
"""Job names of one question; a command line is finite."""
_OLD_SACCT_FORMAT = "JobIDRaw,State,ExitCode,NodeList"
"""`Restarts` is a field since Slurm 23.11."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """What Slurm says about one job."""

    job_id: str
    state: str
    """Slurm's long word, such as PENDING or NODE_FAIL."""
    reason: str | None = None
    """Slurm's own word for why it waits or ended."""
    nodes: str | None = None
    """Host list in Slurm's short form."""
    start: str | None = None
    """When it started or is expected to, in local time; None when Slurm does not know."""
    exit_code: str | None = None
    """CODE:SIGNAL."""
    restarts: int | None = None

    @property
    def active(self) -> bool:
        """Whether it waits, runs or is about to run again."""
        return self.state in ACTIVE


def find_jobs(job_ids: Iterable[str]) -> dict[str, SlurmJob]:
    """What Slurm knows of these jobs, by id; an id it has forgotten is left out.

    One squeue call for all; only what has left the queue is asked of accounting, and only without accounting of the
    controller, job by job.

    Raises:
        TemporaryError: Slurm is not here or does not answer.
    """
    wanted = [job_id for job_id in dict.fromkeys(job_ids) if _JOB.fullmatch(job_id)]
    if not wanted:
        return {}
    found = _squeue(wanted)
    gone = [job_id for job_id in wanted if job_id not in found]
    numbers = [job_id for job_id in gone if job_id.isdecimal()]
    tasks = [job_id for job_id in gone if not job_id.isdecimal()]
    if numbers:
        found |= _sacct(numbers)
    if tasks:
        found |= _sacct(tasks, of_arrays=True)
    for job_id in gone:
        if job_id not in found and (job := _scontrol(job_id)) is not None:
            found[job_id] = job
    return found


def find_named(names: Iterable[str], *, since_s: float | None = None) -> dict[str, list[SlurmJob]]:
    """This user's jobs of these names, oldest first: all that wait or run, and those that ended lately.

    `since_s` (epoch seconds): where the queue knows none of a name, accounting is asked too for jobs submitted since
    then. The names are run ids: letters, digits, `.`, `_` and `-`.

    Raises:
        TemporaryError: Slurm is not here or does not answer.
    """
    wanted = list(dict.fromkeys(names))
    found: dict[str, list[SlurmJob]] = {}
    for some in (wanted[at : at + _NAMES_AT_ONCE] for at in range(0, len(wanted), _NAMES_AT_ONCE)):
        for name, job in _named_in_queue(some):
            found.setdefault(name, []).append(job)
        missing = [name for name in some if name not in found]
        if since_s is not None and missing:
            for name, job in _named_in_accounting(missing, since_s):
                found.setdefault(name, []).append(job)
    return {name: sorted(jobs, key=_order) for name, jobs in found.items() if name in wanted}


def _order(job: SlurmJob) -> tuple[int, ...]:
    return tuple(int(part) for part in job.job_id.split("_"))


def _named_in_queue(names: Sequence[str]) -> Iterator[tuple[str, SlurmJob]]:
    owner = [f"--user={user_name()}", f"--name={','.join(names)}"]
    text = run_slurm(["squeue", "--noheader", "--array", "--states=all", *owner, f"--format=%j|{_SQUEUE_FORMAT}"])
    for line in text.splitlines():
        name, _, rest = line.strip().partition("|")
        if (job := _parse_squeue(rest)) is not None:
            yield name, job


def _named_in_accounting(names: Sequence[str], since_s: float) -> Iterator[tuple[str, SlurmJob]]:
    """Empty where there is no accounting or its database does not answer."""
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since_s))
    who = [f"--user={user_name()}", f"--name={','.join(names)}", f"--starttime={since}"]
    command = [
        "sacct",
        "--allocations",
        "--noheader",
        "--parsable2",
        "--format=JobIDRaw,State,ExitCode,NodeList,JobName",
    ]
    try:
        ran = run_command([*command, *who])
    except TemporaryError:
        return
    for line in ran.stdout.splitlines() if ran.returncode == 0 else ():
        fields, _, name = line.strip().rpartition("|")
        if (job := _parse_sacct(fields)) is not None:
            yield name, job


def _squeue(job_ids: Sequence[str]) -> dict[str, SlurmJob]:
    """Jobs in the queue, and those that ended within the last minutes (MinJobAge)."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--format={_SQUEUE_FORMAT}"]
    try:
        text = run_slurm([*command, f"--jobs={','.join(job_ids)}"])
    except ClusterError as error:
        # A single forgotten id is an error for squeue; several are not.
        if "invalid job id" in str(error).lower():
            return {}
        raise
    found: dict[str, SlurmJob] = {}
    for line in text.splitlines():
        job, number = _parse_squeue(line), line.strip().rpartition("|")[2]
        if job is not None:
            found[job.job_id] = job
        if job is not None and "_" in job.job_id and number in job_ids:
            found[number] = replace(job, job_id=number)
    return found


def _parse_squeue(line: str) -> SlurmJob | None:
    words = line.strip().split("|")
    if len(words) < 5 or not _JOB.fullmatch(words[0]):
        return None
    job_id, state, nodes, start, reason = words[:5]
    return SlurmJob(
        job_id=job_id,
        state=normal_state(state),
        nodes=nodes or None,
        start=None if start in ("N/A", "") else start,
        reason=None if reason in ("None", "") else reason,
    )


def _sacct(job_ids: Sequence[str], *, of_arrays: bool = False) -> dict[str, SlurmJob]:
    """Finished jobs from accounting; empty where there is no accounting or its database does not answer.

    `of_arrays`: they are called ARRAY_TASK, which accounting knows as JobID alone.
    """
    for fields in (_SACCT_FORMAT, _OLD_SACCT_FORMAT):
        if of_arrays:
            fields = fields.replace("JobIDRaw", "JobID")
        command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--format={fields}"]
        try:
            ran = run_command([*command, f"--jobs={','.join(job_ids)}"])
        except TemporaryError:
            return {}
        if ran.returncode == 0:
            jobs = [_parse_sacct(line) for line in ran.stdout.splitlines()]
            return {job.job_id: job for job in jobs if job is not None}
        if "field" not in ran.words.lower():
            return {}
    return {}


def _parse_sacct(line: str) -> SlurmJob | None:
    words = line.strip().split("|")
    if len(words) < 4 or not _JOB.fullmatch(words[0]):
        return None
    restarts = words[4] if len(words) > 4 else ""
    return SlurmJob(
        job_id=words[0],
        state=normal_state(words[1]),
        exit_code=words[2] or None,
        nodes=words[3] if words[3] not in ("", "None assigned") else None,
        restarts=int(restarts) if restarts.isdecimal() else None,
    )


def _scontrol(job_id: str) -> SlurmJob | None:
    """One job from the controller's memory; None when it has forgotten it."""
    ran = run_command(["scontrol", "--oneliner", "show", "job", job_id])
    if ran.returncode != 0:
        return None
    fields = dict(re.findall(r"(\w+)=(\S*)", ran.stdout.splitlines()[0] if ran.stdout else ""))
    if "JobState" not in fields:
        return None
    nodes, reason, restarts = fields.get("NodeList"), fields.get("Reason"), fields.get("Restarts", "")
    return SlurmJob(
        job_id=job_id,
        state=normal_state(fields["JobState"]),
        reason=None if reason in (None, "None") else reason,
        nodes=None if nodes in (None, "", "(null)") else nodes,
        exit_code=fields.get("ExitCode"),
        restarts=int(restarts) if restarts.isdecimal() else None,
    )


def controller_is_away() -> str | None:
    """What Slurm's commands say when a cluster is set up here and its controller does not answer; None otherwise."""
    try:
        ran = run_command(["sinfo", "--noheader", "--format=%R"], timeout_s=30)
    except TemporaryError as error:
        return error.problems[0] if "did not answer" in error.problems[0] else None
    away = ran.returncode != 0 and is_temporary(ran.words) and "configuration source" not in ran.words.lower()
    return ran.words if away else None


def normal_state(text: str) -> str:
    """Slurm's state without what it appends: "CANCELLED by 2000" and "NODE_FAIL+" lose their ends."""
    word = text.strip().upper().split(" ", 1)[0]
    return word.rstrip("+*$~#!%@^-") or "UNKNOWN"


def cancel_job(job_id: str) -> None:
    """Ask Slurm to end a job; one that has ended already is no error.

    Raises:
        TemporaryError: Slurm is not here or does not answer.
        ClusterError: it is somebody else's job, or Slurm refuses for another reason.
    """
    try:
        run_slurm(["scancel", job_id])
    except ClusterError as error:
        words = str(error).lower()
        if "already complet" in words or "invalid job id" in words:
            return
        if "permission denied" in words:
            raise ClusterError(f"job {job_id} belongs to another user; only its owner can cancel it") from error
        raise
