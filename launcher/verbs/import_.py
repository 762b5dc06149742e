"""`launcher import`: another tool's configuration becomes a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.verbs.arguments import json_flag, print_json

if TYPE_CHECKING:
    from launcher.recipe.foreign.convert import Converted


@click.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--tool", type=click.Choice(["axolotl", "llama-factory", "trl", "torchtune"]), help="Whose file it is [recognised]."
)
@click.option("--gpus", type=click.IntRange(1), help="GPUs it was trained on [what the file says, else 1].")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the recipe here instead of to stdout.")
@click.option("--dry-run", is_flag=True, help="With -o: write nothing.")
@json_flag
def command(file: Path, tool: str | None, gpus: int | None, output: Path | None, dry_run: bool, as_json: bool) -> None:
    """Convert an Axolotl, LLaMA-Factory, TRL or torchtune config; list what could not be carried over."""
    from launcher.errors import ConflictError
    from launcher.recipe.foreign.convert import convert_file
    from launcher.recipe.foreign.draft import SWITCHED_OFF
    from launcher.recipe.foreign.telling import line, shown
    from launcher.runs.folder import write_atomic

    made = convert_file(file, tool=tool, gpus=gpus)
    if output is not None and not dry_run:
        if output.exists():
            raise ConflictError(f"{output} exists already; choose another name, or move it away")
        write_atomic(output, made.text)
    if as_json:
        print_json(_json(made))
        return
    if output is None:
        click.echo(made.text, nl=False)
    for note in made.notes:
        click.echo(f"note: {note}", err=True)
    lost = [one for one in made.left_out if one.why != SWITCHED_OFF]
    for one in lost:
        click.echo(f"not carried over: {shown(one.key)}: {shown(one.value)} ({one.why})", err=True)
    off = [one.key for one in made.left_out if one not in lost]
    if off:
        click.echo(f"nothing to carry (empty or switched off): {line(', '.join(off))}", err=True)
    click.echo(f"Next: launcher plan {output or 'RECIPE'}", err=True)


def _json(made: Converted) -> dict[str, Any]:
    """Every key of the file with what became of it."""
    return {
        "schema": 1,
        "tool": made.tool,
        "recipe": made.text,
        "carried": [{"key": one.key, "value": one.value, "field": one.field} for one in made.carried],
        "left_out": [{"key": one.key, "value": one.value, "why": one.why} for one in made.left_out],
        "notes": list(made.notes),
    }
