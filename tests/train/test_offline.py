"""A staged recipe trains where there is no network at all, and nothing in it even tries to reach one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hub import FakeHub
from tests.privileges import unavailable
from tests.tiny import make_chat_rows, make_model_dir

TOP = Path(__file__).parents[2]
RECIPE = """
name: staged
model: {name_or_path: acme/tiny}
method: lora
data: {train: [{path: acme/chats}], validation: 8, max_seq_length: 128}
train: {global_batch_size: 4, max_steps: 3, per_device_train_batch_size: 2, precision: fp32}
checkpoint: {save_minutes: null}
slurm: {site: local, nodes: 1, gpus_per_node: 2}
"""


@pytest.fixture(scope="module")
def namespace() -> list[str]:
    """Begins a command in a network namespace of its own, as root or, where that is allowed, as anybody."""
    for command in (["unshare", "-n"], ["unshare", "-r", "-n"]):
        try:
            if subprocess.run([*command, "ip", "link", "set", "lo", "up"], check=False).returncode == 0:
                return command
        except FileNotFoundError:
            break
    return unavailable("no network namespace can be made here (unshare -n needs root, or unprivileged user namespaces)")


@pytest.fixture(scope="module")
def trained(namespace: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Staged with the hub there, then trained on two ranks without it; what was heard, and the run's folder."""
    folder = tmp_path_factory.mktemp("offline")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "WANDB_"))
    }
    ours = {"LAUNCHER_RUNS": folder / "runs", "LAUNCHER_CACHE": folder / "cache", "HF_HOME": folder / "empty-hub-cache"}
    environment = (
        kept | {name: str(path) for name, path in ours.items()} | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
    )
    hub = FakeHub()
    hub.add("model", "acme/tiny", make_model_dir(folder / "hub" / "model"))
    make_chat_rows(folder / "hub" / "train.jsonl", n=32)
    (folder / "hub" / "data").mkdir()
    (folder / "hub" / "train.jsonl").rename(folder / "hub" / "data" / "train.jsonl")
    hub.add("dataset", "acme/chats", folder / "hub" / "data")
    with hub.serving():
        near = {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
        run([sys.executable, "-m", "launcher.cli", "stage", str(recipe)], environment | near)
    out = folder / "out.json"
    run([*namespace, sys.executable, "-m", "tests.train.offline", str(recipe), str(out)], environment)
    found: dict[str, Any] = json.loads(out.read_text())
    return found | {"runs": folder / "runs", "cache": folder / "cache"}


def run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, env=environment, cwd=TOP, capture_output=True, text=True, check=False, timeout=700,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_staged_run_finishes_without_any_route(trained: dict[str, Any]) -> None:
    """submit, two ranks, result.json: with no way out of the machine."""
    assert trained["unreachable"]
    assert trained["exit_code"] == 0, trained["output"][-3000:]
    (result,) = trained["runs"].glob("staged-*/result.json")
    assert json.loads(result.read_text())["step"] == 3


def test_nothing_tried_to_reach_a_network(trained: dict[str, Any]) -> None:
    """Neither the hub nor, through the proxy, anything else; both listeners hear a connection that is made."""
    assert trained["control"] == {"proxy": 1, "hub": 1}
    assert trained["heard"] == {"proxy": [], "hub": []}, trained["output"][-3000:]


def test_the_job_was_told_to_stay_offline(trained: dict[str, Any]) -> None:
    """The three variables stand in the job's request; the resolved recipe names folder and commit."""
    (folder,) = trained["runs"].glob("staged-*")
    request = json.loads((folder / "job.json").read_text())["request"]
    assert {request["env"].get(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")} == {
        "1"
    }
    (model,) = (trained["cache"] / "models" / "acme--tiny").glob("*/manifest.json")
    resolved = (folder / "recipe.resolved.yaml").read_text()
    assert str(model.parent) in resolved and f"revision: {model.parent.name}" in resolved
