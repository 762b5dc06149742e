"""The profile of a surveyed site: YAML in which every entry says where it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any

from launcher.facts.offer import Site
from launcher.facts.survey import Survey
from launcher.recipe.scalars import format_minutes

_PLAIN = re.compile(r"[A-Za-z0-9_$/.][A-Za-z0-9_$/.@+-]*")
_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "none", "nan", "inf"})
_GIB, _MIB = 2**30, 2**20
_WIDEST_COMMENT = 100


def profile_text(found: Survey, site: str, date: str) -> str:
    """The file `launcher init` writes: values in the order of Site's fields, then what is not known."""
    lines = [
        f"# {site}: what `launcher init` found on {date}. Entries say where they come from; correct what is not so.",
        "# Free space, quotas and account_limits are those of the user who asked; venv, setup and env are left to",
        "# whoever runs the jobs.",
    ]
    order = [field.name for field in fields(Site)]
    for key in sorted(found.values, key=order.index):
        lines += _entry(key, found.values[key], f"{found.sources[key]}, {date}")
    if found.unknown:
        lines += ["", "# Not known:"]
        lines += [f"# {key}: {_one_line(how)}" for key, how in sorted(found.unknown.items())]
    return "\n".join(lines) + "\n"


def profile_json(found: Survey, site: str, text: str, path: str | None) -> dict[str, Any]:
    """What `--json` prints: the same, for programs."""
    values = {key: _jsonable(value) for key, value in found.values.items()}
    return {
        "schema": 1,
        "site": site,
        "path": path,
        "values": values,
        "sources": dict(sorted(found.sources.items())),
        "unknown": dict(sorted(found.unknown.items())),
        "profile": text,
    }


def _jsonable(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return [_jsonable(each) for each in value] if isinstance(value, tuple) else value


def _entry(key: str, value: Any, source: str) -> Iterator[str]:
    comment = f"# {_one_line(source)}"
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        yield ""
        yield comment
        yield f"{key}:"
        for one in value:
            yield from _item(one)
        return
    line = f"{key}: {_value(key, value)}"
    if len(line) + len(comment) > _WIDEST_COMMENT:
        yield comment
        yield line
    else:
        yield f"{line}  {comment}"


def _item(one: Any) -> Iterator[str]:
    """One partition, QOS, account or file system; what has its default is left out."""
    lead = "  - "
    for field in fields(one):
        value = getattr(one, field.name)
        first = field.default is MISSING or lead == "  - "
        if value == field.default and not first:
            continue
        yield f"{lead}{field.name}: {_value(field.name, value)}"
        lead = "    "


def _value(key: str, value: Any) -> str:
    """A value as the profile's reader wants it: times and sizes as people write them."""
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return f"[{', '.join(_scalar(each) for each in value)}]"
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    if key.endswith("_min"):
        return format_minutes(value)
    if key.endswith(("_bytes", "bytes_per_node")):
        return _size(value, exact=not key.endswith("_bytes"))
    return _scalar(value)


def _size(value: int, *, exact: bool) -> str:
    """Whole GiB or MiB: where nothing is lost, or (free space changes by the minute) rounded down."""
    for unit, letter in ((_GIB, "G"), (_MIB, "M")):
        if value >= unit and (value % unit == 0 or not exact):
            return f"{value // unit}{letter}"
    return str(value)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return str(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS and not text[0].isdigit():
        return text
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
