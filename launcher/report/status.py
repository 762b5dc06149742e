"""Status on a terminal: one table for many runs, one block for one; plain text where stdout is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.runs.status import RunStatus

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_STYLES = {
    "COMPLETED": "green",
    "RUNNING": "cyan",
    "COMPLETING": "cyan",
    "PENDING": "yellow",
    "CANCELLED": "magenta",
    "STOPPED": "magenta",
    "UNKNOWN": "yellow",
    "NOT_SUBMITTED": "dim",
}
_GIB = 2**30
_FILE_WIDTH = 4000
_WORDS_WIDTH = 30
"""Columns that WHAT needs at least."""


def print_status(states: Sequence[RunStatus], *, one: bool, console: Console | None = None) -> None:
    """Print one run in full, or a line per run."""
    if console is None:
        from rich.console import Console as TerminalConsole

        console = TerminalConsole(highlight=False)
        if not console.is_terminal:
            # A file or a pipe has no width; a cut line would hide the reason.
            console.width = _FILE_WIDTH
    if not states:
        console.print("no runs here; launcher submit RECIPE starts one")
        return
    if one:
        console.print(_block(states[0]))
        return
    room = console.width - console.measure(_table(states, words=False)).maximum
    console.print(_table(states, words=room >= _WORDS_WIDTH))
    if room < _WORDS_WIDTH:
        # Beside the numbers nobody could read the words, nor the numbers beside the words.
        for status in states:
            console.print(f"\n{status.run}: {_words(status)}", markup=False)


def _table(states: Sequence[RunStatus], *, words: bool) -> Table:
    """A line per run; `words`: with what is to be said of it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in (
        ("RUN", False),
        ("JOB", True),
        ("STATE", False),
        ("STEP", True),
        ("LOSS", True),
        ("TOK/S", True),
    ):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for name, right in (("PEAK", True), ("RESTARTS", True), ("LEFT", True)):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    if words:
        table.add_column("WHAT", overflow="fold")
    for status in states:
        cells = (
            status.run,
            status.job_id or "-",
            Text(status.state, style=_style(status)),
            steps(status),
            _loss(status),
            _rate(status),
            _peak(status),
            str(status.restarts),
            duration(status.eta_s),
        )
        table.add_row(*cells, *((Text(_words(status)),) if words else ()))
    return table


def _words(status: RunStatus) -> str:
    """What the run does, and what it warns of: the fact alone; `launcher status RUN` has the advice, too."""
    return "; ".join((status.sentence, *(f"warning: {said.partition(': ')[0]}" for said in status.warnings)))


def _block(status: RunStatus) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    block = Table.grid(padding=(0, 2))
    block.add_column(style="bold", no_wrap=True)
    block.add_column(overflow="fold")
    beat = "-" if status.heartbeat_s is None else f"{duration(max(0.0, time.time() - status.heartbeat_s))} ago"
    rows: dict[str, str | Text] = {
        "run": status.run,
        "state": Text.assemble((status.state, _style(status)), f"  {status.reason or ''}"),
        "what": status.sentence,
        "job": f"{status.job_id or '-'} ({status.cluster})  nodes {status.nodes or '-'}",
        "progress": f"step {steps(status)}  loss {_loss(status)}  {_rate(status)} tokens/s",
        "left": duration(status.eta_s),
        "memory": f"peak {_peak(status)} per rank",
        "restarts": str(status.restarts),
        "heartbeat": beat,
        "folder": status.path,
    }
    rows |= {f"warning{at or ''}": Text(said, style="yellow") for at, said in enumerate(status.warnings)}
    for name, value in rows.items():
        block.add_row(name, value if isinstance(value, Text) else Text(value.rstrip()))
    return block


def _style(status: RunStatus) -> str:
    return _STYLES.get(status.state, "red" if status.ended else "")


def steps(status: RunStatus) -> str:
    """`40/100`, `40` or `-`."""
    if status.step is None:
        return "-"
    return f"{status.step}/{status.total_steps}" if status.total_steps else str(status.step)


def _loss(status: RunStatus) -> str:
    return "-" if status.loss is None else f"{status.loss:.4f}"


def _rate(status: RunStatus) -> str:
    return "-" if status.tokens_per_s is None else f"{status.tokens_per_s:,.0f}"


def _peak(status: RunStatus) -> str:
    return "-" if not status.peak_bytes else f"{status.peak_bytes / _GIB:.2f} GiB"


def duration(seconds: float | None) -> str:
    """`45s`, `12m`, `3h05m`, `2d04h` or `-`."""
    if seconds is None:
        return "-"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if seconds < 60:
        return f"{seconds:.0f}s"
    if minutes < 60:
        return f"{minutes}m"
    return f"{hours}h{minutes % 60:02d}m" if hours < 24 else f"{hours // 24}d{hours % 24:02d}h"
