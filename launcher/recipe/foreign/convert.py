"""convert: another tool's file -> a recipe that loads, and what it does not carry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from launcher.errors import RecipeError
from launcher.recipe.dump import RecipeDumper
from launcher.recipe.foreign import axolotl, llamafactory, torchtune, trl
from launcher.recipe.foreign.draft import SWITCHED_OFF, Draft, LeftOut
from launcher.recipe.load import recipe_from_text
from launcher.recipe.problems import Findings
from launcher.recipe.scalars import read_any
from launcher.recipe.tree import Node, Scalar, Table
from launcher.recipe.yaml_strict import parse

TOOLS: dict[str, ModuleType] = {
    "torchtune": torchtune,
    "axolotl": axolotl,
    "llama-factory": llamafactory,
    "trl": trl,
}
"""In the order in which they are recognised."""
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """A recipe's text, and an account of the foreign keys."""

    tool: str
    text: str
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]


def convert_file(path: Path, *, tool: str | None = None, gpus: int = 1) -> Converted:
    """Read another tool's configuration and write it as a recipe.

    Raises:
        RecipeError: unreadable, of no known tool, or it makes no recipe that loads.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    source = _plain_file(text, str(path))
    name = tool or next((name for name, module in TOOLS.items() if module.detect(source)), None)
    if name is None:
        raise RecipeError(
            f"{path}: looks like no configuration of {', '.join(TOOLS)}; if it is one, say which with --tool"
        )
    draft = Draft(source=source, folder=path.parent, gpus=gpus)
    draft.put("name", _name(path))
    try:
        TOOLS[name].convert(draft)
    except (TypeError, AttributeError, ValueError, KeyError, IndexError) as error:
        # The tables of the tools say which keys there are, not every shape a value may take.
        value = _short(draft.look(draft.last_taken))
        raise RecipeError(
            f"{path}: {draft.last_taken}: {value!r} is nothing that {name} takes here ({error})"
        ) from error
    draft.put("name", _name(Path(str(draft.get("name")))))
    recipe = _text(draft, path, name)
    for notice in recipe_from_text(recipe, f"recipe made of {path}").notices:
        draft.note(notice)
    return Converted(tool=name, text=recipe, left_out=tuple(draft.left_out), notes=tuple(draft.notes))


def _plain_file(text: str, origin: str) -> dict[str, Any]:
    """The file as plain values: numbers as YAML 1.2 reads them, references to other keys followed."""
    findings = Findings()
    tree = parse(text, origin, findings)
    findings.settle()
    plain = _plain(tree)
    if not isinstance(plain, dict):
        raise RecipeError(f"{origin}: is not a mapping of settings")
    followed: dict[str, Any] = _follow(plain, plain)
    return followed


def _plain(node: Node) -> Any:
    if isinstance(node, Table):
        return {key: _plain(child) for key, child in node.items.items()}
    if isinstance(node, Scalar):
        return read_any(node.text, quoted=node.quoted)
    return [_plain(child) for child in node.items]


def _follow(value: Any, root: Mapping[str, Any]) -> Any:
    """torchtune writes ${output_dir}/logs; one step of references is followed, no more."""
    if isinstance(value, dict):
        return {key: _follow(child, root) for key, child in value.items()}
    if isinstance(value, list):
        return [_follow(child, root) for child in value]
    if not isinstance(value, str):
        return value

    def named(match: re.Match[str]) -> str:
        found: Any = root
        for part in match[1].split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return str(found) if isinstance(found, str | int | float) else match[0]

    return _REFERENCE.sub(named, value)


def _name(path: Path) -> str:
    """A run name out of a file name."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name.removesuffix(".yaml").removesuffix(".yml"))
    return re.sub(r"^[^A-Za-z0-9]+", "", cleaned)[:63] or "imported"


_ORDER = ("name", "model", "method", "lora", "quantization", "data", "train", "deepspeed", "checkpoint", "wandb")


def _text(draft: Draft, path: Path, tool: str) -> str:
    ordered = {key: draft.recipe[key] for key in _ORDER if draft.recipe.get(key) not in (None, {})}
    if ordered.get("method") == "full":
        for section in ("lora", "quantization"):
            ordered.pop(section, None)
    elif ordered.get("method") != "qlora":
        ordered.pop("quantization", None)
    body = yaml.dump(ordered, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=110)
    lost = [f"#   {one.key}: {_short(one.value)}  ({one.why})" for one in draft.left_out if one.why != SWITCHED_OFF]
    head = [f"# Made of {path.name} ({tool}) by launcher import."]
    return "\n".join([*head, *(["# Not carried over:"] if lost else []), *lost, body])


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return printable if len(printable) <= 60 else f"{printable[:57]}..."
