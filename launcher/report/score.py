"""The error tables of `launcher score`, on a terminal or as Markdown for benchmarks/."""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.facts.learned import Learned

_HEAD = ("rows", "median error", "95 % within", "bias", "inside the interval")
_KEYS = ("median_abs_pct", "p95_abs_pct", "bias_pct", "in_interval_pct")
_NAMES = {"allocated": "peak allocated", "device": "whole device", "nvidia_smi": "nvidia-smi beside it"}

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Header and rows."""


def print_score(scored: Mapping[str, Any], *, markdown: bool = False, files: Sequence[str] = ()) -> None:
    """Print the summary of `planning.score`; Markdown names the command that writes it."""
    from rich.console import Console

    terminal = Console(highlight=False, soft_wrap=True)
    out = terminal if terminal.is_terminal else Console(highlight=False, soft_wrap=True, width=140)
    if markdown:
        for line in _markdown(scored, files):
            out.print(line, markup=False)
        return
    out.print(f"{scored['n']} rows, {scored['skipped']} skipped\n")
    for header, rows in _tables(scored):
        _print_table(out, header, rows)
    for line in _sentences(scored):
        out.print(line, markup=False)


def print_learned(
    learned: Learned, path: Path, outliers: Sequence[str], *, as_json: bool = False, dry_run: bool = False
) -> None:
    """What calibration found, and where the next plan finds it."""
    from rich.console import Console

    out = Console(highlight=False, soft_wrap=True)
    if as_json:
        out.print(
            json.dumps({"path": str(path), **asdict(learned), "outliers": list(outliers)}, indent=2), markup=False
        )
        return
    out.print(f"{learned.sentence}: time x {learned.step_factor:.2f}, memory x {learned.memory_factor:.2f}")
    for what, bandwidth in (("inside", learned.intra_node_bw_bytes_s), ("between", learned.inter_node_bw_bytes_s)):
        if bandwidth:
            out.print(f"bandwidth {what} nodes: {bandwidth / 1e9:.1f} GB/s per GPU")
    if outliers:
        out.print(f"left out, too far off to say anything: {', '.join(outliers)}", markup=False)
    out.print(f"{'would keep' if dry_run else 'kept'} in {path}; the next plan uses it")


def _print_table(out: Any, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table as RichTable

    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    out.print(table)
    out.print()


def _markdown(scored: Mapping[str, Any], files: Sequence[str]) -> Iterator[str]:
    names = " ".join(files)
    yield f"# Predicted against published: {dt.date.today().isoformat()}"
    yield ""
    yield f"Written by `launcher score {names} --markdown`. {scored['n']} rows, {scored['skipped']} skipped; measured"
    yield "numbers are those of the sources named in the file, predictions those of `launcher plan`'s formulas."
    for header, rows in _tables(scored):
        yield ""
        yield f"| {' | '.join(header)} |"
        yield "|---" * len(header) + "|"
        yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
    yield from (f"- {line}" for line in _sentences(scored))


def _tables(scored: Mapping[str, Any]) -> Iterator[Table]:
    rows = []
    for title, part in (("", scored), (", incomplete rows", scored["incomplete"])):
        rows += [_memory_row(f"{_NAMES[kind]}{title}", part["memory"][kind]) for kind in _NAMES]
    yield ("memory", *_HEAD), [row for row in rows if row[1] != "0"]
    speed: list[tuple[str, ...]] = []
    for title, part in (("complete rows", scored), ("incomplete rows", scored["incomplete"])):
        figures = part["speed"]
        speed.append((title, str(figures["n"]), _pct(figures["median_abs_pct"]), _pct(figures["within_25_pct"])))
    yield ("speed", "rows", "median error", "within 25 %"), speed
    for key, groups in scored["groups"].items():
        if groups:
            yield (
                (f"peak allocated, by {key}", *_HEAD),
                [_memory_row(name, figures) for name, figures in groups.items()],
            )


def _memory_row(title: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    return (title, str(figures["n"]), *(_pct(figures[key]) for key in _KEYS))


def _sentences(scored: Mapping[str, Any]) -> Iterator[str]:
    fit = scored["fit"]
    if fit["n"]:
        yield (
            f"fit: {fit['correct']} of {fit['n']} right ({100 * fit['correct'] / fit['n']:.1f} %), "
            f"{fit['false_fits']} said to fit that did not, {fit['false_ooms']} refused that ran"
        )
    for row in scored["rows"]:
        if row["predicted_fits"] is not None and bool(row["predicted_fits"]) != (row["outcome"] != "oom"):
            verdict = "said to fit, ran out of memory" if row["predicted_fits"] else "refused, and ran"
            yield (
                f"{verdict}: {row['id']}, {row['predicted_gib']:.1f} GiB expected of {row['usable_gib']:.1f} usable "
                f"({row['binding']})"
            )
    reasons = Counter(str(row["skipped"]).partition(". ")[0] for row in scored["rows"] if row["skipped"])
    for reason, count in reasons.most_common():
        yield f"skipped {count}: {reason}"


def _pct(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
