"""paired: two runs on the same rows: who is better on how many, and whether the difference is more than chance.

The mean difference of per-row losses gets a percentile bootstrap interval over rows (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13): rows are what was sampled, so rows are drawn again. It speaks of other
rows of the same kind, never of another seed of the training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

RESAMPLES = 2000
SEED = 20_260_101
TIE_NATS = 1e-4
"""Rows whose losses are closer than this are ties: rounding of 16-bit arithmetic, not of models."""
LEAST_ROWS = 10
"""Below so many rows no winner is called: an interval over so few says little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """`one` against `other`; losses in nats per trained token, every row counts the same."""

    one: str
    other: str
    rows: int
    wins: int
    """Rows on which `one` has the lower loss."""
    losses: int
    ties: int
    difference: float
    """Mean of (one - other); below zero: `one` is better."""
    low: float
    high: float
    level: float
    """Of the interval [low, high]."""
    sign_p: float
    """Two-sided sign test on wins and losses."""
    better: str | None
    """Whom the rows show to be better; None: it may be chance."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def paired(one: str, other: str, first: Sequence[float], second: Sequence[float], *, level: float = 0.95) -> Pair:
    """Compare two lists of per-row losses, row by row.

    Raises:
        ValueError: no rows, or lists of different length.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not differences:
        raise ValueError("nothing to compare: no rows")
    low, high = _bootstrap(differences, level)
    wins, lost = sum(d < -TIE_NATS for d in differences), sum(d > TIE_NATS for d in differences)
    certain = len(differences) >= LEAST_ROWS and (low > TIE_NATS or high < -TIE_NATS)
    mean = math.fsum(differences) / len(differences)
    return Pair(
        one=one,
        other=other,
        rows=len(differences),
        wins=wins,
        losses=lost,
        ties=len(differences) - wins - lost,
        difference=mean,
        low=low,
        high=high,
        level=level,
        sign_p=sign_test(wins, lost),
        better=(one if mean < 0 else other) if certain else None,
    )


def all_pairs(losses: dict[str, Sequence[float]]) -> list[Pair]:
    """Every pair of names, at a level that makes one false alarm among all of them a matter of 5 % (Bonferroni)."""
    names = list(losses)
    couples = [(a, b) for at, a in enumerate(names) for b in names[at + 1 :]]
    level = 1 - 0.05 / max(1, len(couples))
    return [paired(a, b, losses[a], losses[b], level=level) for a, b in couples]


def winner(pairs: Sequence[Pair], among: Sequence[str]) -> str | None:
    """The one that beats each of the others `among`; None where that may be chance."""
    for name in among:
        own = [pair for pair in pairs if name in (pair.one, pair.other) and {pair.one, pair.other} <= set(among)]
        if own and all(pair.better == name for pair in own):
            return name
    return None


def sign_test(wins: int, losses: int) -> float:
    """Probability of so lopsided a count or worse where both are as likely (binomial, two-sided)."""
    n, k = wins + losses, min(wins, losses)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return float(min(1.0, 2 * tail / 2**n))


def _bootstrap(values: Sequence[float], level: float) -> tuple[float, float]:
    generator = random.Random(SEED)
    n = len(values)
    means = sorted(math.fsum(generator.choices(values, k=n)) / n for _ in range(RESAMPLES))
    out = (1 - level) / 2
    return means[int(out * RESAMPLES)], means[min(RESAMPLES - 1, math.ceil((1 - out) * RESAMPLES) - 1)]
