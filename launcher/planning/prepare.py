"""From a recipe file to a plan: the stages before anything is submitted, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
        RecipeError, DataError, ModelError, ClusterError: what the stage that failed found.
        DoesNotFitError: carries the plan as `.plan`.
    """
    loaded, site = _located(path, overrides)
    recipe = loaded.recipe
    model = model_shape(recipe.model)
    local = Path(recipe.model.name_or_path)
    data = dataset_facts(recipe.data, local if local.is_dir() else None)
    site = site or site_facts(recipe.slurm.site)
    queue = queue_of(recipe, site, wanted=ask_queue)
    plan = make_plan(recipe, model, data, site, objective=objective, queue=queue)
    plan = with_elastic(recipe, plan, model, data, site)
    return Planned(loaded=loaded, model=model, data=data, site=site, plan=plan, path=path)


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
