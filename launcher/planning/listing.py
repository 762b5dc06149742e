"""Shipped recipes with their predictions: what `launcher recipes` lists and copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.errors import ConflictError, DoesNotFitError
from launcher.planning.prepare import plan_recipe
from launcher.recipe.shipped import find_recipe, shipped_recipes


def _row(path: Path) -> dict[str, Any]:
    try:
        plan = plan_recipe(path).plan
    except DoesNotFitError as error:
        plan = error.plan
    chosen, candidate = plan.chosen, plan.chosen.candidate
    return {
        "name": path.stem,
        "method": candidate.method,
        "model": plan.model,
        "nodes": candidate.nodes,
        "gpus_per_node": candidate.gpus_per_node,
        "gpu": candidate.gpu,
        "peak_bytes": int(chosen.memory.peak_bytes.expected),
        "fits": chosen.fits,
        "wall_s": chosen.wall_s,
        "gpu_hours": chosen.gpu_hours,
    }


def list_recipes() -> list[dict[str, Any]]:
    """One row per shipped recipe, its numbers from the planner (bytes, seconds)."""
    return [_row(path) for path in shipped_recipes()]


def copy_recipe(name: str, folder: Path, *, dry_run: bool = False) -> Path:
    """Copy the shipped recipe `name` into `folder`.

    Raises:
        RecipeError: no such recipe.
        ConflictError: a file of that name is there already.
    """
    source = find_recipe(name)
    target = folder / source.name
    if target.exists():
        raise ConflictError(f"{target} exists; move it away, or plan it as it is: launcher plan {target}")
    if not dry_run:
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return target
