"""Row lengths as people look at them: quantiles, a histogram, and how far a sample's mean may be off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Weighted = tuple[int, float]
"""(tokens of a row that was looked at, rows it stands for)."""
_SHORTEST_BIN = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Rows of a range of lengths."""

    up_to_tokens: int
    """Longest row of this bin; its shortest is one longer than the bin before allows."""
    share: float
    """Of all rows."""


def quantile(lengths: Sequence[Weighted], share: float) -> int | None:
    """The length that `share` of the rows do not exceed; None without lengths."""
    if not lengths:
        return None
    ordered = sorted(lengths)
    wanted, reached = share * sum(weight for _, weight in ordered), 0.0
    for length, weight in ordered:
        reached += weight
        if reached >= wanted * (1 - 1e-12):
            return length
    return ordered[-1][0]


def histogram(lengths: Sequence[Weighted]) -> tuple[Bin, ...]:
    """Shares of rows by length, in bins that double; from the first to the last one that holds a row."""
    total = sum(weight for _, weight in lengths)
    if not total:
        return ()
    held: dict[int, float] = {}
    for length, weight in lengths:
        edge = _edge(length)
        held[edge] = held.get(edge, 0.0) + weight
    edge, found = min(held), []
    while edge <= max(held):
        found.append(Bin(up_to_tokens=edge, share=held.get(edge, 0.0) / total))
        edge *= 2
    return tuple(found)


def _edge(length: int) -> int:
    """The power of two, from 32 on, that is not below `length`."""
    return max(_SHORTEST_BIN, 1 << max(0, length - 1).bit_length())


def standard_error(values: Sequence[float], population: int) -> float:
    """Standard error of the mean of a sample drawn without replacement; 0 where all were looked at.

    s / sqrt(n) * sqrt(1 - n/N), the finite population correction (Cochran, Sampling Techniques, section 2.6).
    """
    n = len(values)
    if n >= population or n < 2:
        return 0.0
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return math.sqrt(variance / n * (1 - n / population))
