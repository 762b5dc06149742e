"""`launcher report`: one run as one page."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.verbs.arguments import json_flag, print_json, run_argument, runs_option


@click.command(name="report")
@run_argument
@click.option("--html", type=click.Path(path_type=Path), help="File to write [RUN/report.html].")
@click.option("--dry-run", is_flag=True, help="Say where the page would be; write nothing.")
@json_flag
@runs_option
def command(run: str, html: Path | None, dry_run: bool, as_json: bool, parent: Path | None) -> None:
    """Write a run as one self-contained HTML page: curves, predictions, attempts, diagnosis, lineage, next steps.

    No network is needed to open it. With --json, what the page says is printed instead, unless --html is given, too.
    """
    from launcher.errors import RecipeError
    from launcher.report.run_page import RunPage, write_run
    from launcher.runs.registry import run_of
    from launcher.runs.status import find_run

    folder = find_run(run_of(run, parent), parent)
    target = html or folder.path / "report.html"
    if not target.parent.is_dir():
        raise RecipeError(f"--html: {target.parent} is no folder")
    page = RunPage.of(folder)
    if (html is not None or not as_json) and not dry_run:
        write_run(page, target)
    if as_json:
        print_json(page.to_json())
    else:
        click.echo(f"{'would write ' if dry_run else ''}{target}")
    click.echo(f"Next: {' · '.join(page.next_steps())}", err=True)
