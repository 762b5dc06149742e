"""scores: how likely the model found tokens, and that in OpenAI's forms.

From the logits as they are: temperature and top_p change what is chosen, not what is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from launcher.serving.text import TORN

_LEAST = -9999.0
"""What OpenAI writes for a token that cannot come: JSON has no infinity."""
_AT_ONCE = 256
"""Positions of a prompt that are made probabilities at once, in fp32."""
Say = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Scored:
    """One token, and what else was likely in its place."""

    token: int
    logprob: float | None
    """None: a prompt's first, which follows nothing."""
    top: tuple[tuple[int, float], ...] = ()


def score(logits: Tensor, tokens: Sequence[int], alternatives: int) -> list[Scored]:
    """Tokens (T) by the logits (T, V) of their positions."""
    found = []
    for start in range(0, len(tokens), _AT_ONCE):
        part = torch.log_softmax(logits[start : start + _AT_ONCE].float(), dim=-1).clamp(min=_LEAST)
        chosen = torch.tensor(tokens[start : start + _AT_ONCE], device=part.device)
        own = part.gather(1, chosen[:, None])[:, 0].tolist()
        values, ids = part.topk(min(alternatives, part.shape[1]), dim=-1)
        tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
        found += [Scored(*one) for one in zip(tokens[start : start + _AT_ONCE], own, tops, strict=True)]
    return found


def as_chat(scored: Sequence[Scored], say: Say) -> dict[str, Any]:
    """The chat's form."""

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        text = say(token)
        # A part of a character has no text of its own.
        return {"token": text, "logprob": logprob, "bytes": None if TORN in text else list(text.encode())}

    content = [one(each.token, each.logprob) | {"top_logprobs": [one(*other) for other in each.top]} for each in scored]
    return {"content": content, "refusal": None}


def as_completion(scored: Sequence[Scored], say: Say, offset: int) -> dict[str, Any]:
    """The completion's form; `offset`: characters of the answer before these tokens."""
    tokens = [say(each.token) for each in scored]
    offsets = [offset]
    for text in tokens:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": tokens,
        "token_logprobs": [each.logprob for each in scored],
        "top_logprobs": [None if each.logprob is None else _by_text(each.top, say) for each in scored],
        "text_offset": offsets[:-1],
    }


def _by_text(top: Sequence[tuple[int, float]], say: Say) -> dict[str, float]:
    """The likeliest first; of tokens with the same text (parts of characters) the likeliest alone."""
    found: dict[str, float] = {}
    for token, value in top:
        found.setdefault(say(token), value)
    return found
