"""What the job asks of the cluster: a safe limit, and saves that a preemption cannot turn into losing everything."""

from dataclasses import replace

import pytest

from launcher.errors import RecipeError
from launcher.facts.model import model_shape
from launcher.facts.site import Partition
from launcher.planning.job import rounded_min
from launcher.planning.search import make_plan
from launcher.recipe.schema import CheckpointSection, TrainSection
from tests.unit.planning.examples import A100, DATA, LLAMA_8B, a_recipe, on, plan_of

PARTITION = Partition(name="main", default=True, max_time_min=120, nodes=16)


def test_the_time_limit_is_safe_and_round():
    """Above the slow end of the prediction with start-up, evaluations and saves; whole five minutes or more."""
    plan = plan_of(a_recipe(LLAMA_8B, "full", slurm=on(1, 8)))
    slow_s = plan.chosen.step_s.high * plan.chosen.steps
    assert plan.job.time_limit_min * 60 > slow_s + plan.chosen.checkpoint_bytes / 500e6
    assert plan.job.time_limit_min % 5 == 0
    assert [rounded_min(minutes) for minutes in (3, 58, 61, 400, 1500)] == [5, 60, 75, 420, 1500]


def test_a_run_longer_than_the_partition_allows_is_planned_with_requeues():
    """The limit is the partition's, and the plan says how many jobs in a row that makes."""
    short = replace(A100, partitions=(PARTITION,), default_partition="main")
    plan = plan_of(a_recipe(LLAMA_8B, "full", slurm=on(1, 2)), short, replace(DATA, rows=400_000, tokens=240_000_000))
    assert plan.job.time_limit_min == 120
    warning = next(each for each in plan.warnings if each.code == "time-limit")
    assert "requeue is planned" in warning.message


@pytest.mark.parametrize(
    ("checkpoint", "key"),
    [
        (CheckpointSection(save_minutes=6000), "checkpoint.save_minutes: 6000"),
        (CheckpointSection(save_minutes=None, save_steps=10**6), "checkpoint.save_steps: 1000000"),
    ],
)
def test_a_preemption_must_not_lose_everything(checkpoint, key):
    """A first checkpoint after the end of the run is no checkpoint; short runs may be repeated."""
    long = a_recipe(LLAMA_8B, "full", slurm=on(1, 2), checkpoint=checkpoint)
    with pytest.raises(RecipeError, match=f"{key}: a preemption would lose everything") as caught:
        make_plan(long, model_shape(long.model), DATA, A100)
    assert caught.value.exit_code == 2
    quick = replace(long, train=TrainSection(global_batch_size=128, max_steps=5))
    assert plan_of(quick).chosen.fits


def test_a_limit_without_time_to_save_is_refused():
    """The warning before the end needs a step and a checkpoint: 112 GB do not get written in a job of five minutes."""
    section = replace(on(1, 8), time=10)
    recipe = a_recipe(LLAMA_8B, "full", slurm=section)
    with pytest.raises(RecipeError, match="too short to be warned"):
        make_plan(recipe, model_shape(recipe.model), DATA, A100)
