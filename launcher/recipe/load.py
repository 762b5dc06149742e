"""Loading a recipe: file and overrides in, a checked Recipe and its notices out.

The order is: defaults (schema), file, overrides. Every problem of a recipe is found before any is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import RecipeError
from launcher.recipe.aliases import apply_aliases
from launcher.recipe.build import build
from launcher.recipe.checks import check
from launcher.recipe.dump import recipe_to_yaml
from launcher.recipe.forbidden import refuse_raw_characters, without_forbidden
from launcher.recipe.overrides import apply_overrides
from launcher.recipe.problems import Findings
from launcher.recipe.schema import Recipe
from launcher.recipe.tree import Table
from launcher.recipe.yaml_strict import parse

__all__ = ["LoadedRecipe", "load_recipe", "load_recipe_with_notices", "recipe_from_text", "recipe_to_yaml"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedRecipe:
    """A recipe with what the user should be told about it."""

    recipe: Recipe
    notices: tuple[str, ...]
    """One line each: aliases that were read as ours, settings without effect."""
    text: str
    """The file as written."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file with `k=v` overrides laid over it.

    Raises:
        RecipeError: with every problem, each with its file:line:column or its override.
    """
    return load_recipe_with_notices(path, overrides).recipe


def load_recipe_with_notices(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Like `load_recipe`, with the notices and the file's text."""
    return recipe_from_text(_read(Path(path)), str(path), overrides)


def recipe_from_text(text: str, origin: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Like `load_recipe_with_notices`, from text; `origin` names it in messages."""
    findings = Findings()
    refuse_raw_characters(text, origin, findings)
    findings.settle()  # such characters may hide lines from the reader: show nothing else first
    tree = without_forbidden(parse(text, origin, findings), findings)
    if not isinstance(tree, Table):
        raise TypeError("a mapping stays a mapping when values are taken out")
    tree = apply_overrides(apply_aliases(tree, findings), tuple(overrides), findings)
    built = build(tree, origin, findings)
    recipe = check(built, origin, findings)
    findings.settle()
    return LoadedRecipe(recipe=recipe, notices=tuple(dict.fromkeys(findings.notices)), text=text)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        beside = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        near = ", ".join(str(file) for file in beside[:5])
        raise RecipeError(f"{path}: no such recipe file" + (f"; {path.parent} has {near}" if near else "")) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
