"""What `--explain` says is what the planner computed: factors multiply out, sums add up to the plan's numbers."""

from __future__ import annotations

from math import prod

import pytest

from launcher.facts.model import model_shape
from launcher.planning.plan import Plan
from launcher.recipe.schema import BudgetSection, Recipe
from launcher.report.explain import Line, explain
from launcher.report.html import render_plan
from tests.unit.planning.examples import A100, CPU, LLAMA_70B, SIX, a_recipe, on, plan_of

CASES = {
    **{name: (recipe, A100) for name, recipe in SIX.items()},
    "does not fit": (a_recipe(LLAMA_70B, "full", slurm=on(1, 1)), A100),
    "on a CPU": (a_recipe("Qwen/Qwen2.5-0.5B", "lora"), CPU),
    "prompt tuning": (a_recipe(method="prompt"), A100),
    "priced": (a_recipe(budget=BudgetSection(gpu_hour_price=2.5)), A100),
}


def explained(case: str) -> tuple[Plan, dict[str, Line]]:
    recipe, site = CASES[case]
    plan = plan_of(recipe, site)
    return plan, {line.term: line for line in explain(plan, model_shape(_model(recipe)), site)}


def _model(recipe: Recipe):  # type: ignore[no-untyped-def]
    return recipe.model


@pytest.mark.parametrize("case", CASES)
def test_memory_lines_are_the_plans_terms(case: str) -> None:
    """Every term of the estimate has a line with its value; together they are the peak."""
    plan, lines = explained(case)
    terms = plan.chosen.memory.terms_bytes
    for term in ("weights", "gradients", "optimizer", "activations", "logits", "gathered", "buffers"):
        assert lines[term].value == pytest.approx(terms[term], abs=1.0), term
    assert lines["peak"].value == plan.chosen.memory.peak_bytes.expected
    assert lines["parameters P"].value == plan.params
    assert lines["trained P_t"].value == plan.chosen.trainable_params


@pytest.mark.parametrize("case", CASES)
def test_factors_multiply_to_the_result(case: str) -> None:
    """The numbers put into a formula give its result, so that a reader can check with a calculator."""
    _, lines = explained(case)
    products = [line for line in lines.values() if line.factors]
    assert len(products) >= 7
    for line in products:
        assert prod(line.factors) == pytest.approx(line.value), line.term


@pytest.mark.parametrize("case", CASES)
def test_time_lines_are_the_plans_times(case: str) -> None:
    """Step, throughput, run time, GPU-hours and money are those of the plan."""
    plan, lines = explained(case)
    chosen = plan.chosen
    assert lines["step"].value == pytest.approx(chosen.step_s.expected)
    assert lines["tokens/s per rank"].value == pytest.approx(chosen.tokens_per_s_per_gpu)
    assert lines["run time"].value == chosen.wall_s
    if chosen.candidate.device == "cuda":
        assert lines["GPU-hours"].value == pytest.approx(chosen.gpu_hours)
    if chosen.cost.amount is not None:
        assert lines["cost"].value == pytest.approx(chosen.cost.amount)


@pytest.mark.parametrize("case", CASES)
def test_the_fits_rule_is_the_one_that_decided(case: str) -> None:
    """Cautious peak and runtime against the device, with the verdict in words."""
    plan, lines = explained(case)
    verdict = lines["fits"].value <= plan.chosen.memory.usable_bytes
    assert lines["fits"].numbers.endswith(": fits" if verdict else ": does not fit")
    if plan.chosen.fits:
        assert verdict


def test_every_line_names_its_source() -> None:
    """A number without a source cannot be doubted, so it cannot be trusted."""
    for case in CASES:
        for line in explained(case)[1].values():
            assert line.source
            assert line.formula
            assert line.numbers


def test_the_page_carries_the_formulas() -> None:
    """Folded below the reasons, one row per line."""
    recipe, site = CASES["8b-lora-1x1"]
    plan = plan_of(recipe, site)
    lines = explain(plan, model_shape(recipe.model), site)
    page = render_plan(plan, explained=lines)
    assert page.count("</td></tr>") > len(lines)
    assert f"numbers ({len(lines)})" in page
