"""text: tokens of an answer become pieces of text that can be sent, and end where a stop sequence begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

TORN = "\ufffd"
"""What a tokenizer puts for bytes that are no whole character yet."""


class Decoder(Protocol):
    """The part of a tokenizer that is needed."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of tokens."""


class Pieces:
    """The text of one answer as it grows.

    A few tokens are decoded together with those before them: alone they would lose leading spaces or be torn
    characters. (`tokenizers.DecodeStream` does this too, but raises on some texts that cannot be a prefix.)
    """

    def __init__(self, decoder: Decoder, before: Sequence[int], stops: Sequence[str]) -> None:
        """`before`: the end of the text that the answer continues; nothing for a new message."""
        self._decoder, self._stops = decoder, tuple(stops)
        self._ids = list(before)
        self._start, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False
        """Whether a stop sequence was met; the text ends before it."""

    def add(self, token: int) -> str:
        """What may be sent after one more token; "" where that must wait."""
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith(TORN):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(new)

    def rest(self) -> str:
        """What was held back, when no more token comes."""
        if self.stopped:
            return ""
        held, self._held = self._held + self._new(), ""
        return self._cut(held) if any(stop in held for stop in self._stops) else held

    def _new(self) -> str:
        # Only a prompt of tokens can end within a character, which its continuation then completes.
        known = self._decoder.decode(self._ids[self._start : self._read], skip_special_tokens=True).rstrip(TORN)
        return self._decoder.decode(self._ids[self._start :], skip_special_tokens=True)[len(known) :]

    def _release(self, new: str) -> str:
        text = self._held + new
        if any(stop in text for stop in self._stops):
            return self._cut(text)
        waiting = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - waiting :]
        return text[: len(text) - waiting]

    def _cut(self, text: str) -> str:
        self.stopped, self._held = True, ""
        return text[: min(text.find(stop) for stop in self._stops if stop in text)]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` could begin."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
