"""The worker on a CUDA GPU, from `launcher submit --local` to a verified result.

One command: `python -m pytest tests/gpu` in an environment with the `train` extra and a GPU. Anywhere else every
test skips and says why; scripts/test does not run this folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_chat_rows, make_model_dir

TOP = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here (torch.cuda.is_available() is False)"),
]

RECIPE = """
name: gpu
model: {name_or_path: model}
lora: {r: 4, lora_dropout: 0.0}
data: {train: [chat.jsonl], validation: 0.1, max_seq_length: 128}
train: {global_batch_size: 4, per_device_train_batch_size: 2, max_steps: 6, learning_rate: 1e-3, logging_steps: 1}
slurm: {site: local, nodes: 1, gpus_per_node: 1}
wandb: {mode: disabled}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, chats and a recipe."""
    folder = tmp_path_factory.mktemp("gpu")
    make_model_dir(folder / "model")
    make_chat_rows(folder / "chat.jsonl", 200, 0)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def _train(folder: Path, *overrides: str) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Submit on this machine; returns result.json, the logged steps and the plan's choice."""
    command = [sys.executable, "-m", "launcher.cli", "submit", "recipe.yaml", "--local", *overrides]
    environment = os.environ | {"PYTHONPATH": str(TOP), "LAUNCHER_RUNS": "runs"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = max((folder / "runs").glob("gpu-*"), key=lambda path: path.stat().st_mtime)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    chosen = json.loads((run / "plan.json").read_text())["chosen"]
    return result, [line for line in metrics if "loss" in line], chosen


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_method_trains_and_its_artifact_has_the_trained_loss(folder: Path, method: str) -> None:
    """bf16 on plain torch: six steps, a finite falling loss, and an artifact that was loaded again and agrees."""
    result, steps, chosen = _train(folder, f"method={method}", "deepspeed.stage=0")
    assert chosen["gpu"] != "cpu"
    assert chosen["precision"] in ("bf16", "fp16")
    assert result["artifact"]["loss_check"] == "equal"
    assert steps[-1]["loss"] < steps[1]["loss"]


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_the_losses_of_plain_torch(folder: Path, stage: int) -> None:
    """In fp32 ZeRO changes where states lie, not what is computed."""
    plain = _train(folder, "method=full", "train.precision=fp32", "deepspeed.stage=0")[1]
    sharded = _train(folder, "method=full", "train.precision=fp32", f"deepspeed.stage={stage}")[1]
    assert [step["loss"] for step in sharded] == pytest.approx([step["loss"] for step in plain], rel=1e-4)


def test_peak_memory_is_logged_beside_the_plan(folder: Path) -> None:
    """The allocator's peak reaches metrics.jsonl, so that `launcher score RUN` can compare it."""
    _, steps, chosen = _train(folder, "method=lora", "deepspeed.stage=0")
    peak = max(step["peak_bytes"] for step in steps)
    assert 0 < peak < 2 * chosen["memory"]["device_bytes"]["high"]
