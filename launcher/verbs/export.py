"""`launcher export`: an adapter or model as a serving engine loads it, with the command that serves it."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from launcher.verbs.arguments import json_flag, print_json, run_argument, runs_option, show_notices


@click.command(name="export")
@run_argument
@click.option(
    "--for",
    "engine",
    type=click.Choice(["vllm", "tgi", "sglang", "merged", "checkpoint"]),
    required=True,
    help="Engine that loads adapters; merged: one model; checkpoint: the newest checkpoint of a full run as a model.",
)
@click.option("--name", "served_name", help="Name it is served under [the run's].")
@click.option("--base", type=click.Path(path_type=Path), help="Folder of the base [the one the adapter names].")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="With merged and checkpoint.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write [RUN/export/ENGINE].")
@click.option("--whole", is_flag=True, help="With merged: in memory, for what cannot be merged matrix by matrix.")
@click.option("--trust-base", is_flag=True, help="Take the base although the adapter does not say which it was.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
@json_flag
@runs_option
def command(
    run: str,
    engine: str,
    served_name: str | None,
    base: Path | None,
    dtype: str | None,
    output: Path | None,
    trust_base: bool,
    whole: bool,
    dry_run: bool,
    as_json: bool,
    parent: Path | None,
) -> None:
    """Write what an engine loads, refuse what it would refuse, and print the exact command that serves it.

    RUN is a run, an adapter's name, tag or folder.
    """
    from launcher.facts.serving import serve_command
    from launcher.runs import adapters

    if dtype and engine not in ("merged", "checkpoint"):
        raise click.UsageError(f"--dtype is for merged and checkpoint; {engine} loads the adapter as it was trained")
    if whole and engine != "merged":
        raise click.UsageError(f"--whole is for merged, not for {engine}")
    if engine == "checkpoint":
        asked = adapters.checkpoint_request(run, parent, base=base, dtype=dtype, output=output)
    elif engine == "merged":
        _, folder = adapters.find_adapter(run, parent)
        target = output or (folder.path / "export" / "merged" if folder else None)
        asked = adapters.merge_request(run, parent, base=base, dtype=dtype, output=target, trust_base=trust_base) | {
            "whole": whole
        }
    else:
        asked = adapters.export_request(
            run, parent, engine=engine, served_name=served_name, base=base, output=output, trust_base=trust_base
        )
    if dry_run:
        print_json({"schema": 1, **asked})
        return
    made = adapters.export(asked)
    if engine in ("merged", "checkpoint"):
        words = ["vllm", "serve", made["path"]]
        if served_name:
            words = serve_command("merged", base="", name=served_name, folder=made["path"], rank=None)
        made["command"] = shlex.join(words)
    show_notices(made.get("notices", ()))
    if as_json:
        print_json({"schema": 1, **made})
        return
    click.echo(f"wrote {made['path']}")
    if made.get("evened"):
        click.echo("written with one rank and the scaling 1 for all modules, which the engine reads; the same products")
    if made.get("round_trip_difference") is not None:
        equal = f"within {made['round_trip_difference']:.1e} of" if made["round_trip_difference"] else "equal"
        click.echo(f"loaded through PEFT on its base: logits {equal} the original adapter's")
    elif engine not in ("merged", "checkpoint"):
        click.echo("not loaded and compared: the base is not on this machine (--base FOLDER)")
    click.echo(made["command"])
    there = "" if engine in ("merged", "checkpoint") else f"cd {shlex.quote(made['path'])} && "
    click.echo(f"Next: {there}{made['command']}", err=True)
