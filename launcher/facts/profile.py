"""Site profile: slurm/<site>.yaml as checked field values of Site.

Keys are the field names of Site; what a profile leaves out is probed. Values are read by the type of their field, so
`max_time_min: 24:00:00` is a day and `mem_bytes_per_node: 500G` is 500 GiB.
"""

from __future__ import annotations

import re
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, RecipeError, raise_all
from launcher.facts.learned import Learned
from launcher.facts.offer import Container, Partition, Site
from launcher.recipe.problems import Findings, nearest
from launcher.recipe.scalars import UnreadableError, read_minutes, read_scalar
from launcher.recipe.tree import Node, Scalar, Series, Table
from launcher.recipe.yaml_strict import parse

_LABELS = {"Partition": "a partition", "Qos": "a QOS", "FileSystem": "a file system"}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?")
_UNIT = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_CHOICES = {
    ("Site", "executor"): ("slurm", "local"),
    ("Site", "enforce_part_limits"): ("NO", "ANY", "ALL", None),
    ("Container", "runtime"): ("none", "pyxis", "apptainer"),
}
_MAY_BE_ZERO = frozenset(
    {
        *("intra_node_bw_bytes_s", "inter_node_bw_bytes_s", "step_error_pct", "memory_error_pct"),
        *("preempt_grace_s", "kill_wait_s", "free_bytes", "quota_bytes", "min_nodes", "max_jobs", "max_submit_jobs"),
        *("group_jobs", "group_submit_jobs"),
    }
)
_ZERO_IN_PARTITION = frozenset({"nodes", "gpus_per_node", "cpus_per_node", "mem_bytes_per_node"})
"""A partition without GPUs, or whose nodes are all gone."""


def read_profile(path: Path) -> dict[str, Any]:
    """Values of the Site fields that the profile sets.

    Raises:
        ClusterError: unreadable, not YAML, unknown keys or wrong values; every problem with file:line:column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path}: cannot be read: {error}") from error
    return {"name": path.stem} | _values(text, path, Site)


def read_learned(path: Path) -> Learned:
    """What calibration wrote.

    Raises:
        ClusterError: unreadable, unknown keys or wrong values, as for a profile.
    """
    try:
        values = _values(path.read_text(encoding="utf-8"), path, Learned)
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path}: cannot be read: {error}") from error
    if "runs" not in values:
        raise ClusterError(f"{path}: runs is missing; run `launcher score --calibrate` again or delete the file")
    return Learned(**values)


def _values(text: str, path: Path, kind: type[Any]) -> dict[str, Any]:
    findings = Findings()
    try:
        table = parse(text, str(path), findings)
        findings.settle()
    except RecipeError as error:
        raise ClusterError(*error.problems) from None
    problems: list[str] = []
    values = _read_table(table, kind, problems)
    raise_all(ClusterError, problems)
    return values


def parse_bytes(text: str) -> int | None:
    """Bytes of `64G`, `500GiB`, `1.5T` or a plain number; None when it is none of these."""
    match = _BYTES.fullmatch(text.strip())
    return int(float(match[1]) * _UNIT[match[2]]) if match else None


def _read_table(table: Table, kind: type[Any], problems: list[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    known = [
        field.name for field in fields(kind) if field.name not in ("source", "learned", "nodes_up", "nodes_silent")
    ]
    values: dict[str, Any] = {}
    for key, node in table.items.items():
        if key not in known:
            close = nearest(key, known)
            hint = f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"
            problems.append(f"{table.place(key)}: unknown key {key!r}{hint}")
            continue
        before = len(problems)
        value = _read(node, key, hints[key], problems, zero=_may_be_zero(kind, key))
        choices = _CHOICES.get((kind.__name__, key))
        if choices and len(problems) == before and value not in choices:
            problems.append(f"{node.where}: {key} is {value!r}; expected {' or '.join(filter(None, choices))}")
        values[key] = value
    return values


def _may_be_zero(kind: type[Any], key: str) -> bool:
    return key in _MAY_BE_ZERO or (kind is Partition and key in _ZERO_IN_PARTITION)


def _read(node: Node, key: str, hint: Any, problems: list[str], *, zero: bool = False) -> Any:
    """One value by the type of its field; problems are noted, and None returned."""
    if hint is Container:
        return _section(node, Container, problems)
    series = next((part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is tuple), None)
    if series is not None:
        return _series(node, typing.get_args(series)[0], key, problems)
    if typing.get_origin(hint) is dict:
        return _texts(node, key, problems)
    if not isinstance(node, Scalar):
        problems.append(f"{node.where}: {key} is a single value")
        return None
    return _scalar(node, key, hint, problems, zero=zero)


def _section(node: Node, kind: type[Any], problems: list[str]) -> Any:
    if not isinstance(node, Table):
        problems.append(f"{node.where}: a mapping is expected here")
        return None
    before = len(problems)
    values = _read_table(node, kind, problems)
    needed = [field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]
    problems += [f"{node.where}: {_LABELS[kind.__name__]} needs a {name}" for name in needed if name not in values]
    return kind(**values) if len(problems) == before else None


def _series(node: Node, kind: Any, key: str, problems: list[str]) -> tuple[Any, ...]:
    if not isinstance(node, Series):
        problems.append(f"{node.where}: {key} is a list")
        return ()
    if isinstance(kind, type) and is_dataclass(kind):
        return tuple(_section(item, kind, problems) for item in node.items)
    return tuple(_read(item, key, kind, problems) for item in node.items)


def _texts(node: Node, key: str, problems: list[str]) -> dict[str, str]:
    if not isinstance(node, Table):
        problems.append(f"{node.where}: {key} is a mapping of names to texts")
        return {}
    return {name: _read(child, f"{key}.{name}", str, problems) for name, child in node.items.items()}


def _scalar(node: Scalar, key: str, hint: Any, problems: list[str], *, zero: bool) -> Any:
    if not node.text.isprintable():
        problems.append(f"{node.where}: {key} holds a control character; write one line per list entry")
        return None
    if node.text.lower() in ("", "null", "~") and not node.quoted and type(None) in typing.get_args(hint):
        return None
    try:
        value = _value(node, key, hint)
    except UnreadableError as error:
        problems.append(f"{node.where}: {key} is {node.text!r}; {error}")
        return None
    wanted = tuple(kind for kind in (typing.get_args(hint) or (hint,)) if isinstance(kind, type))
    fits = isinstance(value, wanted) and (bool in wanted or not isinstance(value, bool))
    if not fits:
        expected = "a whole number" if int in wanted else "true or false" if bool in wanted else "another kind of value"
        problems.append(f"{node.where}: {key} is {node.text!r}; expected {expected}")
    elif isinstance(value, int | float) and not isinstance(value, bool) and value <= 0 and not (zero and value == 0):
        problems.append(f"{node.where}: {key} is {node.text!r}; expected {'0 or more' if zero else 'more than 0'}")
    return value


def _value(node: Scalar, key: str, hint: Any) -> Any:
    if key.endswith("_min"):
        return read_minutes(node.text)
    if key.endswith(("_bytes", "bytes_per_node")):
        size = parse_bytes(node.text)
        if size is None:
            raise UnreadableError("expected a size such as 64G or 2T")
        return size
    return node.text if hint is str else read_scalar(node.text, quoted=node.quoted, hint=hint)
