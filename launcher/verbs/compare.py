"""`launcher compare`: runs side by side, and whether one is better."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.verbs.arguments import complete_run, json_flag, print_json, runs_option


@click.command(name="compare")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", shell_complete=complete_run)
@click.option("--no-model", is_flag=True, help="Numbers of the run folders alone; load no model.")
@click.option("--rows", default=200, show_default=True, type=click.IntRange(1), help="Validation rows to measure on.")
@click.option("--generations", default=4, show_default=True, type=click.IntRange(0), help="Prompts to answer.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1), help="Of each answer.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Prompts to answer: lines of .txt, or rows as in data.train [validation rows].",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER",
    help="A folder, name or tag of an adapter that no run made, such as a combined one; measured beside the runs.",
)
@click.option("--html", type=click.Path(path_type=Path), help="Write the comparison as one self-contained page, too.")
@json_flag
@runs_option
def command(
    runs: tuple[str, ...],
    no_model: bool,
    rows: int,
    generations: int,
    max_new_tokens: int,
    prompts: Path | None,
    adapters: tuple[str, ...],
    html: Path | None,
    as_json: bool,
    parent: Path | None,
) -> None:
    """Compare runs and adapters (names or tags): quality, retention, time, memory, cost, plan, rows won and answers.

    Each base is loaded once, every adapter on it in turn, on this machine. A winner is called only where other rows of
    the same kind would hardly change it.
    """
    from launcher.runs.comparison import Asked, compare, find_adapters, find_runs, part

    names, beside = part(runs, parent)
    folders, adapters = find_runs(names, parent), (*adapters, *beside)
    if not folders:
        raise click.UsageError(f"{', '.join(beside)}: compared with a run on the same base; name one")
    asked = Asked(
        rows=rows,
        generations=generations,
        max_new_tokens=max_new_tokens,
        prompts=prompts,
        adapters=find_adapters(adapters, folders, parent),
    )
    if no_model and adapters:
        raise click.UsageError("--adapter has no numbers without loading it; leave --no-model out")
    if not no_model:
        click.echo(f"loading the base and {len(folders)} runs (--no-model compares numbers alone)", err=True)
    found = compare(folders, None if no_model else asked)
    if html is not None:
        from launcher.report.compare import write_comparison

        write_comparison(found, html)
        click.echo(f"wrote {html}", err=True)
    if as_json:
        print_json(found.to_json())
        return
    from launcher.report.compare import print_comparison

    print_comparison(found)
    best = next((run for run in found.runs if run.run == found.winner), found.runs[0])
    more = "" if best.method == "full" else f" · launcher merge {best.run} · launcher export {best.run} --for vllm"
    click.echo(f"Next: launcher report {best.run}{more}", err=True)
