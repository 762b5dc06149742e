"""sampling: the next token of every row of a batch, each by its own settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_COLDEST = 1e-5
"""Below this a temperature is 0: probabilities could not be told from those of the likeliest token alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one answer's tokens are chosen."""

    temperature: float = 1.0
    """0: the likeliest."""
    top_p: float = 1.0
    seed: int | None = None

    def generator(self) -> torch.Generator:
        """The answer's own random numbers: what else is in the batch does not change them."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def choose(logits: Tensor, rows: Sequence[tuple[Sampling, torch.Generator]]) -> list[int]:
    """One token per row.

    Raises:
        RuntimeError: a sampled row's logits hold NaN.
    """
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    for index, (sampling, generator) in enumerate(rows):
        if sampling.temperature >= _COLDEST:
            chosen[index] = _sample(logits[index].float().cpu(), sampling, generator)
    return chosen


def _sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Nucleus sampling (Holtzman et al., arXiv 1904.09751): the fewest likeliest tokens that reach top_p."""
    # Shifted first: a tiny temperature would overflow otherwise.
    probabilities = torch.softmax((logits - logits.max()) / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        sorted, order = probabilities.sort(descending=True)
        # A token stays while those before it have not reached top_p; the first always stays.
        sorted[sorted.cumsum(-1) - sorted >= sampling.top_p] = 0
        return int(order[torch.multinomial(sorted, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
