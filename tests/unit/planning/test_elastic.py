"""Layouts on which a run may go on: the same training on fewer nodes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.facts.dataset import dataset_facts
from launcher.facts.model import model_shape
from launcher.planning.elastic import with_elastic
from launcher.planning.plan import Candidate, Plan, plan_from_json, plan_to_json
from launcher.planning.replan import _FREE, refuse_ragged
from launcher.planning.search import make_plan
from launcher.recipe.schema import Recipe
from launcher.report.text import elastic_words
from tests.tiny import make_recipe
from tests.unit.runs.material import make_site


def elastic(
    tmp_path: Path, *, min_nodes: int | None, nodes: int = 4, batch: int = 16, **train: object
) -> tuple[Recipe, Plan]:
    recipe = make_recipe(
        tmp_path,
        method="full",
        deepspeed={"stage": 2},
        train={"global_batch_size": batch, "max_steps": 4, **train},
        slurm={"nodes": nodes, "gpus_per_node": 2, "time": 60},
        survival={"min_nodes": min_nodes},
    )
    model, data, site = model_shape(recipe.model), dataset_facts(recipe.data, tmp_path / "model"), make_site()
    return recipe, with_elastic(recipe, make_plan(recipe, model, data, site), model, data, site)


def test_without_a_minimum_there_is_one_layout(tmp_path: Path) -> None:
    """And the plan's document says nothing about others."""
    _, plan = elastic(tmp_path, min_nodes=None)
    assert plan.elastic == () and "elastic" not in plan_to_json(plan)


def test_every_number_of_nodes_that_divides_gets_its_layout(tmp_path: Path) -> None:
    """Global batch, rate, precision, length, sharding stay; the ledger of accumulation makes up for the ranks."""
    _, plan = elastic(tmp_path, min_nodes=1)
    assert [each.nodes for each in plan.elastic] == [1, 2]
    chosen = plan.chosen.candidate
    kept = [each.name for each in fields(Candidate) if each.name not in _FREE]
    for each in plan.elastic:
        assert each.global_batch == chosen.global_batch == 16
        assert each.zero_stage == chosen.zero_stage and each.gpus_per_node == chosen.gpus_per_node
        assert all(getattr(each, name) == getattr(chosen, name) for name in kept)


def test_numbers_that_do_not_divide_are_named(tmp_path: Path) -> None:
    """With three nodes of two ranks a batch of 16 would use two of them."""
    _, plan = elastic(tmp_path, min_nodes=1)
    (warning,) = [each for each in plan.warnings if each.code == "idle-nodes"]
    assert warning.message.startswith("on 3 nodes")


def test_the_plan_says_where_else_it_starts(tmp_path: Path) -> None:
    """A range is no surprise; without one nothing is said."""
    _, plan = elastic(tmp_path, min_nodes=1)
    assert elastic_words(plan) == "; starts on 1 or 2 where fewer are free, and takes longer there"
    _, plan = elastic(tmp_path, min_nodes=None)
    assert elastic_words(plan) == ""


def test_the_micro_batch_stays_where_it_can(tmp_path: Path) -> None:
    """Fewer roundings differ, and the memory is what was planned."""
    _, plan = elastic(tmp_path, min_nodes=1, per_device_train_batch_size=2)
    assert [each.micro_batch for each in (*plan.elastic, plan.chosen.candidate)] == [2, 2, 2]


def test_a_minimum_that_cannot_train_is_refused(tmp_path: Path) -> None:
    """Said at once, with the fewest that can."""
    with pytest.raises(RecipeError, match=r"min_nodes: 3 x 2 ranks do not divide .* only the planned 4 do"):
        elastic(tmp_path, min_nodes=3)
    with pytest.raises(RecipeError, match=r"5 is more than the 4 nodes"):
        elastic(tmp_path, min_nodes=5)


def test_a_plan_with_layouts_is_read_back(tmp_path: Path) -> None:
    """plan.json is all a worker has."""
    _, plan = elastic(tmp_path, min_nodes=1)
    assert plan_from_json(plan_to_json(plan)) == plan
    assert plan_from_json({**plan_to_json(plan), "elastic": []}) == replace(plan, elastic=())


@pytest.mark.parametrize(
    ("batch", "nodes", "per_node", "hint"),
    [
        (8, 3, 2, "slurm.nodes 2 or 4 would"),
        (12, 5, 2, "slurm.nodes 3 or 6 would"),
        (7, 2, 2, "another number of nodes"),
    ],
)
def test_ragged_ranks_are_refused_with_what_would_do(batch: int, nodes: int, per_node: int, hint: str) -> None:
    """The nearest below and above."""
    with pytest.raises(RecipeError) as caught:
        refuse_ragged(batch, nodes, per_node, most_nodes=2 * nodes)
    assert hint in str(caught.value)
