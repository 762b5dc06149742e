"""The error table of `launcher score`, on a terminal or as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def print_score(scored: Mapping[str, Any], *, markdown: bool = False, files: Sequence[str] = ()) -> None:
    """Print the summary; Markdown is what benchmarks/ keeps."""
    from rich.console import Console

    out = Console(highlight=False, soft_wrap=True)
    for line in _lines(scored, files):
        out.print(line if markdown else line.replace("|", " "), markup=False)


def _lines(scored: Mapping[str, Any], files: Sequence[str]) -> list[str]:
    fit = scored["fit"]
    lines = [f"{scored['n']} rows of {', '.join(files)}, {scored['skipped']} skipped", ""]
    lines += ["| what | rows | median error | 95 % within | bias | inside the interval |", "|---|---|---|---|---|---|"]
    for title, part in (("", scored), (", incomplete rows", scored["incomplete"])):
        lines += [
            _memory_line(f"{kind}{title}", part["memory"][kind]) for kind in ("allocated", "device", "nvidia_smi")
        ]
    lines += ["", "| what | rows | median error | within 25 % |", "|---|---|---|---|"]
    for title, part in (("speed", scored), ("speed, incomplete rows", scored["incomplete"])):
        speed = part["speed"]
        lines.append(f"| {title} | {speed['n']} | {_pct(speed['median_abs_pct'])} | {_pct(speed['within_25_pct'])} |")
    share = 100 * fit["correct"] / fit["n"] if fit["n"] else None
    lines += ["", f"fit: {fit['correct']} of {fit['n']} right ({_pct(share)}), "]
    lines[-1] += f"{fit['false_fits']} said to fit that did not, {fit['false_ooms']} refused that ran"
    return lines + _skipped(scored["rows"])


def _memory_line(title: str, figures: Mapping[str, Any]) -> str:
    values = [_pct(figures[key]) for key in ("median_abs_pct", "p95_abs_pct", "bias_pct", "in_interval_pct")]
    return f"| {title} | {figures['n']} | " + " | ".join(values) + " |"


def _skipped(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    reasons = Counter(row["skipped"] for row in rows if row["skipped"])
    return [f"skipped {count}: {reason}" for reason, count in reasons.most_common()]


def _pct(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
