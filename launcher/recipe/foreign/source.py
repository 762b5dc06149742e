"""A foreign file as plain values: numbers as YAML 1.2 reads them, merge keys and references followed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import RecipeError
from launcher.recipe.problems import Findings
from launcher.recipe.scalars import read_any
from launcher.recipe.tree import Node, Scalar, Table
from launcher.recipe.yaml_strict import parse

MAX_BYTES = 1_000_000
"""The largest published example has 12 kB; a bigger file is something else."""
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_STEPS = 8
"""References to references that are followed; more are a circle."""
_YAML_1_1 = {"yes": True, "on": True, "no": False, "off": False}
"""The tools read their files with PyYAML."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The settings of a file, and the names of those that others refer to (`${name}`)."""

    settings: dict[str, Any]
    referred_to: frozenset[str]


def read(path: Path) -> Source:
    """The settings in `path`.

    Raises:
        RecipeError: unreadable, no YAML, or no mapping.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: has {path.stat().st_size} bytes; a configuration has some thousands")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    if not text.strip():
        raise RecipeError(f"{path}: is empty")
    findings = Findings()
    tree = parse(_without_merge_keys(text), str(path), findings)
    findings.settle()
    plain = _plain(tree)
    if not isinstance(plain, dict) or not plain:
        raise RecipeError(f"{path}: is no mapping of settings")
    return Source(settings=_follow(plain, plain), referred_to=frozenset(_REFERENCE.findall(text)))


def _plain(node: Node) -> Any:
    if isinstance(node, Table):
        return {key: _plain(child) for key, child in node.items.items()}
    if isinstance(node, Scalar):
        value = read_any(node.text, quoted=node.quoted)
        return _YAML_1_1.get(value.lower(), value) if isinstance(value, str) and not node.quoted else value
    return [_plain(child) for child in node.items]


# --- merge keys -------------------------------------------------------------------------------------


def _without_merge_keys(text: str) -> str:
    """The same document with `<<: *anchor` written out; a text without them, or that is no YAML, as it is."""
    if "<<" not in text:
        return text
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return text  # the parser says what is wrong, and where
    if root is None:
        return text
    _merge(root, set())
    written: str = yaml.serialize(root, Dumper=yaml.SafeDumper)
    return written


def _merge(node: yaml.Node, seen: set[int]) -> None:
    """Write out the merge keys of `node` and below, in place; own keys win over merged ones."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _merge(child, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    own: list[tuple[yaml.Node, yaml.Node]] = []
    for key, value in node.value:
        _merge(value, seen)
        if key.value != "<<" or key.style is not None:
            own.append((key, value))
            continue
        for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            for pair in part.value if isinstance(part, yaml.MappingNode) else []:
                merged.setdefault(str(pair[0].value), pair)
    written = {str(key.value) for key, _ in own}
    node.value = [pair for name, pair in merged.items() if name not in written] + own


# --- references -------------------------------------------------------------------------------------


def _follow(value: Any, root: Mapping[str, Any]) -> Any:
    """torchtune writes ${output_dir}/logs: OmegaConf's references to other keys."""
    if isinstance(value, dict):
        return {key: _follow(child, root) for key, child in value.items()}
    if isinstance(value, list):
        return [_follow(child, root) for child in value]
    for _ in range(_STEPS):
        if not isinstance(value, str) or "${" not in value:
            break
        value = _once(value, root)
    return value


def _once(text: str, root: Mapping[str, Any]) -> Any:
    """One step: a text that is nothing but a reference becomes the value itself."""
    whole = _REFERENCE.fullmatch(text)
    if whole:
        found = _named(whole[1], root)
        return text if found is None or isinstance(found, dict | list) else found

    def named(match: re.Match[str]) -> str:
        found = _named(match[1], root)
        return str(found) if isinstance(found, str | int | float) else match[0]

    return _REFERENCE.sub(named, text)


def _named(path: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
