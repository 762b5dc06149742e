"""When Slurm would start a job: `sbatch --test-only` per alternative, a few calls at most, never a submission."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Protocol

from launcher.errors import LauncherError
from launcher.facts.command import run_command
from launcher.facts.probe import cluster_name, slurm_answers
from launcher.facts.site import Site
from launcher.planning.plan import Candidate, JobShape
from launcher.recipe.schema import Recipe

MOST_CALLS = 6
"""Calls of sbatch per plan: controllers count every one of them against a user's rate."""
_TIMEOUT_S = 5.0
_START = re.compile(r"to start at (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)")
_EXTRA = ("reservation", "nodelist", "exclude", "dependency")
"""Further sbatch options of a recipe that move a job's start."""


class Queue(Protocol):
    """Answers when a job of a candidate's shape would start."""

    def start_s(self, candidate: Candidate, job: JobShape) -> float | None:
        """Seconds from now, or None where nobody says."""


class NoQueue:
    """No Slurm at hand: nothing is asked, nothing is known."""

    def start_s(self, candidate: Candidate, job: JobShape) -> float | None:
        """Return None: not known."""
        del candidate, job
        return None


class SlurmQueue:
    """Asks sbatch, once per number of nodes and GPUs, and stops asking when it does not answer."""

    def __init__(
        self, recipe: Recipe, site: Site, *, now: Callable[[], datetime] = datetime.now, most_calls: int = MOST_CALLS
    ) -> None:
        self._recipe, self._site, self._now = recipe, site, now
        self._left = most_calls
        self._known: dict[tuple[int, int], float | None] = {}

    def start_s(self, candidate: Candidate, job: JobShape) -> float | None:
        """Seconds until Slurm expects to start it; None when refused, unknown, or asked too often."""
        shape = (candidate.nodes, candidate.gpus_per_node)
        if shape not in self._known and self._left > 0:
            self._left -= 1
            self._known[shape] = self._ask(candidate, job)
        return self._known.get(shape)

    def _ask(self, candidate: Candidate, job: JobShape) -> float | None:
        try:
            # sbatch prints its estimate on stderr. The script is one fixed word: no text of a recipe is run.
            ran = run_command(
                ["sbatch", "--test-only", *self._options(candidate, job), "--wrap=true"], timeout_s=_TIMEOUT_S
            )
        except LauncherError:
            self._left = 0
            return None
        found = _START.search(ran.stderr) or _START.search(ran.stdout)
        if ran.returncode != 0 or found is None:
            return None
        return max(0.0, (datetime.fromisoformat(found.group(1)) - self._now()).total_seconds())

    def _options(self, candidate: Candidate, job: JobShape) -> Iterator[str]:
        slurm, site = self._recipe.slurm, self._site
        yield f"--nodes={candidate.nodes}"
        yield f"--ntasks-per-node={candidate.gpus_per_node}"
        yield f"--cpus-per-task={job.cpus_per_task}"
        yield f"--time={job.time_limit_min}"
        if site.request_gpus:
            kind = f"{site.gpu_type}:" if site.gpu_type else ""
            yield f"--gpus-per-node={kind}{candidate.gpus_per_node}"
        named = {
            "partition": slurm.partition or site.default_partition,
            "account": slurm.account or site.account,
            "qos": slurm.qos or site.qos,
            "constraint": slurm.constraint,
            "mem": job.mem,
        }
        named |= {key: slurm.extra.get(key) for key in _EXTRA}
        yield from (f"--{key}={value}" for key, value in named.items() if value)
        if slurm.exclusive:
            yield "--exclusive"


def queue_of(recipe: Recipe, site: Site, *, wanted: bool | None = None) -> Queue:
    """The queue a plan may ask: `wanted` False never, True whenever sbatch is here, None where it is this site's."""
    if wanted is False or site.executor != "slurm" or shutil.which("sbatch") is None:
        return NoQueue()
    if wanted is None and not _is_this_cluster(site):
        return NoQueue()
    return SlurmQueue(recipe, site)


def _is_this_cluster(site: Site) -> bool:
    """Whether the Slurm that answers here is the site's: a plan for another cluster must not ask this one."""
    if "asked of Slurm" in site.source.values():
        return True
    try:
        return slurm_answers() and _letters(cluster_name()) == _letters(site.name)
    except LauncherError:
        return False


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
