"""Arguments: what the verbs' command lines have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


def complete_recipe(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    """Names of shipped recipes, and files."""
    from click.shell_completion import CompletionItem

    from launcher.recipe.shipped import shipped_recipes

    names = [recipe.stem for recipe in shipped_recipes() if recipe.stem.startswith(incomplete)]
    return [CompletionItem(name) for name in names] + [CompletionItem(incomplete, type="file")]


def complete_run(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of runs in the runs folder."""
    from launcher.runs.status import runs_folder

    return sorted(path.name for path in runs_folder(None).glob(f"{incomplete}*") if path.is_dir())


def complete_run_or_trial(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of runs and of trials in the runs folder."""
    from launcher.runs.status import runs_folder

    trials = (path.parent.name for path in runs_folder(None).glob(f".trials/{incomplete}*/trial.json"))
    return sorted([*complete_run(ctx, param, incomplete), *trials])


def read_overrides(values: Sequence[str]) -> list[str]:
    """Check the form of `k=v` arguments; `--a.b=v` and `--a.b v` are accepted too.

    Raises:
        click.UsageError: an argument that is neither; click names the command's own options.
    """
    overrides: list[str] = []
    waiting: str | None = None
    for value in values:
        if waiting is not None:
            overrides.append(f"{waiting}={value}")
            waiting = None
        elif value.startswith("--") and "." in value.split("=", 1)[0]:
            key = value[2:]
            if "=" in key:
                overrides.append(key)
            else:
                waiting = key
        elif value.startswith("-"):
            raise click.NoSuchOption(value)
        elif "=" in value:
            overrides.append(value)
        else:
            raise click.UsageError(f"{value!r} is not an override; write section.field=value, such as train.seed=1")
    if waiting is not None:
        raise click.UsageError(f"--{waiting} has no value; write --{waiting}=VALUE")
    return overrides


recipe_argument = click.argument("recipe", shell_complete=complete_recipe)
override_arguments = click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[SECTION.FIELD=VALUE]...")
json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
run_argument = click.argument("run", shell_complete=complete_run)
runs_option = click.option(
    "--runs", "parent", type=click.Path(path_type=Path), help="Folder that holds the runs [$LAUNCHER_RUNS or ./runs]."
)
objective_option = click.option(
    "--objective",
    type=click.Choice(["time", "cost", "quality"]),
    default="time",
    show_default=True,
    help="Earliest result within the budget, fewest GPU-hours, or the best method the budget allows.",
)
queue_option = click.option(
    "--queue/--no-queue",
    "ask_queue",
    default=None,
    help="Ask Slurm when each alternative would start (sbatch --test-only) [only where the site's Slurm is here].",
)
WITH_OVERRIDES = {"ignore_unknown_options": True}


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))


def show_notices(notices: Sequence[str]) -> None:
    """Notices on stderr, one line each."""
    for notice in notices:
        click.echo(f"note: {notice}", err=True)
