"""`launcher trial`: candidates compared on the user's own data."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.verbs.arguments import (
    WITH_OVERRIDES,
    complete_recipe,
    json_flag,
    override_arguments,
    print_json,
    read_overrides,
    runs_option,
    show_notices,
)

if TYPE_CHECKING:
    from launcher.runs.trial import Asked
    from launcher.runs.trial_candidates import Spec
    from launcher.runs.trial_choice import Objective
    from launcher.runs.trial_folder import Trial
    from launcher.runs.trial_standing import Standing


@click.command("trial", context_settings=WITH_OVERRIDES)
@click.argument("recipe", metavar="RECIPE|TRIAL", shell_complete=complete_recipe)
@override_arguments
@click.option(
    "--candidate", "lines", multiple=True, metavar="'NAME: FIELD=VALUE ...'", help="One candidate; repeat it."
)
@click.option("--candidates", "file", type=click.Path(path_type=Path), help="File with such a line per candidate.")
@click.option("--seeds", type=click.IntRange(1, 100), help="Runs per candidate.  [default: 1; with --confirm 3]")
@click.option("--rungs", default="1/4,1/2,1", show_default=True, help="Where the worse half stops, as shares of a run.")
@click.option("--parallel", type=click.IntRange(1), help="Most tasks of the array at a time.")
@click.option("--local", is_flag=True, help="Run on this machine, one after the other.")
@click.option("--wait", is_flag=True, help="On a cluster: stay until the trial has ended.")
@click.option(
    "--objective",
    type=click.Choice(["quality", "cost", "quality-per-cost", "score"]),
    default="quality",
    show_default=True,
    help="What --pick and --confirm choose by; score: of the answers, by --scorer.",
)
@click.option("--pick", type=click.Path(path_type=Path, dir_okay=False), help="Write the winning recipe to this file.")
@click.option("--confirm", is_flag=True, help="Run winner and runner-up of a finished TRIAL again, with new seeds.")
@click.option("--scorer", metavar="exact|FILE.py:FUNCTION", help="Judge answers of the finished to held-out prompts.")
@click.option("--dry-run", is_flag=True, help="Show candidates, rungs and predicted cost; write nothing.")
@json_flag
@runs_option
def command(
    recipe: str,
    overrides: tuple[str, ...],
    lines: tuple[str, ...],
    file: Path | None,
    seeds: int | None,
    rungs: str,
    parallel: int | None,
    local: bool,
    wait: bool,
    objective: Objective,
    pick: Path | None,
    confirm: bool,
    scorer: str | None,
    dry_run: bool,
    as_json: bool,
    parent: Path | None,
) -> None:
    """Run candidates on your data, stop losers early, and print what each reached and cost.

    With the name or folder of a TRIAL: go on with it, or show its table.
    """
    from launcher.runs.trial_folder import find_trial

    found = find_trial(recipe, parent)
    if confirm and found is None:
        raise click.UsageError(f"--confirm takes a trial that has ended; {recipe!r} is none")
    if objective == "score" and scorer is None and (confirm or not _is_scored(found)):
        raise click.UsageError(
            "--objective score: nobody has judged the answers; add --scorer exact or FILE.py:FUNCTION"
        )
    if found is None:
        from launcher.recipe.shipped import find_recipe
        from launcher.runs import trial
        from launcher.runs.trial_rungs import parse_rungs

        asked = trial.Asked(
            recipe=find_recipe(recipe),
            overrides=tuple(read_overrides(overrides)),
            specs=_specs(lines, file),
            seeds=seeds or 1,
            shares=parse_rungs(rungs),
            parallel=parallel,
            local=local,
            parent=parent,
        )
        found = _new(asked, dry_run=dry_run, as_json=as_json)
        if found is None:
            return
    elif overrides or lines or file:
        raise click.UsageError(
            f"{found.name} is a trial, which goes on as it began; leave overrides and candidates out"
        )
    elif confirm:
        found = _confirmation(found, objective, seeds, dry_run=dry_run, as_json=as_json)
        if found is None:
            return
    _go_on(found, objective, pick, None if dry_run else scorer, as_json=as_json, wait=wait, dry_run=dry_run)


def _is_scored(found: Trial | None) -> bool:
    """Whether somebody has judged the answers of a trial."""
    from launcher.runs.trial_table import scores

    return found is not None and bool(scores(found))


def _specs(lines: tuple[str, ...], file: Path | None) -> tuple[Spec, ...] | None:
    """The candidates that the user names; None where none is."""
    from launcher.runs.trial_candidates import parse_specs, read_specs

    named = parse_specs(lines, "--candidate") if lines else []
    return (*named, *(read_specs(file) if file else [])) or None


def _confirmation(
    trial: Trial, objective: Objective, seeds: int | None, *, dry_run: bool, as_json: bool
) -> Trial | None:
    """A new trial of the first two of this one; None in a dry run."""
    from launcher.runs.trial import working_folder
    from launcher.runs.trial_confirm import SEEDS, confirmation_of

    with working_folder(trial):
        return _new(confirmation_of(trial, objective, seeds or SEEDS), dry_run=dry_run, as_json=as_json)


def _new(asked: Asked, *, dry_run: bool, as_json: bool) -> Trial | None:
    """Plan a trial and write it down; None in a dry run."""
    from launcher.report.trial import print_candidates
    from launcher.runs import trial

    planned = trial.plan(asked)
    show_notices(planned.notices)
    if dry_run and as_json:
        print_json(trial.plan_to_json(asked, planned))
        return None
    if dry_run:
        print_candidates(planned, asked)
        click.echo("Next: the same without --dry-run", err=True)
        return None
    made = trial.create(asked, planned)
    click.echo(f"trial {made.name}: {len(planned.running)} candidates, {len(planned.seeds)} seeds", err=True)
    return made


def _go_on(
    found: Trial,
    objective: Objective,
    pick: Path | None,
    scorer: str | None,
    *,
    as_json: bool,
    wait: bool,
    dry_run: bool,
) -> None:
    """Take a trial as far as it goes, and show it."""
    from launcher.report.trial import print_table
    from launcher.runs import trial, trial_choice, trial_scorer
    from launcher.runs.trial_standing import stand
    from launcher.runs.trial_table import rows

    say = functools.partial(click.echo, err=True)
    standing = stand(found) if dry_run else trial.advance(found, say, wait=wait)
    if not standing.finished and not dry_run and (pick is not None or scorer is not None):
        say(f"--pick and --scorer look at the end of a trial; type them then, after: launcher trial {found.name}")
    if scorer is not None and standing.finished:
        trial_scorer.measure(found, standing, scorer)
    told = rows(found, standing)
    document = trial.remember(found, standing, dry_run=dry_run)
    ready = standing.finished and (objective != "score" or _is_scored(found))
    choice = trial_choice.choose(told, objective) if ready else None
    if as_json:
        print_json(document | {"choice": choice.to_json() if choice else None})
    else:
        print_table(document, told)
    if choice is not None and not as_json:
        click.echo(f"for {choice.objective}: {choice.candidate} ({choice.reasons[0]})")
    if choice is not None and pick is not None and not dry_run:
        trial_choice.write_choice(found, choice, pick)
    _say_next(found, standing, pick if choice is not None and not dry_run else None)


def _say_next(found: Trial, standing: Standing, pick: Path | None) -> None:
    if pick is not None:
        click.echo(f"wrote {pick}\nNext: launcher submit {pick}", err=True)
    elif standing.finished:
        click.echo(f"Next: launcher trial {found.name} --pick FILE", err=True)
    else:
        click.echo(f"Next: launcher trial {found.name}", err=True)


def cancel_trial(found: Trial, *, dry_run: bool) -> None:
    """`launcher cancel` of a trial."""
    from launcher.runs import trial_ending
    from launcher.runs.trial_standing import stand

    if stand(found).finished:
        click.echo(f"{found.name} has ended already; nothing to cancel")
        return
    jobs = trial_ending.living(found) if dry_run else trial_ending.cancel(found)
    for job in jobs:
        click.echo(f"{'would cancel' if dry_run else 'cancelled'} {job}")
    if dry_run:
        click.echo(f"would cancel trial {found.name}: {len(jobs)} jobs; checkpoints stay")
        return
    click.echo(f"cancelled trial {found.name}: {len(jobs)} jobs; checkpoints stay")
    click.echo(f"Next: launcher trial {found.name} goes on with it", err=True)


def show_status(found: Trial, *, as_json: bool) -> None:
    """`launcher status` of a trial."""
    from launcher.report.status import print_status
    from launcher.runs.trial_progress import progress

    now = progress(found)
    if as_json:
        print_json(now.to_json())
        return
    click.echo(now.sentence)
    if now.runs:
        print_status(now.runs, one=False)
    click.echo(f"Next: launcher trial {found.name}{'' if now.state == 'finished' else ' goes on with it'}", err=True)
