"""`launcher why`: one sentence, the line that shows it, one command."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.verbs.arguments import json_flag, print_json, run_argument, runs_option


@click.command(name="why")
@run_argument
@json_flag
@runs_option
def command(run: str, as_json: bool, parent: Path | None) -> None:
    """Say why a run waits, failed, stopped or is slow, what shows it, and what helps."""
    from launcher.runs.explanation import explain
    from launcher.runs.status import find_run

    found = explain(find_run(run, parent))
    if as_json:
        print_json(found.to_json())
        return
    from launcher.report.why import print_explanation

    print_explanation(found, click.echo)
    if found.command:
        click.echo(f"Next: {found.command}", err=True)
