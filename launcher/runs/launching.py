"""Launching: from a plan to a job, in the three ways a user can ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.planning.prepare import Planned
from launcher.planning.search import resolve
from launcher.recipe.schema import Recipe
from launcher.runs.folder import RunFolder
from launcher.runs.preflight import check
from launcher.runs.status import runs_folder
from launcher.runs.submission import JobRequest, create_run, describe, job_request, print_sbatch
from launcher.runs.submission import submit as send


def _parent(recipe: Recipe) -> Path:
    return runs_folder(None) if recipe.output_dir == "auto" else Path(recipe.output_dir).expanduser()


def _checked(planned: Planned) -> tuple[Recipe, Path]:
    """The resolved recipe and the folder for its run, after every check that needs no job."""
    recipe = resolve(planned.recipe, planned.plan)
    parent = _parent(recipe)
    check(recipe, planned.plan, planned.site, parent)
    return recipe, parent


def _created(planned: Planned) -> tuple[RunFolder, JobRequest]:
    recipe, parent = _checked(planned)
    run = create_run(planned.loaded.text, recipe, planned.plan, planned.site, parent)
    return run, job_request(planned.plan, recipe, run, planned.site)


def dry_run(planned: Planned) -> dict[str, Any]:
    """The very request `launch` would send, for a run folder that does not exist yet."""
    recipe, parent = _checked(planned)
    run = RunFolder(parent.resolve() / f"{recipe.name}-xxxxx")
    return describe(job_request(planned.plan, recipe, run, planned.site))


def write_script(planned: Planned) -> tuple[RunFolder, str]:
    """Make the run folder and the script that plain sbatch accepts; nothing is submitted."""
    run, request = _created(planned)
    return run, print_sbatch(request)


def launch(planned: Planned) -> tuple[RunFolder, str]:
    """Make the run folder and submit; returns the run and its job id."""
    run, request = _created(planned)
    return run, send(request)
