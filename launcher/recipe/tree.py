"""The recipe as written: nodes that remember their place, before any field is known.

Scalars keep their text. What `no`, `0123` or `24:00:00` means depends on the field it is given to, so
nothing is converted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Where:
    """A place to show to the user: file, line and column (1-based; 0 = the whole origin)."""

    origin: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.origin}:{self.line}:{self.column}" if self.line else self.origin


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value, as text."""

    text: str
    where: Where
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """A list."""

    items: tuple[Node, ...]
    where: Where


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping; `places` says where each key stands."""

    items: dict[str, Node]
    where: Where
    places: dict[str, Where] = field(default_factory=dict)

    def place(self, key: str) -> Where:
        """Where `key` was written."""
        return self.places.get(key, self.where)


Node = Scalar | Series | Table


def merge(base: Node | None, over: Node) -> Node:
    """Lay `over` on `base`: mappings key by key, everything else replaced.

    A mapping whose keys are all digits addresses the entries of a list (`data.train.0.path`); the
    index one past the end appends.
    """
    if isinstance(over, Table) and over.items:
        if isinstance(base, Table):
            items = {**base.items, **{key: merge(base.items.get(key), node) for key, node in over.items.items()}}
            return Table(items, base.where, {**base.places, **over.places})
        if (base is None or isinstance(base, Series)) and all(key.isdecimal() for key in over.items):
            return _merge_entries(base.items if base else (), over)
    return over


def _merge_entries(entries: tuple[Node, ...], over: Table) -> Node:
    merged = list(entries)
    for key, node in sorted(over.items.items(), key=lambda item: int(item[0])):
        index = int(key)
        if index > len(merged):
            return over  # stays a mapping, which the field that wanted a list refuses with its place
        if index == len(merged):
            merged.append(node)
        else:
            merged[index] = merge(merged[index], node)
    return Series(tuple(merged), over.where)


def walk(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Every node below and including `node`, with its dotted path."""
    yield path, node
    if isinstance(node, Table):
        for key, child in node.items.items():
            yield from walk(child, f"{path}.{key}" if path else key)
    elif isinstance(node, Series):
        for index, child in enumerate(node.items):
            yield from walk(child, f"{path}.{index}")
