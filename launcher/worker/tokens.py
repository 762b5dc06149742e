"""Examples into documents: token ids, and labels that say what the loss looks at.

What is trained, by `data.loss_on`:

| example            | assistant                      | completion               | all        |
|--------------------|--------------------------------|--------------------------|------------|
| chat               | every assistant turn           | the last assistant turn  | everything |
| prompt, completion | the completion                 | the completion           | everything |
| text               | everything: a text has no assistant                                    |

The end-of-sequence token after a trained turn, completion or text is trained too: it is how a model learns to
stop. A chat's mask is found in characters of the rendered text and carried to tokens by their offsets, so a row is
tokenized once; a token that reaches into a trained span is trained. A plain prompt keeps the tokens it has by
itself, which are what the model sees at inference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from launcher.errors import DataError, ModelError
from launcher.facts.formats import Example, Message
from launcher.worker.packing import IGNORED, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Characters [start, end) of the rendered text."""
Mask: TypeAlias = npt.NDArray[np.bool_]
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Document:
    """What is trained as one unit: attention never leaves it. Arrays of shape (T,), T <= max_seq_length."""

    input_ids: Tokens
    labels: Tokens
    """Not shifted; the first is always IGNORED."""

    @property
    def trained(self) -> int:
        """Tokens the loss looks at."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The documents of one example: none when nothing of it would be trained."""

    documents: tuple[Document, ...]
    truncated: bool


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rendered text before tokenization."""

    text: str
    spans: tuple[Span, ...] | None
    """What is trained; None where the template's own markers say."""
    add_special: bool
    """Whether the tokenizer adds its own markers (a chat template writes them itself)."""
    end: bool
    """Whether an end-of-sequence token must follow."""
    prompt: str = ""
    """Start of the text that must keep the tokens it has by itself."""


class Tokenizing:
    """Turns examples into documents for one tokenizer, sequence length and choice of loss.

    Raises:
        ModelError: the tokenizer has no end-of-sequence token, or no offsets (no tokenizer.json).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_seq_length: int, loss_on: str) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{tokenizer.name_or_path}: the tokenizer has no eos_token; training could not end a turn")
        if not tokenizer.is_fast:
            raise ModelError(f"{tokenizer.name_or_path}: the tokenizer has no tokenizer.json; convert it first")
        self._tokenizer = tokenizer
        self._limit = max_seq_length
        self._loss_on = loss_on
        self._has_markers = isinstance(tokenizer.chat_template, str) and bool(_MARKERS.search(tokenizer.chat_template))
        self._stops = tuple(tokenizer.all_special_tokens)

    def __call__(self, examples: Sequence[tuple[str, Example]]) -> Iterator[Tokenized]:
        """Documents of each (place, example), in order.

        Raises:
            DataError: the chat template refuses a row, or hides which part of it is the assistant's.
            ModelError: a chat, and no chat template.
        """
        pieces = [self._piece(where, example) for where, example in examples]
        for (where, example), piece, (ids, offsets) in zip(examples, pieces, self._encode(pieces), strict=True):
            if piece.spans is None:
                ids, mask = self._by_markers(where, example)
            else:
                mask = _inside(offsets, piece.spans)
            yield self._finish(example, ids, mask, piece.end)

    def _encode(self, pieces: Sequence[_Piece]) -> list[tuple[list[int], list[Span]]]:
        """Token ids and character offsets of each piece; pieces are tokenized in batches, in parallel."""
        encoded: list[tuple[list[int], list[Span]]] = [([], [])] * len(pieces)
        for special in (False, True):
            chosen = [i for i, piece in enumerate(pieces) if piece.add_special is special and piece.spans is not None]
            if not chosen:
                continue
            out = self._tokenizer(
                [pieces[i].text for i in chosen],
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for i, ids, offsets in zip(chosen, out["input_ids"], out["offset_mapping"], strict=True):
                encoded[i] = (ids, offsets) if not pieces[i].prompt else self._keep_prompt(pieces[i], ids, offsets)
        return encoded

    def _keep_prompt(self, piece: _Piece, ids: list[int], offsets: list[Span]) -> tuple[list[int], list[Span]]:
        """The same text with the prompt's own tokens, where a token would run from the prompt into the completion."""
        head = self._tokenizer(piece.prompt, return_offsets_mapping=True)
        prompt, spans = list(head["input_ids"]), list(head["offset_mapping"])
        if prompt and prompt[-1] == self._tokenizer.eos_token_id:  # tokenizers that close every text themselves
            prompt, spans = prompt[:-1], spans[:-1]
        if ids[: len(prompt)] == prompt:
            return ids, offsets
        at = len(piece.prompt)
        tail = self._tokenizer(piece.text[at:], add_special_tokens=False, return_offsets_mapping=True)
        moved = [(first + at, last + at) for first, last in tail["offset_mapping"]]
        return prompt + list(tail["input_ids"]), spans + moved

    def _piece(self, where: str, example: Example) -> _Piece:
        if example.messages and self._tokenizer.chat_template is not None:
            return self._chat(where, example)
        if example.only_chat:
            raise ModelError(
                f"{where}: this row is a chat, but the tokenizer in {self._tokenizer.name_or_path} has no chat "
                "template; set data.chat_template to a .jinja file, or start from an instruction-tuned model"
            )
        if example.text is not None:
            return _Piece(example.text, ((0, len(example.text)),), add_special=True, end=True)
        prompt = example.prompt or ""
        text = f"{prompt}{example.completion}"
        start = 0 if self._loss_on == "all" else len(prompt)
        return _Piece(text, ((start, len(text)),), add_special=True, end=True, prompt=prompt)

    def _chat(self, where: str, example: Example) -> _Piece:
        text = self._render(where, example, len(example.messages))
        end = not text.rstrip().endswith(self._stops)
        if self._loss_on == "all":
            return _Piece(text, ((0, len(text)),), add_special=False, end=end)
        if self._has_markers and self._loss_on == "assistant" and example.first_trained == 0:
            return _Piece(text, None, add_special=False, end=end)
        turns = [i for i, m in enumerate(example.messages) if m["role"] == "assistant" and i >= example.first_trained]
        wanted = turns if self._loss_on == "assistant" else turns[-1:]
        spans = tuple(self._turn(where, example, turn, text) for turn in wanted)
        return _Piece(text, spans, add_special=False, end=end)

    def _turn(self, where: str, example: Example, turn: int, text: str) -> Span:
        """Characters of one assistant turn, its end marker included, without white space behind that."""
        before = self._render(where, example, turn, prompt=True) if turn else ""
        after = text if turn + 1 == len(example.messages) else self._render(where, example, turn + 1)
        if not text.startswith(before) and turn and text.startswith(self._render(where, example, turn)):
            # The generation prompt adds something answers do not have (such as an opened thinking block).
            before = _common_start(before, text)
        if not text.startswith(before) or not text.startswith(after):
            raise DataError(
                f"{where}: the chat template renders earlier turns differently once later ones follow, so the "
                "assistant's part cannot be told. Use data.loss_on: completion, data.loss_on: all, or a "
                "data.chat_template with {% generation %} markers"
            )
        return len(before), len(after.rstrip()) if after.rstrip().endswith(self._stops) else len(after)

    def _by_markers(self, where: str, example: Example) -> tuple[list[int], Mask]:
        out: Any = self._apply(
            where, example.messages, example, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(out["input_ids"]), np.asarray(out["assistant_masks"], dtype=bool)

    def _render(self, where: str, example: Example, count: int, *, prompt: bool = False) -> str:
        text: str = self._apply(where, example.messages[:count], example, tokenize=False, add_generation_prompt=prompt)
        return text

    def _apply(self, where: str, messages: Sequence[Message], example: Example, **options: Any) -> Any:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tools=list(example.tools) or None, **options
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise DataError(f"{where}: the chat template refuses this chat: {error}") from error

    def _finish(self, example: Example, ids: list[int], mask: Mask, end: bool) -> Tokenized:
        """Close the sequence, mask it and cut it to length."""
        eos = self._tokenizer.eos_token_id
        input_ids = np.asarray(ids, dtype=np.int32)
        if end and (len(ids) == 0 or ids[-1] != eos):
            input_ids, mask = np.append(input_ids, np.int32(eos)), np.append(mask, mask[-1:])
        # The end-of-sequence token right behind a trained token is trained.
        mask[1:] |= mask[:-1] & (input_ids[1:] == eos)
        labels = np.where(mask, input_ids, np.int32(IGNORED))
        whole = example.text is not None
        starts = range(0, len(input_ids), self._limit) if whole else range(1)
        documents = (self._document(input_ids, labels, start) for start in starts)
        return Tokenized(
            tuple(document for document in documents if document.trained),
            truncated=not whole and len(input_ids) > self._limit,
        )

    def _document(self, input_ids: Tokens, labels: Tokens, start: int) -> Document:
        part = labels[start : start + self._limit].copy()
        part[:1] = IGNORED
        return Document(input_ids[start : start + self._limit], part)


def _common_start(one: str, other: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:same]


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> Mask:
    """Which tokens end within the spans; shape (T,)."""
    mask: Mask = np.zeros(len(offsets), dtype=bool)
    if not offsets:
        return mask
    end = np.asarray(offsets, dtype=np.int64)[:, 1]
    for first, last in spans:
        mask |= (end > first) & (end <= last)
    return mask
