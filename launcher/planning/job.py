"""What the job asks of the cluster: a safe time limit, cores, the warning before its end, and saves that help."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launcher.facts.site import Site
from launcher.planning.estimate import Task, save_interval_s, wall_s
from launcher.planning.headline import duration
from launcher.planning.plan import Estimate, JobShape, Warning_
from launcher.recipe.schema import Recipe

_SLOW_SAVE = 2.0
"""A busy file system takes twice as long for a checkpoint."""
_SAFE_TIME = 1.15
"""Time limit over the slow end of the prediction, which is a cautious one already."""
_MARGIN_MIN = 10
_ROUNDING_MIN = ((60, 5), (360, 15), (1440, 30))
"""Limits up to so many minutes are rounded up to a multiple of so many; longer ones to whole hours."""
_WORTH_SAVING_S = 3600.0
"""Work whose loss matters: refused where jobs are requeued, warned of elsewhere."""


def job_shape(task: Task, chosen: Estimate) -> JobShape:
    """Time limit, cores per rank and memory of the job."""
    slurm, site, candidate = task.recipe.slurm, task.site, chosen.candidate
    asked = slurm.time if isinstance(slurm.time, int) else None
    limit = asked or safe_limit_min(task, chosen)
    longest = longest_job_min(task.recipe, site)
    if asked is None and longest is not None:
        limit = min(limit, longest)
    # On a cluster a rank takes its share of the node, others may use the rest; this machine is all ours.
    ranks = candidate.gpus_per_node if site.executor == "local" else max(candidate.gpus_per_node, site.gpus_per_node)
    cpus = slurm.cpus_per_task if isinstance(slurm.cpus_per_task, int) else max(1, site.cpus_per_node // ranks)
    return JobShape(time_limit_min=limit, cpus_per_task=cpus, mem=slurm.mem)


def safe_limit_min(task: Task, chosen: Estimate) -> int:
    """Minutes that suffice at the slow end: start-up, steps, evaluations, every save and the warning at the end."""
    slow_s = wall_s(task, chosen.candidate, chosen.step_s.high, chosen.steps)
    lead_s = signal_lead_s(chosen, None)
    whole_s = _SAFE_TIME * slow_s + lead_s
    return rounded_min(math.ceil(max(whole_s, 2 * lead_s) / 60) + _MARGIN_MIN)


def rounded_min(minutes: int) -> int:
    """Rounded up to a limit people would write."""
    grain = next((grain for up_to, grain in _ROUNDING_MIN if minutes <= up_to), 60)
    return math.ceil(minutes / grain) * grain


def longest_job_min(recipe: Recipe, site: Site) -> int | None:
    """The partition's or the site's time limit, whichever is shorter; None where there is none."""
    wanted = recipe.slurm.partition or site.default_partition
    limits = [partition.max_time_min for partition in site.partitions if partition.name == wanted]
    known = [limit for limit in (*limits, site.max_time_min) if limit is not None]
    return min(known) if known else None


def save_s(chosen: Estimate) -> float:
    """Seconds one checkpoint takes to write on a busy file system."""
    return _SLOW_SAVE * chosen.save_s


def signal_lead_s(chosen: Estimate, time_min: int | None) -> int:
    """Seconds before the time limit at which the job is told to stop.

    At least two slow steps and two checkpoint writes; where the limit allows, up to two minutes, never above a
    quarter of the limit for comfort alone.
    """
    needed_s = 15 + 2 * chosen.step_s.high + 2 * save_s(chosen)
    comfort_s = 120.0 if time_min is None else min(120.0, time_min * 60 / 4)
    return math.ceil(max(needed_s, comfort_s))


# ---------------------------------------------------------------- what a preemption would cost


def job_problems(task: Task, chosen: Estimate, job: JobShape) -> Iterator[str]:
    """Why the job cannot survive a preemption or its own end: refused before the queue."""
    if task.site.executor != "slurm":
        return
    lead = signal_lead_s(chosen, job.time_limit_min)
    if 2 * lead >= job.time_limit_min * 60:
        yield (
            f"slurm.time: {job.time_limit_min} min is too short to be warned {lead} s before its end (one step and a "
            f"checkpoint of {save_s(chosen):.0f} s take that long); at least {2 * lead // 60 + 1} min is needed"
        )
    lost_s = _lost_s(task, chosen, job)
    if task.recipe.slurm.requeue and lost_s > _WORTH_SAVING_S:
        yield (
            f"{_interval_key(task.recipe)}: a preemption would lose everything, {duration(lost_s)} of work: no "
            f"checkpoint is written before that; set checkpoint.save_minutes: {_proposed_minutes(chosen, lost_s)}"
        )


def job_warnings(task: Task, chosen: Estimate, job: JobShape) -> Iterator[Warning_]:
    """What runs, but should be looked at: limits too short for the whole run, work at risk, saves that cost much."""
    if job.time_limit_min * 60 < chosen.wall_s and task.site.executor == "slurm":
        jobs = math.ceil(chosen.wall_s / max(1, job.time_limit_min * 60 - signal_lead_s(chosen, job.time_limit_min)))
        after = (
            f"requeue is planned: about {jobs} jobs in a row, each going on from the last checkpoint"
            if task.recipe.slurm.requeue
            else "set slurm.requeue: true, or it ends unfinished"
        )
        yield Warning_(
            code="time-limit",
            message=f"the run is predicted to take {duration(chosen.wall_s)}, one job may take "
            f"{job.time_limit_min} min; {after}",
        )
    lost_s = _lost_s(task, chosen, job)
    if lost_s > _WORTH_SAVING_S:
        message = f"no checkpoint is written before {duration(lost_s)} of work: a failure loses all of it"
        yield Warning_(code="no-checkpoint", message=message)
    interval = save_interval_s(task.recipe, chosen.step_s.expected)
    if interval is not None and chosen.wall_s > interval and save_s(chosen) > interval:
        message = (
            f"a checkpoint of {chosen.checkpoint_bytes / 1e9:,.0f} GB takes about {save_s(chosen) / 60:.0f} min to "
            f"write and is due every {interval / 60:.0f} min; save less often"
        )
        yield Warning_(code="saves-cost-time", message=message)


def _lost_s(task: Task, chosen: Estimate, job: JobShape) -> float:
    """Work of one job that nothing on disk holds when it dies just before its end; 0 where checkpoints are written."""
    attempt_s = chosen.wall_s
    if task.site.executor == "slurm":
        attempt_s = min(attempt_s, job.time_limit_min * 60)
    interval = save_interval_s(task.recipe, chosen.step_s.expected)
    return attempt_s if interval is None or interval >= attempt_s else 0.0


def _interval_key(recipe: Recipe) -> str:
    asked = recipe.checkpoint
    if asked.save_steps:
        return f"checkpoint.save_steps: {asked.save_steps}"
    return f"checkpoint.save_minutes: {asked.save_minutes:g}" if asked.save_minutes else "checkpoint"


def _proposed_minutes(chosen: Estimate, lost_s: float) -> int:
    """Half an hour, or ten times what a save takes, within the run."""
    return max(1, min(max(30, math.ceil(10 * save_s(chosen) / 60)), int(lost_s / 120)))
