"""Watching a run of this machine until it ends."""

from __future__ import annotations

import click

from launcher.runs.folder import RunFolder


def watch(run: RunFolder) -> None:
    """Show a local run until it ends; Ctrl-C cancels it.

    Raises:
        JobFailedError: it ended without a result.
    """
    from launcher.runs import status as runs

    try:
        for line in runs.follow_logs(run, rank=0, follow=True):
            click.echo(line, err=True)
        ended = runs.wait(run)
    except KeyboardInterrupt:
        runs.cancel(run)
        click.echo(f"cancelled {run.run_id}", err=True)
        raise
    click.echo(ended.sentence, err=True)
    click.echo(f"Next: launcher status {run.run_id}", err=True)
