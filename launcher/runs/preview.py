"""preview: the recipe's data as its run would see it, and the token cache made before the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from launcher.errors import DataError, DoesNotFitError
from launcher.facts.train_environment import ask, train_python
from launcher.planning.plan import plan_to_json
from launcher.planning.prepare import load_located, plan_recipe
from launcher.planning.resolve import resolve
from launcher.recipe.load import recipe_to_yaml
from launcher.recipe.schema import Recipe
from launcher.runs.status import runs_folder

_MODULE = "launcher.worker.preview"
_LOOK_S = 3600.0
_PREPARE_S = 24 * 3600.0


def show_rows(path: Path, overrides: list[str], *, rows: int, skip: int) -> list[dict[str, Any]]:
    """Rows of every training source with their pieces of text, trained and masked told apart.

    Raises:
        RecipeError, DataError, ModelError, ClusterError: what the stage that failed found.
    """
    loaded = load_located(path, overrides)
    request = {"ask": "show", "recipe": recipe_to_yaml(loaded.recipe), "rows": rows, "skip": skip}
    found: list[dict[str, Any]] = ask(_MODULE, request, python=train_python(), verb="data show", timeout_s=_LOOK_S)[
        "rows"
    ]
    return found


def count_rows(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Counts of every source, exact: every row is tokenized.

    Raises:
        DataError: nothing of a training source is trained; the counts are in its `.stats`.
    """
    recipe = load_located(path, overrides).recipe
    request = {"ask": "stats", "recipe": recipe_to_yaml(recipe)}
    return {"schema": 1} | ask(_MODULE, request, python=train_python(), verb="data stats", timeout_s=_LOOK_S)


def refuse_untrained(stats: dict[str, Any]) -> None:
    """Refuse counts that leave nothing to train on.

    Raises:
        DataError: a training source has no trained token.
    """
    problems = [
        f"{one['path']}: nothing to train on: in all {one['rows']} rows every label is masked "
        f"({one['truncated_rows']} rows were cut to data.max_seq_length; is the answer behind that?)"
        for one in stats["sources"]
        if one["used_for"] == "train" and one["trained_tokens"] == 0
    ]
    if problems:
        raise DataError(*problems)


def prepare_cache(path: Path, overrides: list[str], *, dry_run: bool = False) -> dict[str, Any]:
    """Tokenize and pack once into the cache that every later run of the same data finds.

    Raises:
        RecipeError, DataError, ModelError, ClusterError: what the stage that failed found.
    """
    try:
        planned = plan_recipe(path, overrides)
        recipe, plan, site = planned.recipe, planned.plan, planned.site
    except DoesNotFitError as error:  # a small machine prepares data for a large one
        from launcher.facts.site import site_facts

        plan, recipe = error.plan, load_located(path, overrides).recipe
        site = site_facts(recipe.slurm.site)
    cache = token_cache_folder(recipe, site.cache_dir)
    if dry_run:
        return {"schema": 1, "cache": str(cache), "would": "tokenize and pack every row into this folder"}
    request = {
        "ask": "prepare",
        "recipe": recipe_to_yaml(resolve(recipe, plan)),
        "plan": plan_to_json(plan),
        "cache": str(cache),
    }
    python = train_python(site)
    return {"schema": 1} | ask(_MODULE, request, python=python, verb="data prepare", timeout_s=_PREPARE_S)


def token_cache_folder(recipe: Recipe, cache_dir: str | None) -> Path:
    """Where the run's rank 0 looks: $LAUNCHER_CACHE or the site's, else beside the run folders."""
    named = os.environ.get("LAUNCHER_CACHE") or cache_dir
    runs = runs_folder(None) if recipe.output_dir == "auto" else Path(recipe.output_dir).expanduser()
    return (Path(named).expanduser() if named else runs.resolve() / ".cache") / "tokens"
