"""A run goes on with other ranks, and its losses are those of a run that never stopped.

Every chain below is one run that is stopped and resumed with another number of ranks each time. The rows of a step,
the schedule and the optimizer's states stay, so the losses differ from the uninterrupted run's by the order of
additions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.plan import Candidate, plan_to_json
from launcher.recipe.schema import Recipe
from launcher.runs.folder import RunFolder, read_json_lines, write_json
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


def _chain(groups: Groups, recipe: Recipe, shapes: list[Candidate]) -> RunFolder:
    """One run over all shapes in turn, STEPS_EACH steps each; the last one ends it."""
    run = make_run(recipe, shapes[0])
    for attempt, candidate in enumerate(shapes):
        replan(run, recipe, candidate)
        last = candidate is shapes[-1]
        groups(candidate.world_size).run(train_here, run.path, f"job.{attempt}", None if last else STEPS_EACH)
    return run


def replan(run: RunFolder, recipe: Recipe, candidate: Candidate) -> None:
    """Another shape for the run's next attempt, as `launcher resume` writes it."""
    write_json(run.plan, plan_to_json(make_plan_of(recipe, candidate)))
    if candidate.zero_stage:
        write_json(run.ds_config, deepspeed_config(candidate))


def _reshaped(run: RunFolder) -> list[tuple[int, int, int]]:
    lines = [line for line in read_json_lines(run.attempts) if line["event"] == "reshaped"]
    return [(line["from_world"], line["to_world"], line["step"]) for line in lines]


_STRAIGHT: dict[tuple[str, str], list[float]] = {}


def _uninterrupted(groups: Groups, workshop: Path, method: str, *, stage: int = 0, **fields: Any) -> list[float]:
    """Losses of eight steps in one go on two ranks."""
    key = (method, str((stage, fields)))
    if key not in _STRAIGHT:
        run = make_run(_recipe(workshop, method, 4 * STEPS_EACH), candidate_for(2, stage, method=method, **fields))
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
