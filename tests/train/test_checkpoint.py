"""A checkpoint is whole or not there, and a run that resumed from one cannot be told from one that never stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launcher.recipe.schema import Recipe
from launcher.runs.fence import claim
from launcher.runs.folder import RunFolder, read_json_lines
from launcher.worker.checkpoint import Checkpoints, Identity
from tests.tiny import make_recipe
from tests.train.ranks import Ranks
from tests.train.runs import candidate_for, events, losses, losses_at, make_run, saves, train_here
from tests.train.test_shelf import FakeEngine, flip

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


class KilledError(Exception):
    """What stands for a kill where the processes must live on for the next test."""


def _die_in_the_step_after(run_dir: Path, step: int) -> str:
    """A rank that ends inside the step after `step`, once the checkpoint is there; nobody has voted since."""
    from launcher.worker.loop import Loop

    whole = Loop._step
    checkpoint = RunFolder(run_dir).checkpoint(step)

    def deadly(self: Loop) -> tuple[bool, bool]:
        if self.memory.step < step:
            return whole(self)
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        raise KilledError(str(checkpoint.exists()))

    Loop._step = deadly  # type: ignore[method-assign]
    try:
        train_here(run_dir, "first.0")
    except KilledError as error:
        return str(error)
    finally:
        Loop._step = whole  # type: ignore[method-assign]
    return "it trained to the end"


@pytest.mark.parametrize("stage", [0, 2])
def test_a_save_is_on_disk_as_soon_as_every_rank_has_written(stage: int, ranks: Ranks, workshop: Path) -> None:
    """No step needs to end for it: killed in the step after a save, a run goes on from that save."""
    recipe = _recipe(workshop, "lora", save_steps=2, background=True)
    run, straight = (make_run(recipe, candidate_for(2, stage)) for _ in range(2))
    assert ranks.run(_die_in_the_step_after, run.path, 4) == ["True", "True"]
    ranks.run(train_here, run.path, "second.1")
    resumed = next(line for line in read_json_lines(run.attempts) if line["event"] == "resumed")
    assert resumed["step"] == 4
    ranks.run(train_here, straight.path)
    assert _sequence(run) == _sequence(straight)


DAMAGE = {
    "a truncated shard": lambda path: (path / "engine.pt").write_bytes((path / "engine.pt").read_bytes()[:-100]),
    "a flipped byte": lambda path: flip(path / "engine.pt"),
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
        flip(path / "engine.pt")
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


def _train_on_a_full_disk(run_dir: Path, attempt: str, stop_after: int | None) -> tuple[str, str]:
    """From the first save on, rank 1's disk takes nothing; how the run ends for this rank."""
    write, began = os.write, Checkpoints._prepare

    def fake_full_disk(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def prepare(self: Checkpoints, step: int) -> None:
        began(self, step)
        if dist.get_rank() == 1:
            os.write = fake_full_disk

    Checkpoints._prepare = prepare  # type: ignore[method-assign]
    try:
        return _error_of(train_here, run_dir, attempt, stop_after)
    finally:
        os.write, Checkpoints._prepare = write, began  # type: ignore[method-assign]


@pytest.mark.parametrize("background", [True, False])
def test_one_rank_that_cannot_write_leaves_nobody_waiting(background: bool, ranks: Ranks, workshop: Path) -> None:
    """ZeRO-2, where every rank has a shard: saves fail on both ranks alike, training goes on to the same losses."""
    recipe = _recipe(workshop, "lora", save_steps=2, background=background)
    run, straight = (make_run(recipe, candidate_for(2, 2)) for _ in range(2))
    answers = ranks.run(_train_on_a_full_disk, run.path, "first.0", None)
    assert {kind for kind, _ in answers} == {"nothing"}
    assert [name for name, _ in saves(run)] == ["saving", "save_failed"] * 3
    failure = next(line for line in read_json_lines(run.attempts) if line["event"] == "save_failed")
    assert "rank 1" in failure["error"]
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt needs" in failure["error"]
    assert not list(run.checkpoints.iterdir())
    ranks.run(train_here, straight.path)
    assert _sequence(run) == _sequence(straight)


def test_a_stop_whose_save_fails_is_an_error_on_every_rank(ranks: Ranks, workshop: Path) -> None:
    """Leaving quietly would look like a run that can go on from here."""
    run = make_run(_recipe(workshop, "lora"), candidate_for(2, 2))
    answers = ranks.run(_train_on_a_full_disk, run.path, "first.0", 3)
    assert {kind for kind, _ in answers} == {"JobFailedError"}
    assert "stopped" not in events(run)


def _live_on_after(run_dir: Path, step: int) -> tuple[int, str]:
    """The life of a rank of attempt old.0; when it has trained `step`, attempt new.1 begins elsewhere.

    Rank 0's writers glance at the fence every few seconds; alone it would end there first, on a busy machine.
    """
    import launcher.worker.loop as loop
    from launcher.runs import fence
    from launcher.runs.pulse import Pulse
    from launcher.worker import main
    from tests.train.ranks import place_of

    folder, trained = RunFolder(run_dir), loop.Loop._note

    def note(self: Any, now: int, *args: Any) -> None:
        trained(self, now, *args)
        if now == step and dist.get_rank() == 0:
            claim(folder, "new.1")

    loop.Loop._note = note  # type: ignore[method-assign]
    every_s, fence.GLANCE_S = fence.GLANCE_S, 3600.0
    try:
        train_here(run_dir, "old.0")
    except Exception as error:
        place = place_of(dist.get_rank(), dist.get_world_size(), "old.0")
        return main._failed(folder, place, error, Pulse(None)), str(error)
    finally:
        loop.Loop._note, fence.GLANCE_S = trained, every_s  # type: ignore[method-assign]
    return 0, ""


def test_a_leftover_attempt_ends_without_checkpoint_result_or_metrics(ranks: Ranks, workshop: Path) -> None:
    """Both ranks end with exit code 7 at the save after step 4, and leave one line that says so."""
    run = make_run(_recipe(workshop, "lora", save_steps=2, background=False), candidate_for(2, 2))
    answers = ranks.run(_live_on_after, run.path, 3)
    assert {code for code, _ in answers} == {7}
    assert all("old.0 was replaced by attempt new.1" in words for _, words in answers)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000002"]
    assert not run.result.exists()
    assert max(losses_at(run.metrics)) <= 4
    assert events(run)[-1:] == ["fenced"]
    assert events(run).count("fenced") == 1


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


def _error_of(function: Any, *args: Any) -> tuple[str, str]:
    """What `function` raises, as (class, message); for use in `Ranks`."""
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def _load(folder: Path, identity: dict[str, Any], path: Path) -> None:
    Checkpoints(folder, Identity(**identity), keep=2).load(path, FakeEngine())
