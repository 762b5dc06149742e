"""A run goes on with other ranks, and its losses are those of a run that never stopped.

Every chain below is one run that is stopped and resumed with another number of ranks each time. The rows of a step,
the schedule and the optimizer's states stay, so the losses differ from the uninterrupted run's by the order of
additions only.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from launcher.errors import ConflictError, JobFailedError
from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.plan import Candidate, plan_to_json
from launcher.recipe.schema import Recipe
from launcher.runs.folder import RunFolder, read_json_lines, write_json
from launcher.worker.generators import load_random_state
from launcher.worker.reshape import Span, prove, refuse_other_weights
from launcher.worker.saved import MASTER, TORCH_FILE, Saved, open_saved
from tests.tiny import make_recipe
from tests.train.ranks import Ranks
from tests.train.runs import candidate_for, losses, make_plan_of, make_run, train_here

STEPS_EACH = 2
"""Steps between two changes of the number of ranks."""

Groups = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshape")


@pytest.fixture(scope="module")
def groups(workshop: Path) -> Iterator[Groups]:
    """Groups of 1, 2 and 4 ranks, each started when first asked for."""
    started: dict[int, Ranks] = {}

    def of(world: int) -> Ranks:
        if world not in started:
            started[world] = Ranks(world, workshop / f"rendezvous-{world}")
        return started[world]

    yield of
    for group in started.values():
        group.close()


def _recipe(workshop: Path, method: str, steps: int, **train: Any) -> Recipe:
    saving = {"save_minutes": None, "save_steps": None, "save_total_limit": 2}
    return make_recipe(workshop, method=method, train={"max_steps": steps} | train, checkpoint=saving)


def _chain(groups: Groups, recipe: Recipe, shapes: list[Candidate], steps_each: int = STEPS_EACH) -> RunFolder:
    """One run over all shapes in turn, as many steps each; the last one ends it."""
    run = make_run(recipe, shapes[0])
    for attempt, candidate in enumerate(shapes):
        replan(run, recipe, candidate)
        last = candidate is shapes[-1]
        groups(candidate.world_size).run(train_here, run.path, f"job.{attempt}", None if last else steps_each)
    return run


def replan(run: RunFolder, recipe: Recipe, candidate: Candidate) -> None:
    """Another shape for the run's next attempt, as `launcher resume` writes it."""
    write_json(run.plan, plan_to_json(make_plan_of(recipe, candidate)))
    if candidate.zero_stage:
        write_json(run.ds_config, deepspeed_config(candidate))


def _reshaped(run: RunFolder) -> list[tuple[int, int, int]]:
    lines = [line for line in read_json_lines(run.attempts) if line["event"] == "reshaped"]
    return [(line["from_world"], line["to_world"], line["step"]) for line in lines]


_STRAIGHT: dict[str, list[float]] = {}


def _uninterrupted(
    groups: Groups, workshop: Path, method: str, *, segments: int = 4, stage: int = 0, **fields: Any
) -> list[float]:
    """Losses of as many steps in one go on two ranks."""
    key = str((method, segments, stage, fields))
    if key not in _STRAIGHT:
        recipe = _recipe(workshop, method, segments * STEPS_EACH)
        run = make_run(recipe, candidate_for(2, stage, method=method, **fields))
        groups(2).run(train_here, run.path)
        _STRAIGHT[key] = losses(run)
    return _STRAIGHT[key]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_may_grow_and_shrink_between_attempts(stage: int, method: str, groups: Groups, workshop: Path) -> None:
    """2 ranks, then 4, then 1, then 2: every loss and the ledger are those of one run."""
    expected = _uninterrupted(groups, workshop, method)
    shapes = [candidate_for(world, stage, method=method) for world in (2, 4, 1, 2)]
    run = _chain(groups, _recipe(workshop, method, 4 * STEPS_EACH), shapes)
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert _reshaped(run) == [(2, 4, 2), (4, 1, 4), (1, 2, 6)]


def test_the_stage_may_change_with_the_ranks(groups: Groups, workshop: Path) -> None:
    """Plain torch, ZeRO-3, ZeRO-1, ZeRO-2 and plain torch again read what the one before wrote."""
    expected = _uninterrupted(groups, workshop, "full", weight_decay=0.1)
    shapes = [
        candidate_for(world, stage, method="full", weight_decay=0.1)
        for world, stage in ((2, 0), (4, 3), (2, 1), (2, 0))
    ]
    run = _chain(groups, _recipe(workshop, "full", 4 * STEPS_EACH), shapes)
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert [line["to_stage"] for line in read_json_lines(run.attempts) if line["event"] == "reshaped"] == [3, 1, 0]


def test_in_half_precision_the_stage_may_change_too(groups: Groups, workshop: Path) -> None:
    """Plain torch's fp32 weights are ZeRO's masters, and back; what is multiplied in bf16 rounds, and only rounds."""
    expected = _uninterrupted(groups, workshop, "full", segments=2, precision="bf16")
    shapes = [
        candidate_for(world, stage, method="full", precision="bf16")
        for world, stage in ((2, 0), (1, 2), (2, 3), (1, 0))
    ]
    run = _chain(groups, _recipe(workshop, "full", 2 * STEPS_EACH), shapes, steps_each=1)
    assert losses(run) == pytest.approx(expected, rel=2e-3)


def test_a_weight_with_two_names_moves_once(groups: Groups, workshop: Path) -> None:
    """With tied embeddings the output layer is the embedding; every stage counts it once."""
    recipe = _recipe(workshop / "tied", "full", 3 * STEPS_EACH)
    _tie(Path(recipe.model.name_or_path))
    straight = make_run(recipe, candidate_for(2, 0, method="full"))
    groups(2).run(train_here, straight.path)
    shapes = [candidate_for(world, stage, method="full") for world, stage in ((2, 3), (4, 1), (2, 3))]
    assert losses(_chain(groups, recipe, shapes)) == pytest.approx(losses(straight), rel=1e-5)


def _tie(model: Path) -> None:
    """Make the tiny model's output layer its embedding."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


ACCUMULATION = {
    "half the ranks accumulate twice as much": [(4, 1, 2), (2, 1, 4), (1, 2, 4), (4, 2, 1)],
    "another micro-batch on as many ranks": [(2, 1, 4), (2, 2, 2), (2, 4, 1), (2, 1, 4)],
}


@pytest.mark.parametrize("name", ACCUMULATION)
def test_micro_batch_and_accumulation_may_change(name: str, groups: Groups, workshop: Path) -> None:
    """(ranks, micro-batch, accumulation) change, the global batch of eight rows does not."""
    expected = _uninterrupted(groups, workshop, "lora")
    shapes = [candidate_for(world, 2, method="lora", micro_batch=micro) for world, micro, _ in ACCUMULATION[name]]
    assert [(c.world_size, c.micro_batch, c.gradient_accumulation) for c in shapes] == ACCUMULATION[name]
    run = _chain(groups, _recipe(workshop, "lora", 4 * STEPS_EACH), shapes)
    assert losses(run) == pytest.approx(expected, rel=1e-5)


KINDS: dict[str, dict[str, Any]] = {
    "bf16, ZeRO-1": {"method": "full", "stage": 1, "precision": "bf16"},
    "bf16, LoRA, ZeRO-2": {"method": "lora", "stage": 2, "precision": "bf16"},
    "bf16, ZeRO-3": {"method": "full", "stage": 3, "precision": "bf16"},
    "fp16, LoRA, ZeRO-2": {"method": "lora", "stage": 2, "precision": "fp16"},
    "optimizer on CPU, ZeRO-2": {"method": "full", "stage": 2, "offload_optimizer": "cpu"},
    "all on CPU, ZeRO-3": {"method": "full", "stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
    "many sub-groups, ZeRO-3": {"method": "full", "stage": 3, "sub_group_elements": 20_000},
    "QLoRA": {"method": "qlora", "stage": 0},
    "QLoRA, ZeRO-3": {"method": "qlora", "stage": 3},
    "AdaLoRA": {"method": "adalora", "stage": 0},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_state_moves(name: str, groups: Groups, workshop: Path) -> None:
    """4 ranks, then 2: compared with the same kind on two ranks in one go."""
    case = dict(KINDS[name])
    method, stage, sub_group = case.pop("method"), case.pop("stage"), case.pop("sub_group_elements", None)
    if sub_group is not None:
        case["buckets"] = dataclasses.replace(candidate_for(1).buckets, sub_group_elements=sub_group)
    expected = _uninterrupted(groups, workshop, method, segments=2, stage=stage, **case)
    shapes = [candidate_for(world, stage, method=method, **case) for world in (4, 2)]
    run = _chain(groups, _recipe(workshop, method, 2 * STEPS_EACH), shapes)
    tolerance = 1e-5 if case.get("precision", "fp32") == "fp32" else 1e-3
    assert losses(run) == pytest.approx(expected, rel=tolerance)
    assert _reshaped(run) == [(4, 2, 2)]


# --- what is refused ---------------------------------------------------------------------------


def test_eight_bit_states_stay_with_their_ranks(groups: Groups, workshop: Path) -> None:
    """They are quantised in blocks of a rank's own part; the refusal says so, and the checkpoint is as it was."""
    recipe = _recipe(workshop, "lora", 2 * STEPS_EACH)
    candidate = candidate_for(2, 2, method="lora", optim="adamw_8bit")
    run = make_run(recipe, candidate)
    groups(2).run(train_here, run.path, "job.0", STEPS_EACH)
    before = _files(run.checkpoint(STEPS_EACH))
    replan(run, recipe, candidate_for(1, 2, method="lora", optim="adamw_8bit"))
    kind, message = groups(1).run(error_of, train_here, run.path, "job.1")[0]
    assert kind == "ConflictError"
    assert "cannot be read from another number of ranks or stage" in message
    assert _files(run.checkpoint(STEPS_EACH)) == before


def test_a_checkpoint_stays_as_it_is_until_the_next_save(groups: Groups, workshop: Path) -> None:
    """Reading it into other ranks writes nothing, anywhere below checkpoints/."""
    recipe = _recipe(workshop, "lora", STEPS_EACH + 1)
    run = make_run(recipe, candidate_for(2, 3, method="lora"))
    groups(2).run(train_here, run.path, "job.0", STEPS_EACH)
    before = _files(run.checkpoints)
    replan(run, recipe, candidate_for(1, 2, method="lora"))
    groups(1).run(train_here, run.path, "job.1")
    assert _files(run.checkpoints) == before


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_of(function: Any, *args: Any) -> tuple[str, str]:
    """What `function` raises, as (class, message); for use in `Ranks`."""
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


# --- parts -------------------------------------------------------------------------------------


def _saved(**weights: list[torch.Tensor]) -> Saved:
    """Contents of a checkpoint in which each weight's master has these pieces and Adam made no step."""
    return Saved(
        stage=1,
        world_size=2,
        vectors={name: {MASTER: pieces} for name, pieces in weights.items()},
        adam_steps=None,
        loss_scale=None,
        counters={},
        buffers={},
    )


def test_a_span_is_read_across_pieces() -> None:
    """Elements 3 to 8 of a vector saved as 4 + 4 + 4."""
    saved = _saved(w=list(torch.arange(12.0).split(4)))
    out = torch.empty(5)
    saved.read("w", MASTER, 3, out)
    assert out.tolist() == [3.0, 4.0, 5.0, 6.0, 7.0]


def test_reading_past_the_end_is_an_error() -> None:
    """A short piece must never leave zeros behind."""
    saved = _saved(w=[torch.ones(4)])
    with pytest.raises(JobFailedError, match="w: master has 2 of the 4 elements from 2"):
        saved.read("w", MASTER, 2, torch.empty(4))


def _held(*parts: torch.Tensor) -> list[Span]:
    starts = [sum(part.numel() for part in parts[:index]) for index in range(len(parts))]
    return [
        Span(name="w", start=start, elements=part.numel(), stepped=part, offset=0)
        for start, part in zip(starts, parts, strict=True)
    ]


def test_the_proof_accepts_any_cut_of_the_same_bits() -> None:
    """Saved as 5 + 7, held as 3 + 9."""
    whole = torch.randn(12)
    prove(_saved(w=list(whole.split([5, 7]))), _held(*whole.split([3, 9])), device=torch.device("cpu"))


WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one bit": lambda whole: (whole.view(torch.int32) ^ torch.tensor([1] + [0] * 11, dtype=torch.int32)).view(
        torch.float32
    ),
    "two elements changed places": lambda whole: whole[[1, 0, *range(2, 12)]],
    "one place to the right": lambda whole: whole.roll(1),
    "an element too few": lambda whole: whole[:11],
}


@pytest.mark.parametrize("name", WRONG)
def test_the_proof_finds_what_is_not_as_saved(name: str) -> None:
    """Bits and places count."""
    whole = torch.randn(12)
    with pytest.raises(JobFailedError, match="1 of 1 weights differ"):
        prove(_saved(w=[whole]), _held(WRONG[name](whole)), device=torch.device("cpu"))


def test_other_trained_weights_are_refused_by_name() -> None:
    """A weight that was not trained before cannot be made up."""
    with pytest.raises(ConflictError, match=r"first v: 0 elements saved, 3 here"):
        refuse_other_weights(_saved(w=[torch.ones(4)]), {"w": 4, "v": 3})


def test_opening_a_checkpoint_reads_no_tensor(tmp_path: Path) -> None:
    """96 MiB of states are mapped: opening takes no memory for them, and a span costs a span."""
    weight = torch.zeros(1 << 23)
    state = {"step": torch.tensor(3.0), "exp_avg": weight, "exp_avg_sq": weight.clone()}
    optimizer = {"state": {0: state}, "param_groups": [{"params": [0]}]}
    torch.save({"weights": {"w": weight.clone()}, "optimizer": optimizer, "scaler": {}}, tmp_path / TORCH_FILE)
    del weight, state, optimizer
    before = _anonymous_bytes()
    saved = open_saved(tmp_path)
    saved.read("w", "exp_avg", 1 << 20, torch.empty(1 << 18))
    assert saved.adam_steps == 3
    assert saved.elements("w") == 1 << 23
    assert _anonymous_bytes() - before < 16 << 20


def _anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]


def _draws(folder: Path, rank: int, saved_ranks: int) -> tuple[float, float, float]:
    load_random_state(folder, rank, saved_ranks)
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_new_ranks_get_random_states_of_their_own(tmp_path: Path) -> None:
    """The same for every resume from one checkpoint, another for every rank and every checkpoint."""
    torch.manual_seed(1)
    torch.save({"torch": torch.get_rng_state()}, tmp_path / "rng-00000.pt")
    second, third = _draws(tmp_path, 2, saved_ranks=2), _draws(tmp_path, 3, saved_ranks=2)
    assert _draws(tmp_path, 2, saved_ranks=2) == second
    assert not set(second) & set(third)
    torch.manual_seed(2)
    torch.save({"torch": torch.get_rng_state()}, tmp_path / "rng-00000.pt")
    assert not set(_draws(tmp_path, 2, saved_ranks=2)) & set(second)


def test_a_resume_on_more_ranks_can_be_repeated(groups: Groups, workshop: Path) -> None:
    """With dropout, two resumes on four ranks from the same checkpoint of two draw the same masks."""
    found = []
    for _ in range(2):
        recipe = _recipe(workshop, "lora", 2 * STEPS_EACH)
        shapes = [candidate_for(world, 0, method="lora") for world in (2, 4)]
        dropped = [
            dataclasses.replace(shape, lora=dataclasses.replace(shape.lora, lora_dropout=0.2)) for shape in shapes
        ]
        found.append(losses(_chain(groups, recipe, dropped)))
    assert found[0] == found[1]
