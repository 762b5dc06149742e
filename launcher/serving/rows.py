"""rows: one answer while it is made, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from launcher.serving.names import Entry
from launcher.serving.sampling import Sampling
from launcher.serving.text import Pieces


@dataclass(frozen=True, slots=True)
class Piece:
    """More of the text."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The text is complete."""

    reason: Literal["stop", "length"]
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Broken:
    """There will be no more, and that is our fault."""

    why: str


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
    cancelled: bool = False
    """Set by any thread when nobody waits for the answer any more."""
    tokens: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = self.sampling.generator()

    def take(self, token: int) -> bool:
        """One more token; whether the answer goes on."""
        self.tokens += 1
        if token in self.ends:
            return self._finish("stop")
        text = self.pieces.add(token)
        if text:
            self.sink(Piece(text))
        if self.pieces.stopped:
            return self._finish("stop")
        return True if self.tokens < self.most_tokens else self._finish("length")

    def _finish(self, reason: Literal["stop", "length"]) -> bool:
        text = self.pieces.rest()
        if text:
            self.sink(Piece(text))
        self.sink(Finished("stop" if self.pieces.stopped else reason, self.tokens))
        return False
