"""replies: the bodies of answers, in OpenAI's form."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.serving.scores import Say, Scored, as_chat, as_completion


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens that one answer took."""

    prompt: int
    completion: int

    def body(self) -> dict[str, int]:
        """OpenAI's counts."""
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


@dataclass(kw_only=True, slots=True)
class Choice:
    """One of a request's answers, as it grows."""

    text: str
    scored: tuple[Scored, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One answer's identity, and whether it is a chat's or a completion's."""

    model: str
    chat: bool
    say: Say | None = None
    """A token's own text, where scores are asked for."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created_s: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """An answer that is not streamed."""
        told = [self._whole(index, choice) for index, choice in enumerate(choices)]
        return self._body("chat.completion" if self.chat else "text_completion", told) | {"usage": usage.body()}

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        if self.chat:
            part: dict[str, Any] = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        else:
            part = {"text": choice.text}
        logprobs = self._logprobs(choice.scored, 0)
        return {"index": index, **part, "logprobs": logprobs, "finish_reason": choice.reason}

    def _logprobs(self, scored: Sequence[Scored], offset: int) -> dict[str, Any] | None:
        if self.say is None:
            return None
        return as_chat(scored, self.say) if self.chat else as_completion(scored, self.say, offset)

    def width(self, scored: Sequence[Scored]) -> int:
        """Characters of tokens' own texts, by which a completion's offsets count."""
        return sum(len(self.say(one.token)) for one in scored) if self.say is not None else 0

    def first(self, index: int, echo: str) -> Iterator[dict[str, Any]]:
        """What a choice's stream begins with: a chat says who speaks."""
        if self.chat:
            yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
        elif echo:
            yield self._chunk(index, {"text": echo})

    def piece(self, index: int, text: str, scored: Sequence[Scored], offset: int) -> dict[str, Any]:
        """A part of a choice's text; `offset`: characters before it."""
        part = {"delta": {"content": text}} if self.chat else {"text": text}
        return self._chunk(index, part, logprobs=self._logprobs(scored, offset))

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """Why a choice's text ends."""
        return self._chunk(index, {"delta": {}} if self.chat else {"text": ""}, reason=reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The counts, at the very end."""
        return self._body(self._chunk_kind, []) | {"usage": usage.body()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self,
        index: int,
        part: dict[str, Any],
        *,
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, **part, "logprobs": logprobs, "finish_reason": reason}
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
