"""convert: another tool's file -> a recipe that loads, and what it does not carry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from launcher.errors import RecipeError
from launcher.recipe.dump import RecipeDumper
from launcher.recipe.foreign import axolotl, llamafactory, torchtune, trl
from launcher.recipe.foreign.draft import SWITCHED_OFF, Carried, Draft, LeftOut
from launcher.recipe.foreign.source import read
from launcher.recipe.foreign.telling import line, safe, shown
from launcher.recipe.load import recipe_from_text
from launcher.recipe.schema import LORA_METHODS

TOOLS: dict[str, ModuleType] = {
    "torchtune": torchtune,
    "axolotl": axolotl,
    "llama-factory": llamafactory,
    "trl": trl,
}
"""In the order in which they are recognised."""
_OTHERS = {
    "zero_optimization": "is a DeepSpeed file; import the training configuration that names it",
    "train_micro_batch_size_per_gpu": "is a DeepSpeed file; import the training configuration that names it",
    "distributed_type": "is an Accelerate file; import the training configuration it is used with",
    "compute_environment": "is an Accelerate file; import the training configuration it is used with",
    "export_dir": "is for the export of a model, not for training",
    "infer_backend": "is for inference, not for training",
    "data": "is a recipe already; launcher plan FILE",
}
"""Keys that tell files which are often named by mistake."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """A recipe's text, and an account of the foreign keys."""

    tool: str
    text: str
    carried: tuple[Carried, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]


def convert_file(path: Path, *, tool: str | None = None, gpus: int | None = None) -> Converted:
    """Read another tool's configuration and write it as a recipe; `gpus` = GPUs it was trained on.

    Raises:
        RecipeError: unreadable, of no known tool, for no supervised training on text, or it makes no recipe that loads.
    """
    found = read(path)
    source = found.settings
    name = tool or next((name for name, module in TOOLS.items() if module.detect(source)), None)
    if name is None:
        raise RecipeError(f"{path}: {_unknown(source)}")
    draft = Draft(source=source, folder=path.parent, gpus=gpus, referred_to=found.referred_to)
    draft.put("name", _name(path), of=())
    _fill(draft, path, name)
    draft.put("name", _name(Path(str(draft.get("name")))), of=draft.origins["name"])
    recipe = _text(draft, path, name)
    for notice in recipe_from_text(recipe, f"recipe made of {path}").notices:
        draft.note(notice)
    return Converted(
        tool=name,
        text=recipe,
        carried=draft.carried(),
        left_out=tuple(draft.left_out),
        notes=tuple(line(note) for note in draft.notes),
    )


def _unknown(source: dict[str, Any]) -> str:
    told = next((what for key, what in _OTHERS.items() if key in source), None)
    return told or f"looks like no configuration of {', '.join(TOOLS)}; if it is one, say which with --tool"


def _fill(draft: Draft, path: Path, name: str) -> None:
    """Run the tool's converter; odd values and other objectives are refused with all their keys."""
    try:
        TOOLS[name].convert(draft)
    except (TypeError, AttributeError, ValueError, KeyError, IndexError) as error:
        # The tables of the tools say which keys there are, not every shape a value may take.
        value = shown(safe(draft.last_taken, draft.look(draft.last_taken)))
        raise RecipeError(
            f"{path}: {draft.last_taken}: {value!r} is nothing that {name} takes here ({error})"
        ) from error
    problems = [f"{path}: {line(one)}" for one in dict.fromkeys(draft.problems)]
    for needed, what in (("model.name_or_path", "a model"), ("data.train", "data to train on")):
        if not problems and not draft.get(needed):
            problems.append(f"{path}: names no {what.removeprefix('a ')}; {name} files for training do")
    unresolved = [f"{path}: {one.key}: {one.value!r} holds a reference that nothing here resolves; write the value"
                  for one in draft.carried() if isinstance(one.value, str) and "${" in one.value]  # fmt: skip
    if problems or unresolved:
        raise RecipeError(*problems, *unresolved)
    method = draft.get("method")
    if method is not None and method not in LORA_METHODS:
        draft.unused("lora", f"method: {method} has no adapter")
    if method != "qlora":
        draft.unused("quantization", "is read by method: qlora alone")


def _name(path: Path) -> str:
    """A run name out of a file name."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name.removesuffix(".yaml").removesuffix(".yml"))
    return re.sub(r"^[^A-Za-z0-9]+", "", cleaned)[:63] or "imported"


_ORDER = ("name", "model", "method", "lora", "quantization", "data", "train", "deepspeed", "checkpoint", "wandb")


def _text(draft: Draft, path: Path, tool: str) -> str:
    ordered = {key: draft.recipe[key] for key in _ORDER if draft.recipe.get(key) not in (None, {})}
    body = yaml.dump(ordered, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=110)
    lost = [
        f"#   {shown(one.key)}: {shown(one.value)}  ({one.why})" for one in draft.left_out if one.why != SWITCHED_OFF
    ]
    head = [f"# Made of {shown(path.name)} ({tool}) by launcher import."]
    return "\n".join([*head, *(["# Not carried over:"] if lost else []), *lost, body])
