"""Successive halving: who goes on after a rung, and where a run pauses for it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import RecipeError
from launcher.runs.trial_rungs import kept, mean, most_hours, parse_rungs, rung_steps, survivors

LOSSES = st.dictionaries(
    st.text("abcdef", min_size=1), st.lists(st.floats(0, 9), min_size=2, max_size=2), min_size=1, max_size=12
)


def test_shares_are_read_as_written() -> None:
    """Exact shares: a third of the steps is a third."""
    assert parse_rungs("1/3, 1/2,1") == (Fraction(1, 3), Fraction(1, 2), Fraction(1))


@pytest.mark.parametrize("text", ["", "1/2", "1/2,1/4,1", "1/2,1/2,1", "0,1", "1,2", "x,1", "1/0,1"])
def test_anything_but_rising_shares_that_end_in_one_is_refused(text: str) -> None:
    """The message shows what would do."""
    with pytest.raises(RecipeError, match="1/4,1/2,1"):
        parse_rungs(text)


def test_a_rung_is_a_step_of_the_whole_run() -> None:
    """The last is the end; none is before the first step."""
    assert rung_steps(parse_rungs("1/4,1/2,1"), 120) == (30, 60, 120)
    assert rung_steps(parse_rungs("1/4,1/2,1"), 1) == (1, 1, 1)


def test_the_better_half_goes_on() -> None:
    """By the mean over the seeds, in the order of the list."""
    losses = {"a": [3.0, 3.0], "b": [1.0, 1.0], "c": [2.0, 2.1], "d": [2.0, 1.9], "e": [9.0, 0.0]}
    assert survivors(losses) == ["b", "c", "d"]


@given(LOSSES)
def test_nobody_who_goes_on_is_worse_than_one_who_does_not(losses: dict[str, list[float]]) -> None:
    """Half go on, never fewer than two where there are two, whatever the losses."""
    going = survivors(losses)
    assert len(going) == kept(len(losses)) >= min(2, len(losses))
    stopped = [mean(losses[name]) for name in losses if name not in going]
    assert max(mean(losses[name]) for name in going) <= min(stopped, default=math.inf)


def test_a_loss_that_is_no_number_does_not_go_on_before_another() -> None:
    """A candidate that diverged counts as infinitely bad."""
    assert survivors({"a": [math.inf], "b": [8.0], "c": [9.0]}) == ["b", "c"]


def test_the_budget_counts_on_the_dearest_going_on() -> None:
    """Four candidates of 8, 4, 2 and 1 hours: a quarter of all, a quarter of the two dearest, half of these."""
    assert most_hours([1.0, 8.0, 2.0, 4.0], parse_rungs("1/4,1/2,1"), seeds=2) == 2 * (15 / 4 + 12 / 4 + 12 / 2)
