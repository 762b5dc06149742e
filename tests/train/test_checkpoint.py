"""A checkpoint is whole or not there, and a run that resumed from one cannot be told from one that never stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import JobFailedError
from launcher.recipe.schema import Recipe
from launcher.runs.folder import RunFolder, read_json_lines
from launcher.worker.checkpoint import Checkpoints, Identity
from tests.tiny import make_recipe
from tests.train.ranks import Ranks
from tests.train.runs import candidate_for, events, losses, losses_at, make_run, train_here

STEPS = 6


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    group = Ranks(2, tmp_path_factory.mktemp("rendezvous"))
    yield group
    group.close()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def _recipe(workshop: Path, method: str, **checkpoint: Any) -> Recipe:
    saving = {"save_minutes": None, "save_steps": None, "save_total_limit": 2} | checkpoint
    return make_recipe(workshop, method=method, train={"max_steps": STEPS}, checkpoint=saving)


def _sequence(run: RunFolder) -> list[tuple[Any, ...]]:
    """What must not change by an interruption: step, loss, learning rate, gradient norm and sample ids."""
    lines = [line for line in read_json_lines(run.metrics) if line.get("loss") is not None]
    names = ("step", "loss", "learning_rate", "grad_norm", "samples", "tokens")
    return sorted(tuple(line[name] for name in names) for line in lines)


RESUMED: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "stage": 0},
    "full, ZeRO-2": {"method": "full", "stage": 2},
    "full, ZeRO-2, optimizer on CPU": {"method": "full", "stage": 2, "offload_optimizer": "cpu"},
    "full, ZeRO-3": {"method": "full", "stage": 3},
    "LoRA": {"method": "lora", "stage": 0},
    "LoRA, dropout": {"method": "lora", "stage": 0, "dropout": 0.2},
    "LoRA, 8-bit Adam": {"method": "lora", "stage": 0, "optim": "adamw_8bit"},
    "LoRA, ZeRO-2": {"method": "lora", "stage": 2},
    "LoRA, ZeRO-3, checkpointing": {
        "method": "lora",
        "stage": 3,
        "gradient_checkpointing": True,
        "checkpointing_reentrant": True,
    },
    "QLoRA": {"method": "qlora", "stage": 0},
    "QLoRA, ZeRO-3": {"method": "qlora", "stage": 3},
    "AdaLoRA": {"method": "adalora", "stage": 0},
    "DoRA, ZeRO-2": {"method": "dora", "stage": 2},
    "prompt tuning, ZeRO-3": {"method": "prompt", "stage": 3, "packing": False},
}


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_equals_an_uninterrupted_one_to_the_last_bit(
    name: str, ranks: Ranks, workshop: Path
) -> None:
    """Three steps, a stop signal on one rank, a new attempt, three steps: the sequence of six steps in one go."""
    case = dict(RESUMED[name])
    method, stage, dropout = case.pop("method"), case.pop("stage"), case.pop("dropout", None)
    candidate = candidate_for(2, stage, method=method, **case)
    if dropout is not None:
        candidate = _with_dropout(candidate, dropout)
    straight, broken = (make_run(_recipe(workshop, method), candidate) for _ in range(2))
    ranks.run(train_here, straight.path)
    ranks.run(train_here, broken.path, "first.0", 3)
    assert events(broken) == ["started", "joined", "stopped"]
    assert not broken.result.exists()
    assert len(losses(broken)) == 3
    ranks.run(train_here, broken.path, "second.1")
    assert events(broken)[3:] == ["started", "joined", "resumed", "completed"]
    assert _sequence(broken) == _sequence(straight)
    assert len(losses(straight)) == STEPS


def _with_dropout(candidate: Any, dropout: float) -> Any:
    import dataclasses

    return dataclasses.replace(candidate, lora=dataclasses.replace(candidate.lora, lora_dropout=dropout))


def test_every_rank_stops_after_the_same_step(ranks: Ranks, workshop: Path) -> None:
    """A signal that only one rank received stops all of them, with one checkpoint of that step."""
    run = make_run(_recipe(workshop, "lora"), candidate_for(2, 0))
    ranks.run(train_here, run.path, "first.0", 4)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000004"]
    stopped = next(line for line in read_json_lines(run.attempts) if line["event"] == "stopped")
    assert stopped["step"] == 4


def test_periodic_checkpoints_keep_the_newest(ranks: Ranks, workshop: Path) -> None:
    """save_steps writes them, save_total_limit bounds them, and nothing unfinished is left."""
    run = make_run(_recipe(workshop, "lora", save_steps=1), candidate_for(2, 2))
    ranks.run(train_here, run.path)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000005", "step-000006"]
    manifest = json.loads((run.checkpoint(6) / "manifest.json").read_text())
    there = {p.relative_to(run.checkpoint(6)).as_posix() for p in run.checkpoint(6).rglob("*") if p.is_file()}
    assert manifest["files"].keys() == there - {"manifest.json"}
    assert (manifest["world_size"], manifest["zero_stage"], manifest["method"]) == (2, 2, "lora")


DAMAGE = {
    "a truncated shard": lambda path: (path / "engine.pt").write_bytes((path / "engine.pt").read_bytes()[:-100]),
    "a flipped byte": lambda path: _flip(path / "engine.pt"),
    "an empty shard": lambda path: (path / "rng-00001.pt").write_bytes(b""),
    "a missing shard": lambda path: (path / "rng-00001.pt").unlink(),
    "a missing manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_text('{"schema": 1, "fi'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(name: str, ranks: Ranks, workshop: Path) -> None:
    """The run goes on from the older checkpoint, says so, and ends with the losses of an undisturbed run."""
    run = _stopped_run(ranks, workshop)
    whole = losses_at(run.metrics)
    DAMAGE[name](run.checkpoint(4))
    ranks.run(train_here, run.path, "second.1")
    resumed = next(line for line in read_json_lines(run.attempts) if line["event"] == "resumed")
    assert resumed["checkpoint"] == "step-000003"
    assert {step: losses_at(run.metrics)[step] for step in whole} == whole
    assert events(run)[-1] == "completed"


def test_no_whole_checkpoint_is_an_error_and_never_a_silent_restart(ranks: Ranks, workshop: Path) -> None:
    """With every checkpoint damaged the run stops, naming what is wrong with them."""
    run = _stopped_run(ranks, workshop)
    for path in run.checkpoints.iterdir():
        _flip(path / "engine.pt")
    answers = ranks.run(_error_of, train_here, run.path, "second.1")
    assert {kind for kind, _ in answers} == {"JobFailedError"}
    assert "none is whole" in answers[0][1]
    assert "engine.pt differs from its sha256" in answers[1][1]


def test_what_a_killed_save_left_behind_is_ignored_and_swept(ranks: Ranks, workshop: Path) -> None:
    """A folder that was never renamed counts for nothing, and is gone after the next save."""
    run = make_run(_recipe(workshop, "lora", save_steps=3), candidate_for(2, 0))
    (run.checkpoints / ".step-000009.first.0.tmp").mkdir()
    ranks.run(train_here, run.path, "second.0")
    assert "resumed" not in events(run)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000003", "step-000006"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("run_id", "other-zzzzz", "now it is 'other-zzzzz'"), ("method", "dora", "method 'lora', now it is 'dora'")],
)
def test_a_checkpoint_of_another_run_or_method_is_refused_by_name(
    field: str, value: Any, words: str, ranks: Ranks, workshop: Path
) -> None:
    """A checkpoint is for the run and the method that wrote it."""
    run = _stopped_run(ranks, workshop)
    identity = {"run_id": run.run_id, "attempt": "x.0", "world_size": 2, "zero_stage": 0, "method": "lora"}
    answers = ranks.run(_error_of, _load, run.checkpoints, identity | {field: value}, run.checkpoint(4))
    assert {kind for kind, _ in answers} == {"ConflictError"}
    assert words in answers[0][1]


def test_another_number_of_ranks_is_told_and_not_refused(ranks: Ranks, workshop: Path) -> None:
    """One process goes on where two stopped; how the engine does that is test_reshape's matter."""
    run = _stopped_run(ranks, workshop)
    identity = Identity(run_id=run.run_id, attempt="x.0", world_size=1, zero_stage=0, method="lora")
    checkpoints = Checkpoints(run.checkpoints, identity, keep=2)
    state = checkpoints.load(run.checkpoint(4), FakeEngine())
    assert state["memory"]["step"] == 4
    assert checkpoints.reshaped == {"from_world": 2, "to_world": 1, "from_stage": 0, "to_stage": 0}


class FakeEngine:
    """An engine with two small files and, where asked, a full disk."""

    def __init__(self, *, full_disk: bool = False) -> None:
        self._full_disk = full_disk

    def save(self, writer: Any) -> None:
        if self._full_disk:
            raise OSError(28, "No space left on device")
        writer.write("part/a.pt", {"weights": b"weights"})
        writer.write("b.pt", [1, 2, 3])

    def load(self, folder: Path) -> None:
        pass


def _checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    identity = Identity(run_id="tiny-abcde", attempt="7.0", world_size=1, zero_stage=0, method="lora")
    return Checkpoints(folder, identity, keep=keep)


def test_a_full_disk_leaves_the_older_checkpoint_and_no_rubbish(tmp_path: Path) -> None:
    """The save fails with the reason; what was there stays and verifies."""
    checkpoints = _checkpoints(tmp_path)
    before = checkpoints.save(1, FakeEngine(), {})
    with pytest.raises(JobFailedError, match="No space left on device"):
        checkpoints.save(2, FakeEngine(full_disk=True), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoints.newest() == before


def test_pruning_never_touches_what_is_not_this_runs(tmp_path: Path) -> None:
    """A folder with another run's manifest, and anything not named like a checkpoint, stays."""
    checkpoints = _checkpoints(tmp_path, keep=1)
    foreign = checkpoints.save(1, FakeEngine(), {})
    manifest = json.loads((foreign / "manifest.json").read_text())
    (foreign / "manifest.json").write_text(json.dumps(manifest | {"run_id": "other-zzzzz"}))
    (tmp_path / "notes").mkdir()
    checkpoints.save(2, FakeEngine(), {})
    checkpoints.save(3, FakeEngine(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-000001", "step-000003"]


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    """A run that never saved starts at step 0, quietly."""
    assert _checkpoints(tmp_path).newest() is None


_STOPPED: dict[Path, RunFolder] = {}


def _stopped_run(ranks: Ranks, workshop: Path) -> RunFolder:
    """A copy of a LoRA run that stopped after step 4 with checkpoints of steps 3 and 4."""
    if workshop not in _STOPPED:
        run = make_run(_recipe(workshop, "lora", save_steps=3), candidate_for(2, 0))
        ranks.run(train_here, run.path, "first.0", 4)
        _STOPPED[workshop] = run
    made = _STOPPED[workshop]
    copy = made.path.with_name(f"{made.path.name}-{len(list(made.path.parent.iterdir()))}")
    shutil.copytree(made.path, copy)
    for manifest in copy.glob("checkpoints/step-*/manifest.json"):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"run_id": copy.name}))
    return RunFolder(copy)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _error_of(function: Any, *args: Any) -> tuple[str, str]:
    """What `function` raises, as (class, message); for use in `Ranks`."""
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def _load(folder: Path, identity: dict[str, Any], path: Path) -> None:
    Checkpoints(folder, Identity(**identity), keep=2).load(path, FakeEngine())
