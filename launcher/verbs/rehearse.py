"""`launcher rehearse`: the whole life of a run in minutes, before the queue."""

from __future__ import annotations

import click

from launcher.verbs.arguments import (
    WITH_OVERRIDES,
    json_flag,
    override_arguments,
    print_json,
    read_overrides,
    recipe_argument,
)


@click.command("rehearse", context_settings=WITH_OVERRIDES)
@recipe_argument
@override_arguments
@click.option("--slurm", is_flag=True, help="As a small job of the recipe's partition and account, without GPUs.")
@click.option("--ranks", type=int, help="CPU ranks, 1 to 4 [2, or 1 for a job of one rank].")
@click.option("--keep", is_flag=True, help="Keep the rehearsal's folder; after a failure it always stays.")
@click.option("--dry-run", is_flag=True, help="Print the job that would be rehearsed; touch nothing.")
@json_flag
@click.pass_context
def command(
    context: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    slurm: bool,
    ranks: int | None,
    keep: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run the recipe's job with a tiny random model on CPU ranks: steps, save, kill, resume, export.

    A verdict per stage; what could not be exercised is listed. Exit 0 only if every exercised stage went well.
    """
    from launcher.recipe.shipped import find_recipe
    from launcher.report.rehearsal import print_ending, verdict_line
    from launcher.runs import rehearsal

    path, asked = find_recipe(recipe), read_overrides(overrides)
    if dry_run:
        print_json(rehearsal.preview(path, asked, slurm=slurm, ranks=ranks))
        return
    done = rehearsal.rehearse(
        path,
        asked,
        slurm=slurm,
        ranks=ranks,
        keep=keep,
        report=lambda verdict: click.echo(verdict_line(verdict), err=as_json),
    )
    if as_json:
        print_json(done.to_json())
    else:
        print_ending(done, click.echo)
    if done.exit_code == 0:
        click.echo(f"Next: launcher submit {recipe}", err=True)
    context.exit(done.exit_code)
