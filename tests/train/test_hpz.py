"""A secondary partition of ZeRO-3's weights (ZeRO++ hpZ) changes where bytes travel, not what is learnt.

DeepSpeed makes its groups once per process, so these ranks run nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_recipe
from tests.train.ranks import Ranks
from tests.train.runs import candidate_for, losses, make_run, result, train_here

STEPS = 5


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hpz")


def _train(world: int, workshop: Path, **fields: Any) -> dict[str, Any]:
    recipe = make_recipe(workshop, method="full", train={"max_steps": STEPS, "global_batch_size": 8})
    group = Ranks(world, workshop / f"rendezvous-{world}-{len(fields)}")
    try:
        run = make_run(recipe, candidate_for(world, method="full", **fields))
        group.run(train_here, run.path)
        if "hpz_partition" in fields:
            zero = json.loads(run.ds_config.read_text())["zero_optimization"]
            assert zero["zero_hpz_partition_size"] == fields["hpz_partition"]
        return {"losses": losses(run), "after": result(run)["validation_loss"]["after"]}
    finally:
        group.close()


@pytest.fixture(scope="module")
def reference(workshop: Path) -> Iterator[dict[str, Any]]:
    yield _train(1, workshop, stage=0)


def test_two_nodes_of_two_ranks_learn_the_same(workshop: Path, reference: dict[str, Any]) -> None:
    """Four ranks whose weights are also held by each pair, recomputing: the losses are one process's."""
    found = _train(4, workshop, stage=3, hpz_partition=2, gradient_checkpointing=True)
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert found["after"] == pytest.approx(reference["after"], rel=1e-5)
