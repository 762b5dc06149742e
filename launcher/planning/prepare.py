"""From a recipe file to a plan: the stages before anything is submitted, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError
from launcher.facts.dataset import DatasetFacts, dataset_facts
from launcher.facts.model import ModelShape, model_shape
from launcher.facts.site import Site, site_facts
from launcher.facts.staged import cache_folder, names_ids, with_staged
from launcher.planning.elastic import with_elastic
from launcher.planning.objective import Objective
from launcher.planning.plan import Plan
from launcher.planning.queue import queue_of
from launcher.planning.search import make_plan
from launcher.recipe.load import LoadedRecipe, load_recipe_with_notices
from launcher.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A recipe, the facts it was planned with, and the plan."""

    loaded: LoadedRecipe
    model: ModelShape
    data: DatasetFacts
    site: Site
    plan: Plan
    path: Path | None = None
    """The recipe's file."""

    @property
    def recipe(self) -> Recipe:
        """The recipe as the user asked for it, with ids that are staged replaced by their folders."""
        return self.loaded.recipe


def plan_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    objective: Objective = "time",
    ask_queue: bool | None = False,
) -> Planned:
    """Load a recipe, gather the facts and decide.

    `ask_queue`: whether Slurm is asked when each alternative would start; None = where the site's own Slurm is here.

    Raises:
        RecipeError: the recipe is wrong, or contradicts itself or the site.
        DataError, ModelError, ClusterError: what is wrong with data, model and site, all of it; the first class counts.
        DoesNotFitError: carries the plan as `.plan`.
    """
    loaded, site = _located(path, overrides)
    recipe = loaded.recipe
    local, known = Path(recipe.model.name_or_path), site
    data, model, site = _all(
        lambda: dataset_facts(recipe.data, local if local.is_dir() else None),
        lambda: model_shape(recipe.model),
        lambda: known or site_facts(recipe.slurm.site),
    )
    queue = queue_of(recipe, site, wanted=ask_queue)
    plan = make_plan(recipe, model, data, site, objective=objective, queue=queue)
    plan = with_elastic(recipe, plan, model, data, site)
    return Planned(loaded=loaded, model=model, data=data, site=site, plan=plan, path=path)


def _all(*stages: Callable[[], Any]) -> list[Any]:
    """What each stage returns; where several fail, one error with the problems of all, of the first one's class."""
    values: list[Any] = []
    errors: list[LauncherError] = []
    for stage in stages:
        try:
            values.append(stage())
        except LauncherError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise type(errors[0])(*dict.fromkeys(problem for error in errors for problem in error.problems))
    return values


def load_located(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """A recipe file with every id that `launcher stage` brought here replaced by its folder.

    Raises:
        RecipeError: as `load_recipe_with_notices`.
        ClusterError: the recipe names ids, and its site is not known.
    """
    return _located(path, overrides)[0]


def _located(path: Path, overrides: Sequence[str]) -> tuple[LoadedRecipe, Site | None]:
    """The located recipe, and its site where that had to be known."""
    loaded = load_recipe_with_notices(path, overrides)
    recipe = loaded.recipe
    if not names_ids(recipe):
        return loaded, None
    site = site_facts(recipe.slurm.site)
    return replace(loaded, recipe=with_staged(recipe, cache_folder(recipe, site.cache_dir))), site
