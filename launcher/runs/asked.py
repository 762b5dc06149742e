"""Asked: what a job will ask of the cluster, resolved as its request will be, whether or not one can be made."""

from __future__ import annotations

import os
from dataclasses import dataclass

from launcher.facts.offer import Site
from launcher.facts.profile import parse_bytes
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe
from launcher.runs.request import JobRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One job's wishes."""

    recipe: Recipe
    plan: Plan
    site: Site
    request: JobRequest | None
    """None where a value in it must not reach sbatch; then sbatch is not asked."""
    partition: str | None
    account: str | None
    qos: str | None

    @property
    def mem(self) -> str | None:
        """Memory per node in sbatch's form."""
        return self.recipe.slurm.mem or self.plan.job.mem

    @property
    def mem_bytes(self) -> int | None:
        """The same in bytes; a bare number is MiB, 0 means all of the node, None that none is asked for."""
        if self.mem is None:
            return None
        return int(self.mem) * 2**20 if self.mem.isdecimal() else parse_bytes(self.mem)

    def option(self, name: str) -> str | None:
        """A further sbatch option of the recipe."""
        value = self.recipe.slurm.extra.get(name)
        return None if value is None or value is False else str(value)


def asked(recipe: Recipe, plan: Plan, site: Site, request: JobRequest | None) -> Asked:
    """What the job will ask for: the recipe, else sbatch's own variables, else the site profile."""
    slurm, environ = recipe.slurm, os.environ
    return Asked(
        recipe=recipe,
        plan=plan,
        site=site,
        request=request,
        partition=slurm.partition or environ.get("SBATCH_PARTITION") or site.default_partition,
        account=slurm.account or environ.get("SBATCH_ACCOUNT") or site.account,
        qos=slurm.qos or environ.get("SBATCH_QOS") or site.qos,
    )
