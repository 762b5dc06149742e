"""`launcher resume`: a new job for an old run."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.verbs.arguments import (
    WITH_OVERRIDES,
    json_flag,
    override_arguments,
    print_json,
    read_overrides,
    run_argument,
    runs_option,
    show_notices,
)


@click.command("resume", context_settings=WITH_OVERRIDES)
@run_argument
@override_arguments
@click.option("--detach", is_flag=True, help="For a run of this machine: return at once.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent; touch nothing.")
@json_flag
@runs_option
def command(
    run: str, overrides: tuple[str, ...], detach: bool, dry_run: bool, as_json: bool, parent: Path | None
) -> None:
    """Go on from the newest checkpoint: the same run, on the same or (slurm.nodes=N) on other nodes."""
    from launcher.runs import resume, submission
    from launcher.runs.status import find_run

    asked = read_overrides(overrides)
    done = resume.resume(find_run(run, parent), asked, dry_run=dry_run, say=lambda text: click.echo(text, err=True))
    if isinstance(done, resume.Finished):
        if as_json:
            print_json({"run": done.run.run_id, "path": str(done.run.path), "job_id": None, "step": done.step})
        click.echo(f"{done.run.run_id} is {done.sentence}", err=as_json)
        return
    show_notices(done.notices)
    if dry_run:
        print_json(submission.describe(done.request) | {"step": done.step})
        return
    document = {"run": done.run.run_id, "path": str(done.run.path), "job_id": done.job_id, "step": done.step}
    if as_json:
        print_json(document)
    else:
        click.echo(f"resumed run {done.run.run_id} as job {done.job_id} from step {done.step}: {done.run.path}")
    if done.request.cluster == "local" and not detach:
        from launcher.verbs.watching import watch

        watch(done.run)
        return
    click.echo(f"Next: launcher status {done.run.run_id} · launcher logs -f {done.run.run_id}", err=True)
