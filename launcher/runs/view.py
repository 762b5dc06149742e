"""view: what Slurm's controller says of one job in full, asked from inside the job or from outside.

What was seen on Slurm 22.05 while the batch script was still alive after srun:

    preemption, in its grace     RUNNING     PreemptTime=<now>   EndTime=<now + grace>
    preemption, at the kill      COMPLETING  Restarts + 1        (PreemptTime kept where the job may not be requeued)
    `scontrol requeue`           COMPLETING  Restarts + 1
    `scancel`                    COMPLETING  Restarts unchanged  EndTime=<now>
    time limit, warned           RUNNING     EndTime=<start + limit>
    time limit, at the kill      COMPLETING  Reason=TimeLimit
"""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass

from launcher.errors import ClusterError, TemporaryError
from launcher.facts.command import run_command, run_slurm
from launcher.runs.slurm import SlurmJob, normal_state

_FIELD = re.compile(r"(?:^|\s)([A-Za-z]\w*)(?::\w+)?=(\S*)")
_ABSENT = frozenset({"", "None", "(null)", "N/A", "Unknown", "UNLIMITED", "None assigned"})


@dataclass(frozen=True, kw_only=True, slots=True)
class JobView:
    """One job as the controller sees it."""

    job_id: str
    state: str
    """Slurm's long word."""
    reason: str | None = None
    requeue: bool = True
    """Whether Slurm may put the job back."""
    restarts: int | None = None
    """How often Slurm started it again; None where it does not say."""
    preempted: bool = False
    """Whether it is being ended, or was, to make room for another job."""
    end_s: float | None = None
    """When it ended or will be ended, in seconds since the epoch."""
    exit_code: str | None = None
    """CODE:SIGNAL."""
    partition: str | None = None
    nodes: str | None = None

    @classmethod
    def of(cls, job: SlurmJob) -> JobView:
        """What squeue or accounting said, in the same form."""
        return cls(
            job_id=job.job_id,
            state=job.state,
            reason=job.reason,
            restarts=job.restarts,
            preempted=job.state == "PREEMPTED",
            exit_code=job.exit_code,
            nodes=job.nodes,
        )


def job_view(job_id: str, *, timeout_s: float = 15.0) -> JobView | None:
    """Ask the controller for a job; None when it does not know it (any more).

    Raises:
        TemporaryError: scontrol is not here, or the controller does not answer.
    """
    try:
        text = run_slurm(["scontrol", "--oneliner", "show", "job", job_id], timeout_s=timeout_s)
    except ClusterError:
        return None
    return parse_job(text)


def parse_job(text: str) -> JobView | None:
    """Read one line of `scontrol --oneliner show job`; the first of two equal names counts, comments come last."""
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(text.splitlines()[0] if text else ""):
        fields.setdefault(name, value)
    if "JobState" not in fields or not fields.get("JobId", "").isdecimal():
        return None
    said = {name: value for name, value in fields.items() if value not in _ABSENT}
    restarts = said.get("Restarts", "")
    return JobView(
        job_id=fields["JobId"],
        state=normal_state(fields["JobState"]),
        reason=said.get("Reason"),
        requeue=said.get("Requeue", "1") != "0",
        restarts=int(restarts) if restarts.isdecimal() else None,
        preempted="PreemptTime" in said,
        end_s=_epoch_s(said.get("EndTime")),
        exit_code=said.get("ExitCode"),
        partition=said.get("Partition"),
        nodes=said.get("NodeList"),
    )


def _epoch_s(text: str | None) -> float | None:
    try:
        return time.mktime(time.strptime(text or "", "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None


def earlier_state(job_id: str, restart: int) -> str | None:
    """How start number `restart` (from 0) of a job ended, from accounting; None where there is none.

    Only `sacct --duplicates` lists the starts before the last one.
    """
    command = ["sacct", "--duplicates", "--allocations", "--noheader", "--parsable2", "--format=State"]
    try:
        ran = run_command([*command, f"--jobs={job_id}"], timeout_s=15.0)
    except TemporaryError:
        return None
    states = [normal_state(line) for line in ran.stdout.splitlines() if line.strip()]
    return states[restart] if ran.returncode == 0 and restart < len(states) else None


def preemption_requeues(partition: str | None) -> bool:
    """Whether this cluster puts preempted jobs of `partition` back by itself; False where that cannot be told.

    The partition's PreemptMode counts before the cluster's. A QOS may say otherwise: whoever relies on the answer
    must look again after the grace time.
    """
    modes = [_preempt_mode(["scontrol", "--oneliner", "show", "partition", partition])] if partition else []
    modes.append(_preempt_mode(["scontrol", "show", "config"]))
    said = next((mode for mode in modes if mode), "")
    return "REQUEUE" in said.upper().split(",")


def _preempt_mode(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        ran = run_command(command, timeout_s=15.0)
    except TemporaryError:
        return None
    found = re.search(r"\bPreemptMode\s*=\s*(\S+)", ran.stdout) if ran.returncode == 0 else None
    return found[1] if found else None
