"""A traced step beside the closed form, for `plan --trace`: on a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.planning.trace import Compared, Trace
from launcher.report.text import gib

if TYPE_CHECKING:
    from rich.console import Console


def trace_to_json(trace: Trace, compared: Sequence[Compared]) -> dict[str, Any]:
    """What `plan --trace --json` adds under `trace`: bytes and shares, plain values only."""
    return {
        "layers": trace.layers,
        "weights_bytes": trace.weights_bytes,
        "moments": {
            moment.name: {"start_bytes": moment.start_bytes, "peak_bytes": moment.peak_bytes}
            for moment in trace.moments
        },
        "compared": [
            {
                "moment": each.moment,
                "traced_bytes": each.traced_bytes,
                "formula_bytes": each.formula_bytes,
                "error": each.error,
            }
            for each in compared
        ],
        "seconds": trace.seconds,
        "torch": trace.torch,
        "transformers": trace.transformers,
    }


def print_trace(trace: Trace, compared: Sequence[Compared], *, console: Console | None = None) -> None:
    """Print both sides of every moment and how far they are apart."""
    from rich.console import Console
    from rich.table import Table

    out = console or Console(highlight=False, soft_wrap=True)
    table = Table(title="Traced on fake tensors", title_justify="left", box=None, pad_edge=False, header_style="dim")
    for name in ("  MOMENT", "TRACED", "CLOSED FORM", "DIFFERENCE"):
        table.add_column(name, justify="left" if name == "  MOMENT" else "right", no_wrap=True)
    for each in compared:
        table.add_row(f"  {each.moment}", gib(each.traced_bytes), gib(each.formula_bytes), f"{each.error:+.1%}")
    out.print()
    out.print(table)
    out.print(
        f"  per rank and micro-batch, without weights, gradients and buffers; {trace.layers} layers, "
        f"{trace.seconds:.1f} s, torch {trace.torch}, transformers {trace.transformers}"
    )
