"""`launcher gc`: remove what is safe to remove, after showing it."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.verbs.arguments import json_flag, print_json, runs_option


@click.command(name="gc")
@click.option("--yes", "-y", is_flag=True, help="Remove it; without this it is only shown.")
@click.option("--keep-checkpoints", is_flag=True, help="Leave the checkpoints of finished runs.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where stage keeps models and data [$LAUNCHER_CACHE].")
@click.option("--dry-run", is_flag=True, help="Show only (what happens without --yes, too).")
@json_flag
@runs_option
def command(
    yes: bool, keep_checkpoints: bool, dry_run: bool, as_json: bool, parent: Path | None, cache: Path | None
) -> None:
    """Show what can be removed without losing anything, and with --yes remove it."""
    from launcher.errors import ClusterError
    from launcher.runs.garbage import find_garbage, remove
    from launcher.runs.status import runs_folder

    found = find_garbage(runs_folder(parent), checkpoints=not keep_checkpoints, cache=cache)
    removing = yes and not dry_run
    trouble = remove(found) if removing else []
    if as_json:
        listed = [{"path": str(one.path), "bytes": one.bytes, "why": one.why} for one in found]
        print_json({"schema": 1, "removed": removing, "found": listed, "trouble": trouble})
    else:
        for one in found:
            click.echo(f"{one.bytes / 1e6:12,.1f} MB  {one.path}  ({one.why})")
        total = sum(one.bytes for one in found) / 1e9
        click.echo(f"{'removed' if removing else 'would remove'} {len(found)} folders, {total:,.2f} GB", err=True)
        if found and not removing:
            click.echo("Next: launcher gc --yes", err=True)
    if trouble:
        raise ClusterError(*trouble)
