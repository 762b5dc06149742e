"""`launcher sync`: offline W&B records, sent from a node that has network."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from launcher.verbs.arguments import run_argument, runs_option


@click.command(name="sync")
@run_argument
@click.option("--dry-run", is_flag=True, help="Print the command that would run.")
@runs_option
def command(run: str, dry_run: bool, parent: Path | None) -> None:
    """Send a run's offline Weights & Biases records; all attempts become one run there."""
    from launcher.runs import wandb_sync
    from launcher.runs.status import find_run

    folder = find_run(run, parent)
    if dry_run:
        click.echo(shlex.join(wandb_sync.command(folder)))
        return
    click.echo(wandb_sync.send(folder))
    click.echo(f"Next: launcher status {folder.run_id}", err=True)
