"""Tables of numbers on narrow terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from launcher.report.parts import in_parts

LEFT, RIGHT = ["NAME", "METHOD"], ["LOSS", "TIME", "A LONG HEADER", "TOKENS"]
ROWS = [["lora-r16", "lora", "5.3706", "91 s", "x", "122,688"], ["full", "full", "5.4", "2 min", "", ""]]


def shown(width: int, rows: list[list[str]] | None = None) -> str:
    text = io.StringIO()
    for part in in_parts(LEFT, RIGHT, rows or ROWS, width):
        Console(file=text, width=width).print(part)
    return text.getvalue()


@pytest.mark.parametrize("width", [23, 25, 30, 40, 60, 200])
def test_nothing_is_cut(width: int) -> None:
    """Every cell is there once, names in every part; no line is wider than the terminal."""
    text = shown(width)
    assert "\u2026" not in text and max(map(len, text.splitlines())) <= width
    for cell in ("5.3706", "91 s", "122,688", "2 min", "A LONG HEADER"):
        assert text.count(cell) == 1
    assert text.count("lora-r16") == text.count("NAME")


def test_a_wide_terminal_shows_one_table() -> None:
    """And brackets in a user's name are not markup."""
    assert shown(200).count("NAME") == 1
    assert "[red]" in shown(200, [["[red]", *ROWS[0][1:]]])
