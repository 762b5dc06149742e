"""The verbs: parse, call one function, print; nothing else.

Heavy and slow imports stay inside the verbs: `launcher --help` pays for click alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher import __version__
from launcher.errors import JobFailedError, LauncherError

if TYPE_CHECKING:
    from launcher.planning.objective import Objective
    from launcher.planning.plan import Plan
    from launcher.report.inspection import Inspection
    from launcher.runs.folder import RunFolder

_SBATCH_FLAGS = {
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "constraint": "slurm.constraint",
    "time": "slurm.time",
    "nodes": "slurm.nodes",
    "job_name": "name",
    "nodelist": "slurm.extra.nodelist",
    "exclude": "slurm.extra.exclude",
    "dependency": "slurm.extra.dependency",
}
"""sbatch's own flags on `submit` and the recipe field each one sets."""


class _Verbs(click.Group):
    """Turns LauncherError into its message and exit code; bugs keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LauncherError as error:
            for problem in error.problems:
                click.echo(f"error: {problem}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="launcher")
def main() -> None:
    """Plan, launch and survive LLM fine-tuning: one recipe in, an adapter or model out."""


# ---------------------------------------------------------------- arguments


def _complete_recipe(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    from launcher.recipe.shipped import shipped_recipes

    names = [recipe.stem for recipe in shipped_recipes() if recipe.stem.startswith(incomplete)]
    return [CompletionItem(name) for name in names] + [CompletionItem(incomplete, type="file")]


def _complete_run(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from launcher.runs.status import runs_folder

    return sorted(path.name for path in runs_folder(None).glob(f"{incomplete}*") if path.is_dir())


def _overrides(values: Sequence[str]) -> list[str]:
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


_recipe_argument = click.argument("recipe", shell_complete=_complete_recipe)
_override_arguments = click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[SECTION.FIELD=VALUE]...")
_json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
_run_argument = click.argument("run", shell_complete=_complete_run)
_runs_option = click.option(
    "--runs", "parent", type=click.Path(path_type=Path), help="Folder that holds the runs [$LAUNCHER_RUNS or ./runs]."
)
_objective_option = click.option(
    "--objective",
    type=click.Choice(["time", "cost", "quality"]),
    default="time",
    show_default=True,
    help="Earliest result within the budget, fewest GPU-hours, or the best method the budget allows.",
)
_queue_option = click.option(
    "--queue/--no-queue",
    "ask_queue",
    default=None,
    help="Ask Slurm when each alternative would start (sbatch --test-only) [only where the site's Slurm is here].",
)
_WITH_OVERRIDES = {"ignore_unknown_options": True}


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def _notices(notices: Sequence[str]) -> None:
    for notice in notices:
        click.echo(f"note: {notice}", err=True)


# ---------------------------------------------------------------- before a run


@main.command(context_settings=_WITH_OVERRIDES)
@_recipe_argument
@_override_arguments
@_json_flag
@click.option("--explain", is_flag=True, help="Show every formula with this plan's numbers and its source.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the plan as one self-contained page, too.")
@click.option("--trace", is_flag=True, help="Measure one step of the real model class on fake tensors (needs torch).")
@click.option("--alternatives", is_flag=True, help="Show every alternative, the rejected ones too.")
@_objective_option
@_queue_option
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    as_json: bool,
    explain: bool,
    html: Path | None,
    trace: bool,
    alternatives: bool,
    objective: Objective,
    ask_queue: bool | None,
) -> None:
    """Say what will run, whether it fits, how long it takes, what it costs and why."""
    from launcher.errors import DoesNotFitError
    from launcher.planning.prepare import plan_recipe
    from launcher.recipe.shipped import find_recipe

    refused: DoesNotFitError | None = None
    try:
        planned = plan_recipe(find_recipe(recipe), _overrides(overrides), objective=objective, ask_queue=ask_queue)
        _notices(planned.loaded.notices)
        decided = planned.plan
    except DoesNotFitError as error:
        refused, decided = error, error.plan
    inspection = None
    if explain or trace or html:
        from launcher.report.inspection import Inspection

        inspection = Inspection.of(decided, find_recipe(recipe), _overrides(overrides))
    _show_plan(decided, recipe, inspection, as_json=as_json, explain=explain, trace=trace, alternatives=alternatives)
    if inspection is not None and html is not None:
        inspection.write_html(html, recipe)
        click.echo(f"wrote {html}", err=True)
    if refused is not None:
        raise refused


def _show_plan(
    decided: Plan,
    recipe: str,
    inspection: Inspection | None,
    *,
    as_json: bool,
    explain: bool,
    trace: bool,
    alternatives: bool,
) -> None:
    """Print a plan, and what was asked for beside it, as text or as one JSON document."""
    from launcher.planning.plan import plan_to_json
    from launcher.report.text import print_plan
    from launcher.report.trace import print_trace, trace_to_json

    traced = inspection.traced() if inspection is not None and trace else None
    if as_json:
        _print_json(plan_to_json(decided) | ({"trace": trace_to_json(*traced)} if traced else {}))
        return
    explained = inspection.explained() if inspection is not None and explain else ()
    print_plan(decided, explained=explained, all_alternatives=alternatives, recipe_argument=recipe)
    if traced:
        print_trace(*traced)


@main.command()
@click.argument("name", required=False, shell_complete=_complete_recipe)
@_json_flag
@click.option("--dry-run", is_flag=True, help="Say what would be copied; touch nothing.")
def recipes(name: str | None, as_json: bool, dry_run: bool) -> None:
    """List the shipped recipes with their predicted cost, or copy one here."""
    from launcher.planning.listing import copy_recipe, list_recipes

    if name is None:
        listed = list_recipes()
        if as_json:
            _print_json(listed)
            return
        from launcher.report.text import print_recipes

        print_recipes(listed)
        return
    target = copy_recipe(name, Path.cwd(), dry_run=dry_run)
    click.echo(f"{'would copy' if dry_run else 'copied'} to {target}", err=True)
    click.echo(f"Next: launcher plan {target}", err=True)


# ---------------------------------------------------------------- a run


def _sbatch_options(command: Any) -> Any:
    """Add sbatch's own short flags to a verb."""
    letters = {"nodes": "-N", "job_name": "-J", "nodelist": "-w", "exclude": "-x", "account": "-A", "constraint": "-C"}
    for flag, field in reversed(_SBATCH_FLAGS.items()):
        letter = letters.get(flag, f"-{flag[0]}")
        command = click.option(letter, f"--{flag.replace('_', '-')}", flag, help=f"As in sbatch; sets {field}.")(
            command
        )
    return command


@main.command(context_settings=_WITH_OVERRIDES)
@_recipe_argument
@_override_arguments
@click.option("--local", is_flag=True, help="Run on this machine and wait for the end.")
@click.option("--detach", is_flag=True, help="With --local: return at once.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent; touch nothing.")
@click.option("--print-sbatch", is_flag=True, help="Write the run folder and print a script for plain sbatch.")
@_json_flag
@_objective_option
@_queue_option
@_sbatch_options
def submit(
    recipe: str,
    overrides: tuple[str, ...],
    local: bool,
    detach: bool,
    dry_run: bool,
    print_sbatch: bool,
    as_json: bool,
    objective: Objective,
    ask_queue: bool | None,
    **sbatch_flags: str | None,
) -> None:
    """Check everything that can be checked, then submit (or run here with --local)."""
    from launcher.planning.prepare import plan_recipe
    from launcher.recipe.shipped import find_recipe
    from launcher.runs import launching, submission

    chosen = [f"{_SBATCH_FLAGS[flag]}={value}" for flag, value in sbatch_flags.items() if value is not None]
    chosen += ["slurm.site=local"] if local else []
    asked = [*_overrides(overrides), *chosen]
    planned = plan_recipe(find_recipe(recipe), asked, objective=objective, ask_queue=ask_queue)
    _notices(planned.loaded.notices)
    if dry_run:
        request, notices = launching.dry_run(planned)
        _notices(notices)
        _print_json(request)
        return
    made = launching.create(planned)
    _notices(made.notices)
    run = made.run
    if print_sbatch:
        click.echo(submission.print_sbatch(made.request), nl=False)
        click.echo(f"Next: save the script and `sbatch` it; then launcher status {run.run_id}", err=True)
        return
    job_id = submission.submit(made.request)
    if as_json:
        _print_json({"run": run.run_id, "path": str(run.path), "job_id": job_id})
    else:
        click.echo(f"submitted run {run.run_id} as job {job_id}: {run.path}")
    if planned.site.executor == "local" and not detach:
        _watch(run)
        return
    click.echo(f"Next: launcher status {run.run_id} · launcher logs -f {run.run_id}", err=True)


def _watch(run: RunFolder) -> None:
    """Show a local run until it ends; Ctrl-C cancels it."""
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


@main.command()
@click.argument("run", required=False, shell_complete=_complete_run)
@_json_flag
@_runs_option
def status(run: str | None, as_json: bool, parent: Path | None) -> None:
    """Show the state of one run, or of all: the run folder first, Slurm second."""
    from launcher.runs import status as runs

    states = [runs.run_status(runs.find_run(run, parent))] if run else runs.list_runs(parent)
    if as_json:
        documents = [state.to_json() for state in states]
        _print_json(documents[0] if run else documents)
        return
    from launcher.report.status import print_status

    print_status(states, one=run is not None)


@main.command()
@_run_argument
@click.option("-f", "--follow", is_flag=True, help="Keep printing until the run ends.")
@click.option("--rank", default=0, show_default=True, help="Whose log.")
@_runs_option
def logs(run: str, follow: bool, rank: int, parent: Path | None) -> None:
    """Print the log of one rank, all attempts in order."""
    from launcher.runs import status as runs

    for line in runs.follow_logs(runs.find_run(run, parent), rank=rank, follow=follow):
        click.echo(line)


@main.command()
@_run_argument
@click.option("--dry-run", is_flag=True, help="Say what would be cancelled; touch nothing.")
@_runs_option
def cancel(run: str, dry_run: bool, parent: Path | None) -> None:
    """End a run, pending or running; checkpoints stay."""
    from launcher.runs import status as runs

    folder = runs.find_run(run, parent)
    if dry_run:
        state = runs.run_status(folder)
        click.echo(f"would cancel {folder.run_id} (job {state.job_id}, {state.state})")
        return
    click.echo(runs.cancel(folder))


@main.command()
@_run_argument
@click.option("--timeout", "timeout_s", type=float, help="Give up after this many seconds (exit 75).")
@_json_flag
@_runs_option
def wait(run: str, timeout_s: float | None, as_json: bool, parent: Path | None) -> None:
    """Wait for the end of a run; exit 8 when it did not succeed."""
    from launcher.runs import status as runs

    folder = runs.find_run(run, parent)
    try:
        state = runs.wait(folder, timeout_s=timeout_s)
    except JobFailedError:
        if as_json:
            _print_json(runs.run_status(folder).to_json())
        raise
    if as_json:
        _print_json(state.to_json())
    else:
        click.echo(state.sentence)


@main.command()
@click.argument("targets", nargs=-1, metavar="FILE.jsonl|RUN...", shell_complete=_complete_run)
@click.option("--calibrate", metavar="SITE", help="Fit this site's coefficients to its finished runs and keep them.")
@click.option("--markdown", is_flag=True, help="Print the error tables as Markdown.")
@click.option("--dry-run", is_flag=True, help="With --calibrate: say what would be kept; touch nothing.")
@_json_flag
@_runs_option
def score(
    targets: tuple[str, ...], calibrate: str | None, markdown: bool, dry_run: bool, as_json: bool, parent: Path | None
) -> None:
    """Compare predictions with what was measured: published rows, or own runs."""
    from launcher.planning.score import summary
    from launcher.report.score import print_learned, print_score
    from launcher.runs.measured import calibrate_site, score_all

    if calibrate:
        learned, path, outliers = calibrate_site(calibrate, targets, parent, dry_run=dry_run)
        print_learned(learned, path, outliers, as_json=as_json, dry_run=dry_run)
        return
    if not targets:
        raise click.UsageError("name a file of published rows (.jsonl) or runs; --calibrate SITE takes all of a site's")
    scored = summary(score_all(targets, parent))
    if as_json:
        _print_json(scored)
    else:
        print_score(scored, markdown=markdown, files=targets)


if __name__ == "__main__":
    sys.exit(main())
