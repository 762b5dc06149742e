"""A comparison of runs: tables on a terminal, and one self-contained page (templates/compare.html.j2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import __version__
from launcher.report.numbers import bytes_, count, loss, money, percent, seconds
from launcher.report.pages import environment
from launcher.runs.comparison import Comparison
from launcher.runs.run_facts import Against, Quality, RunFacts

if TYPE_CHECKING:
    from rich.console import Console

_FILE_WIDTH = 200
UNITS: dict[str, Callable[[float | None], str]] = {
    "bytes": bytes_,
    "s": seconds,
    "tokens/s": count,
    "steps": count,
    "h": lambda value: count(value, digits=2),
    "money": money,
}
"""How a number of each unit is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measure of all runs."""

    name: str
    cells: tuple[str, ...]
    group: str


def rows(comparison: Comparison) -> list[Row]:
    """Every measure, grouped; measures that no run has are left out."""
    found: list[Row] = []
    for group, measures in _MEASURES.items():
        for name, told in measures.items():
            cells = tuple(told(run) for run in comparison.runs)
            if any(cell != "-" for cell in cells):
                found.append(Row(name=name, cells=cells, group=group))
    return found + [_against_row(name, comparison.runs) for name in _against_names(comparison.runs)]


def _best(quality: Quality) -> str:
    return "-" if quality.best is None else f"{loss(quality.best)} (step {quality.best_step})"


def _retention(run: RunFacts) -> str:
    if run.retention_rise is None:
        return "-"
    over = run.retention_rise > run.retention_limit
    return f"{percent(run.retention_rise)}{f' (limit {percent(run.retention_limit)})' if over else ''}"


def _rank(run: RunFacts) -> str:
    return f"{run.method or '-'}{f' r={run.lora_r}' if run.lora_r else ''}"


_MEASURES: dict[str, dict[str, Callable[[RunFacts], str]]] = {
    "what": {
        "base": lambda run: run.base or "-",
        "method": _rank,
        "learning rate": lambda run: "-" if run.learning_rate is None else f"{run.learning_rate:.3g}",
        "steps": lambda run: count(run.step),
    },
    "quality": {
        "validation loss, base": lambda run: loss(run.validation.base),
        "validation loss, best": lambda run: _best(run.validation),
        "validation loss, last": lambda run: loss(run.validation.last),
        "perplexity, last": lambda run: loss(run.validation.perplexity, digits=2),
    },
    "retention": {
        "retention loss, base": lambda run: loss(run.retention.base),
        "retention loss, last": lambda run: loss(run.retention.last),
        "retention perplexity": _retention,
    },
    "took": {
        "wall time": lambda run: seconds(run.wall_s),
        "GPU-hours": lambda run: count(run.gpu_hours, digits=2),
        "cost": lambda run: money(run.cost),
        "peak GPU memory": lambda run: bytes_(run.peak_bytes),
        "peak host memory": lambda run: bytes_(run.host_peak_bytes),
        "size of the result": lambda run: bytes_(run.artifact_bytes),
        "restarts": lambda run: count(run.restarts),
    },
}


def _against_names(runs: Sequence[RunFacts]) -> list[str]:
    """What at least one run both predicted and measured."""
    return list(dict.fromkeys(one.name for run in runs for one in run.against if one.error is not None))


def _against_row(name: str, runs: Sequence[RunFacts]) -> Row:
    found = [next((one for one in run.against if one.name == name), None) for run in runs]
    return Row(name=name, cells=tuple(against_words(one) for one in found), group="predicted and measured")


def against_words(one: Against | None) -> str:
    """Such as: 12.0 GiB, measured 11.5 GiB (+4 %)."""
    if one is None or one.error is None:
        return "-"
    said = UNITS[one.unit]
    return f"{said(one.predicted)}, measured {said(one.measured)} ({percent(one.error)})"


def pair_words(comparison: Comparison) -> list[dict[str, str]]:
    """Every pair as words."""
    return [
        {
            "pair": f"{pair.one} against {pair.other}",
            "wins": f"{pair.wins} won, {pair.losses} lost, {pair.ties} tied of {pair.rows}",
            "difference": f"{pair.difference:+.4f} ({pair.low:+.4f} to {pair.high:+.4f})",
            "better": pair.better or "may be chance",
        }
        for pair in comparison.pairs
    ]


# ---------------------------------------------------------------- terminal


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print tables, notes, the verdict and the answers to stdout."""
    from rich.console import Console as Terminal
    from rich.markup import escape
    from rich.table import Table

    out = console or Terminal(highlight=False)
    if console is None and not out.is_terminal:
        out.width = _FILE_WIDTH
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", *(run.run for run in comparison.runs)):
        table.add_column(name, overflow="fold")
    group = ""
    for row in rows(comparison):
        if row.group not in ("what", group):
            table.add_row()
        group = row.group
        prefix = "plan: " if group == "predicted and measured" else ""
        table.add_row(f"{prefix}{row.name}", *(escape(cell) for cell in row.cells))
    out.print(table)
    if comparison.pairs:
        out.print(_pairs_table(comparison))
    out.print(f"\n{comparison.verdict}", markup=False)
    for note in comparison.notes:
        out.print(f"note: {note}", markup=False, style="yellow")
    for at, asked in enumerate(comparison.generations, start=1):
        out.print(f"\nprompt {at}", style="bold")
        _print_answers(out, asked)


def _pairs_table(comparison: Comparison) -> Any:
    from rich.table import Table

    level = comparison.pairs[0].level
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("\nROWS", "\nWON", f"\nNATS PER TOKEN ({level:.1%} INTERVAL)", "\nBETTER"):
        table.add_column(name, overflow="fold")
    for pair in pair_words(comparison):
        table.add_row(pair["pair"], pair["wins"], pair["difference"], pair["better"])
    return table


def _print_answers(out: Console, asked: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    told = {"": asked["prompt"], **({"the data": asked["reference"]} if asked["reference"] else {}), **asked["answers"]}
    for name, text in told.items():
        table.add_row(name, Text(text.strip() or "(nothing)"))
    out.print(table)


# ---------------------------------------------------------------- page


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the page to `path`, whose folder must exist, and return it."""
    path.write_text(render_comparison(comparison), encoding="utf-8")
    return path


def render_comparison(comparison: Comparison) -> str:
    """The page as text."""
    told = rows(comparison)
    groups = list(dict.fromkeys(row.group for row in told))
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            comparison=comparison,
            groups=[(group, [row for row in told if row.group == group]) for group in groups],
            pairs=pair_words(comparison),
            bars=[_bar(pair) for pair in comparison.pairs],
            version=__version__,
        )
    )


def _bar(pair: Any) -> dict[str, float]:
    """Shares of rows won, tied and lost, in percent."""
    return {kind: round(100 * getattr(pair, kind) / pair.rows, 2) for kind in ("wins", "ties", "losses")}
