"""What a budget of GPU-hours decides, rejects and refuses."""

import re
from dataclasses import replace

import pytest

from launcher.errors import RecipeError
from launcher.facts.model import model_shape
from launcher.planning.objective import OBJECTIVES
from launcher.planning.search import make_plan, resolve
from launcher.recipe.schema import BudgetSection, SlurmSection, TaskSection, TrainSection
from tests.unit.planning.examples import A100, DATA, LLAMA_8B, a_recipe, on, plan_of


def test_the_budget_decides_how_many_gpus():
    """The earliest result within the budget: more GPUs for more, and never over it where anything is within."""
    cheap, rich = (plan_of(a_recipe(LLAMA_8B, "lora", budget=BudgetSection(max_gpu_hours=h))).chosen for h in (3.2, 20))
    assert cheap.candidate.world_size < rich.candidate.world_size == 128
    assert cheap.gpu_hours <= 3.2
    assert rich.wall_s < cheap.wall_s


def test_a_method_over_the_budget_gives_way():
    """Full fine-tuning that the rules ask for but the budget does not pay becomes an adapter, with the reason."""
    recipe = a_recipe(task=TaskSection(goal="knowledge"), slurm=on(1, 2))
    many = replace(DATA, rows=200_000)
    full = plan_of(recipe, data=many)
    assert full.chosen.candidate.method == "full"
    tight = replace(recipe, budget=BudgetSection(max_gpu_hours=0.95 * full.chosen.gpu_hours))
    plan = plan_of(tight, data=many)
    assert plan.chosen.candidate.method == "lora"
    assert any(advice.rule == "R14" and "over the budget" in advice.reason for advice in plan.advice)


def over(recipe):
    """The refusal of a recipe that allows nothing within its budget."""
    with pytest.raises(RecipeError) as caught:
        plan_of(recipe)
    return str(caught.value)


def limited(recipe, max_gpu_hours):
    return replace(recipe, budget=BudgetSection(max_gpu_hours=max_gpu_hours))


def applied(recipe, said):
    """The recipe with one change that was proposed, such as "method: qlora, slurm.nodes: 2 (3.1 GPU-hours)"."""
    for change in said.split(" (")[0].split(", "):
        key, value = change.split(": ")
        section, _, field = key.rpartition(".")
        parsed = value.split(" with ")[0]
        parsed = float(parsed) if "." in parsed else int(parsed) if parsed.isdigit() else parsed
        changed = {field: parsed} if not section else {section: replace(getattr(recipe, section), **{field: parsed})}
        recipe = replace(recipe, **changed)
    return recipe


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", ["auto", "full", "lora"])
def test_nothing_within_the_budget_is_refused_with_what_the_cheapest_takes(method, objective):
    """A recipe error, not a warning: it names the GPU-hours of the cheapest, and that budget is enough."""
    recipe = a_recipe(LLAMA_8B, method)
    with pytest.raises(RecipeError) as caught:
        make_plan(limited(recipe, 0.5), model_shape(recipe.model), DATA, A100, objective=objective)
    assert caught.value.exit_code == 2
    assert re.search(r"the cheapest that fits, \w+ on \d+ x \d+ A100-80GB, takes [0-9.]+ GPU-hours", str(caught.value))
    enough = float(re.search(r"budget.max_gpu_hours: ([0-9.]+)\.$", str(caught.value))[1])
    plan = make_plan(limited(recipe, enough), model_shape(recipe.model), DATA, A100, objective=objective)
    assert plan.chosen.gpu_hours <= enough
    assert plan.chosen.gpu_hours > 0.9 * enough


@pytest.mark.parametrize(
    ("fields", "share", "first"),
    [
        ({"method": "lora", "slurm": SlurmSection(nodes=16)}, 0.6, "slurm.nodes: "),
        ({"method": "full", "slurm": on(1, 8)}, 0.93, "method: lora"),
        ({"method": "lora", "slurm": on(1, 1)}, 0.5, "train.num_train_epochs: 0.4"),
        ({"method": "lora", "slurm": on(1, 1), "train": TrainSection(global_batch_size=128, max_steps=100)}, 0.5,
         "train.max_steps: 4"),
    ],
)  # fmt: skip
def test_the_smallest_change_that_saves_enough_comes_first(fields, share, first):
    """Fewer nodes, then a method that trains less, then fewer steps; the changed recipe is within the budget."""
    fields = dict(fields)
    recipe = a_recipe(fields.pop("model", LLAMA_8B), fields.pop("method"), **fields)
    poor = limited(recipe, share * plan_of(recipe).chosen.gpu_hours)
    said = over(poor).split("Nearest within the budget: ")[1]
    assert said.startswith(first)
    for change in said.removesuffix(".").split("; or "):
        assert plan_of(applied(poor, change)).chosen.gpu_hours <= applied(poor, change).budget.max_gpu_hours


def test_alternatives_over_the_budget_are_rejected_with_the_way_back():
    """They fit the memory and not the budget: last of those that fit, with the reason and the change that saves."""
    plan = plan_of(limited(a_recipe(LLAMA_8B, "lora"), 3.2))
    assert plan.chosen.gpu_hours <= 3.2
    beyond = [each for each in plan.alternatives if each.fits and each.gpu_hours > 3.2]
    assert beyond
    for each in beyond:
        assert "over the budget of 3.2" in each.rejected_because
        assert each.would_fit
    rejected = [each.rejected_because is not None for each in plan.alternatives]
    assert rejected == sorted(rejected)


def test_a_recipe_that_leaves_nothing_open_is_planned_over_its_budget():
    """Estimated as written, with a warning that says what would be within: no knob is turned, nothing is refused."""
    recipe = a_recipe(LLAMA_8B, "lora", slurm=on(4, 8))
    written = limited(resolve(recipe, plan_of(recipe)), 2.0)
    plan = plan_of(written)
    assert plan.chosen == plan_of(replace(written, budget=BudgetSection())).chosen
    (warning,) = (each.message for each in plan.warnings if each.code == "over-budget")
    assert "takes" in warning and "train.num_train_epochs" in warning
