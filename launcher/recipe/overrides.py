"""`train.learning_rate=1e-4` on the command line: a small tree laid over the file's."""

from __future__ import annotations

from launcher.errors import RecipeError
from launcher.recipe.aliases import apply_aliases
from launcher.recipe.forbidden import control_character, has_secret, without_forbidden
from launcher.recipe.problems import Findings
from launcher.recipe.tree import Node, Table, Where, merge
from launcher.recipe.yaml_strict import parse_value


def apply_overrides(tree: Table, overrides: tuple[str, ...], findings: Findings) -> Table:
    """`tree` with every `k=v` laid over it, in order; problems name the override they came from."""
    for text in overrides:
        over = _override(text, findings)
        if over is not None:
            merged = merge(tree, apply_aliases(over, findings))
            tree = merged if isinstance(merged, Table) else tree
    return tree


def _override(text: str, findings: Findings) -> Table | None:
    key, equals, value = text.removeprefix("--").partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys) or control_character(key):
        shown = key if control_character(key) is None else ascii(key)
        message = "expected key=value with a dotted key, such as train.learning_rate=1e-4"
        findings.refuse(Where(f"override {shown!r}"), message)
        return None
    where = _where(key, value)
    try:
        node: Node | None = without_forbidden(parse_value(value, where, findings), findings, key)
    except RecipeError as error:
        findings.refuse(where, str(error).removeprefix(f"{where}: "))
        return None
    return None if node is None else _chain(keys, node, where)


def _where(key: str, value: str) -> Where:
    """The override as the user typed it, without its value where that may be a secret or garble the terminal."""
    if control_character(value) is not None or _may_hold_secret(key, value):
        value = "…"
    return Where(f"override '{key}={value}'")


def _may_hold_secret(key: str, value: str) -> bool:
    try:
        return has_secret(parse_value(value, Where("override"), Findings()), key)
    except RecipeError:
        return True


def _chain(keys: list[str], node: Node, where: Where) -> Table:
    for key in reversed(keys):
        node = Table({key: node}, where, {key: where})
    if not isinstance(node, Table):
        raise TypeError("an override has at least one key")
    return node
