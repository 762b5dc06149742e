"""From the tree to a Recipe: unknown keys, types and required fields.

`launcher.recipe.schema` is the one definition. Text is read by the field's type, OmegaConf's structured
configs judge each value, fill in the defaults, merge, and make the frozen sections.
"""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from launcher.recipe.aliases import VALUES
from launcher.recipe.problems import Findings, nearest, one_of
from launcher.recipe.scalars import UnreadableError, kinds_of, read_any, read_minutes, read_scalar
from launcher.recipe.schema import AUTO, DataSource, Recipe, ValidationSpec
from launcher.recipe.tree import Node, Scalar, Series, Table, Where

REQUIRED = {
    "name": "a name for the runs",
    "model.name_or_path": "a model folder or a hub id",
    "data.train": "files, folders or data-set ids to train on",
}
_MISSING = "missing"
"""Stands in for required values, so that the rest of the recipe is still checked."""
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", "auto": "auto"}


@dataclass(slots=True)
class Built:
    """A recipe with the place of every field that was written."""

    recipe: Recipe
    places: dict[str, Where]


def build(tree: Table, origin: str, findings: Findings) -> Built:
    """Make the Recipe; fields that cannot be read become problems and keep their defaults."""
    from omegaconf import OmegaConf

    builder = _Builder(findings)
    values = builder.section(Recipe, _builtin_retention(tree), "")
    for path, meaning in REQUIRED.items():
        if not _get(values, path) and path not in findings.paths:
            findings.refuse(_nearest_place(builder.places, path, origin), f"needed: {meaning}", path=path)
    filled = _with_required(values)
    recipe = OmegaConf.to_object(OmegaConf.merge(_config(Recipe), filled))
    if not isinstance(recipe, Recipe):
        raise TypeError(f"OmegaConf made a {type(recipe).__name__} of a recipe")
    return Built(recipe, builder.places)


def _builtin_retention(tree: Table) -> Table:
    """`data.retention: builtin` is a word where rows are expected: it becomes the field that means it."""
    data = tree.items.get("data")
    word = data.items.get("retention") if isinstance(data, Table) else None
    if not isinstance(data, Table) or not isinstance(word, Scalar) or word.text != "builtin":
        return tree
    items = {key: node for key, node in data.items.items() if key != "retention"}
    items["retention_builtin"] = Scalar("true", word.where)
    places = {**data.places, "retention_builtin": data.place("retention")}
    return Table({**tree.items, "data": Table(items, data.where, places)}, tree.where, tree.places)


@cache
def hints(section: type) -> dict[str, Any]:
    """Field -> type of a section."""
    return typing.get_type_hints(section)


@cache
def field_paths() -> tuple[str, ...]:
    """Every dotted path a recipe may set."""
    return tuple(_paths(Recipe, ""))


def _paths(section: type, prefix: str) -> list[str]:
    found: list[str] = []
    for name, hint in hints(section).items():
        nested = isinstance(hint, type) and is_dataclass(hint) and hint is not ValidationSpec
        found += _paths(hint, f"{prefix}{name}.") if nested else [prefix + name]
    return found


def _get(values: dict[str, Any], path: str) -> Any:
    found: Any = values
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _with_required(values: dict[str, Any]) -> dict[str, Any]:
    model = {"name_or_path": _MISSING, **values.get("model", {})}
    data = {**values.get("data", {})}
    data["train"] = data.get("train") or [DataSource(path=_MISSING)]
    return {**values, "name": values.get("name") or _MISSING, "model": model, "data": data}


def _nearest_place(places: dict[str, Where], path: str, origin: str) -> Where:
    return places.get(path) or places.get(path.rpartition(".")[0]) or Where(origin)


class _Builder:
    """Walks the tree beside the schema; remembers where each field was written."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.places: dict[str, Where] = {}

    def refuse(self, where: Where, path: str, message: str) -> None:
        self.findings.refuse(where, message, path=path)

    def section(self, section: type, table: Table, prefix: str) -> dict[str, Any]:
        """Plain values of the fields of `section` that are set and readable."""
        values: dict[str, Any] = {}
        nodes: dict[str, Node] = {}
        for key, node in table.items.items():
            path = prefix + key
            hint = hints(section).get(key)
            if hint is None:
                self.unknown(table.place(key), section, path)
                continue
            self.places[path] = node.where
            value = self.field(node, hint, path)
            if value is not _UNREAD:
                values[key], nodes[key] = value, node
        if _fault(section, values) is None:
            return values
        return {key: value for key, value in values.items() if self.judged(section, key, value, nodes[key], prefix)}

    def field(self, node: Node, hint: Any, path: str) -> Any:
        special = _SPECIAL.get(path)
        if special is not None:
            return special(self, node, path)
        if is_dataclass(hint) and isinstance(hint, type):
            return self.mapping(node, hint, path)
        if typing.get_origin(hint) is dict:
            return self.free_mapping(node, path)
        if any(typing.get_origin(kind) is tuple for kind in kinds_of(hint)):
            return self.words(node, path)
        if not isinstance(node, Scalar):
            found = "a list" if isinstance(node, Series) else "a mapping"
            self.refuse(node.where, path, f"expected {_expected(hint)}, found {found}")
            return _UNREAD
        text = VALUES.get(_shape(path), {}).get(node.text.lower(), node.text)
        if text != node.text:
            self.findings.note(node.where, f"{path}: {node.text} is read as {text}")
        return read_scalar(text, quoted=node.quoted, hint=hint)

    def mapping(self, node: Node, section: type, path: str) -> Any:
        if isinstance(node, Scalar) and not node.quoted and node.text in ("", "null", "~"):
            return {}  # a section header with every line below it commented out
        if not isinstance(node, Table):
            names = ", ".join(field.name for field in fields(section)[:3])
            self.refuse(node.where, path, f"expected a section with fields such as {names}; found {_shown(node)}")
            return _UNREAD
        return self.section(section, node, f"{path}.")

    def free_mapping(self, node: Node, path: str) -> Any:
        if isinstance(node, Scalar) and not node.quoted and node.text in ("", "null", "~"):
            return {}
        if not isinstance(node, Table):
            self.refuse(node.where, path, f"expected a mapping of names to values, found {_shown(node)}")
            return _UNREAD
        self.places.update({f"{path}.{key}": child.where for key, child in node.items.items()})
        return _plain(node)

    def words(self, node: Node, path: str) -> Any:
        """One word, words with commas between, or a list."""
        if isinstance(node, Scalar):
            text = VALUES.get(path, {}).get(node.text.lower(), node.text)
            if text == "all-linear":
                return text
            return [] if text in ("", "null") else [word.strip() for word in text.split(",")]
        if isinstance(node, Table) or not all(isinstance(child, Scalar) for child in node.items):
            self.refuse(node.where, path, "expected a list of words")
            return _UNREAD
        return [child.text for child in node.items if isinstance(child, Scalar)]

    def minutes(self, node: Node, path: str) -> Any:
        if isinstance(node, Scalar) and node.text.lower() == AUTO:
            return AUTO
        try:
            minutes = read_minutes(node.text if isinstance(node, Scalar) else "")
        except UnreadableError as error:
            self.refuse(node.where, path, f"{error}; found {_shown(node)}")
            return _UNREAD
        if isinstance(node, Scalar) and re.fullmatch(r"\d+:\d+", node.text):
            self.findings.note(node.where, f"{path}: {node.text} is minutes:seconds, as for sbatch: {minutes} minutes")
        return minutes

    def sources(self, node: Node, path: str) -> Any:
        """`data.train`: a list of data sources."""
        if not isinstance(node, Series):
            self.refuse(node.where, path, "expected a list of files, folders or data-set ids")
            return _UNREAD
        found = [self.source(child, f"{path}.{index}") for index, child in enumerate(node.items)]
        if any(source is _UNREAD for source in found):
            self.findings.paths.add(path)
        return [source for source in found if source is not _UNREAD]

    def source(self, node: Node, path: str) -> Any:
        if not isinstance(node, Table):
            self.refuse(node.where, path, f"expected a path or {{path: …}}, found {_shown(node)}")
            return _UNREAD
        self.places.setdefault(path, node.where)
        values = self.section(DataSource, node, f"{path}.")
        if "path" not in values:
            if f"{path}.path" not in self.findings.paths:
                self.refuse(node.where, f"{path}.path", "needed: a file, a folder or a data-set id")
            values["path"] = _MISSING
        return DataSource(**values)

    def retention(self, node: Node, path: str) -> Any:
        return None if isinstance(node, Scalar) else self.source(node, path)

    def validation(self, node: Node, path: str) -> Any:
        """0.02 (share), 500 (rows), {path: …} or null."""
        if isinstance(node, Table):
            source = self.source(node, path)
            return _UNREAD if source is _UNREAD else {"share": None, "source": source}
        value = read_any(node.text, quoted=False) if isinstance(node, Scalar) else _UNREAD
        if value is None or (value == 0 and not isinstance(value, bool)):
            return {"share": None}
        if isinstance(value, int) and not isinstance(value, bool):
            return {"share": None, "count": value}
        if isinstance(value, float):
            return {"share": value}
        self.refuse(node.where, path, f"expected a share (0.02), rows (500), {{path: …}} or null; found {_shown(node)}")
        return _UNREAD

    def judged(self, section: type, key: str, value: Any, node: Node, prefix: str) -> bool:
        """Whether this field takes `value`; a refusal shows what it wants."""
        if _fault(section, {key: value}) is None:
            return True
        self.refuse(node.where, prefix + key, f"expected {_expected(hints(section)[key])}, found {_shown(node)}")
        return False

    def unknown(self, where: Where, section: type, path: str) -> None:
        """Refuse a key nobody knows, with the nearest field of this section or of the whole recipe."""
        prefix, _, key = path.rpartition(".")
        here = [f"{prefix}.{name}" if prefix else name for name in nearest(key, hints(section))]
        elsewhere = [known for known in field_paths() if known.rpartition(".")[2] == key.replace("-", "_")]
        anywhere = _nearest_field(key) if not here else []
        guess = (elsewhere or here or anywhere)[:1]
        known = one_of(sorted(hints(section)))
        hint = f"did you mean {guess[0]}?" if guess else f"{prefix or 'a recipe'} has {known}"
        self.refuse(where, path, f"unknown key; {hint}")


@cache
def _config(section: type) -> Any:
    """OmegaConf's view of a section with its defaults; merging copies it."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(section)


def _fault(section: type, values: dict[str, Any]) -> Exception | None:
    """What OmegaConf has against these values of a section, if anything."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, value in values.items():
        if hints(section)[key] is bool and not isinstance(value, bool):
            return TypeError(f"{key}: OmegaConf would take any number for true")
    try:
        OmegaConf.merge(_config(section), values)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        return error
    return None


def _nearest_field(key: str) -> list[str]:
    by_name = {path.rpartition(".")[2]: path for path in reversed(field_paths())}
    return [by_name[name] for name in nearest(key, by_name)]


class _Unread:
    """A value that could not be read; its problem is already in the findings."""


_UNREAD = _Unread()

_SPECIAL: dict[str, typing.Callable[[_Builder, Node, str], Any]] = {
    "data.train": _Builder.sources,
    "data.retention": _Builder.retention,
    "data.validation": _Builder.validation,
    "slurm.time": _Builder.minutes,
}


def _shape(path: str) -> str:
    """The path without list indices; retention and validation sources count as training sources."""
    return re.sub(r"^data\.(train\.\d+|retention|validation)\.", "data.train.", path)


def _plain(node: Node) -> Any:
    if isinstance(node, Scalar):
        return read_any(node.text, quoted=node.quoted)
    if isinstance(node, Series):
        return [_plain(child) for child in node.items]
    return {key: _plain(child) for key, child in node.items.items()}


def _expected(hint: Any) -> str:
    return one_of([_WORDS.get(kind, "null" if kind is type(None) else "a list") for kind in kinds_of(hint)])


def _shown(node: Node) -> str:
    if isinstance(node, Scalar):
        return repr(node.text if len(node.text) <= 60 else node.text[:57] + "…") if node.text else "nothing"
    return "a list" if isinstance(node, Series) else "a mapping"
