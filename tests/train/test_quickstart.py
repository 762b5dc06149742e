"""`scripts/quickstart --fast`, as a newcomer would type it: the whole path from an empty folder to an answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh checkout: the tracked folders the quickstart needs, and nothing that earlier runs made."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launcher", "recipes", "slurm", "scripts"):
        shutil.copytree(TOP / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def output(checkout: Path) -> str:
    """What the quickstart prints, with packages that are installed already and no home folder to write to."""
    unset = {"LAUNCHER_RUNS", "PYTHONPATH", "HF_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [checkout / "scripts" / "quickstart", "--fast"],
        env=environment | {"LAUNCHER_PYTHON": sys.executable, "HOME": "/nonexistent"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=840,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_it_runs_the_commands_that_users_type(output: str) -> None:
    """Both recipes are planned, then submitted, and each command is shown before its output."""
    typed = re.findall(r"^\$ launcher (\w+) recipes/([\w-]+)\.yaml", output, re.MULTILINE)
    assert typed == [(verb, name) for name in ("quickstart-base", "tiny-cpu") for verb in ("plan", "submit")]


def test_both_methods_learnt_something(checkout: Path, output: str) -> None:
    """Full fine-tuning and LoRA each end with a lower validation loss than they began with."""
    for name in ("quickstart-base", "tiny-cpu"):
        (result,) = (checkout / "runs").glob(f"{name}-*/result.json")
        losses = json.loads(result.read_text(encoding="utf-8"))["validation_loss"]
        assert losses["after"] < losses["before"] - 0.1, name


def test_it_ends_with_the_comparison(checkout: Path, output: str) -> None:
    """Losses, an answer before and after, and where the adapter lies: the last things a newcomer sees."""
    tail = output[output.index("5. What changed") :]
    assert re.search(r"^validation loss   before \d+\.\d+   after \d+\.\d+$", tail, re.MULTILINE)
    assert all(re.search(rf"^  {when}  ", tail, re.MULTILINE) for when in ("before", "after ", "docs  "))
    adapter = re.search(r"^adapter +(\S+)$", tail, re.MULTILINE)
    assert adapter is not None
    assert (checkout / adapter[1] / "adapter_model.safetensors").is_file()


def test_everything_it_made_lies_in_ignored_folders(checkout: Path, output: str) -> None:
    """A quickstart leaves `git status` clean."""
    made = {path.name for path in checkout.iterdir()} - {"launcher", "recipes", "slurm", "scripts"}
    assert made == {"quickstart", "runs"}
