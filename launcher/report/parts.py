"""parts: a table of numbers on a terminal that is narrower than it: several tables below each other, none cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_GAP = 2
"""Between columns; what rich puts there."""


def in_parts(left: Sequence[str], right: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[Table]:
    """Tables no wider than `width` columns, each beginning with the first column; one where everything has room.

    `left` and `right` are the headers of the columns in their order, aligned so; a row has a cell for each.
    """
    names = [*left, *right]
    widths = [max(len(name), *(len(row[at]) for row in rows), 0) for at, name in enumerate(names)]
    for columns in _fitting(widths, width):
        yield _table([(names[at], at >= len(left)) for at in columns], [[row[at] for at in columns] for row in rows])


def _fitting(widths: Sequence[int], width: int) -> Iterator[list[int]]:
    """Numbers of the columns of each part; a column that is too wide alone is alone."""
    part, used = [0], widths[0]
    for at in range(1, len(widths)):
        if len(part) > 1 and used + _GAP + widths[at] > width:
            yield part
            part, used = [0], widths[0]
        part.append(at)
        used += _GAP + widths[at]
    yield part


def _table(names: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in names:
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
