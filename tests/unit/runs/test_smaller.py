"""A smaller micro-batch: the same global batch in every file of the run, and the old files beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import ConflictError
from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.plan import plan_from_json, plan_to_json
from launcher.recipe.load import load_recipe, recipe_to_yaml
from launcher.runs.folder import RunFolder, write_json
from launcher.runs.smaller import use_micro_batch
from tests.tiny import make_recipe
from tests.unit.runs.material import make_plan, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run at ZeRO-2 with micro-batches of 6, twice per step."""
    run = make_run(tmp_path)
    plan = make_plan(micro_batch=6, gradient_accumulation=2, zero_stage=2)
    write_json(run.plan, plan_to_json(plan))
    write_json(run.ds_config, deepspeed_config(plan.chosen.candidate, {}))
    train = {"per_device_train_batch_size": 6, "global_batch_size": plan.chosen.candidate.global_batch}
    run.resolved.write_text(recipe_to_yaml(make_recipe(tmp_path, train=train)))
    return run


def test_every_file_agrees(run: RunFolder) -> None:
    """Plan, resolved recipe and DeepSpeed's configuration name the same numbers, and the global batch is as before."""
    before = plan_from_json(json.loads(run.plan.read_text())).chosen.candidate
    use_micro_batch(run, 3)
    plan = plan_from_json(json.loads(run.plan.read_text()))
    after, config = plan.chosen.candidate, json.loads(run.ds_config.read_text())
    assert (after.micro_batch, after.gradient_accumulation, after.global_batch) == (3, 4, before.global_batch)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 4
    assert config["train_batch_size"] == before.global_batch
    assert load_recipe(run.resolved).train.per_device_train_batch_size == 3
    assert plan.warnings[-1].code == "smaller-micro-batch"


def test_layouts_on_fewer_nodes_become_smaller_too(run: RunFolder) -> None:
    """The job that ran out of memory may have had fewer nodes, and the next one may; one that is small enough stays."""
    plan = plan_from_json(json.loads(run.plan.read_text()))
    chosen = plan.chosen.candidate
    fewer = [replace(chosen, nodes=1, micro_batch=micro, gradient_accumulation=48 // micro) for micro in (12, 2)]
    write_json(run.plan, plan_to_json(replace(plan, elastic=tuple(fewer))))
    use_micro_batch(run, 4)
    elastic = plan_from_json(json.loads(run.plan.read_text())).elastic
    assert [(each.micro_batch, each.gradient_accumulation) for each in elastic] == [(4, 12), (2, 24)]


def test_older_plans_are_kept(run: RunFolder) -> None:
    """Twice smaller leaves both older plans, in order."""
    for size in (3, 1):
        use_micro_batch(run, size)
    kept = [json.loads((run.path / f"plan-{number}.json").read_text())["chosen"]["micro_batch"] for number in (1, 2)]
    assert kept == [6, 3]
    assert (run.path / "ds_config-1.json").exists()
    assert (run.path / "recipe.resolved-2.yaml").exists()


def test_a_size_that_does_not_divide_is_refused(run: RunFolder) -> None:
    """Nothing is written then."""
    before = run.plan.read_text()
    with pytest.raises(ConflictError, match="12 sequences"):
        use_micro_batch(run, 5)
    assert run.plan.read_text() == before
    assert not (run.path / "plan-1.json").exists()
