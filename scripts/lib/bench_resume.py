"""What `scripts/bench checkpoint` measures of a resume: from the start of the process to the end of its first step.

One rank, a tiny model, the worker as a job starts it. The same checkpoint stands for an early and for a late step: what
is trained is beside the point, finding the place in the data is not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from launcher.runs.folder import RunFolder, read_json_lines, write_json
from tests.tiny import make_recipe
from tests.train.runs import candidate_for, make_run

ROOT = Path(__file__).resolve().parents[2]
EARLY, LATE = 10, 50_000
TIMES = 3
ROWS = 1_000_000
"""Of the data set on which finding the place is timed by itself."""
TIMEOUT_S = 600


def measure(home: Path) -> Iterator[dict[str, Any]]:
    """A row for each step, with the load average of the machine.

    Raises:
        RuntimeError: the worker failed; with its last line.
    """
    home.mkdir(parents=True)
    saving = {"save_minutes": None, "save_steps": EARLY, "background": False}
    recipe = make_recipe(home, method="lora", train={"max_steps": 2 * LATE}, checkpoint=saving)
    first = make_run(recipe, candidate_for(1, 0))
    _work(first, stop_after=EARLY + 1)
    for step in (EARLY, LATE):
        found = [_resume(first, home / f"{step}-{number}", step) for number in range(TIMES)]
        row = {name: [each[name] for each in found] for name in ("first_step_s", "resumed_s")}
        yield {"point": f"resume-{step}", "step": step, **row, "place_s": place_s(step), "load_average": _load()}


def _load() -> float:
    return os.getloadavg()[0]


def _resume(first: RunFolder, parent: Path, step: int) -> dict[str, float]:
    run = RunFolder(parent / first.run_id)
    shutil.copytree(first.path, run.path)
    _advance(run, step)
    run.attempts.unlink()
    seconds = _work(run, stop_after=step + 1)
    resumed = next(line for line in read_json_lines(run.attempts) if line["event"] == "resumed")
    if resumed["step"] != step:
        raise RuntimeError(f"it went on after step {resumed['step']}, not after {step}")
    shutil.rmtree(parent)
    return {"first_step_s": seconds, "resumed_s": float(resumed["seconds"])}


def _work(run: RunFolder, *, stop_after: int) -> float:
    """Seconds of a worker that ends as soon as it has trained a step."""
    faults = f"at=after_step,step={stop_after},do=exit0,always"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LAUNCHER_FAULT": faults}
    words = [sys.executable, "-m", "launcher.worker.main", str(run.path)]
    began_s = time.monotonic()
    ran = subprocess.run(words, env=environ, text=True, capture_output=True, timeout=TIMEOUT_S, check=False)
    seconds = time.monotonic() - began_s
    steps = [line["step"] for line in read_json_lines(run.metrics) if "loss" in line]
    if ran.returncode or stop_after not in steps:
        raise RuntimeError((ran.stderr.strip().splitlines() or ["no word"])[-1])
    return seconds


def _advance(run: RunFolder, step: int) -> None:
    """Let the checkpoint of step EARLY be one of `step`."""
    import torch

    from launcher.worker.manifest import MANIFEST, read_manifest
    from launcher.worker.snapshot import write_file

    old, new = run.checkpoint(EARLY), run.checkpoint(step)
    if new != old:
        old.rename(new)
    state = torch.load(new / "state.pt", weights_only=True)
    state["memory"] |= {"step": step, "evaluated_step": 0}
    (new / "state.pt").unlink()
    manifest = read_manifest(new)
    files = manifest["files"] | {"state.pt": write_file(new / "state.pt", state)}
    write_json(new / MANIFEST, manifest | {"step": step, "files": files})


def place_s(step: int) -> float:
    """Seconds to find the rows of a step in a data set of a million, without having found any before."""
    from launcher.worker.packing import Order

    found = []
    for _ in range(TIMES):
        began_s = time.monotonic()
        Order(rows=ROWS, global_batch=64, seed=1).indices(step)
        found.append(time.monotonic() - began_s)
    return median(found)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; nothing without rows."""
    if not rows:
        return ""
    lines = [
        "## From the start of the process to its first step",
        "",
        "One rank, a tiny model: imports, checking and loading a checkpoint, finding the place in the data, one step.",
        f"Place: finding the rows of that step in a data set of {ROWS:,} rows, by itself. Medians of {TIMES}.",
        "",
        "| resumed after step | checkpoint loaded after s | first step done after s | place s | load |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: row.get("step", 0)):
        if row.get("failed"):
            lines.append(f"| {row['point']} | failed: {str(row['failed'])[:80].replace('|', '/')} ||||")
            continue
        cells = [f"{median(row['resumed_s']):.1f}", f"{median(row['first_step_s']):.1f}", f"{row['place_s']:.3f}"]
        lines.append(f"| {row['step']:,} | " + " | ".join(cells) + f" | {row['load_average']:.1f} |")
    return "\n".join([*lines, ""])
