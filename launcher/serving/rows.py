"""rows: one answer while it is made, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from launcher.serving.names import Entry
from launcher.serving.sampling import Sampling
from launcher.serving.scores import Scored
from launcher.serving.text import Pieces


@dataclass(frozen=True, slots=True)
class Piece:
    """More of the text."""

    text: str
    scored: tuple[Scored, ...] = ()
    """Its tokens, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The text is complete."""

    reason: Literal["stop", "length"]
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Broken:
    """There will be no more, and that is our fault."""

    why: str
    status: int = 500


Event = Piece | Finished | Broken


@dataclass(kw_only=True, eq=False)
class Row:
    """One answer; made by the endpoint, worked on by the model's thread alone, which tells `sink`."""

    entry: Entry
    prompt: list[int]
    most_tokens: int
    sampling: Sampling
    ends: frozenset[int]
    """Tokens that end the answer."""
    pieces: Pieces
    sink: Callable[[Event], None]
    alternatives: int | None = None
    """Likely tokens to be told beside each of the answer; None: no scores at all."""
    scores_prompt: bool = False
    """Whether the prompt's own tokens are to be scored, too."""
    cancelled: bool = False
    """Set by any thread when nobody waits for the answer any more."""
    tokens: int = 0
    generator: torch.Generator = field(init=False)
    _unsent: list[Scored] = field(init=False, default_factory=list)
    """Scores of tokens whose text is held back."""

    def __post_init__(self) -> None:
        self.generator = self.sampling.generator()

    @property
    def wants_nothing(self) -> bool:
        """Whether the model need not be asked: a prompt is to be repeated, and no more."""
        return not self.most_tokens and not self.scores_prompt

    def take(self, token: int, scored: Scored | None = None) -> bool:
        """One more token; whether the answer goes on."""
        self.tokens += 1
        if token in self.ends:
            return self._finish("stop")
        if scored is not None:
            self._unsent.append(scored)
        text = self.pieces.add(token)
        if text:
            self._send(text)
        if self.pieces.stopped:
            return self._finish("stop")
        return True if self.tokens < self.most_tokens else self._finish("length")

    def _finish(self, reason: Literal["stop", "length"]) -> bool:
        text = self.pieces.rest()
        if text or self._unsent:
            self._send(text)
        self.sink(Finished("stop" if self.pieces.stopped else reason, self.tokens))
        return False

    def _send(self, text: str) -> None:
        self.sink(Piece(text, tuple(self._unsent)))
        self._unsent.clear()

    def take_prompt(self, scored: list[Scored]) -> bool:
        """Scores of the prompt's tokens; whether there is to be an answer after it."""
        self.sink(Piece("", tuple(scored)))
        return True if self.most_tokens else self._finish("length")
