"""Where shipped recipes and site profiles lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

from launcher.errors import RecipeError

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_folder(kind: str) -> Path:
    """Folder of shipped files of `kind`: "recipes" or "slurm"."""
    inside = _PACKAGE / "_shipped" / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def shipped_recipes() -> tuple[Path, ...]:
    """Every shipped recipe, sorted by name."""
    return tuple(sorted(shipped_folder("recipes").glob("*.yaml")))


def find_recipe(name_or_path: str) -> Path:
    """The recipe file a user means: a path, or the name of a shipped recipe.

    Raises:
        RecipeError: neither exists; names the nearest shipped recipe.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    by_name = {recipe.stem: recipe for recipe in shipped_recipes()}
    if path.name.removesuffix(".yaml") in by_name and path.parent in (Path(), Path("recipes")):
        return by_name[path.name.removesuffix(".yaml")]
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), by_name, n=1)
    hint = f"; did you mean the shipped recipe {near[0]!r}?" if near else "; `launcher recipes` lists the shipped ones"
    what = "is a folder, not a recipe file" if path.is_dir() else "no such recipe file"
    raise RecipeError(f"{name_or_path}: {what}{hint}")
