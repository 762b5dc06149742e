"""`launcher init`: a profile of this site's Slurm, made from what it says of itself."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.verbs.arguments import json_flag, print_json


@click.command(name="init")
@click.option("--site", metavar="NAME", help="Name of the profile [the cluster's].")
@click.option("--probe-job", is_flag=True, help="Ask a compute node, too: one task for a minute.")
@click.option("-p", "--partition", help="Describe the nodes of this one [the default, or the one with most GPUs].")
@click.option("-A", "--account", help="Account of the jobs, written into the profile.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write here [slurm/NAME.yaml].")
@click.option("--dry-run", is_flag=True, help="Print the profile; write nothing, submit nothing.")
@json_flag
def command(
    site: str | None,
    probe_job: bool,
    partition: str | None,
    account: str | None,
    output: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Probe this site's Slurm and write its profile, every entry with its source."""
    from datetime import date

    from launcher.facts.probe import cluster_name
    from launcher.facts.survey import survey
    from launcher.report.site import profile_json, profile_text
    from launcher.runs.site_profile import check_free, check_name, site_name, write_new
    from launcher.runs.status import runs_folder

    default = output.stem if output else site_name(cluster_name()) if site is None else ""
    name = check_name(default if site is None else site)
    path = output or Path("slurm") / f"{name}.yaml"
    if not dry_run:
        check_free(path)
    runs = runs_folder(None)
    found = survey(partition=partition, account=account, runs=runs)
    if probe_job and dry_run:
        click.echo(f"would submit a probe job to partition {found.values['default_partition']}", err=True)
    elif probe_job:
        from launcher.runs.site_probe_job import ask_node

        ask_node(found, runs, say=lambda sentence: click.echo(sentence, err=True))
    text = profile_text(found, name, date.today().isoformat())
    if not dry_run:
        write_new(path, text)
    if as_json:
        print_json(profile_json(found, name, text, None if dry_run else str(path)))
    elif dry_run:
        click.echo(text, nl=False)
    else:
        click.echo(f"wrote {path}")
    for key, how in sorted(found.unknown.items()):
        click.echo(f"not known: {key} ({how})", err=True)
    said = name if path.parent == Path("slurm") and path.suffix == ".yaml" else str(path)
    click.echo(f"Next: launcher plan RECIPE slurm.site={said}", err=True)
