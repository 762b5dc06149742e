"""`launcher adapters`: which adapters there are, what they are called, and how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.verbs.arguments import json_flag, print_json, run_argument, runs_option

if TYPE_CHECKING:
    from launcher.runs.registry import Entry


@click.group(name="adapters", invoke_without_command=True)
@json_flag
@runs_option
@click.pass_context
def command(context: click.Context, as_json: bool, parent: Path | None) -> None:
    """List the adapters of finished runs; tag and diff them."""
    if context.invoked_subcommand is not None:
        return
    from launcher.runs.registry import list_adapters

    found = list_adapters(parent)
    if as_json:
        print_json({"schema": 1, "adapters": [one.to_json() for one in found]})
        return
    if not found:
        click.echo("no adapters here; a finished LoRA run leaves one", err=True)
        return
    _table(found)
    click.echo("Next: launcher adapters diff ONE OTHER · launcher adapters tag RUN NAME", err=True)


def _table(found: list[Entry]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("RUN", "TAGS", "METHOD", "RANK", "BASE", "STEP", "VALIDATION", "RETENTION", "MB"):
        table.add_column(name, justify="left" if name in ("RUN", "TAGS", "METHOD", "BASE") else "right")
    for one in found:
        losses = [f"{loss:.4f}" if loss is not None else "" for loss in (one.validation_loss, one.retention_loss)]
        base = f"{one.base or ''}{f' @ {one.base_revision[:8]}' if one.base_revision else ''}"
        table.add_row(one.run, ", ".join(one.tags), one.method or "", str(one.rank or ""), base, str(one.step or ""),
                      *losses, f"{one.bytes / 1e6:.1f}")  # fmt: skip
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 400
    console.print(table)


@command.command(name="tag")
@run_argument
@click.argument("name")
@click.option("--move", is_flag=True, help="Take the tag from the run that has it.")
@click.option("--dry-run", is_flag=True, help="Check; write nothing.")
@runs_option
def tag_adapter(run: str, name: str, move: bool, dry_run: bool, parent: Path | None) -> None:
    """Give a run's adapter a name."""
    from launcher.runs.registry import find_entry, tag

    entry = find_entry(run, parent) if dry_run else tag(run, name, parent, move=move)
    click.echo(f"{'would tag' if dry_run else 'tagged'} {entry.run} as {name}")


@command.command(name="diff")
@click.argument("one")
@click.argument("other")
@json_flag
@runs_option
def diff_adapters(one: str, other: str, as_json: bool, parent: Path | None) -> None:
    """Show what differs between two adapters (runs or tags): origin, shape, plan and losses."""
    from launcher.runs.registry import diff, find_entry

    left, right = find_entry(one, parent), find_entry(other, parent)
    found = diff(left, right)
    if as_json:
        print_json({"schema": 1, "one": left.run, "other": right.run, "different": found})
        return
    click.echo(f"{'':28}  {left.run:32}  {right.run}")
    for key, (a, b) in found.items():
        click.echo(f"{key:28}  {a!s:32.32}  {b!s:.60}")
    if not found:
        click.echo("nothing differs")
