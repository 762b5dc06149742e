"""The verbs: parse, call one function, print; nothing else.

Heavy and slow imports stay inside the verbs: `launcher --help` pays for click alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher import __version__
from launcher.errors import JobFailedError, LauncherError
from launcher.verbs.arguments import (
    WITH_OVERRIDES,
    complete_recipe,
    complete_run,
    complete_run_or_trial,
    json_flag,
    objective_option,
    override_arguments,
    print_json,
    queue_option,
    read_overrides,
    recipe_argument,
    run_argument,
    runs_option,
    show_notices,
)

if TYPE_CHECKING:
    from launcher.planning.objective import Objective
    from launcher.planning.plan import Plan
    from launcher.report.inspection import Inspection

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


_LATER: dict[str, tuple[str, str]] = {
    "adapters": ("adapters", "List the adapters of finished runs; tag and diff them."),
    "export": ("export", "Write what vLLM, TGI or SGLang load, checked, with the command that serves it."),
    "merge": ("merge", "Merge a run's adapter into its base, shard by shard, proved."),
    "init": ("init", "Probe this site's Slurm and write its profile, every entry with its source."),
    "sync": ("sync", "Send a run's offline Weights & Biases records from a node that has network."),
    "gc": ("gc", "Show what can be removed without losing anything, and with --yes remove it."),
    "import": ("import_", "Convert an Axolotl, LLaMA-Factory, TRL or torchtune config into a recipe."),
    "stage": ("stage", "Bring model and data into the shared cache, verified, so that jobs need no network."),
    "compare": ("compare", "Put runs side by side: quality, retention, time, memory, cost, rows won, answers."),
    "report": ("report", "Write one run as a self-contained HTML page."),
    "data": ("data", "Look at the recipe's data as its run will see it, or tokenize it beforehand."),
    "rehearse": ("rehearse", "Run the whole job with a tiny random model on CPU ranks, before the queue."),
    "trial": ("trial", "Run candidates on your data, stop losers early, and compare what each reached and cost."),
    "why": ("why", "Say why a run waits, failed, stopped or is slow, what shows it, and what helps."),
    "serve": ("serve", "Serve adapters of one base, each by its name, as OpenAI's API does."),
    "resume": ("resume", "Go on from the newest checkpoint: the same run, on the same or on other nodes."),
}
"""Verbs of launcher/verbs, loaded when typed: name -> (module, first line of the help)."""


class _Verbs(click.Group):
    """Turns LauncherError into its message and exit code; bugs keep their traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_LATER])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a verb of its own module; every such module calls its click command `command`."""
        if cmd_name not in _LATER:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(f"launcher.verbs.{_LATER[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        """The list of verbs, without loading any."""
        texts = {name: command.get_short_help_str(100) for name, command in self.commands.items()}
        texts |= {name: text for name, (_, text) in _LATER.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(texts.items()))

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


# ---------------------------------------------------------------- before a run


@main.command(context_settings=WITH_OVERRIDES)
@recipe_argument
@override_arguments
@json_flag
@click.option("--explain", is_flag=True, help="Show every formula with this plan's numbers and its source.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the plan as one self-contained page, too.")
@click.option("--trace", is_flag=True, help="Measure one step of the real model class on fake tensors (needs torch).")
@click.option("--alternatives", is_flag=True, help="Show every alternative, the rejected ones too.")
@objective_option
@queue_option
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
    from launcher.errors import DoesNotFitError, UnknownArchitectureError
    from launcher.planning.prepare import plan_recipe
    from launcher.recipe.shipped import find_recipe
    from launcher.runs.forgetting import with_earlier_runs

    refused: DoesNotFitError | None = None
    try:
        planned = plan_recipe(find_recipe(recipe), read_overrides(overrides), objective=objective, ask_queue=ask_queue)
        show_notices(planned.loaded.notices)
        decided = with_earlier_runs(planned).plan
    except DoesNotFitError as error:
        refused, decided = error, error.plan
    except UnknownArchitectureError:
        if not trace:
            raise
        _plan_by_trace(find_recipe(recipe), read_overrides(overrides), as_json=as_json, closed_form=explain or html)
        return
    inspection = None
    if explain or trace or html:
        from launcher.report.inspection import Inspection

        inspection = Inspection.of(decided, find_recipe(recipe), read_overrides(overrides))
    _show_plan(decided, recipe, inspection, as_json=as_json, explain=explain, trace=trace, alternatives=alternatives)
    if inspection is not None and html is not None:
        inspection.write_html(html, recipe)
        click.echo(f"wrote {html}", err=True)
    if refused is not None:
        raise refused


def _plan_by_trace(recipe: Path, overrides: Sequence[str], *, as_json: bool, closed_form: object) -> None:
    """What can be said of a model that no closed form knows.

    Raises:
        DoesNotFitError: the layout does not fit.
    """
    from launcher.errors import DoesNotFitError
    from launcher.planning.traced import trace_recipe_file
    from launcher.report.traced import print_traced, traced_to_json

    traced, notices = trace_recipe_file(recipe, overrides)
    show_notices(notices)
    if closed_form:
        click.echo("note: --explain and --html show the closed form, which this architecture does not have", err=True)
    if as_json:
        print_json(traced_to_json(traced))
    else:
        print_traced(traced)
    if not traced.fits:
        raise DoesNotFitError(f"as traced, {traced.candidate.method} fine-tuning {traced.rejected_because}")


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
        print_json(plan_to_json(decided) | ({"trace": trace_to_json(*traced)} if traced else {}))
        return
    explained = inspection.explained() if inspection is not None and explain else ()
    print_plan(decided, explained=explained, all_alternatives=alternatives, recipe_argument=recipe)
    if traced:
        print_trace(*traced)


@main.command()
@click.argument("name", required=False, shell_complete=complete_recipe)
@json_flag
@click.option("--dry-run", is_flag=True, help="Say what would be copied; touch nothing.")
def recipes(name: str | None, as_json: bool, dry_run: bool) -> None:
    """List the shipped recipes with their predicted cost, or copy one here."""
    from launcher.planning.listing import copy_recipe, list_recipes

    if name is None:
        listed = list_recipes()
        if as_json:
            print_json(listed)
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


@main.command(context_settings=WITH_OVERRIDES)
@recipe_argument
@override_arguments
@click.option("--local", is_flag=True, help="Run on this machine and wait for the end.")
@click.option("--detach", is_flag=True, help="With --local: return at once.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent; touch nothing.")
@click.option("--print-sbatch", is_flag=True, help="Write the run folder and print a script for plain sbatch.")
@json_flag
@objective_option
@queue_option
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
    from launcher.errors import ClusterError, DoesNotFitError
    from launcher.planning.prepare import plan_recipe
    from launcher.recipe.load import load_recipe
    from launcher.recipe.shipped import find_recipe
    from launcher.runs import launching, submission
    from launcher.runs.forgetting import with_earlier_runs
    from launcher.runs.preflight_files import check_working_folder

    check_working_folder()
    chosen = [f"{_SBATCH_FLAGS[flag]}={value}" for flag, value in sbatch_flags.items() if value is not None]
    chosen += ["slurm.site=local"] if local else []
    asked = [*read_overrides(overrides), *chosen]
    try:
        planned = with_earlier_runs(plan_recipe(find_recipe(recipe), asked, objective=objective, ask_queue=ask_queue))
    except (ClusterError, DoesNotFitError):
        if load_recipe(find_recipe(recipe), asked).slurm.site == "auto":
            launching.refuse_while_away()
        raise
    show_notices(planned.loaded.notices)
    if dry_run:
        request, notices = launching.dry_run(planned)
        show_notices(notices)
        print_json(request)
        return
    made = launching.create(planned)
    show_notices(made.notices)
    run = made.run
    if print_sbatch:
        click.echo(submission.print_sbatch(made.request), nl=False)
        click.echo(f"Next: save the script and `sbatch` it; then launcher status {run.run_id}", err=True)
        return
    job_id = submission.submit(made.request, say=lambda sentence: click.echo(sentence, err=True))
    if as_json:
        print_json({"run": run.run_id, "path": str(run.path), "job_id": job_id})
    else:
        click.echo(f"submitted run {run.run_id} as job {job_id}: {run.path}")
    if planned.site.executor == "local" and not detach:
        from launcher.verbs.watching import watch

        watch(run)
        return
    click.echo(f"Next: launcher status {run.run_id} · launcher logs -f {run.run_id}", err=True)


@main.command()
@click.argument("run", metavar="[RUN|TRIAL]", required=False, shell_complete=complete_run_or_trial)
@json_flag
@runs_option
def status(run: str | None, as_json: bool, parent: Path | None) -> None:
    """Show the state of one run, of a trial, or of all runs: the run folder first, Slurm second."""
    from launcher.runs import status as runs

    if run is None:
        states = runs.list_runs(parent)
    else:
        from launcher.runs.trial_folder import Trial, find_run_or_trial

        found = find_run_or_trial(run, parent)
        if isinstance(found, Trial):
            from launcher.verbs.trial import show_status

            show_status(found, as_json=as_json)
            return
        states = [runs.run_status(found)]
    if as_json:
        documents = [state.to_json() for state in states]
        print_json(documents[0] if run else documents)
        return
    from launcher.report.status import print_status

    print_status(states, one=run is not None)


@main.command()
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Keep printing until the run ends.")
@click.option("--rank", default=0, show_default=True, help="Whose log.")
@runs_option
def logs(run: str, follow: bool, rank: int, parent: Path | None) -> None:
    """Print the log of one rank, all attempts in order."""
    from launcher.runs import status as runs

    for line in runs.follow_logs(runs.find_run(run, parent), rank=rank, follow=follow):
        click.echo(line)


@main.command()
@click.argument("run", metavar="RUN|TRIAL", shell_complete=complete_run_or_trial)
@click.option("--dry-run", is_flag=True, help="Say what would be cancelled; touch nothing.")
@runs_option
def cancel(run: str, dry_run: bool, parent: Path | None) -> None:
    """End a run, or a trial with all its runs, pending or running; checkpoints stay."""
    from launcher.runs import status as runs
    from launcher.runs.trial_folder import Trial, find_run_or_trial

    folder = find_run_or_trial(run, parent)
    if isinstance(folder, Trial):
        from launcher.verbs.trial import cancel_trial

        cancel_trial(folder, dry_run=dry_run)
        return
    if dry_run:
        state = runs.run_status(folder)
        click.echo(f"would cancel {folder.run_id} (job {state.job_id}, {state.state})")
        return
    click.echo(runs.cancel(folder))


@main.command()
@run_argument
@click.option("--timeout", "timeout_s", type=float, help="Give up after this many seconds (exit 75).")
@json_flag
@runs_option
def wait(run: str, timeout_s: float | None, as_json: bool, parent: Path | None) -> None:
    """Wait for the end of a run; exit 8 when it did not succeed."""
    from launcher.runs import status as runs

    folder = runs.find_run(run, parent)
    try:
        state = runs.wait(folder, timeout_s=timeout_s)
    except JobFailedError:
        if as_json:
            print_json(runs.run_status(folder).to_json())
        raise
    if as_json:
        print_json(state.to_json())
    else:
        click.echo(state.sentence)


@main.command()
@click.argument("targets", nargs=-1, metavar="FILE.jsonl|RUN...", shell_complete=complete_run)
@click.option("--calibrate", metavar="SITE", help="Fit this site's coefficients to its finished runs and keep them.")
@click.option("--markdown", is_flag=True, help="Print the error tables as Markdown.")
@click.option("--dry-run", is_flag=True, help="With --calibrate: say what would be kept; touch nothing.")
@json_flag
@runs_option
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
        print_json(scored)
    else:
        print_score(scored, markdown=markdown, files=targets)


if __name__ == "__main__":
    sys.exit(main())
