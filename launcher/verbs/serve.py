"""`launcher serve`: adapters of one base behind an OpenAI-compatible endpoint, each by its name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from launcher.verbs.arguments import complete_run, json_flag, print_json, runs_option

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command(name="serve")
@click.argument("runs", nargs=-1, metavar="[NAME=]RUN...", shell_complete=complete_run)
@click.option("--base", type=click.Path(path_type=Path), help="Folder of the base [the one the adapters name].")
@click.option("--base-name", help="Name the base is asked for by [its id or folder, or the run's].")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "4bit", "bf16", "fp16", "fp32"]),
    default="auto",
    show_default=True,
    help="How the base is held; auto: as the adapters were trained (4 bits for QLoRA).",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Others than this machine need --token-env.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one and prints it."
)
@click.option("--token-env", metavar="NAME", help="Variable that holds the token clients must send.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of prompt and answer [the base's positions].")
@click.option("--max-rows", type=click.IntRange(min=1), default=8, show_default=True, help="Answers made at once.")
@click.option("--max-waiting", type=click.IntRange(min=0), default=64, show_default=True, help="More are told 429.")
@click.option(
    "--max-body", type=click.IntRange(min=1), default=4 * 2**20, show_default=True, help="Bytes of a request."
)
@click.option("--grace", type=click.IntRange(min=0), default=30, show_default=True, help="Seconds to end in.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1.")
@click.option("--trust-base", is_flag=True, help="Take adapters that do not say which base they are of.")
@click.option("--add", multiple=True, metavar="[NAME=]RUN", help="Have a running server (--url) take an adapter.")
@click.option("--remove", multiple=True, metavar="NAME", help="Have a running server (--url) drop one.")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Of that server.")
@click.option("--slurm", is_flag=True, help="As a Slurm job, with vLLM.")
@click.option("--site", default="auto", show_default=True, help="With --slurm: the site's profile.")
@click.option("-p", "--partition", help="With --slurm.")
@click.option("-t", "--time", "time_min", type=click.IntRange(min=1), help="With --slurm: minutes [480].")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="With --slurm: of one node.")
@click.option("--dry-run", is_flag=True, help="Print what would be loaded and the memory it takes; load nothing.")
@json_flag
@runs_option
def command(runs: tuple[str, ...], **given: Any) -> None:
    """Serve adapters (runs, tags or folders) of one base, or a fully fine-tuned run, as OpenAI's API does."""
    from launcher.errors import RecipeError
    from launcher.runs.serving import Options, serve_request

    if given["add"] or given["remove"]:
        if runs:
            raise click.UsageError("--add and --remove change a running server; leave RUN out")
        _change(given)
        return
    if not runs:
        raise click.UsageError("name at least one run, tag, adapter folder or model folder")
    options = Options(
        host=given["host"], port=given["port"], token_env=given["token_env"], rows=given["max_rows"],
        waiting=given["max_waiting"], context=given["context"], body_bytes=given["max_body"], grace_s=given["grace"],
        device=given["device"], trust_base=given["trust_base"], json=given["as_json"],
    )  # fmt: skip
    if options.host not in _LOOPBACK and options.token_env is None and not given["slurm"]:
        raise RecipeError(f"--host {options.host}: others can reach it, so a token is needed: --token-env NAME")
    request = serve_request(
        runs, given["parent"], base=given["base"], base_name=given["base_name"], dtype=given["dtype"], options=options
    )
    if given["slurm"]:
        _submit(request, given)
        return
    if given["dry_run"]:
        _show(request, as_json=given["as_json"])
        return
    _become_server(request)


def _change(given: dict[str, Any]) -> None:
    """Adapters of a running server."""
    from launcher.runs import serving, serving_client

    for text in given["add"]:
        if given["dry_run"]:
            click.echo(f"would add {serving.find_target(text, given['parent']).name}")
            continue
        name = serving_client.add(given["url"], text, given["parent"], token_env=given["token_env"])
        click.echo(f"added {name}")
    for name in given["remove"]:
        if not given["dry_run"]:
            serving_client.remove(given["url"], name, token_env=given["token_env"])
        click.echo(f"{'would remove' if given['dry_run'] else 'removed'} {name}")
    click.echo(f"Next: curl {given['url'].rstrip('/').removesuffix('/v1')}/v1/models", err=True)


def _submit(request: dict[str, Any], given: dict[str, Any]) -> None:
    """The same with vLLM, as a job."""
    from launcher.runs.serving_job import Place, describe, submit

    place = Place(site=given["site"], partition=given["partition"], time_min=given["time_min"], gpus=given["gpus"])
    if given["dry_run"]:
        print_json({"schema": 1, **describe(request, place)})
        return
    job_id, folder = submit(request, place)
    if given["as_json"]:
        print_json({"schema": 1, "job_id": job_id, "folder": str(folder)})
    else:
        click.echo(f"submitted job {job_id}: {folder}")
    click.echo(f"Next: cat {folder}/address.json once the job runs; its log: {folder}/job.out", err=True)


def _become_server(request: dict[str, Any]) -> None:
    """Replace this process: signals, output and the exit code are the server's own."""
    from launcher.facts.train_environment import environment, train_python
    from launcher.runs.serving import check_environment

    python = train_python()
    check_environment(python)
    os.execve(python, [python, "-m", "launcher.serving.main", json.dumps(request)], environment())


def _show(request: dict[str, Any], *, as_json: bool) -> None:
    from launcher.runs.serving_memory import memory

    needed = memory(request)
    if as_json:
        print_json({"schema": 1, **request, "memory": needed})
        return
    base = request["base"]
    held = f"4 bits, computed in {base['dtype']}" if base["quantization"] else base["dtype"]
    click.echo(f"base     {base['name']}  {base['folder']}  ({held})")
    for one in request["adapters"]:
        click.echo(f"adapter  {one['name']}  {one['folder']}")
    for key, value in needed.items():
        if key.endswith("bytes_at_most") or key in ("weights_bytes", "adapters_bytes"):
            click.echo(f"{key:20} {'not known' if value is None else f'{value / 2**30:.2f} GiB'}")
    click.echo("Next: the same without --dry-run", err=True)
