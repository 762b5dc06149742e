"""Which shape the recipe's base model has: from its folder or the shipped catalogue; no weights, GPU or network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from launcher.errors import ModelError
from launcher.facts.architecture import shape_from_config
from launcher.facts.model_kind import model_kind_problems
from launcher.facts.shape import Linear, ModelShape
from launcher.facts.staged import hub_name
from launcher.recipe.schema import ModelSection

__all__ = ["Linear", "ModelShape", "catalogue", "model_shape"]

_CATALOGUE = Path(__file__).parent / "catalogue" / "models.jsonl"


def model_shape(model: ModelSection) -> ModelShape:
    """Find the shape of the recipe's base model: local folder first, shipped catalogue second.

    Raises:
        ModelError: folder without a usable config.json, unknown architecture, or a name the catalogue lacks.
    """
    folder = Path(model.name_or_path).expanduser()
    if folder.exists():
        staged = hub_name(folder)
        return _from_folder(staged[0] if staged else model.name_or_path, folder)
    return _from_catalogue(model.name_or_path)


def _from_folder(name: str, folder: Path) -> ModelShape:
    path = folder / "config.json"
    if folder.is_dir() and not path.is_file() and (problems := model_kind_problems(folder)):
        raise ModelError(*(f"model.name_or_path: {problem}" for problem in problems))
    if not folder.is_dir() or not path.is_file():
        raise ModelError(f"model.name_or_path: {folder} has no config.json; found {_found(folder)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise ModelError(f"{path}: holds a {type(config).__name__}, not an object")
    return shape_from_config(config, name=name, source=str(path))


def _found(folder: Path) -> str:
    if not folder.is_dir():
        return "a file, not a folder"
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return shown or "an empty folder"


def _from_catalogue(name: str) -> ModelShape:
    config = catalogue().get(name.lower())
    if config is None:
        raise ModelError(f"model.name_or_path: {_unknown(name)}")
    return shape_from_config(config, name=config["name"], source=f"shipped catalogue ({config['source']})")


def _unknown(name: str) -> str:
    known = {row["name"].lower(): row["name"] for row in catalogue().values()}
    close = get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    hint = f" Did you mean {', '.join(known[match] for match in close)}?" if close else ""
    what = "a folder that exists" if name.startswith((".", "/", "~")) else "a folder"
    return (
        f"{name!r} is neither {what} nor one of the {len(known)} models of the shipped catalogue.{hint}"
        " Any other model can be planned from its folder: bring it here with launcher stage, or give the path of a"
        " folder that holds config.json."
    )


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Shipped models: lower-case name -> the keys of its config.json that matter, with `name` and `source`."""
    with _CATALOGUE.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {row["name"].lower(): row for row in rows}
