"""`launcher merge`: a run's adapter and its base become one model."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.verbs.arguments import json_flag, print_json, run_argument, runs_option


@click.command(name="merge")
@run_argument
@click.option("--base", type=click.Path(path_type=Path), help="Folder of the base [the one the adapter names].")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the merged weights [as the base's].")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write [RUN/merged].")
@click.option("--trust-base", is_flag=True, help="Take the base although the adapter does not say which it was.")
@click.option("--whole", is_flag=True, help="Merge in memory: AdaLoRA, fused experts, biases, replaced modules.")
@click.option("--dry-run", is_flag=True, help="Check everything that needs no weights; write nothing.")
@json_flag
@runs_option
def command(
    run: str,
    base: Path | None,
    dtype: str | None,
    output: Path | None,
    trust_base: bool,
    whole: bool,
    dry_run: bool,
    as_json: bool,
    parent: Path | None,
) -> None:
    """Merge shard by shard in bounded memory, prove the result and write it with tokenizer and model card.

    RUN is a run, an adapter's name, tag or folder. A QLoRA base is rounded to 4 bits and back first, as in training.
    """
    from launcher.runs import adapters

    asked = adapters.merge_request(run, parent, base=base, dtype=dtype, output=output, trust_base=trust_base) | {
        "whole": whole
    }
    if dry_run:
        print_json({"schema": 1, **asked})
        return
    made = adapters.merge(asked)
    if as_json:
        print_json({"schema": 1, **made})
        return
    proof = made["proof"]
    click.echo(f"merged {made['matrices']} matrices into {made['path']} ({made['bytes'] / 1e9:.2f} GB)")
    click.echo(
        f"largest difference of {proof['compared']} from base and adapter together: {proof['difference']:.1e} "
        f"of the largest (limit {proof['limit']:g} in {proof['dtype']})"
    )
    click.echo(f"Next: vllm serve {made['path']} · launcher adapters sign {made['path']}", err=True)
