"""`scripts/bench checkpoint`: how long training waits for a save, in the background or not, and what a resume takes.

Every point runs the worker's own engine and checkpoints in fresh processes, one per rank (`bench_save.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import bench_resume
from bench_memory import CPU_MODEL, Point, machine_name, predict, recipe_of, site_of

from launcher.facts.model import model_shape
from launcher.planning.deepspeed_config import deepspeed_config

ROOT = Path(__file__).resolve().parents[2]
SAVE, STEP = (Path(__file__).with_name(name) for name in ("bench_save.py", "bench_step.py"))
TIMEOUT_S = 600
RESUME = "resume"
"""How the points of a resume are called; see bench_resume.py."""
_LARGER = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
MODELS = {"17m": CPU_MODEL, "97m": CPU_MODEL | _LARGER}
"""Parameters -> configuration; with Adam in fp32 a checkpoint has 12 bytes for each of them."""


def grid() -> Iterator[tuple[str, Point]]:
    """Which engine, which method, how many parameters."""
    common = {"checkpointing": False, "micro_batch": 1, "precision": "fp32"}
    for model in MODELS:
        seq_len = 64 if model == "97m" else 128
        yield model, Point(model=model, method="full", stage=0, ranks=1, seq_len=seq_len, **common)
    yield "97m", Point(model="97m", method="lora", stage=0, ranks=1, seq_len=64, **common)
    for stage in (1, 2, 3):
        yield "17m", Point(model="17m", method="full", stage=stage, ranks=2, seq_len=128, **common)
    yield "97m", Point(model="97m", method="full", stage=2, ranks=2, seq_len=64, **common)


def run_point(point: Point, folders: Path, disk: Path) -> dict[str, Any]:
    """Plan, train, save; the medians of the saves after the first."""
    folder = _model(point.model, folders)
    recipe = recipe_of(point, folder)
    plan = predict(recipe, site_of("cpu", point.ranks))
    candidate = plan.chosen.candidate
    request = {
        "model": str(folder),
        "candidate": asdict(candidate),
        "ds_config": deepspeed_config(candidate) if candidate.zero_stage else None,
        "device": "cpu",
        "vocab": model_shape(recipe.model).vocab,
        "folder": str(disk / point.name),
    }
    (disk / point.name).mkdir(mode=0o700)
    found = _ranks(request, candidate.world_size)
    shutil.rmtree(disk / point.name)
    blocking, stall = median(found["blocking_s"]), median(found["stall_s"])
    load = os.getloadavg()[0]
    return {"point": point.name, **asdict(point), **found, "stall_share": stall / blocking, "load_average": load}


def _model(name: str, folders: Path) -> Path:
    folder = folders / name
    if not folder.exists():
        request = json.dumps({"make": str(folder), "config": MODELS[name], "device": "cpu"})
        subprocess.run([sys.executable, str(STEP)], input=request, text=True, check=True, env=_environment({}),
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    return folder


def _environment(place: dict[str, str]) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SAVE.parent)]), "OMP_NUM_THREADS": "1"} | place


def _ranks(request: dict[str, Any], world: int) -> dict[str, Any]:
    """Rank 0's answer.

    Raises:
        RuntimeError: a rank failed; with its last line.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "DS_ACCELERATOR": "cpu"}
    processes = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        process = subprocess.Popen([sys.executable, str(SAVE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=log, text=True, env=_environment(address | place))  # fmt: skip
        processes.append((process, log))
        assert process.stdin
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        process.stdin = None
    answers = []
    try:
        for process, log in processes:
            out, _ = process.communicate(timeout=TIMEOUT_S)
            log.seek(0)
            if process.returncode:
                raise RuntimeError((log.read().strip().splitlines() or ["no word"])[-1])
            answers.append(out)
    finally:
        for process, _ in processes:
            process.kill()
    return dict(json.loads(answers[0].strip().splitlines()[-1]))


def table(rows: list[dict[str, Any]], machine: str, date: str) -> str:
    """The rows as Markdown."""
    heads = ["run", "checkpoint MB", "waiting s", "stall s", "first stall s", "share", "written after s"]
    heads += ["steps beside", "slower s", "load"]
    lines = [
        f"# Saves on {machine}, {date}",
        "",
        "Written by `scripts/bench checkpoint`. Waiting: seconds a blocking save takes. Stall: seconds training stands",
        "still for one in the background (agreement, and what of the copy the next forward and backward pass do not",
        "cover); the first has the buffers' page faults too. Share:",
        "stall of waiting. Slower: how much longer the steps took that ran beside the writing, in all; here ranks and",
        "writers share the same cores, with free ones or GPUs it is less. Medians of three, of two after the first.",
        "Load: the machine's load average afterwards; above its cores where other work ran beside this.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---|" + "---:|" * (len(heads) - 1),
    ]
    for row in (row for row in rows if not row["point"].startswith(RESUME)):
        if row.get("failed"):
            lines.append(f"| {row['point']} | failed: {str(row['failed'])[:80].replace('|', '/')} |||||||||")
            continue
        cells = [
            f"{row['bytes'] / 1e6:,.0f}",
            f"{median(row['blocking_s']):.2f}",
            f"{median(row['stall_s']):.3f}",
            f"{row['first_stall_s']:.3f}",
            f"{row['stall_share']:.1%}",
            f"{median(row['background_s']):.1f}",
            f"{median(row['overlapping_steps']):.0f}",
            f"{median(row['slower_s']):.2f}",
            f"{row['load_average']:.1f}",
        ]
        lines.append(f"| {row['point']} | " + " | ".join(cells) + " |")
    resumes = bench_resume.table([row for row in rows if row["point"].startswith(RESUME)])
    return "\n".join([*lines, "", resumes] if resumes else [*lines, ""])


def measured(points: list[Point], resumes: bool, folders: Path, disk: Path) -> Iterator[dict[str, Any]]:
    """Row after row; one that failed says why."""
    for point in points:
        try:
            yield run_point(point, folders, disk)
        except (RuntimeError, subprocess.SubprocessError) as error:
            yield {"point": point.name, **asdict(point), "failed": str(error)}
    if not resumes:
        return
    try:
        yield from bench_resume.measure(folders / "resume")
    except (RuntimeError, subprocess.SubprocessError) as error:
        yield {"point": RESUME, "failed": str(error)}


def _said(row: dict[str, Any]) -> str:
    if row.get("failed"):
        return f"failed: {row['failed']}"
    if row["point"].startswith(RESUME):
        return f"{median(row['first_step_s']):.1f} s to the first step"
    return f"{row['stall_share']:.1%} of the waiting"


def main(arguments: list[str]) -> int:
    """Run the grid, append every row as soon as it is known, write the table."""
    parser = argparse.ArgumentParser(prog="scripts/bench checkpoint", description=__doc__)
    parser.add_argument("--only", default="", help="points whose name contains this")
    parser.add_argument("--list", action="store_true", help="print names and stop")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder for both files")
    parser.add_argument("--disk", type=Path, default=None, help="where checkpoints are written (default: a temporary)")
    options = parser.parse_args(arguments)
    points = [point for _, point in grid() if options.only in point.name]
    resumes = options.only in RESUME
    if options.list or not (points or resumes):
        names = [*(point.name for point in points), *([RESUME] if resumes else [])]
        print("\n".join(names) or f"no point's name contains {options.only!r}")
        return 0 if names else 2
    machine, date = machine_name("cpu"), time.strftime("%Y-%m-%d", time.gmtime())
    target = options.out / f"checkpoint-{machine}-{date}.jsonl"
    folders = Path(tempfile.mkdtemp(prefix="bench-"))
    disk = Path(tempfile.mkdtemp(prefix="bench-", dir=options.disk))
    try:
        for row in measured(points, resumes, folders, disk):
            with target.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"machine": machine, "date": date, **row}) + "\n")
            print(f"{row['point']:48s} {_said(row)}", flush=True)
    finally:
        shutil.rmtree(folders, ignore_errors=True)
        shutil.rmtree(disk, ignore_errors=True)
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    latest = list({row["point"]: row for row in rows}.values())
    target.with_suffix(".md").write_text(table(latest, machine, date), encoding="utf-8")
    print(f"{target.name} and {target.with_suffix('.md').name} in {options.out}")
    return 1 if any(row.get("failed") for row in latest) else 0
