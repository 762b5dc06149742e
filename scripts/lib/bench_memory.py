"""`scripts/bench memory`: the planner's peak beside the peak of real steps of our own worker.

Every point of the grid is planned by `make_plan` and measured by `bench_step.py` in fresh processes, one per rank.
Predictions and measurements share no code. A point that fails is a row too, with its error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from launcher.errors import DoesNotFitError, LauncherError
from launcher.facts.dataset import DatasetFacts
from launcher.facts.model import model_shape
from launcher.facts.probe import probe_machine
from launcher.facts.site import Site
from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.plan import Estimate, Plan
from launcher.planning.search import make_plan
from launcher.recipe.schema import (
    DataSection,
    DataSource,
    DeepSpeedSection,
    LoraSection,
    ModelSection,
    Recipe,
    SlurmSection,
    TrainSection,
)

ROOT = Path(__file__).resolve().parents[2]
STEP = Path(__file__).with_name("bench_step.py")
GIB = 2**30
TIMEOUT_S = 900
CPU_MODEL = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
"""17 M parameters: large enough that a step's tensors outweigh its bookkeeping, small enough for a laptop."""
CUDA_MODELS = ("Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-3B", "meta-llama/Llama-3.1-8B")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run of the grid; what is not said is the planner's choice."""

    model: str
    method: str
    stage: int
    ranks: int
    checkpointing: bool
    micro_batch: int
    seq_len: int
    packing: bool = False
    precision: str = "auto"
    accumulation: int = 1
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """Such as `lora-z0x1-ckpt-2x512`."""
        kept = "ckpt" if self.checkpointing else "kept"
        extra = ("-packed" if self.packing else "") + ("-dropout" if self.dropout else "")
        extra += f"-{self.precision}" if self.precision != "auto" else ""
        extra += f"-acc{self.accumulation}" if self.accumulation > 1 else ""
        model = self.model.rpartition("/")[2]
        return f"{model}-{self.method}-z{self.stage}x{self.ranks}-{kept}-{self.micro_batch}x{self.seq_len}{extra}"


def grid(device: str) -> Iterator[Point]:
    """What is measured: method x ZeRO x checkpointing x batch x sequence, thinned to what can differ."""
    if device == "cuda":
        yield from _cuda_grid()
        return
    common = {"model": "cpu-17m", "micro_batch": 2, "seq_len": 512}
    for stage, ranks in ((0, 1), (1, 2), (2, 2), (3, 2)):
        for checkpointing in (False, True):
            yield Point(method="full", stage=stage, ranks=ranks, checkpointing=checkpointing, **common)
    for stage, ranks in ((0, 1), (3, 2)):
        for checkpointing in (False, True):
            yield Point(method="lora", stage=stage, ranks=ranks, checkpointing=checkpointing, **common)
    yield Point(method="qlora", stage=0, ranks=1, checkpointing=True, **common)
    yield Point(method="lora", stage=0, ranks=1, checkpointing=False, dropout=0.1, **common)
    yield Point(method="full", stage=0, ranks=2, checkpointing=True, accumulation=2, **common)
    yield Point(method="full", stage=1, ranks=2, checkpointing=True, accumulation=2, **common)
    yield Point(method="full", stage=2, ranks=2, checkpointing=True, accumulation=2, **common)
    single = {"model": "cpu-17m", "method": "full", "stage": 0, "ranks": 1, "checkpointing": False}
    yield Point(**single, micro_batch=8, seq_len=256)
    yield Point(**single, micro_batch=1, seq_len=2048)
    yield Point(**single, micro_batch=2, seq_len=512, packing=True)
    yield Point(**single, micro_batch=2, seq_len=512, precision="bf16")
    yield Point(**single, micro_batch=1, seq_len=64)


def _cuda_grid() -> Iterator[Point]:
    """One GPU: what one rank of any stage holds differs by shards alone, which is arithmetic."""
    for model in CUDA_MODELS:
        small = model == CUDA_MODELS[0]
        for method in ("full", "lora", "qlora"):
            if method == "full" and "8B" in model:
                continue
            for checkpointing in (False, True):
                for micro_batch, seq_len in ((1, 2048), (4, 2048), (1, 8192)):
                    common = {"model": model, "method": method, "ranks": 1, "checkpointing": checkpointing}
                    yield Point(**common, stage=0, micro_batch=micro_batch, seq_len=seq_len)
                    if micro_batch == 4:
                        yield Point(**common, stage=0, micro_batch=micro_batch, seq_len=seq_len, packing=True)
        if small:
            for stage in (1, 2, 3):
                yield Point(
                    model=model, method="full", stage=stage, ranks=1, checkpointing=True, micro_batch=4, seq_len=2048
                )


# ---------------------------------------------------------------- predicted


def recipe_of(point: Point, folder: Path) -> Recipe:
    """The point as a recipe: nothing is left to the planner that the grid varies."""
    return Recipe(
        name="bench",
        model=ModelSection(name_or_path=str(folder)),
        data=DataSection(
            train=(DataSource(path="random/tokens"),), max_seq_length=point.seq_len, packing=point.packing
        ),
        method=point.method,
        lora=LoraSection(r=16, lora_alpha=32.0, lora_dropout=point.dropout),
        train=TrainSection(
            global_batch_size=point.micro_batch * point.accumulation * point.ranks,
            per_device_train_batch_size=point.micro_batch,
            gradient_checkpointing=point.checkpointing,
            precision=point.precision,
            learning_rate=1e-4,
            max_steps=3,
        ),
        deepspeed=DeepSpeedSection(stage=point.stage, offload_optimizer="none", offload_param="none"),
        slurm=SlurmSection(nodes=1, gpus_per_node=point.ranks),
    )


def predict(recipe: Recipe, site: Site) -> Plan:
    """The plan of one point, whether it fits or not."""
    tokens = recipe.data.max_seq_length
    data = DatasetFacts(
        rows=1000, tokens=1000 * tokens, basis="assumed", max_tokens=tokens, mean_tokens=tokens, validation_rows=0
    )
    try:
        return make_plan(recipe, model_shape(recipe.model), data, site)
    except DoesNotFitError as error:
        plan: Plan = error.plan
        return plan


def site_of(device: str, ranks: int) -> Site:
    """This machine, as if it ran so many ranks."""
    machine = probe_machine()
    known = {key: machine[key] for key in ("cpus_per_node", "mem_bytes_per_node")}
    gpu = str(machine.get("gpu", "cpu")) if device == "cuda" else "cpu"
    return Site(name="bench", executor="local", gpu=gpu, gpus_per_node=ranks, max_nodes=1, request_gpus=False, **known)


# ---------------------------------------------------------------- measured


def make_folder(model: str, device: str, parent: Path) -> Path:
    """A folder with config.json and random weights of that shape; made once per model."""
    folder = parent / model.replace("/", "--")
    if folder.exists():
        return folder
    process = _process({})
    process.communicate(json.dumps({"make": str(folder), "config": config_of(model), "device": device}))
    if process.returncode:
        raise RuntimeError(_last_line(process))
    return folder


def config_of(model: str) -> dict[str, Any]:
    """What config.json of a measured model holds."""
    if model == "cpu-17m":
        return CPU_MODEL
    from launcher.planning.trace import model_config

    return model_config(ModelSection(name_or_path=model))


def measure(plan: Plan, recipe: Recipe, device: str) -> dict[str, Any]:
    """Peaks of every rank over three optimizer steps; the largest counts.

    Raises:
        RuntimeError: a rank failed; the message ends with its last line.
    """
    candidate = plan.chosen.candidate
    ds_config = deepspeed_config(candidate) if candidate.zero_stage else None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(candidate.world_size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(candidate.world_size)}
        request = {
            "model": recipe.model.name_or_path,
            "candidate": asdict(candidate),
            "ds_config": ds_config,
            "device": device,
            "vocab": model_shape(recipe.model).vocab,
        }
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        process = _process(place)
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        ranks.append(process)
    return _collect(ranks)


def _process(environment: dict[str, str]) -> Any:
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
    process = subprocess.Popen(
        [sys.executable, str(STEP)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    process.log = log  # type: ignore[attr-defined]
    return process


def _collect(ranks: list[Any]) -> dict[str, Any]:
    answers, problem = [], ""
    deadline = time.monotonic() + TIMEOUT_S
    for process in ranks:
        try:
            process.stdin = None
            out, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            problem = problem or f"no answer within {TIMEOUT_S} s"
            continue
        if process.returncode:
            problem = problem or _last_line(process)
            continue
        answers.append(json.loads(out.strip().splitlines()[-1]))
    if problem:
        raise RuntimeError(problem)
    return dict(max(answers, key=lambda answer: answer["peak_bytes"]))


def _last_line(process: Any) -> str:
    process.log.seek(0)
    said = [line for line in process.log.read().splitlines() if line.strip()]
    return str(said[-1]) if said else f"exit {process.returncode}"


# ---------------------------------------------------------------- rows


def row_of(point: Point, chosen: Estimate, measured: dict[str, Any] | None, error: str | None) -> dict[str, Any]:
    """One line of the file: the point, what was predicted, what was measured."""
    peak = chosen.memory.peak_bytes
    found = measured or {}
    relative = peak.expected / found["peak_bytes"] - 1 if measured else None
    return {
        "point": point.name,
        **asdict(point),
        "precision": chosen.candidate.precision,
        "gpu": chosen.candidate.gpu,
        "optim": chosen.candidate.optim,
        "attn_implementation": chosen.candidate.attn_implementation,
        "predicted": {
            "low_bytes": peak.low,
            "expected_bytes": peak.expected,
            "high_bytes": peak.high,
            "terms_bytes": chosen.memory.terms_bytes,
            "binding": chosen.memory.binding,
            "fits": chosen.fits,
        },
        "measured": found or None,
        "error": relative,
        "failed": error,
    }


def run_point(point: Point, device: str, folders: Path) -> dict[str, Any]:
    """Predict, measure, compare."""
    recipe = recipe_of(point, make_folder(point.model, device, folders))
    plan = predict(recipe, site_of(device, point.ranks))
    measured, error = None, None
    try:
        measured = measure(plan, recipe, device)
    except (RuntimeError, LauncherError) as failed:
        error = str(failed)
    return row_of(point, plan.chosen, measured, error)


def machine_name(device: str) -> str:
    """What was measured on, such as `intel-xeon-platinum-8370c-2-cores` or `nvidia-h100`."""
    if device == "cuda":
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        return _slug(listed.stdout.splitlines()[0])
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    name = re.sub(r"\(.*?\)|CPU|Processor|@.*", " ", names[0]) if names else platform.machine()
    return _slug(f"{name} {os.cpu_count()} cores")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def predicted_again(row: dict[str, Any], device: str, parent: Path) -> dict[str, Any]:
    """A measured row with the prediction of today's formulas; what was measured stays as it was.

    Raises:
        ValueError: today's planner would run the point in another way, so that it has to be measured anew.
    """
    point = Point(**{field.name: row[field.name] for field in fields(Point)})
    folder = parent / point.model.replace("/", "--")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(point.model)), encoding="utf-8")
    # A row says which precision was chosen, a point which one was asked for.
    asked = "auto" if point.name != row["point"] else point.precision
    point = replace(point, precision=asked)
    chosen = predict(recipe_of(point, folder), site_of(device, point.ranks)).chosen
    fresh = row_of(point, chosen, row["measured"], row["failed"])
    changed = [key for key in ("precision", "gpu", "optim", "attn_implementation") if fresh[key] != row[key]]
    if changed:
        raise ValueError(f"{row['point']}: {', '.join(changed)} changed since it was measured; measure it again")
    return {"machine": row["machine"], "date": row["date"], **fresh}


# ---------------------------------------------------------------- table


def table(rows: list[dict[str, Any]], machine: str, date: str) -> str:
    """The rows as Markdown, with what they amount to."""
    good = [row for row in rows if row["measured"]]
    versions = good[0]["measured"]["versions"] if good else {}
    lines = [
        f"# Peak memory on {machine}, {date}",
        "",
        "Written by `scripts/bench memory`. Predicted: the planner's expected peak of one rank. Measured: the largest",
        f"rank's peak over three optimizer steps of the worker's own engine, {_how(good)}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        "| run | precision | predicted MiB | measured MiB | error | binding |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        predicted = row["predicted"]["expected_bytes"] / 2**20
        if row["measured"]:
            measured = f"{row['measured']['peak_bytes'] / 2**20:,.1f} | {row['error']:+.1%}"
        else:
            measured = f"failed: {str(row['failed'])[:80].replace('|', '/')} |"
        lines.append(
            f"| {row['point']} | {row['precision']} | {predicted:,.1f} | {measured} | {row['predicted']['binding']} |"
        )
    return "\n".join([*lines, "", _summary(good, rows), ""])


def _how(good: list[dict[str, Any]]) -> str:
    on_gpu = good and good[0]["measured"]["counter"].startswith("torch.cuda")
    return "by `torch.cuda.max_memory_allocated`" if on_gpu else "by counting live storages of real tensors"


def _summary(good: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    if not good:
        return "Nothing was measured."
    errors = [abs(row["error"]) for row in good]
    inside = sum(
        row["predicted"]["low_bytes"] <= row["measured"]["peak_bytes"] <= row["predicted"]["high_bytes"] for row in good
    )
    return (
        f"{len(good)} of {len(rows)} points measured: median absolute error {median(errors):.1%}, worst "
        f"{max(errors):.1%}, {inside} inside the predicted interval."
    )


def renew(target: Path, device: str) -> int:
    """Write a file of rows anew with today's predictions, the newest row of every point, and its table."""
    newest = {row["point"]: row for row in map(json.loads, target.read_text(encoding="utf-8").splitlines())}
    with tempfile.TemporaryDirectory(prefix="bench-") as parent:
        rows = [predicted_again(row, device, Path(parent)) for row in newest.values()]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    renewed = f"Predictions renewed with `--again` on {time.strftime('%Y-%m-%d', time.gmtime())}; nothing else changed."
    text = table(rows, rows[0]["machine"], rows[0]["date"]).rstrip("\n")
    target.with_suffix(".md").write_text(f"{text}\n\n{renewed}\n", encoding="utf-8")
    print(f"{target.name}: {_summary([row for row in rows if row['measured']], rows)}")
    return 0


def main(arguments: list[str]) -> int:
    """Run the grid, append every row as soon as it is known, write the table."""
    parser = argparse.ArgumentParser(prog="scripts/bench memory", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="points whose name contains this")
    parser.add_argument("--list", action="store_true", help="print names and stop")
    parser.add_argument(
        "--again", type=Path, help="measure nothing: renew the predictions beside a file's measurements"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder for both files")
    options = parser.parse_args(arguments)
    if options.again:
        return renew(options.again, options.device)
    points = [point for point in grid(options.device) if options.only in point.name]
    if options.list or not points:
        print("\n".join(point.name for point in points) or f"no point's name contains {options.only!r}")
        return 0 if points else 2
    machine, date = machine_name(options.device), time.strftime("%Y-%m-%d", time.gmtime())
    target = options.out / f"memory-{machine}-{date}.jsonl"
    folders = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        for point in points:
            row = {"machine": machine, "date": date, **run_point(point, options.device, folders)}
            with target.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            said = f"{row['error']:+.1%}" if row["measured"] else f"failed: {row['failed']}"
            print(f"{point.name:60s} {said}", flush=True)
    finally:
        shutil.rmtree(folders, ignore_errors=True)
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    latest = list({row["point"]: row for row in rows}.values())
    target.with_suffix(".md").write_text(table(latest, machine, date), encoding="utf-8")
    print(f"{target.name} and {target.with_suffix('.md').name} in {options.out}")
    return 1 if any(row["failed"] for row in latest) else 0
