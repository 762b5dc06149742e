"""What may stand in no recipe value: control characters, interpolation and secrets.

Values travel to sbatch lines, JSON files, logs and trackers. sbatch's own parser honours a backslash
inside quotes, so quoting is no defence against a newline: every control character is refused instead.
"""

from __future__ import annotations

import re
import unicodedata

from launcher.recipe.problems import Findings
from launcher.recipe.tree import Node, Scalar, Series, Table, Where, walk

_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Control characters, lone surrogates, line and paragraph separators."""
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Direction overrides: text that reads differently from what it does."""

_TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16}"
    r"|wandb_v\d_\w{16,}|local-[0-9a-f]{40}|xox[abp]-[A-Za-z0-9-]{10,})"
    r"|://[^/\s:@]+:[^/\s@]+@"
)
"""Shapes of well-known access tokens, and user:password@ in an address."""
_SECRET_KEY = re.compile(r"(?i)(^|[_-])(api[_-]?key|key|token|secret|password|passwd|credentials?)$")
_HEX40 = re.compile(r"[0-9a-fA-F]{40}")
"""A W&B key; also a commit hash, which only a `revision` may hold."""


def control_character(text: str) -> str | None:
    """The first forbidden character of `text`, as `U+000A`, or None."""
    for character in text:
        if unicodedata.category(character) in _CATEGORIES or character in _BIDI:
            return f"U+{ord(character):04X}"
    return None


def is_secret(path: str, text: str) -> bool:
    """Whether the value `text` of field `path` looks like an access token or a password."""
    key = path.rpartition(".")[2]
    if _TOKEN.search(text) or (_HEX40.fullmatch(text) and "revision" not in key):
        return True
    return bool(_SECRET_KEY.search(key)) and text.strip().lower() not in ("", "null", "~", "true", "false")


def refuse_raw_characters(text: str, origin: str, findings: Findings) -> None:
    """Refuse control characters anywhere in the file, comments included: YAML takes some as line ends."""
    for number, line in enumerate(text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n"), start=1):
        found = control_character(line.replace("\t", " "))
        if found:
            column = 1 + next(i for i, c in enumerate(line) if c != "\t" and control_character(c))
            findings.refuse(Where(origin, number, column), f"control character {found} is not allowed in a recipe")


def without_forbidden(node: Node, findings: Findings, path: str = "") -> Node | None:
    """`node` without its forbidden values, each of which becomes a problem that never shows a secret."""
    if isinstance(node, Scalar):
        return None if _refuse_scalar(node, path, findings) else node
    if isinstance(node, Series):
        kept = (without_forbidden(child, findings, f"{path}.{i}") for i, child in enumerate(node.items))
        return Series(tuple(child for child in kept if child is not None), node.where)
    items: dict[str, Node] = {}
    for key, child in node.items.items():
        below = f"{path}.{key}" if path else key
        found = control_character(key)
        if found:
            findings.refuse(node.place(key), f"control character {found} in a key")
            continue
        clean = without_forbidden(child, findings, below)
        if clean is not None:
            items[key] = clean
    return Table(items, node.where, node.places)


def _refuse_scalar(node: Scalar, path: str, findings: Findings) -> bool:
    found = control_character(node.text)
    if is_secret(path, node.text):
        problem = "looks like a secret; keep it out of recipes (WANDB_API_KEY, HF_TOKEN or ~/.netrc hold it)"
    elif found:
        problem = f"control character {found} is not allowed in a value"
    elif "${" in node.text:
        problem = "${…} is not filled in; write the value out"
    elif node.text == "???":
        problem = "??? is a placeholder; write the value"
    else:
        return False
    findings.refuse(node.where, problem, path=path)
    return True


def has_secret(node: Node, path: str) -> bool:
    """Whether any value below `node` looks like a secret."""
    return any(isinstance(child, Scalar) and is_secret(below, child.text) for below, child in walk(node, path))
