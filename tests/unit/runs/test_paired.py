"""Two runs on the same rows: who wins where, and when that is more than chance."""

from __future__ import annotations

import random

import pytest

from launcher.runs.paired import LEAST_ROWS, all_pairs, paired, sign_test, winner


def rows(generator: random.Random, n: int, shift: float = 0.0) -> list[float]:
    """Losses that differ far more from row to row than from run to run."""
    return [row + shift + generator.gauss(0, 0.05) for row in random.Random(1).choices([1.0, 2.0, 4.0], k=n)]


def test_wins_losses_and_ties_are_counted_by_row() -> None:
    """A difference of rounding is a tie."""
    pair = paired("a", "b", [1.0, 2.0, 3.0, 4.0], [1.5, 1.0, 3.00001, 4.5])
    assert (pair.wins, pair.losses, pair.ties, pair.rows) == (2, 1, 1, 4)
    assert pair.difference == pytest.approx((-0.5 + 1.0 - 0.00001 - 0.5) / 4)


def test_a_real_difference_is_found_although_rows_differ_much_more() -> None:
    """Paired: 0.05 nats between the runs, rows between 1 and 4 nats."""
    generator = random.Random(0)
    pair = paired("a", "b", rows(generator, 100), rows(generator, 100, 0.05))
    assert pair.better == "a"
    assert pair.low < pair.difference < pair.high < 0


def test_noise_is_hardly_ever_called_a_difference() -> None:
    """Two hundred pairs that differ by chance alone: about one in twenty at the 95 % level, not more."""
    generator = random.Random(3)
    called = sum(paired("a", "b", rows(generator, 40), rows(generator, 40)).better is not None for _ in range(200))
    assert called <= 22, called


def test_a_handful_of_rows_settles_nothing() -> None:
    """Nine rows, all better: no winner; with one more there is."""
    few = LEAST_ROWS - 1
    assert paired("a", "b", [1.0] * few, [2.0] * few).better is None
    assert paired("a", "b", [1.0] * LEAST_ROWS, [2.0] * LEAST_ROWS).better == "a"


def test_the_winner_beats_each_of_the_others() -> None:
    """The base is no competitor; a third run that may be as good leaves no winner."""
    generator = random.Random(5)
    losses = {"base": rows(generator, 60, 1.0), "a": rows(generator, 60), "b": rows(generator, 60, 0.2)}
    assert winner(all_pairs(losses), ["a", "b"]) == "a"
    losses["c"] = [value + 1e-5 for value in losses["a"]]
    pairs = all_pairs(losses)
    assert winner(pairs, ["a", "b", "c"]) is None
    assert pairs[0].level == pytest.approx(1 - 0.05 / 6)


def test_lists_of_different_length_are_refused() -> None:
    """Rows that were not measured for both cannot be paired."""
    with pytest.raises(ValueError, match="zip"):
        paired("a", "b", [1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no rows"):
        paired("a", "b", [], [])


@pytest.mark.parametrize(("wins", "losses", "expected"), [(5, 5, 1.0), (10, 0, 2 / 1024), (8, 2, 112 / 1024)])
def test_the_sign_test_is_the_binomial(wins: int, losses: int, expected: float) -> None:
    """Values of the two-sided test with even odds."""
    assert sign_test(wins, losses) == pytest.approx(expected)
