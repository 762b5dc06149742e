"""The plan as people see it."""

import io

import pytest
from rich.console import Console

from launcher.facts.model import model_shape
from launcher.report.explain import explain
from launcher.report.text import duration, print_plan, print_recipes
from tests.unit.planning.examples import A100, CPU, LLAMA_8B, LLAMA_70B, RTX4090, SIX, a_recipe, plan_of


def printed(plan, **options):
    out = io.StringIO()
    print_plan(plan, console=Console(file=out, width=140, highlight=False, soft_wrap=True), **options)
    return out.getvalue()


@pytest.mark.parametrize("name", SIX)
def test_every_plan_prints_what_runs_and_what_to_type_next(name):
    """Model, method, memory, time and the next command are all there."""
    plan = plan_of(SIX[name])
    text = printed(plan, recipe_argument="my.yaml")
    candidate = plan.chosen.candidate
    assert plan.model in text
    assert f"{candidate.nodes} x {candidate.gpus_per_node} A100-80GB" in text
    assert "GiB" in text
    assert "tokens/s" in text
    assert text.rstrip().endswith("Next: launcher submit my.yaml")


def test_a_plan_that_does_not_fit_says_so_first_and_last():
    """Nobody should submit what was refused."""
    text = printed(plan_of(a_recipe(LLAMA_70B, "qlora"), RTX4090))
    assert "does not fit" in text
    assert "launcher submit" not in text


def test_reasons_of_rejected_alternatives_are_shown_on_request():
    """By default only what works is listed, with how many were left out."""
    plan = plan_of(SIX["70b-full-8x8"])
    assert "NOT, BECAUSE IT" not in printed(plan)
    assert "--alternatives" in printed(plan)
    assert "GiB per GPU" in printed(plan, all_alternatives=True)


def test_explain_shows_every_term():
    """Each term comes with its formula, its numbers, its result and its source."""
    recipe = SIX["8b-full-1x8"]
    plan = plan_of(recipe)
    lines = explain(plan, model_shape(recipe.model), A100)
    text = printed(plan, explained=lines)
    for line in lines:
        assert line.term in text
        assert line.result in text
    assert "ZeRO-2" in text


def test_cpu_ranks_are_called_what_they_are():
    """No GPU-hours are promised where there is no GPU."""
    text = printed(plan_of(a_recipe("quickstart/base", "lora"), CPU))
    assert "CPU ranks" in text
    assert "GPU-hours" not in text


def test_recipes_list():
    """One line per recipe with its prediction."""
    out = io.StringIO()
    candidate = {"nodes": 1, "gpus_per_node": 8, "gpu": "A100-80GB"}
    row = {"name": "8b-lora", "method": "lora", "model": LLAMA_8B, "fits": True, "wall_s": 7200.0, "gpu_hours": 16.0}
    print_recipes([row | candidate | {"peak_bytes": 20 * 2**30}], console=Console(file=out, width=160))
    assert "8b-lora" in out.getvalue()
    assert "20.0 GiB" in out.getvalue()
    assert "2.0 h" in out.getvalue()


@pytest.mark.parametrize(("seconds", "said"), [(45, "45 s"), (720, "12 min"), (12_600, "3.5 h"), (259_200, "3.0 days")])
def test_durations_are_read_at_a_glance(seconds, said):
    """One unit, two or three digits."""
    assert duration(seconds) == said
