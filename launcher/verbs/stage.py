"""`launcher stage`: what a job will read, brought to where every node sees it."""

from __future__ import annotations

import shlex
import subprocess
import sys

import click

from launcher.verbs.arguments import (
    WITH_OVERRIDES,
    json_flag,
    override_arguments,
    print_json,
    read_overrides,
    recipe_argument,
    show_notices,
)


@click.command(name="stage", context_settings=WITH_OVERRIDES)
@recipe_argument
@override_arguments
@click.option("--copy", is_flag=True, help="Copy local folders and files into the cache, too.")
@click.option("--verify", is_flag=True, help="Read staged files again and compare every hash.")
@click.option("--dry-run", is_flag=True, help="List what would be fetched, with sizes; touch nothing.")
@json_flag
def command(recipe: str, overrides: tuple[str, ...], copy: bool, verify: bool, dry_run: bool, as_json: bool) -> None:
    """Bring model, tokenizer, template and data into the shared cache, so that jobs make no network call."""
    from launcher.recipe.shipped import find_recipe
    from launcher.report.staging import print_staging, progress
    from launcher.runs import staging

    _where_the_hub_client_is()
    wanted = staging.look(find_recipe(recipe), read_overrides(overrides), copy=copy, verify=verify)
    show_notices(wanted.notices)
    paths = None
    if not dry_run:
        with progress(sys.stderr) as shown:
            paths = staging.carry_out(wanted, shown)
    document = staging.to_json(wanted, paths)
    if as_json:
        print_json(document)
    else:
        print_staging(document)
    further = [] if paths is None else staging.copy_overrides(paths, wanted)
    click.echo(f"Next: launcher {shlex.join(['stage' if dry_run else 'submit', recipe, *further])}", err=True)


def _where_the_hub_client_is() -> None:
    """Go on in the train environment where this one has no hub client; this call then does not come back."""
    from launcher.facts.hub import available
    from launcher.facts.train_environment import environment, train_python

    if available() or train_python() == sys.executable:
        return
    done = subprocess.run([train_python(), "-m", "launcher.cli", *sys.argv[1:]], env=environment(), check=False)
    raise SystemExit(done.returncode)
