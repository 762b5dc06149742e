"""plan_files: what the next job reads (plan, resolved recipe, DeepSpeed's configuration), replaced and kept."""

from __future__ import annotations

import shutil
from pathlib import Path

from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.plan import Plan, plan_to_json
from launcher.recipe.load import recipe_to_yaml
from launcher.recipe.schema import Recipe
from launcher.runs.folder import RunFolder, write_atomic, write_json


def write_plan(run: RunFolder, recipe: Recipe, plan: Plan) -> None:
    """What the next job reads: the plan comes last, so that half of a change is never taken for all of it."""
    candidate = plan.chosen.candidate
    if candidate.zero_stage > 0:
        write_json(run.ds_config, deepspeed_config(candidate, recipe.deepspeed.overrides))
    write_elastic(run, recipe, plan)
    write_atomic(run.resolved, recipe_to_yaml(recipe))
    write_json(run.plan, plan_to_json(plan))


def write_elastic(run: RunFolder, recipe: Recipe, plan: Plan) -> None:
    """DeepSpeed's configuration for every number of ranks the plan allows beside its own; those of other plans go."""
    for stale in run.path.glob("ds_config-world*.json"):
        stale.unlink()
    for candidate in plan.elastic:
        if candidate.zero_stage > 0:
            path = run.path / f"ds_config-world{candidate.world_size}.json"
            write_json(path, deepspeed_config(candidate, recipe.deepspeed.overrides))


def _planned_files(run: RunFolder) -> tuple[Path, ...]:
    return (run.plan, run.resolved, run.ds_config)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def archive(run: RunFolder) -> int:
    """Keep what was planned so far as plan-N.json, recipe.resolved-N.yaml and ds_config-N.json; returns N."""
    number = 1
    while any(_numbered(path, number).exists() for path in _planned_files(run)):
        number += 1
    for path in _planned_files(run):
        if path.exists():
            shutil.copy2(path, _numbered(path, number))
    return number


def restore(run: RunFolder, number: int) -> None:
    """Undo `archive` and whatever was written since."""
    for path in _planned_files(run):
        kept = _numbered(path, number)
        if kept.exists():
            kept.replace(path)
        else:
            path.unlink(missing_ok=True)
