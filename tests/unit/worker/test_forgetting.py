"""How much a base forgot, in one number, and when that is said."""

from __future__ import annotations

import math

import pytest

from launcher.recipe.schema import DataSection
from launcher.worker.forgetting import rise, warning, worse_than_base


def test_the_rise_is_that_of_the_perplexity_whatever_the_entropy() -> None:
    """0.2 nats more count the same on text of one nat per token and of six."""
    for base in (1.0, 6.0):
        assert rise({"retention": base}, {"retention": base + 0.2}) == pytest.approx(math.exp(0.2) - 1)
    assert rise({}, {"retention": 1.0}) is None
    assert rise({"validation": 1.0}, {"validation": 2.0}) is None
    assert math.isfinite(rise({"retention": 1.0}, {"retention": 5000.0}) or math.nan)


def test_it_warns_past_the_limit_and_not_at_it() -> None:
    """The message says from where to where, by how much, and what helps."""
    before, limit = {"retention": 2.0}, math.exp(0.2) - 1
    assert warning(10, before, {"retention": 2.2}, limit + 1e-9) is None
    assert warning(10, before, {"retention": 1.0}, limit) is None
    found = warning(10, before, {"retention": 2.5}, limit)
    assert found is not None
    assert (found["code"], found["step"], found["limit"]) == ("retention", 10, limit)
    assert "from 2.0000 to 2.5000, its perplexity by 65% (the limit is 22%)" in found["message"]
    assert "lower train.learning_rate" in found["message"]
    assert "an adapter instead" in found["message"]


def test_nobody_who_trains_an_adapter_is_told_to_train_one() -> None:
    """What helps depends on what was done."""
    found = warning(10, {"retention": 2.0}, {"retention": 2.5}, 0.2, method="lora")
    assert found is not None and "an adapter instead" not in found["message"]


def test_a_result_that_is_worse_than_the_base_says_so() -> None:
    """Equal is not worse; without held-out rows nobody knows."""
    assert worse_than_base(9, {"validation": 2.0}, {"validation": 2.0}) is None
    assert worse_than_base(9, {}, {"validation": 2.0}) is None
    found = worse_than_base(9, {"validation": 2.0}, {"validation": 2.1})
    assert found is not None and (found["code"], found["step"]) == ("worse-than-base", 9)
    assert "2.1000" in found["message"] and "2.0000" in found["message"]


def test_the_default_limit_lies_between_what_was_measured_gently_and_roughly() -> None:
    """Losses of docs/compare.md: advised rates stay silent, thirty times as much does not, on either base."""
    limit = DataSection(train=()).retention_max_rise
    gentle = [(2.1696, 2.1716), (2.1696, 2.1922), (5.8419, 5.9810)]
    rough = [(2.1696, 2.4809), (2.1696, 3.6221), (5.8419, 6.1406)]
    for first, last in gentle:
        assert warning(1, {"retention": first}, {"retention": last}, limit) is None
    for first, last in rough:
        assert warning(1, {"retention": first}, {"retention": last}, limit) is not None
