"""`launcher data`: what will be trained, before anything is."""

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


@click.group(name="data")
def command() -> None:
    """Look at the recipe's data as its run will see it, or tokenize it beforehand."""


@command.command(context_settings=WITH_OVERRIDES)
@recipe_argument
@override_arguments
@click.option("-n", "--rows", default=2, show_default=True, type=click.IntRange(1, 1000), help="Rows of each source.")
@click.option("--skip", default=0, show_default=True, type=click.IntRange(0), help="Begin after so many rows.")
@json_flag
def show(recipe: str, overrides: tuple[str, ...], rows: int, skip: int, as_json: bool) -> None:
    """Print real rows: trained tokens, masked tokens and end-of-sequence told apart."""
    from launcher.recipe.shipped import find_recipe
    from launcher.runs.preview import show_rows

    found = show_rows(find_recipe(recipe), read_overrides(overrides), rows=rows, skip=skip)
    if as_json:
        print_json({"schema": 1, "rows": found})
        return
    from launcher.report.preview import print_rows

    print_rows(found)
    click.echo(f"Next: launcher data stats {recipe}", err=True)


@command.command(context_settings=WITH_OVERRIDES)
@recipe_argument
@override_arguments
@json_flag
def stats(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Count rows, tokens, trained tokens, lengths, truncation, repeats, overlap and empty turns."""
    from launcher.recipe.shipped import find_recipe
    from launcher.report.preview import print_stats
    from launcher.runs.preview import count_rows, refuse_untrained

    counted = count_rows(find_recipe(recipe), read_overrides(overrides))
    if as_json:
        print_json(counted)
    else:
        print_stats(counted)
    refuse_untrained(counted)
    click.echo(f"Next: launcher plan {recipe}", err=True)


@command.command(context_settings=WITH_OVERRIDES)
@recipe_argument
@override_arguments
@click.option("--job", is_flag=True, help="As a CPU job of its own on the site's Slurm, which the run can wait for.")
@click.option("--dry-run", is_flag=True, help="Say where it would be written; touch nothing.")
@json_flag
def prepare(recipe: str, overrides: tuple[str, ...], job: bool, dry_run: bool, as_json: bool) -> None:
    """Tokenize and pack once into the shared cache; every later run of the same data starts from it."""
    from launcher.recipe.shipped import find_recipe
    from launcher.runs import prepare_job, preview

    path, asked = find_recipe(recipe), read_overrides(overrides)
    if job and not dry_run:
        job_id = prepare_job.submit(path, asked)
        if as_json:
            print_json({"schema": 1, "job_id": job_id})
        else:
            click.echo(f"submitted job {job_id}, which tokenizes the data of {recipe}")
        click.echo(f"Next: launcher submit {recipe} --dependency afterok:{job_id}", err=True)
        return
    made = preview.prepare_cache(path, asked, dry_run=dry_run)
    if as_json:
        print_json(made)
        return
    from launcher.report.preview import print_prepared

    print_prepared(made)
    if not dry_run:
        click.echo(f"Next: launcher submit {recipe}", err=True)
