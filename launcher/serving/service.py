"""service: what the endpoint does, without HTTP: requests become rows, adapters come and go."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError
from launcher.serving.engine import Engine
from launcher.serving.model import Served
from launcher.serving.names import Entry, Names, new_entry
from launcher.serving.opened import BaseFacts, Opened, open_adapter
from launcher.serving.problems import ApiError
from launcher.serving.replies import Form
from launcher.serving.requests import ChatRequest, CompletionRequest, LoadRequest
from launcher.serving.rows import Row
from launcher.serving.sampling import Sampling
from launcher.serving.stream import Answer, Asked
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
    _loading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2), init=False)
    """Adapters read at once: a slow file system must not take the threads in which prompts become tokens."""

    def chat(self, asked: ChatRequest, answer: Answer, note: dict[str, Any]) -> Asked:
        """A chat's rows; on any thread.

        Raises:
            ApiError: 404, 400 (the template refuses it, or it is too long).
        """
        entry = self.names.find(asked.model)
        if not entry.tokenizer.chat_template:
            raise ApiError(400, f"{entry.name} has no chat template; use /v1/completions", param="messages")
        messages = [message.plain() for message in asked.messages]
        try:
            text = entry.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error
        _refuse_left_out(messages, text)
        prompt = self._tokens(entry, text, asked, special=False)
        self._refuse_prompt(asked, entry, prompt)
        return self._asked(asked, entry, [prompt], [""], answer, note)

    def completion(self, asked: CompletionRequest, answer: Answer, note: dict[str, Any]) -> Asked:
        """A completion's rows, one for each choice of each prompt; on any thread.

        Raises:
            ApiError: 404, 400 (empty, too long, or tokens that the model does not have).
        """
        entry = self.names.find(asked.model)
        prompts: list[list[int]] = []
        echoes: list[str] = []
        for given in asked.prompts:
            prompt = self._tokens(entry, given, asked, special=True) if isinstance(given, str) else given
            self._refuse_prompt(asked, entry, prompt)
            text = given if isinstance(given, str) else str(entry.tokenizer.decode(prompt)) if asked.echo else ""
            prompts.append(prompt)
            echoes.append(text if asked.echo else "")
        return self._asked(asked, entry, prompts, echoes, answer, note)

    def _tokens(self, entry: Entry, text: str, asked: ChatRequest | CompletionRequest, *, special: bool) -> list[int]:
        """Tokens of a text, unless there are far too many: reading millions of words for nothing takes a minute."""
        if len(text) > self.context * entry.longest_token:
            raise self._too_long(asked, len(text) // entry.longest_token, "at least ")
        found: list[int] = entry.tokenizer(text, add_special_tokens=special)["input_ids"]
        return found

    def _refuse_prompt(self, asked: ChatRequest | CompletionRequest, entry: Entry, prompt: list[int]) -> None:
        if not prompt:
            raise ApiError(400, "the prompt is empty", param=_PARAMS[type(asked)])
        taken = len(prompt) + self.model.virtual_tokens(entry)
        if self.context - taken < (1 if asked.limit is None else asked.limit):
            raise self._too_long(asked, taken)
        # A tokenizer may have more tokens than the base has embeddings, and on a GPU one of them would end the server.
        strange = next((token for token in prompt if not 0 <= token < self.model.vocabulary), None)
        if strange is not None:
            raise ApiError(400, f"this model has no embedding of the token {strange}", param=_PARAMS[type(asked)])

    def _too_long(self, asked: ChatRequest | CompletionRequest, taken: int, least: str = "") -> ApiError:
        return ApiError(
            400,
            f"this server's context is {self.context} tokens; the prompt has {least}{taken} "
            f"and the answer may have {1 if asked.limit is None else asked.limit}",
            code="context_length_exceeded",
            param=_PARAMS[type(asked)],
        )

    def _asked(
        self,
        asked: ChatRequest | CompletionRequest,
        entry: Entry,
        prompts: list[list[int]],
        echoes: list[str],
        answer: Answer,
        note: dict[str, Any],
    ) -> Asked:
        each = asked.n or 1
        rows = [
            self._row(asked, entry, prompts[index // each], answer.sink(index), choice=index % each)
            for index in range(len(prompts) * each)
        ]
        scored = asked.alternatives is not None
        say = functools.partial(_say, entry.tokenizer) if scored else None
        return Asked(
            rows=rows,
            answer=answer,
            form=Form(model=asked.model, chat=isinstance(asked, ChatRequest), say=say),
            prompt_tokens=sum(len(prompt) for prompt in prompts),
            echoes=[echo for echo in echoes for _ in range(each)],
            note=note,
        )

    def _row(
        self,
        asked: ChatRequest | CompletionRequest,
        entry: Entry,
        prompt: list[int],
        sink: Any,
        *,
        choice: int,
    ) -> Row:
        completion = isinstance(asked, CompletionRequest)
        room = self.context - len(prompt) - self.model.virtual_tokens(entry)
        temperature = 1.0 if asked.temperature is None else asked.temperature
        own_end = entry.tokenizer.eos_token_id
        return Row(
            entry=entry,
            prompt=prompt,
            most_tokens=room if asked.limit is None else asked.limit,
            sampling=Sampling(temperature=temperature, top_p=asked.top_p or 1.0, seed=_seed(asked.seed, choice)),
            ends=self.model.ends | ({own_end} if own_end is not None else set()),
            pieces=Pieces(entry.tokenizer, prompt[-_CONTINUED_TOKENS:] if completion else [], asked.stops),
            sink=sink,
            alternatives=asked.alternatives,
            scores_prompt=isinstance(asked, CompletionRequest) and bool(asked.echo) and asked.logprobs is not None,
        )

    async def load(self, asked: LoadRequest) -> Entry:
        """Serve one more adapter; only the weights' copy into the model waits for the answers under way.

        Raises:
            ApiError: 400; the name is taken, or the folder holds nothing that can be served.
        """
        self.names.refuse_taken(asked.lora_name)
        try:
            async with self._loading:
                opened = await asyncio.to_thread(open_adapter, Path(asked.lora_path), self.base, trusted=self.trusted)
            return await asyncio.wrap_future(self.engine.call(lambda: self.add(asked.lora_name, opened)))
        except LauncherError as error:
            raise ApiError(400, "; ".join(error.problems), param="lora_path") from error
        except OSError as error:
            raise ApiError(400, f"{asked.lora_path}: cannot be read: {error}", param="lora_path") from error

    def add(self, name: str, opened: Opened) -> Entry:
        """Put an adapter into the model and its name on the list; on the model's thread, or before it starts.

        Raises:
            ModelError: it does not fit. ApiError: 400; the name is taken.
        """
        self.names.refuse_taken(name)
        key = self.names.new_key()
        self.model.add(key, opened)
        tokenizer: Any = opened.tokenizer or self.names.base.tokenizer
        entry = new_entry(name, key, tokenizer, opened.folder)
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


_PARAMS = {ChatRequest: "messages", CompletionRequest: "prompt"}


def _seed(seed: int | None, choice: int) -> int | None:
    """Choices of one request differ; the first is what the seed gives alone."""
    return None if seed is None else (seed + choice + 2**63) % 2**64 - 2**63


def _say(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))


def _refuse_left_out(messages: Sequence[dict[str, str]], text: str) -> None:
    """Refuse what the template has dropped: an answer to less than was asked.

    Assistants' messages may be cut (many templates leave out earlier thoughts), tools' may be written as JSON.

    Raises:
        ApiError: 400; the first that is missing.
    """
    for number, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] not in ("assistant", "tool") and content not in text:
            raise ApiError(
                400,
                f"the chat template leaves out messages.{number}: this model takes no role {message['role']!r} there",
                param="messages",
            )
