"""From a recipe file to a plan: the stages before anything is submitted, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.facts.dataset import DatasetFacts, dataset_facts
from launcher.facts.model import ModelShape, model_shape
from launcher.facts.site import Site, site_facts
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
        """The recipe as the user asked for it."""
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
    loaded = load_recipe_with_notices(path, overrides)
    recipe = loaded.recipe
    model = model_shape(recipe.model)
    local = Path(recipe.model.name_or_path)
    data = dataset_facts(recipe.data, local if local.is_dir() else None)
    site = site_facts(recipe.slurm.site)
    queue = queue_of(recipe, site, wanted=ask_queue)
    plan = make_plan(recipe, model, data, site, objective=objective, queue=queue)
    plan = with_elastic(recipe, plan, model, data, site)
    return Planned(loaded=loaded, model=model, data=data, site=site, plan=plan, path=path)
