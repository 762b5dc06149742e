"""Preflight: everything that can be refused before the queue, all of it at once.

Each subject has a file of its own: preflight_data, preflight_files, preflight_tracking, preflight_cluster (and
preflight_partition); models are judged in facts/weights.py and facts/model_kind.py.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import ClusterError, DataError, LauncherError, ModelError, RecipeError
from launcher.facts.files import is_dataset_id
from launcher.facts.model_kind import model_kind_problems
from launcher.facts.site import Site
from launcher.facts.weights import model_folder_problems
from launcher.planning.plan import Plan
from launcher.recipe.schema import DataSource, Recipe
from launcher.runs.asked import asked
from launcher.runs.folder import RunFolder
from launcher.runs.preflight_cluster import check_cluster
from launcher.runs.preflight_data import overlaps, read_source, sources, too_little
from launcher.runs.preflight_files import check_folder, check_working_folder, group_problems, no_room, unshared
from launcher.runs.preflight_tracking import tracking_problems
from launcher.runs.request import JobRequest
from launcher.runs.submission import job_request

_ORDER: tuple[type[LauncherError], ...] = (RecipeError, DataError, ModelError, ClusterError)
"""Which error is raised when several stages found something; its messages carry all the others too."""


_NEEDED = ("torch", "transformers", "peft")
ABOUT_ROWS = ("truncation", "duplicates")
"""Warnings of the plan that whoever submits without planning should hear of, too."""
OLDEST_PYTHON = (3, 11)
"""As in pyproject.toml."""


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


def check(recipe: Recipe, plan: Plan, site: Site, parent: Path, *, kept: int = 0) -> list[str]:
    """Check data, model, files, tracking and cluster; returns notices worth showing.

    `recipe` is the resolved one, `parent` the folder that will receive the run folder, `kept` how many checkpoints the
    run has there already. Nothing is left behind.

    Raises:
        RecipeError, DataError, ModelError, ClusterError: the first class in this order that found something; its
            problems are those of every class.
    """
    found, marks = _Found(), dict[DataSource, frozenset[int]]()
    for source in sources(recipe):
        found.run(lambda source=source: _check_source(source, site, found, marks))  # type: ignore[misc]
    found.add(DataError, *too_little(recipe, plan, found.notices))
    found.notices += overlaps(recipe, marks)
    found.notices += [f"data: {one.message}" for one in plan.warnings if one.code in ABOUT_ROWS]
    found.run(lambda: _check_model(recipe, site, found))
    found.run(lambda: _check_files(recipe, plan, site, parent, kept, found))
    found.run(lambda: _check_python(site))
    found.add(ClusterError, *tracking_problems(recipe, site))
    request: list[JobRequest] = []
    found.run(lambda: request.append(_request(recipe, plan, site, parent)))
    if site.executor == "slurm":
        job = asked(recipe, plan, site, request[0] if request else None)
        found.run(lambda: found.add(ClusterError, *check_cluster(job, found.notices)))
    found.settle()
    return found.notices


def _check_source(source: DataSource, site: Site, found: _Found, marks: dict[DataSource, frozenset[int]]) -> None:
    """Every row of a local source must parse and have the format; an id is left to the job."""
    if is_dataset_id(source.path):
        _not_staged(f"data: {source.path} is a data-set id that is not staged", DataError, site, found)
        return
    marks[source] = read_source(source)


def _check_model(recipe: Recipe, site: Site, found: _Found) -> None:
    name = recipe.model.name_or_path
    folder = Path(name).expanduser()
    if not folder.exists():
        _not_staged(f"model.name_or_path: {name} is not on this machine", ModelError, site, found)
        return
    problems = [*model_folder_problems(folder), *model_kind_problems(folder)]
    if recipe.model.trust_remote_code:
        problems = [problem for problem in problems if "its own code" not in problem]
    if problems:
        raise ModelError(*(f"model.name_or_path: {problem}" for problem in problems))


def _not_staged(what: str, error: type[LauncherError], site: Site, found: _Found) -> None:
    """An id that only the job could fetch: refused where its nodes are known to have no network.

    Raises:
        DataError, ModelError: the site's nodes have no network; says what helps.
    """
    if site.internet_on_nodes is False:
        raise error(
            f"{what}, and compute nodes of {site.name} have no network; bring it to the shared cache first, from here: "
            "launcher stage RECIPE"
        )
    found.notices.append(f"{what}; the job will need network to fetch it, or stage it first: launcher stage RECIPE")


def _check_python(site: Site) -> None:
    if site.venv is None or site.container.runtime != "none":
        return
    python = Path(site.venv).expanduser() / "bin" / "python"
    if not os.access(python, os.X_OK):
        raise ClusterError(
            f"venv: no Python at {python}; point the site profile or LAUNCHER_VENV to a virtual environment"
        )
    version = _python_version(python.parents[1])
    if version is not None and version < OLDEST_PYTHON:
        has, needs = (".".join(map(str, one)) for one in (version, OLDEST_PYTHON))
        raise ClusterError(f"venv: {site.venv} has Python {has}, ranks need {needs} or newer; make it anew with that")
    missing = _missing_packages(python.parents[1])
    if missing:
        raise ClusterError(
            f"venv: {site.venv} has no {' and no '.join(missing)}; install them there: "
            f"{python} -m pip install 'finetune-launcher[train]'"
        )


def _python_version(venv: Path) -> tuple[int, int] | None:
    """Of a virtual environment, by the names of its folders; None where they do not tell."""
    found = [re.fullmatch(r"python(\d+)\.(\d+)", path.parent.name) for path in venv.glob("lib*/python*/site-packages")]
    return next(((int(one[1]), int(one[2])) for one in found if one), None)


def _missing_packages(venv: Path) -> list[str]:
    """Packages that no rank starts without; only where the environment holds all of its own, by its own word."""
    try:
        settings = (venv / "pyvenv.cfg").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    if re.search(r"(?mi)^include-system-site-packages\s*=\s*true", settings):
        return []
    folders = [*venv.glob("lib*/python*/site-packages")]
    linked = any(any(folder.glob("*.pth")) for folder in folders)  # may bring packages from anywhere
    lacking = [name for name in _NEEDED if not any((folder / name).is_dir() for folder in folders)]
    return [] if (linked and len(lacking) < len(_NEEDED)) or not folders else lacking


def _check_files(recipe: Recipe, plan: Plan, site: Site, parent: Path, kept: int, found: _Found) -> None:
    """Folders that exist, that the nodes see, and that have room.

    Raises:
        ClusterError: one that cannot be written, or that jobs could not start in.
    """
    check_working_folder()
    check_folder(parent)
    found.add(ClusterError, *group_problems(recipe.output_group, parent.absolute(), found.notices))
    if site.executor == "slurm":
        if shutil.which("sbatch") is None:  # a dry run on a laptop: other disks than the job's
            return
        found.add(ClusterError, *unshared(recipe, site, parent, found.notices))
    found.add(ClusterError, *no_room(recipe, plan, parent, kept=kept))


def _request(recipe: Recipe, plan: Plan, site: Site, parent: Path) -> JobRequest:
    """The request, with no value in it that must not reach sbatch, whatever name the run will get.

    Raises:
        RecipeError, ClusterError: there is one.
    """
    return job_request(plan, recipe, RunFolder(parent.absolute() / f"{recipe.name}-xxxxx"), site)
