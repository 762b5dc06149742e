"""metrics.jsonl is always there; Weights & Biases mirrors it when it can and never stops training when it cannot."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.folder import RunFolder, read_json_lines
from launcher.worker import tracking
from launcher.worker.tracking import NullTracker, make_tracker
from tests.tiny import make_recipe

DEAD_SERVER = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", "tiny")


def _recipe(tmp_path: Path, **wandb: Any) -> Any:
    return make_recipe(tmp_path, wandb=wandb)


def _train(recipe: Any, run: RunFolder, steps: range = range(1, 4)) -> None:
    tracker = make_tracker(recipe, run, rank=0)
    for step in steps:
        tracker.log(step, loss=5.0 - step, learning_rate=1e-3)
    tracker.event("evaluated", validation_loss=3.25)
    tracker.finish("completed")


def _files(run: RunFolder) -> list[Path]:
    return sorted(run.path.rglob("*.wandb"))


def test_metrics_file_has_every_step_and_event(tmp_path: Path, run: RunFolder) -> None:
    """Each log and event is one line, with the names the caller used."""
    _train(_recipe(tmp_path, mode="disabled"), run)
    lines = list(read_json_lines(run.metrics))
    assert [(line["step"], line["loss"]) for line in lines if "step" in line] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert [line["event"] for line in lines if "event" in line] == ["evaluated", "finished"]
    assert not _files(run)


def test_disabled_never_imports_wandb(tmp_path: Path, run: RunFolder) -> None:
    """A run without W&B does not pay for importing it."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom launcher.runs.folder import RunFolder\n"
        "from launcher.worker.tracking import make_tracker\nfrom tests.tiny import make_recipe\n"
        f"recipe = make_recipe(Path({str(tmp_path)!r}), wandb={{'mode': 'disabled'}})\n"
        f"make_tracker(recipe, RunFolder(Path({str(run.path)!r})), 0).log(1, loss=1.0)\n"
        "sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_other_ranks_write_nothing(tmp_path: Path, run: RunFolder) -> None:
    """Only rank 0 records."""
    tracker = make_tracker(_recipe(tmp_path, mode="offline"), run, rank=1)
    tracker.log(1, loss=1.0)
    tracker.event("evaluated")
    tracker.finish("completed")
    assert isinstance(tracker, NullTracker)
    assert not run.metrics.exists()
    assert not _files(run)


def test_numbers_that_json_cannot_say_become_null(tmp_path: Path, run: RunFolder) -> None:
    """A diverged loss leaves a line any JSON reader accepts; tensors and numpy scalars are numbers."""
    import numpy as np

    tracker = make_tracker(_recipe(tmp_path, mode="disabled"), run, rank=0)
    tracker.log(1, loss=math.nan, grad_norm=math.inf, tokens=np.int64(7))
    line = json.loads(run.metrics.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (line["loss"], line["grad_norm"], line["tokens"]) == (None, None, 7)


def test_offline_run_is_really_written(tmp_path: Path, run: RunFolder) -> None:
    """wandb's own reader finds id, project, configuration, step and the last loss in the offline file."""
    run.plan.write_text(json.dumps({"model": {"name": "tiny"}, "chosen": {"zero_stage": 0, "nodes": 41}}))
    _train(_recipe(tmp_path, mode="offline", project="proj", group="grp", tags=("tag-a",)), run)
    (file,) = _files(run)
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", str(file.parent)]
    seen = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    rows = {tuple(line.split(maxsplit=1)) for line in seen.splitlines() if len(line.split(maxsplit=1)) == 2}
    assert ("run", f"{run.run_id} ({run.run_id})") in rows
    assert {("project", "proj"), ("step", "3"), ("loss", "2")} <= rows
    assert {("recipe.data.max_seq_length", "128"), ("plan.chosen.nodes", "41")} <= rows
    content = file.read_bytes()
    assert b"grp" in content
    assert b"tag-a" in content


@pytest.mark.parametrize("log_model", [True, False])
def test_the_artifact_goes_to_wandb_only_where_asked(tmp_path: Path, run: RunFolder, log_model: bool) -> None:
    """wandb.log_model hands over the adapter; without it the files stay in the run folder alone."""
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    tracker = make_tracker(_recipe(tmp_path, mode="offline", log_model=log_model), run, rank=0)
    tracker.log(1, loss=2.0)
    tracker.artifact(run.adapter)
    tracker.finish("completed")
    (written,) = _files(run)
    assert (f"adapter-{run.run_id}".encode() in _flushed(written)) is log_model


def _flushed(written: Path) -> bytes:
    """What wandb's helper process has written once the run's end is in the file; it writes after finish returned."""
    deadline = time.monotonic() + 60
    while b"loss" not in (content := written.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"loss" in content, f"{written} was never flushed"
    return content


def test_second_attempt_keeps_the_id(tmp_path: Path, run: RunFolder) -> None:
    """A restarted job records under the same run id and goes on from the trainer's step."""
    recipe = _recipe(tmp_path, mode="offline")
    _train(recipe, run)
    first = _files(run)
    # wandb names folders by the second; real attempts are minutes apart.
    first[0].parent.rename(first[0].parent.with_name("offline-run-20200101_000000-" + run.run_id))
    _train(recipe, run, range(4, 6))
    assert [file.name for file in _files(run)] == [f"run-{run.run_id}.wandb"] * 2
    assert [line["step"] for line in read_json_lines(run.metrics) if "step" in line] == [1, 2, 3, 4, 5]


def test_nothing_of_the_machine_is_recorded(tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment value, command line or host name reaches the files, only what was logged."""
    import platform

    monkeypatch.setenv("SOME_TOKEN", "canary-in-environment")
    monkeypatch.setattr(sys, "argv", ["train", "canary-in-argv"])
    _train(_recipe(tmp_path, mode="offline"), run)
    content = b"".join(path.read_bytes() for path in (run.path / "wandb").rglob("*") if path.is_file())
    assert b"max_seq_length" in content
    assert b"canary" not in content
    assert platform.node().encode() not in _files(run)[0].read_bytes()


def test_unreachable_server_falls_back_to_offline(
    tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a key but no network, training waits for the time-out at most, says so once, and records offline."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", DEAD_SERVER)
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 2.0)
    _train(_recipe(tmp_path, mode="auto"), run)
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "cannot be reached" in warnings[0]
    assert [file.parent.name.startswith("offline-run-") for file in _files(run)].count(True) == 1
    assert len(list(read_json_lines(run.metrics))) == 5
    found = [p for p in run.path.rglob("*") if p.is_file() and b"0123456789" * 4 in p.read_bytes()]
    assert not found, "the key was written to the run folder"


def test_online_without_a_key_does_not_ask(tmp_path: Path, run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    """A job never waits at a prompt for a key."""
    _train(_recipe(tmp_path, mode="online"), run)
    assert "no key" in capfd.readouterr().err
    assert len(_files(run)) == 1


def test_training_without_the_package(
    tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where wandb is not installed there is one warning and metrics.jsonl."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    _train(_recipe(tmp_path, mode="offline"), run)
    assert capfd.readouterr().err.count("warning:") == 1
    assert len(list(read_json_lines(run.metrics))) == 5


class FakeBrokenRun:
    """A wandb run whose service died."""

    def log(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("service process is gone")


def test_mirror_that_breaks_later_is_dropped(tmp_path: Path, run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    """A mirror that fails in the middle of training costs one warning and no line of the file."""
    tracker = tracking.FileTracker(run.metrics, mirror=tracking.WandbMirror(FakeBrokenRun()))
    for step in (1, 2, 3):
        tracker.log(step, loss=1.0)
    tracker.finish("completed")
    assert capfd.readouterr().err.count("warning:") == 1
    assert len(list(read_json_lines(run.metrics))) == 4


def test_metrics_file_that_cannot_be_written_does_not_stop_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A full or missing disk costs a warning, not the run."""
    tracker = tracking.FileTracker(tmp_path / "gone" / "metrics.jsonl")
    tracker.log(1, loss=1.0)
    tracker.log(2, loss=1.0)
    assert capfd.readouterr().err.count("warning:") == 1


@pytest.mark.parametrize(
    ("netrc_text", "environ", "mode"),
    [
        ("", {}, "offline"),
        ("", {"WANDB_API_KEY": "k"}, "online"),
        ("machine api.wandb.ai login user password k\n", {}, "online"),
        ("machine elsewhere.example login user password k\n", {}, "offline"),
        ("", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
    ],
)
def test_auto_mode(tmp_path: Path, netrc_text: str, environ: dict[str, str], mode: str) -> None:
    """Auto is online exactly where wandb can log in without asking, unless WANDB_MODE says otherwise."""
    path = tmp_path / "netrc"
    path.write_text(netrc_text)
    path.chmod(0o600)
    recipe = _recipe(tmp_path, mode="auto")
    assert tracking.wandb_mode(recipe, {"NETRC": str(path), **environ}) == mode
