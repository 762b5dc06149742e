"""`launcher adapters`: which adapters there are, what they are called, and how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.facts.adapters import WAYS
from launcher.verbs.arguments import complete_run, json_flag, print_json, runs_option, show_notices

if TYPE_CHECKING:
    from launcher.runs.registry import Entry

_FILE_WIDTH = 4000
_MOST_LOST = 5
"""Modules shown on a terminal; --json has all."""
name_option = click.option("--name", help="What other verbs call it [after the folder of --to].")
target_option = click.option(
    "--to", "target", type=click.Path(path_type=Path),
    help="Folder to write; it must not exist [.adapters/NAME in the folder of runs].",
)  # fmt: skip
dry_run_option = click.option("--dry-run", is_flag=True, help="Check everything that needs no weights; write nothing.")


def read_weights(_context: click.Context, _option: click.Parameter, value: str) -> list[float]:
    """`0.7,0.3` as numbers.

    Raises:
        click.BadParameter: a part is no number.
    """
    try:
        return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 0.7,0.3") from error


@click.group(name="adapters", invoke_without_command=True)
@json_flag
@runs_option
@click.pass_context
def command(context: click.Context, as_json: bool, parent: Path | None) -> None:
    """List the adapters of finished runs and those made of them; tag, diff, combine and reduce them."""
    if context.invoked_subcommand is not None:
        return
    from launcher.runs.registry import list_adapters

    found = list_adapters(parent)
    if as_json:
        print_json({"schema": 1, "adapters": [one.to_json() for one in found]})
        return
    if not found:
        click.echo("no adapters here; a finished LoRA run leaves one", err=True)
        return
    _table(found)
    click.echo(
        "Next: launcher adapters diff ONE OTHER · launcher adapters combine ONE OTHER --weights 0.5,0.5 --name BOTH",
        err=True,
    )


def _table(found: list[Entry]) -> None:
    from rich.console import Console

    from launcher.report.parts import in_parts

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    left, right = ("NAME", "TAGS", "METHOD", "BASE", "MADE OF"), ("RANK", "STEP", "VALIDATION", "RETENTION", "MB")
    for at, part in enumerate(in_parts(left, right, [_cells(one) for one in found], console.width)):
        if at:
            console.print()
        console.print(part)


def _cells(one: Entry) -> list[str]:
    losses = [f"{loss:.4f}" if loss is not None else "" for loss in (one.validation_loss, one.retention_loss)]
    base = f"{one.base or ''}{f' @ {one.base_revision[:8]}' if one.base_revision else ''}"
    words = [one.name, ", ".join(one.tags), one.method or "", base, one.made or ""]
    return [*words, str(one.rank or ""), str(one.step or ""), *losses, f"{one.bytes / 1e6:.1f}"]


@command.command(name="tag")
@click.argument("adapter", shell_complete=complete_run)
@click.argument("name")
@click.option("--move", is_flag=True, help="Take the tag from the adapter that has it.")
@click.option("--dry-run", is_flag=True, help="Check; write nothing.")
@runs_option
def tag_adapter(adapter: str, name: str, move: bool, dry_run: bool, parent: Path | None) -> None:
    """Give an adapter (of a run, or in a folder) a name that other verbs take; a folder is listed from then on."""
    from launcher.runs.registry import tag

    entry = tag(adapter, name, parent, move=move, dry_run=dry_run)
    click.echo(f"{'would tag' if dry_run else 'tagged'} {entry.name} as {name}")
    click.echo(f"Next: launcher merge {name} · launcher export {name} --for vllm · launcher serve {name}", err=True)


@command.command(name="diff")
@click.argument("one")
@click.argument("other")
@json_flag
@runs_option
def diff_adapters(one: str, other: str, as_json: bool, parent: Path | None) -> None:
    """Show what differs between two adapters (runs, tags or folders): origin, shape, plan and losses."""
    from launcher.runs.registry import diff, find_entry

    left, right = find_entry(one, parent), find_entry(other, parent)
    found = diff(left, right)
    if as_json:
        print_json({"schema": 1, "one": left.name, "other": right.name, "different": found})
        return
    click.echo(f"{'':28}  {left.name:32}  {right.name}")
    for key, (a, b) in found.items():
        click.echo(f"{key:28}  {a!s:32.32}  {b!s:.60}")
    if not found:
        click.echo("nothing differs")


@command.command(name="combine")
@click.argument("adapters", nargs=-1, required=True)
@click.option("--weights", required=True, callback=read_weights, help="One number each, by commas: 0.7,0.3.")
@click.option("--how", type=click.Choice(WAYS), default="linear", show_default=True, help="PEFT's combination types.")
@click.option("--density", type=float, help="Share of the numbers that ties, dare and magnitude_prune keep.")
@click.option("--majority", type=click.Choice(["total", "frequency"]), default="total", show_default=True,
              help="What decides a sign in the ties forms.")  # fmt: skip
@click.option("--rank", type=int, help="Of the result, for the svd forms [the highest of the adapters'].")
@click.option("--seed", type=int, default=0, show_default=True, help="What the dare forms drop.")
@name_option
@target_option
@click.option("--trust-base", is_flag=True, help="Take them although not all say which base they were trained on.")
@dry_run_option
@json_flag
@runs_option
def combine_adapters(
    adapters: tuple[str, ...],
    weights: list[float],
    dry_run: bool,
    as_json: bool,
    parent: Path | None,
    **settings: Any,
) -> None:
    """Make one adapter of several of one base (runs, tags or folders), weighted; the base itself is not needed."""
    from launcher.runs.adapters import combine_request, derive

    asked = combine_request(adapters, parent, weights=weights, **settings)
    if dry_run:
        print_json({"schema": 1, **asked})
        return
    made = derive(asked)
    show_notices(made["notices"])
    if as_json:
        print_json({"schema": 1, **made})
    else:
        click.echo(f"wrote {made['path']}: {made['made']}; rank {made['rank']}, {made['modules']} modules")
    _next(made)


def _next(made: dict[str, Any]) -> None:
    """By name where it has one."""
    name = made["name"] or made["path"]
    click.echo(f"Next: launcher merge {name} · launcher export {name} --for vllm · launcher serve {name}", err=True)


@command.command(name="reduce")
@click.argument("adapter")
@click.option("--rank", type=click.IntRange(min=1), required=True, help="Of the result.")
@name_option
@target_option
@click.option("--prove", is_flag=True, help="Load both on the base and say the largest difference of their logits.")
@click.option("--base", type=click.Path(path_type=Path), help="Folder of the base, for --prove [the adapter's].")
@click.option("--trust-base", is_flag=True, help="Take the base although the adapter does not say which it was.")
@dry_run_option
@json_flag
@runs_option
def reduce_adapter(adapter: str, rank: int, dry_run: bool, as_json: bool, parent: Path | None, **settings: Any) -> None:
    """Make the nearest adapter of a lower rank, and say module by module what it loses."""
    from launcher.runs.adapters import derive, reduce_request

    asked = reduce_request(adapter, parent, rank=rank, **settings)
    if dry_run:
        print_json({"schema": 1, **asked})
        return
    made = derive(asked)
    show_notices(made["notices"])
    if as_json:
        print_json({"schema": 1, **made})
    else:
        _losses(made)
    _next(made)


def _losses(made: dict[str, Any]) -> None:
    """The modules that lose most, the whole, and the logits where they were compared."""
    modules = sorted(made["modules"].items(), key=lambda one: -one[1])
    click.echo(f"wrote {made['path']}: {made['made']}")
    click.echo(f"relative error of the products: {made['relative_error']:.2%} over all {len(modules)} modules; most in")
    for module, error in modules[:_MOST_LOST]:
        click.echo(f"  {error:7.2%}  {module}")
    if made["proof"]:
        worst, share = made["proof"]["logits_difference"], made["proof"]["share_of_largest"]
        click.echo(f"largest difference of logits: {worst:.3g}, {share:.2%} of the largest")
    else:
        click.echo("logits not compared (--prove)")


@command.command(name="sign")
@click.argument("name", metavar="FOLDER")
@click.option(
    "--key",
    type=click.Path(path_type=Path, exists=True),
    help="SSH key to sign with: a private key, or an agent's public one.",
)
@dry_run_option
@json_flag
@runs_option
def sign_folder(name: str, key: Path | None, dry_run: bool, as_json: bool, parent: Path | None) -> None:
    """List the sha256 of every file of an adapter (run, tag, folder) or of a merged or exported one, and sign it."""
    from launcher.runs.adapters import artifact_folder
    from launcher.runs.signing import SUMS, sign

    folder = artifact_folder(name, parent)
    if dry_run:
        click.echo(f"would write {folder / SUMS}{' and its signature' if key else ''}")
        return
    files = sign(folder, key=key)
    if as_json:
        print_json({"schema": 1, "path": str(folder), "files": files, "signed": key is not None})
    else:
        click.echo(f"{folder / SUMS}: {files} files{', signed' if key else ', not signed (--key)'}")
    click.echo(f"Next: launcher adapters verify {folder}{' --signers FILE' if key else ''}", err=True)


@command.command(name="verify")
@click.argument("name", metavar="FOLDER")
@click.option("--signers", type=click.Path(path_type=Path, exists=True), help="ssh-keygen's file of allowed signers.")
@json_flag
@runs_option
def verify_folder(name: str, signers: Path | None, as_json: bool, parent: Path | None) -> None:
    """Compare every file with the list that was signed, and with --signers the signature; exit 7 when it differs."""
    from launcher.runs.adapters import artifact_folder
    from launcher.runs.signing import verify

    folder = artifact_folder(name, parent)
    found = verify(folder, signers=signers)
    if as_json:
        print_json({"schema": 1, "path": str(folder), "files": found.files, "signer": found.signer})
        return
    who = f", signed by {found.signer}" if found.signer else "; the signature was not looked at (--signers)"
    click.echo(f"{folder}: {found.files} files as listed{who}")
