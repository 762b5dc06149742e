"""A hub on loopback with a tiny model and a data set, and `launcher stage` against it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launcher.cli import main
from tests.hub import FakeHub
from tests.tiny import make_chat_rows, make_model_dir

MODEL, DATA = "acme/tiny", "acme/chats"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a data set, as their owner would upload them."""
    folder = tmp_path_factory.mktemp("published")
    make_model_dir(folder / "model")
    (folder / "model" / "README.md").write_text("a model card, which no run reads\n")
    (folder / "model" / "pytorch_model.bin").write_bytes(b"pickled copy of the weights")
    (folder / "data").mkdir()
    make_chat_rows(folder / "data" / "train.jsonl", n=40)
    make_chat_rows(folder / "data" / "test.jsonl", n=8, seed=1)
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub of this test, asked instead of the public one; no token anywhere."""
    import huggingface_hub.constants

    for name in ("model", "data"):
        shutil.copytree(published / name, tmp_path / "hub" / name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "LAUNCHER_VENV", "LAUNCHER_SITE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LAUNCHER_RUNS", str(tmp_path / "runs"))
    hub = FakeHub()
    hub.add("model", MODEL, tmp_path / "hub" / "model")
    hub.add("dataset", DATA, tmp_path / "hub" / "data")
    with hub.serving():
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that names model and data by id."""
    return write_recipe(tmp_path, MODEL, DATA)


def write_recipe(tmp_path: Path, model: str, data: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: staged\nmodel: {{name_or_path: {model}}}\nmethod: lora\n"
        f"data: {{train: [{{path: {data}}}], max_seq_length: 256}}\n"
        "train: {global_batch_size: 4, max_steps: 2}\nslurm: {site: local}\nwandb: {mode: disabled}\n"
    )
    return path


def launch(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def stage(recipe: Path, *arguments: str) -> dict[str, Any]:
    """Stage successfully; returns what --json prints."""
    done = launch("stage", recipe, "--json", *arguments)
    assert done.exit_code == 0, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def folder_of(document: dict[str, Any], kind: str = "model") -> Path:
    return next(Path(item["path"]) for item in document["items"] if item["kind"] == kind)
