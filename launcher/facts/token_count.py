"""Token lengths of examples: by the model's own tokenizer and chat template, or by characters without one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ModelError
from launcher.facts.formats import Example
from launcher.facts.rows import Problems
from launcher.facts.template import (
    Renderer,
    TemplateRefusedError,
    find_template,
    special_tokens,
    tokenizer_config,
)
from launcher.recipe.schema import DataSection

CHARACTERS_PER_TOKEN = 4.0
"""Rule of thumb for English text and vocabularies of 32k entries and up."""
TOKENS_PER_TURN = 4
"""What a chat template adds around each message, where it cannot be rendered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """One example in tokens."""

    tokens: int
    """Before truncation."""
    kept: int
    """After truncation; a text is cut into pieces and keeps everything."""
    pieces: int
    """Sequences it becomes: 1, or more for a text longer than max_seq_length."""
    trained: int
    """Tokens the loss looks at, estimated from the trained parts alone."""


class TokenCounter:
    """Measures examples for one recipe; `exact` says whether the model's tokenizer was used."""

    def __init__(self, data: DataSection, tokenizer_dir: Path | None) -> None:
        folder = tokenizer_dir if tokenizer_dir and (tokenizer_dir / "tokenizer.json").is_file() else None
        self.exact = folder is not None
        self._limit = data.max_seq_length
        self._loss_on = data.loss_on
        self._folder = folder
        self._specials = special_tokens(tokenizer_config(folder)) if folder else {}
        self._renderer = Renderer(find_template(folder, data.chat_template), self._specials)
        self._tokenizer: Any = None

    def check(self, where: str, example: Example) -> None:
        """Refuse a chat that no template can render.

        Raises:
            ModelError: the tokenizer is here, without a chat template, and the row is nothing but a chat.
        """
        if self.exact and example.only_chat and not self._renderer.has_template:
            raise ModelError(
                f"{where}: this row is a chat, but the tokenizer in {self._folder} has no chat template; "
                "set data.chat_template to a .jinja file, or start from an instruction-tuned model"
            )

    def lengths(self, examples: Sequence[tuple[str, Example]]) -> list[Length]:
        """Length of every (place, example).

        Raises:
            DataError: the template itself refuses rows (such as roles that do not alternate).
        """
        rendered = self._texts(examples)
        tokens = self._tokens(rendered)
        plain = [example for _, example in examples]
        trained = self._tokens([self._trained_text(example) for example in plain])
        before = self._before(plain, tokens)
        return [
            self._length(example, total + self._around(example), part, ahead)
            for example, total, part, ahead in zip(plain, tokens, trained, before, strict=True)
        ]

    def _before(self, examples: Sequence[Example], tokens: Sequence[int]) -> list[int]:
        """At least so many tokens stand before the first trained one, looked at in rows that are cut; else 0."""
        cut = [index for index, total in enumerate(tokens) if total > self._limit and self._loss_on != "all"]
        counted = self._tokens([self._untrained_start(examples[index]) for index in cut])
        found = dict(zip(cut, counted, strict=True))
        return [found.get(index, 0) for index in range(len(examples))]

    def _length(self, example: Example, tokens: int, trained: int, before: int) -> Length:
        if example.text is not None:
            return Length(tokens=tokens, kept=tokens, pieces=math.ceil(tokens / self._limit), trained=tokens)
        kept = min(tokens, self._limit)
        if before >= self._limit:
            return Length(tokens=tokens, kept=kept, pieces=1, trained=0)
        share = 1.0 if self._loss_on == "all" else min(1.0, (trained + 1) / tokens)  # + 1: the end of the turn
        return Length(tokens=tokens, kept=kept, pieces=1, trained=round(share * kept))

    def _texts(self, examples: Sequence[tuple[str, Example]]) -> list[str]:
        problems, texts = Problems(), []
        for where, example in examples:
            try:
                texts.append(self._renderer.text(example))
            except TemplateRefusedError as error:
                problems.add(where, f"the chat template refuses this chat: {error}")
        problems.raise_if_any()
        return texts

    def _tokens(self, texts: Sequence[str]) -> list[int]:
        if self._folder is None:
            return [round(len(text) / CHARACTERS_PER_TOKEN) for text in texts]
        if self._tokenizer is None:
            self._tokenizer = _load(self._folder)
        return [len(encoded.ids) for encoded in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _around(self, example: Example) -> int:
        """Tokens that stand around the text: added markers of a plain text, or an estimate of an absent template's."""
        if example.messages and self._renderer.has_template:
            return 0
        if example.messages and self._folder is None:
            return TOKENS_PER_TURN * len(example.messages)
        return 1 + (int(self._tokenizer.num_special_tokens_to_add(False)) if self._folder else 0)

    def _untrained_start(self, example: Example) -> str:
        """What is surely before the first trained token: the prompt, or the messages up to the trained answer."""
        if not example.messages:
            return example.prompt or ""
        answers = [
            index
            for index, message in enumerate(example.messages)
            if index >= example.first_trained and message["role"] == "assistant"
        ]
        end = (answers[0] if self._loss_on == "assistant" else answers[-1]) if answers else 0
        return "\n".join(str(message["content"]) for message in example.messages[:end])

    def _trained_text(self, example: Example) -> str:
        if example.text is not None or self._loss_on == "all":
            return ""
        if not example.messages:
            return example.completion or ""
        answers = [
            message["content"]
            for message in example.messages[example.first_trained :]
            if message["role"] == "assistant"
        ]
        return "\n".join(answers if self._loss_on == "assistant" else answers[-1:])


def _load(folder: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{folder / 'tokenizer.json'}: not a tokenizer file ({error})") from error
