"""Launching: from a plan to a job, in the three ways a user can ask for it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ConflictError, TemporaryError
from launcher.planning.prepare import Planned
from launcher.planning.search import resolve
from launcher.recipe.load import recipe_to_yaml
from launcher.recipe.schema import AUTO, Recipe
from launcher.runs.adoption import ledger, open_submission
from launcher.runs.folder import RunFolder
from launcher.runs.preflight import check
from launcher.runs.slurm import controller_is_away
from launcher.runs.status import run_status, runs_folder
from launcher.runs.submission import JobRequest, create_run, describe, job_request


def _parent(recipe: Recipe) -> Path:
    return runs_folder(None) if recipe.output_dir == "auto" else Path(recipe.output_dir).expanduser()


@dataclass(frozen=True, kw_only=True, slots=True)
class Launched:
    """A run that exists, and what the checks noticed on the way."""

    run: RunFolder
    request: JobRequest
    notices: tuple[str, ...]


def _checked(planned: Planned) -> tuple[Recipe, Path, tuple[str, ...]]:
    """Resolve the recipe and check all that needs no job; returns it, the folder for its run, and notices."""
    _refuse_by_accident_here(planned)
    recipe = resolve(planned.recipe, planned.plan)
    parent = _parent(recipe)
    return recipe, parent, tuple(check(recipe, planned.plan, planned.site, parent))


def _refuse_by_accident_here(planned: Planned) -> None:
    """A recipe that names no site is meant for the cluster; while its controller is away this is no reason to run here.

    Raises:
        TemporaryError: Slurm is set up on this machine and does not answer.
    """
    if planned.site.executor == "local" and planned.recipe.slurm.site == AUTO:
        refuse_while_away()


def refuse_while_away() -> None:
    """For recipes that name no site, also where no plan could be made: this machine alone is rarely what they ask for.

    Raises:
        TemporaryError: Slurm is set up on this machine and does not answer.
    """
    if not os.environ.get("LAUNCHER_SITE") and (words := controller_is_away()) is not None:
        raise TemporaryError(
            f"Slurm is set up here and its controller does not answer ({words}), so nothing was submitted; try again "
            "later, or run on this machine with: launcher submit --local"
        )


def _refuse_unanswered(recipe: Recipe, parent: Path) -> None:
    """A launcher that was killed may have left a job of this very recipe; a second `submit` must not train it twice.

    Raises:
        ConflictError: such a job lives. It was taken over: its run is an ordinary run now.
    """
    asked = recipe_to_yaml(recipe)
    for folder in sorted(parent.glob(f"{recipe.name}-*")):
        run = RunFolder(folder.resolve())
        with contextlib.suppress(OSError, ValueError):
            if open_submission(ledger(run)) is None or run.resolved.read_text(encoding="utf-8") != asked:
                continue
            state = run_status(run)
            if state.job_id is not None and not state.ended:
                raise ConflictError(
                    f"this recipe was submitted already, by a launcher that was killed before it could say so: run "
                    f"{run.run_id}, job {state.job_id}, {state.sentence}; follow it with launcher status {run.run_id}, "
                    f"or end it first with: launcher cancel {run.run_id}"
                )


def create(planned: Planned) -> Launched:
    """Check, then make the run folder; nothing is submitted."""
    recipe, parent, notices = _checked(planned)
    _refuse_unanswered(recipe, parent)
    run = create_run(planned.loaded.text, recipe, planned.plan, planned.site, parent, origin=planned.path)
    return Launched(run=run, request=job_request(planned.plan, recipe, run, planned.site), notices=notices)


def dry_run(planned: Planned) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Show the very request `create` and `send` would make, for a run folder that does not exist yet."""
    recipe, parent, notices = _checked(planned)
    run = RunFolder(parent.resolve() / f"{recipe.name}-xxxxx")
    return describe(job_request(planned.plan, recipe, run, planned.site)), notices
