"""Strict YAML: text to a tree of nodes with places, or every problem with its file, line and column.

Stands on PyYAML's SafeLoader for scanning and composing. Nothing is resolved or constructed: plain
scalars stay text, tags and merge keys are refused, duplicate keys are refused, aliases may expand only
so far.
"""

from __future__ import annotations

import yaml

from launcher.errors import RecipeError
from launcher.recipe.problems import Findings
from launcher.recipe.tree import Node, Scalar, Series, Table, Where

MAX_CHARACTERS = 1_000_000
MAX_NODES = 10_000
"""Values after aliases are expanded; a recipe has about a hundred."""
MAX_DEPTH = 50

_PLAIN_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


class _Loader(yaml.SafeLoader):
    """SafeLoader that leaves every scalar a string; any other tag was written by hand."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own attribute


def parse(text: str, origin: str, findings: Findings) -> Table:
    """Read one YAML document whose top level is a mapping; smaller problems go into `findings`.

    Raises:
        RecipeError: not YAML at all, more than one document, not a mapping, or absurdly large.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{origin}: {len(text)} characters; a recipe has at most {MAX_CHARACTERS}")
    root = _compose(text, origin)
    if root is None:
        raise RecipeError(f"{origin}: empty; a recipe needs at least name, model.name_or_path and data.train")
    tree = _Converter(origin, findings).convert(root, 0)
    if not isinstance(tree, Table):
        raise RecipeError(f"{tree.where}: a recipe is a mapping of sections (name: …, model: …), found {_kind(tree)}")
    return tree


def parse_value(text: str, where: Where, findings: Findings) -> Node:
    """Read the right-hand side of an override: flow YAML when it starts as such, else one plain scalar."""
    stripped = text.strip()
    if not stripped.startswith(("[", "{", '"', "'")):
        return Scalar(stripped, where)
    try:
        root = yaml.compose(stripped, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{where}: the value is not valid YAML ({_problem(error)})") from None
    return _Converter(where, findings).convert(root, 0) if root is not None else Scalar("", where)


def _compose(text: str, origin: str) -> yaml.Node | None:
    try:
        return yaml.compose(text.removeprefix("\ufeff"), Loader=_Loader)
    except RecursionError:
        raise RecipeError(f"{origin}: nested too deeply; at most {MAX_DEPTH} levels") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        raise RecipeError(f"{origin}:{line}:{column}: character U+{int(error.character):04X} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        raise RecipeError(f"{place}: {_problem(error)}") from None


def _problem(error: Exception) -> str:
    """What PyYAML found, without the snippet it quotes: that could hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return "nested too deeply" if isinstance(error, RecursionError) else "unreadable"
    problem = error.problem or error.context or "unreadable"
    if "found another document" in problem:
        return "a second document starts here; a recipe is one document"
    if "'\\t'" in problem:
        return "a tab starts a token here; YAML indents with spaces"
    if "mapping values are not allowed here" in problem:
        return "a second ': ' on one line, or wrong indentation; quote the value if the colon belongs to it"
    return f"not valid YAML: {problem}"


def _kind(node: Node) -> str:
    return {Scalar: "a single value", Series: "a list", Table: "a mapping"}[type(node)]


class _Converter:
    """PyYAML nodes to ours; counts what aliases expand to."""

    def __init__(self, origin: str | Where, findings: Findings) -> None:
        self.origin = origin
        self.findings = findings
        self.count = 0

    def where(self, node: yaml.Node) -> Where:
        if isinstance(self.origin, Where):
            return self.origin
        return Where(self.origin, node.start_mark.line + 1, node.start_mark.column + 1)

    def convert(self, node: yaml.Node, depth: int) -> Node:
        self.count += 1
        where = self.where(node)
        if self.count > MAX_NODES:
            raise RecipeError(f"{where}: aliases expand to more than {MAX_NODES} values")
        if depth > MAX_DEPTH:
            raise RecipeError(f"{where}: nested too deeply; at most {MAX_DEPTH} levels")
        if node.tag not in _PLAIN_TAGS:
            short = node.tag.replace("tag:yaml.org,2002:", "!!")
            self.findings.refuse(where, f"YAML tag {short[:60]!r} is not allowed; write the plain value")
        if isinstance(node, yaml.ScalarNode):
            return Scalar(node.value, where, quoted=node.style is not None)
        if isinstance(node, yaml.SequenceNode):
            return Series(tuple(self.convert(child, depth + 1) for child in node.value), where)
        return self.table(node, where, depth)

    def table(self, node: yaml.Node, where: Where, depth: int) -> Table:
        items: dict[str, Node] = {}
        places: dict[str, Where] = {}
        for key_node, value_node in node.value:
            place = self.where(key_node)
            key = key_node.value
            value = self.convert(value_node, depth + 1)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _PLAIN_TAGS:
                self.findings.refuse(place, "a key must be a plain word")
            elif key == "<<":
                self.findings.refuse(place, "merge keys (<<) are not supported; write the values out")
            elif key in items:
                self.findings.refuse(place, f"key {key!r} stands twice; first at line {places[key].line}, keep one")
            else:
                items[key], places[key] = value, place
        return Table(items, where, places)
