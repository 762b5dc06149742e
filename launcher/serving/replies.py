"""replies: the bodies of answers, in OpenAI's form."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens that one answer took."""

    prompt: int
    completion: int

    def body(self) -> dict[str, int]:
        """OpenAI's counts."""
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One answer's identity, and whether it is a chat's or a completion's."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created_s: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str, usage: Usage) -> dict[str, Any]:
        """An answer that is not streamed."""
        if self.chat:
            part: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            part = {"text": text}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": reason}
        return self._body("chat.completion" if self.chat else "text_completion", [choice]) | {"usage": usage.body()}

    def first(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with: a chat says who speaks."""
        if self.chat:
            yield self._chunk({"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, text: str) -> dict[str, Any]:
        """A part of the text."""
        return self._chunk({"delta": {"content": text}} if self.chat else {"text": text}, None)

    def last(self, reason: str) -> dict[str, Any]:
        """Why the text ends."""
        return self._chunk({"delta": {}} if self.chat else {"text": ""}, reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The counts, at the very end."""
        return self._body(self._chunk_kind, []) | {"usage": usage.body()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, part: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": reason}
        return self._body(self._chunk_kind, [choice])

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        return {
            "id": prefix + self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }
