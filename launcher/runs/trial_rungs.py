"""trial_rungs: successive halving: after each rung the better half goes on, resumed, to the next.

Every candidate trains on the schedule of its whole run; a rung is where it pauses, not a shorter schedule. Nothing here
looks at a clock: the same losses give the same survivors, whatever interrupted the runs on the way.

Source: successive halving, Jamieson and Talwalkar, arXiv 1502.07943.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from launcher.errors import RecipeError

USUAL = ("1/4", "1/2", "1")
Losses = Mapping[str, Sequence[float]]
"""Candidate -> validation loss of each seed, in the order in which candidates are listed."""


def parse_rungs(text: str) -> tuple[Fraction, ...]:
    """Shares of the whole run, such as `1/4,1/2,1`.

    Raises:
        RecipeError: not rising shares that end in 1.
    """
    wrong = f"--rungs: expected rising shares of the run that end in 1, such as 1/4,1/2,1 or 1; found {text!r}"
    try:
        shares = tuple(Fraction(part.strip()) for part in text.split(","))
    except (ValueError, ZeroDivisionError) as error:
        raise RecipeError(wrong) from error
    rising = all(low < high for low, high in itertools.pairwise(shares))
    if not rising or shares[0] <= 0 or shares[-1] != 1:
        raise RecipeError(wrong)
    return shares


def rung_steps(shares: Sequence[Fraction], steps: int) -> tuple[int, ...]:
    """The step at which a run of `steps` pauses for each rung; the last is its end."""
    return tuple(max(1, math.ceil(share * steps)) for share in shares)


def kept(count: int) -> int:
    """How many of `count` candidates go on: the better half, rounded up; two, so that the last rung compares."""
    return min(count, max(2, math.ceil(count / 2)))


def survivors(losses: Losses) -> list[str]:
    """Who goes on after a rung, in the order of the list; equal losses are decided by that order."""
    ranked = sorted(losses, key=lambda name: mean(losses[name]))
    best = set(ranked[: kept(len(ranked))])
    return [name for name in losses if name in best]


def mean(values: Sequence[float]) -> float:
    """The same for the same values in the same order, to the last bit."""
    return math.fsum(values) / len(values)


def most_hours(hours: Sequence[float], shares: Sequence[Fraction], seeds: int) -> float:
    """Upper bound of a trial in device-hours: the most expensive always go on. `hours`: of a whole run each."""
    left, total, before = sorted(hours, reverse=True), 0.0, Fraction(0)
    for share in shares:
        total += float(share - before) * sum(left)
        before, left = share, left[: kept(len(left))]
    return total * seeds
