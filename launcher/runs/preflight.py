"""Preflight: everything that can be refused before the queue, all of it at once.

Plain sbatch accepts jobs that can never start (a limit over the partition's, more nodes than there are); they would
wait for ever. So the limits are compared here with what Slurm says about its partitions.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import ClusterError, DataError, LauncherError, ModelError, RecipeError
from launcher.facts.files import is_dataset_id
from launcher.facts.formats import read_examples
from launcher.facts.probe import associations, partitions
from launcher.facts.profile import parse_bytes
from launcher.facts.site import Partition, Site
from launcher.facts.weights import model_folder_problems
from launcher.planning.plan import Plan
from launcher.recipe.problems import nearest
from launcher.recipe.scalars import format_minutes
from launcher.recipe.schema import DataSource, Recipe
from launcher.runs.folder import RunFolder
from launcher.runs.submission import job_request

_ORDER: tuple[type[LauncherError], ...] = (RecipeError, DataError, ModelError, ClusterError)
"""Which error is raised when several stages found something; its messages carry all the others too."""


@dataclass(slots=True)
class _Found:
    """Problems by class, and notices."""

    problems: dict[type[LauncherError], list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def add(self, error: type[LauncherError], *problems: str) -> None:
        self.problems.setdefault(error, []).extend(problems)

    def run(self, stage: Callable[[], None]) -> None:
        """Run one stage; what it raises is kept."""
        try:
            stage()
        except LauncherError as error:
            self.add(type(error), *error.problems)

    def settle(self) -> None:
        for error in (*_ORDER, *self.problems):
            if self.problems.get(error):
                everything = [problem for kind in (*_ORDER, *self.problems) for problem in self.problems.get(kind, [])]
                raise error(*dict.fromkeys(everything))


def check(recipe: Recipe, plan: Plan, site: Site, parent: Path) -> list[str]:
    """Check data, model, output folder and cluster; returns notices worth showing.

    `recipe` is the resolved one, `parent` the folder that will receive the run folder. Nothing is left behind.

    Raises:
        RecipeError, DataError, ModelError, ClusterError: the first class in this order that found something; its
            problems are those of every class.
    """
    found = _Found()
    for source in _sources(recipe):
        found.run(lambda source=source: _check_source(source, found))  # type: ignore[misc]
    found.run(lambda: _check_model(recipe, found))
    found.run(lambda: _check_folder(parent))
    found.run(lambda: _check_python(site))
    found.run(lambda: _check_request(recipe, plan, site, parent))
    if site.executor == "slurm":
        found.run(lambda: _check_cluster(recipe, plan, site, found))
    found.settle()
    return found.notices


def _sources(recipe: Recipe) -> Iterator[DataSource]:
    yield from recipe.data.train
    if recipe.data.validation.source is not None:
        yield recipe.data.validation.source
    if recipe.data.retention is not None:
        yield recipe.data.retention


def _check_source(source: DataSource, found: _Found) -> None:
    """Every row of a local source must parse and have the format; an id is left to the job."""
    if is_dataset_id(source.path):
        found.notices.append(
            f"data: {source.path} is a data-set id; the job needs network or a filled cache to read it"
        )
        return
    rows = sum(1 for _ in read_examples(source))
    if rows == 0:
        raise DataError(f"{source.path}: no rows")


def _check_model(recipe: Recipe, found: _Found) -> None:
    name = recipe.model.name_or_path
    folder = Path(name).expanduser()
    if not folder.exists():
        found.notices.append(
            f"model: {name} is not on this machine; the job needs network or a filled cache to load it"
        )
        return
    problems = model_folder_problems(folder)
    if recipe.model.trust_remote_code:
        problems = [problem for problem in problems if "its own code" not in problem]
    if problems:
        raise ModelError(*(f"model.name_or_path: {problem}" for problem in problems))


def _check_folder(parent: Path) -> None:
    """A file can be made where the run folder will be; sbatch would accept the job and lose its log."""
    try:
        folder = parent.resolve()
        while not folder.exists():
            folder = folder.parent
        probe = folder / f".launcher-probe-{secrets.token_hex(6)}"
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        probe.unlink()
    except OSError as error:
        raise ClusterError(
            f"output_dir: {parent} cannot be written ({error.strerror}); set output_dir=... or LAUNCHER_RUNS to a "
            "folder that you own and that the compute nodes share"
        ) from error


def _check_python(site: Site) -> None:
    if site.venv is None or site.container.runtime != "none":
        return
    python = Path(site.venv).expanduser() / "bin" / "python"
    if not os.access(python, os.X_OK):
        raise ClusterError(
            f"venv: no Python at {python}; point the site profile or LAUNCHER_VENV to a virtual environment"
        )


def _check_request(recipe: Recipe, plan: Plan, site: Site, parent: Path) -> None:
    """The request can be made: no value in it that must not reach sbatch, whatever name the run will get."""
    job_request(plan, recipe, RunFolder(parent.absolute() / f"{recipe.name}-xxxxx"), site)


def _check_cluster(recipe: Recipe, plan: Plan, site: Site, found: _Found) -> None:
    """Partition, limits, account and QOS against what Slurm says; unchecked where it does not answer."""
    try:
        known = partitions()
    except LauncherError as error:
        found.notices.append(f"cluster: not checked, because {error.problems[0]}")
        return
    found.add(ClusterError, *_partition_problems(recipe, plan, site, known))
    allowed = associations()
    if allowed is not None:
        accounts, qos = allowed
        found.add(ClusterError, *_unknown("account", recipe.slurm.account or site.account, accounts))
        found.add(ClusterError, *_unknown("qos", recipe.slurm.qos or site.qos, qos))


def _unknown(what: str, name: str | None, known: tuple[str, ...]) -> list[str]:
    if name is None or name in known or not known:
        return []
    close = nearest(name, known)
    hint = f"did you mean {close[0]}? " if close else ""
    return [f"slurm.{what}: {name!r} is not yours to use; {hint}yours: {', '.join(known)}"]


def _partition_problems(recipe: Recipe, plan: Plan, site: Site, known: tuple[Partition, ...]) -> list[str]:
    """Problems of each partition asked for; none when at least one of several can take the job."""
    default = next((partition.name for partition in known if partition.default), None)
    asked = recipe.slurm.partition or os.environ.get("SBATCH_PARTITION") or site.default_partition or default
    if asked is None:
        return ["slurm.partition: this cluster has no default; choose one of " + ", ".join(one.name for one in known)]
    by_name = {partition.name: partition for partition in known}
    found: list[list[str]] = []
    for name in asked.split(","):
        if name not in by_name:
            close = nearest(name, by_name)
            hint = f"did you mean {close[0]}? " if close else ""
            return [f"slurm.partition: {name!r} does not exist; {hint}there are: {', '.join(by_name)}"]
        found.append(list(_limits(by_name[name], recipe, plan, site)))
    return [] if not all(found) else found[0]


def _limits(partition: Partition, recipe: Recipe, plan: Plan, site: Site) -> Iterator[str]:
    """What this partition can never give to the job."""
    candidate, name = plan.chosen.candidate, partition.name
    if not partition.up:
        yield f"slurm.partition: {name} does not start jobs now (it is not UP)"
    most = min(partition.nodes, partition.max_nodes or partition.nodes)
    if candidate.nodes > most:
        yield f"slurm.nodes: {candidate.nodes} nodes asked of partition {name}, which gives at most {most}"
    limit = partition.max_time_min
    if limit is not None and plan.job.time_limit_min > limit:
        asked = format_minutes(plan.job.time_limit_min)
        yield f"slurm.time: {asked} asked of partition {name}, which allows {format_minutes(limit)}; set slurm.time"
    account = recipe.slurm.account or site.account
    if account and partition.allow_accounts and account not in partition.allow_accounts:
        yield f"slurm.account: partition {name} is for {', '.join(partition.allow_accounts)}, not {account}"
    qos = recipe.slurm.qos or site.qos
    if qos and partition.allow_qos and qos not in partition.allow_qos:
        yield f"slurm.qos: partition {name} takes {', '.join(partition.allow_qos)}, not {qos}"
    yield from _node_limits(partition, plan, site, recipe.slurm.mem or plan.job.mem)


def _node_limits(partition: Partition, plan: Plan, site: Site, mem: str | None) -> Iterator[str]:
    candidate, name = plan.chosen.candidate, partition.name
    if site.request_gpus and partition.gpus_per_node is not None:
        if candidate.gpus_per_node > partition.gpus_per_node:
            yield (
                f"slurm.gpus_per_node: {candidate.gpus_per_node} asked, but a node of partition {name} has "
                f"{partition.gpus_per_node}"
            )
        elif site.gpu_type and partition.gpu_types and site.gpu_type not in partition.gpu_types:
            has = ", ".join(partition.gpu_types)
            yield f"gpu_type: the site profile says {site.gpu_type!r}; partition {name} has {has}"
    cpus, most = candidate.gpus_per_node * plan.job.cpus_per_task, partition.cpus_per_node
    if most and cpus > most:
        fits = max(1, most // candidate.gpus_per_node)
        yield (
            f"slurm.cpus_per_task: {candidate.gpus_per_node} tasks x {plan.job.cpus_per_task} CPUs asked, but a node "
            f"of partition {name} has {most}; set slurm.cpus_per_task={fits}"
        )
    mem_bytes = _mem_bytes(mem)
    if mem_bytes and partition.mem_bytes_per_node and mem_bytes > partition.mem_bytes_per_node:
        has = f"{partition.mem_bytes_per_node // 2**30}G"
        yield f"slurm.mem: {mem} asked, but a node of partition {name} has {has}"


def _mem_bytes(mem: str | None) -> int | None:
    """Slurm's --mem in bytes; a bare number is MiB, 0 means all of the node."""
    if mem is None:
        return None
    return int(mem) * 2**20 if mem.isdecimal() else parse_bytes(mem)
