"""The same recipe gives the same losses however it is spread: ranks, ZeRO stage, offload, checkpointing.

This is what "results survive a change of GPU count" means. Losses are compared in fp32 on CPU, where only the order
of additions may differ. Each group of ranks is started once and runs all its configurations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.recipe.schema import Recipe
from tests.tiny import make_recipe
from tests.train.ranks import Ranks
from tests.train.runs import candidate_for, losses, make_run, result, train_here

RELATIVE = 1e-5
STEPS = 5

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain torch": {"stage": 0},
    "plain torch, checkpointing": {"stage": 0, "gradient_checkpointing": True},
    "plain torch, micro-batch 1": {"stage": 0, "micro_batch": 1},
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-2, optimizer on CPU": {"stage": 2, "offload_optimizer": "cpu"},
    "ZeRO-2, checkpointing": {"stage": 2, "gradient_checkpointing": True},
    "ZeRO-3": {"stage": 3},
    "ZeRO-3, optimizer on CPU": {"stage": 3, "offload_optimizer": "cpu"},
    "ZeRO-3, optimizer and weights on CPU": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
    "ZeRO-3, checkpointing": {"stage": 3, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def single(workshop: Path) -> Iterator[Ranks]:
    group = Ranks(1, workshop / "rendezvous-1")
    yield group
    group.close()


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["1 rank", "2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, single: Ranks, workshop: Path) -> Iterator[Ranks]:
    if request.param == 1:
        yield single
        return
    group = Ranks(request.param, workshop / f"rendezvous-{request.param}")
    yield group
    group.close()


@pytest.fixture(scope="module")
def recipe(workshop: Path) -> Recipe:
    return make_recipe(workshop, method="full", train={"max_steps": STEPS, "global_batch_size": 8})


@pytest.fixture(scope="module")
def reference(single: Ranks, recipe: Recipe) -> dict[str, Any]:
    """Losses of one process with plain torch; everything is compared with them."""
    return _train(single, recipe, stage=0)


def _train(ranks: Ranks, recipe: Recipe, *, stage: int, **fields: Any) -> dict[str, Any]:
    run = make_run(recipe, candidate_for(ranks.world, stage, method=recipe.method, **fields))
    ranks.run(train_here, run.path)
    return {"losses": losses(run), "after": result(run)["validation_loss"]["after"]}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_losses_do_not_depend_on_how_the_work_is_spread(
    name: str, ranks: Ranks, recipe: Recipe, reference: dict[str, Any]
) -> None:
    """Every training loss and the final validation loss equal the single process's."""
    found = _train(ranks, recipe, **CONFIGURATIONS[name])
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(reference["losses"], rel=RELATIVE)
    assert found["after"] == pytest.approx(reference["after"], rel=RELATIVE)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(
    precision: str, ranks: Ranks, recipe: Recipe, reference: dict[str, Any]
) -> None:
    """Autocast and DeepSpeed's own half precision round differently, and only round."""
    for stage in (0, 2):
        found = _train(ranks, recipe, stage=stage, precision=precision)
        assert found["losses"] == pytest.approx(reference["losses"], rel=2e-3), f"stage {stage}"


@pytest.mark.parametrize("method", ["lora", "qlora", "adalora", "prompt"])
def test_adapters_train_the_same_on_any_number_of_ranks_and_stage(
    method: str, ranks: Ranks, single: Ranks, workshop: Path
) -> None:
    """Every stage a method supports gives the losses of plain torch on one rank."""
    packing = method != "prompt"
    recipe = make_recipe(workshop, method=method, train={"max_steps": STEPS})
    if method not in _EXPECTED:
        _EXPECTED[method] = _train(single, recipe, stage=0, packing=packing)["losses"]
    for stage in [0] if method == "adalora" else [0, 2, 3]:
        found = _train(ranks, recipe, stage=stage, packing=packing)["losses"]
        assert found == pytest.approx(_EXPECTED[method], rel=RELATIVE), f"stage {stage}"


_EXPECTED: dict[str, list[float]] = {}
"""Losses of one rank with plain torch, per method."""
