"""service: what the endpoint does, without HTTP: requests become rows, adapters come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from launcher.errors import LauncherError
from launcher.serving.engine import Engine
from launcher.serving.model import Served
from launcher.serving.names import Entry, Names
from launcher.serving.opened import BaseFacts, Opened, open_adapter
from launcher.serving.problems import ApiError
from launcher.serving.requests import ChatRequest, CompletionRequest, LoadRequest
from launcher.serving.rows import Row
from launcher.serving.sampling import Sampling
from launcher.serving.stream import Answer
from launcher.serving.text import Pieces

_CONTINUED_TOKENS = 8
"""Tokens of a prompt with which its continuation is decoded: enough for any character and its leading space."""


@dataclass(kw_only=True)
class Service:
    """One base and its adapters, ready to answer."""

    names: Names
    engine: Engine
    model: Served
    base: BaseFacts
    context: int
    """Tokens of prompt and answer together at most."""
    trusted: bool
    """Whether adapters that do not say what they were trained on are taken."""

    def chat_row(self, asked: ChatRequest, answer: Answer) -> Row:
        """A chat's row.

        Raises:
            ApiError: 404, 400 (the template refuses it, or it is too long).
        """
        entry = self.names.find(asked.model)
        if not entry.tokenizer.chat_template:
            raise ApiError(400, f"{entry.name} has no chat template; use /v1/completions", param="messages")
        messages = [message.plain() for message in asked.messages]
        try:
            text = entry.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, ValueError) as error:
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error
        prompt = entry.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._row(asked, entry, prompt, asked.limit, answer, continued=0)

    def completion_row(self, asked: CompletionRequest, answer: Answer) -> Row:
        """A completion's row.

        Raises:
            ApiError: 404, 400 (empty, too long, or tokens that the model does not have).
        """
        entry = self.names.find(asked.model)
        given: Any = asked.prompt
        prompt: list[int] = entry.tokenizer(given)["input_ids"] if isinstance(given, str) else list(given)
        strange = [token for token in prompt if not 0 <= token < self.model.vocabulary]
        if strange:
            raise ApiError(400, f"prompt: there is no token {strange[0]}", param="prompt")
        return self._row(asked, entry, prompt, asked.limit, answer, continued=_CONTINUED_TOKENS)

    def _row(
        self,
        asked: ChatRequest | CompletionRequest,
        entry: Entry,
        prompt: list[int],
        limit: int | None,
        answer: Answer,
        *,
        continued: int,
    ) -> Row:
        room = self.context - len(prompt) - self.model.virtual_tokens(entry)
        if not prompt:
            raise ApiError(400, "the prompt is empty", param="prompt")
        if room < (limit or 1):
            raise ApiError(
                400,
                f"this server's context is {self.context} tokens; the prompt has {self.context - room} "
                f"and the answer may have {limit or 1}",
                code="context_length_exceeded",
                param="messages" if isinstance(asked, ChatRequest) else "prompt",
            )
        temperature = 1.0 if asked.temperature is None else asked.temperature
        own_end = entry.tokenizer.eos_token_id
        return Row(
            entry=entry,
            prompt=prompt,
            most_tokens=limit or room,
            sampling=Sampling(temperature=temperature, top_p=asked.top_p or 1.0, seed=asked.seed),
            ends=self.model.ends | ({own_end} if own_end is not None else set()),
            pieces=Pieces(entry.tokenizer, prompt[-continued:] if continued else [], asked.stops),
            sink=answer,
        )

    async def load(self, asked: LoadRequest) -> Entry:
        """Serve one more adapter; only the weights' copy into the model waits for the answers under way.

        Raises:
            ApiError: 400; the name is taken, or the folder holds nothing that can be served.
        """
        self.names.refuse_taken(asked.lora_name)
        try:
            opened = await asyncio.to_thread(open_adapter, Path(asked.lora_path), self.base, trusted=self.trusted)
            return await asyncio.wrap_future(self.engine.call(lambda: self.add(asked.lora_name, opened)))
        except LauncherError as error:
            raise ApiError(400, "; ".join(error.problems), param="lora_path") from error

    def add(self, name: str, opened: Opened) -> Entry:
        """Put an adapter into the model and its name on the list; on the model's thread, or before it starts.

        Raises:
            ModelError: it does not fit. ApiError: 400; the name is taken.
        """
        self.names.refuse_taken(name)
        key = self.names.new_key()
        self.model.add(key, opened)
        tokenizer: Any = opened.tokenizer or self.names.base.tokenizer
        entry = Entry(name=name, key=key, tokenizer=tokenizer, folder=str(opened.folder))
        self.names.add(entry)
        return entry

    def unload(self, name: str) -> None:
        """Serve it no longer; answers under way are completed first.

        Raises:
            ApiError: 404, 400 (the base).
        """
        self.engine.retire(self.names.remove(name).key)

    @property
    def served(self) -> Sequence[str]:
        """Names on the list."""
        return [str(one["id"]) for one in self.names.listed()]
