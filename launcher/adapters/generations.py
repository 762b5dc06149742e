"""generations: prompts as each run's tokenizer renders them, and what a model answers, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from launcher.adapters.loaded import Subject
from launcher.errors import LauncherError
from launcher.worker.packing import IGNORED
from launcher.worker.sources import Sources
from launcher.worker.tokens import Document

_TEXT_PROMPT_TOKENS = 32
"""A text without an answer is cut here, or in the middle; the rest is the reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What is asked, and what the data says to it; the same for every run."""

    shown: str
    reference: str | None
    ids: tuple[int, ...] | None
    """Tokens of a validation row; None where each run's tokenizer renders `asked`."""
    asked: dict[str, Any] | None = None
    """{"messages"}, {"prompt"} or {"text"}."""


def of_documents(documents: Sequence[Document], tokenizer: Any) -> list[Prompt]:
    """Validation rows as prompts: what stands before the first trained token, and the trained stretch after it."""
    return [_of_document(document, tokenizer) for document in documents]


def _of_document(document: Document, tokenizer: Any) -> Prompt:
    ids, trained = document.input_ids.tolist(), (document.labels != IGNORED).tolist()
    first = trained.index(True)
    if first <= 1:  # a text: everything but its first token is trained
        first = max(1, min(_TEXT_PROMPT_TOKENS, len(ids) // 2))
    end = next((at for at in range(first, len(ids)) if not trained[at]), len(ids))
    decode = tokenizer.decode
    reference = decode(ids[first:end], skip_special_tokens=True)
    return Prompt(shown=decode(ids[:first]), reference=reference, ids=tuple(ids[:first]))


def of_rows(rows: Sequence[dict[str, Any]]) -> list[Prompt]:
    """Prompts of the user's file."""
    return [
        Prompt(shown=_shown(row), reference=row.get("reference"), ids=None, asked=row)
        for row in rows
    ]  # fmt: skip


def _shown(row: dict[str, Any]) -> str:
    if "messages" in row:
        return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in row["messages"])
    return str(row.get("prompt") or row.get("text") or "")


def rendered(prompt: Prompt, subject: Subject, tokenizer: Any) -> list[int]:
    """Token ids of a prompt as this run saw such prompts in training."""
    if prompt.ids is not None:
        return list(prompt.ids)
    asked = prompt.asked or {}
    messages = asked.get("messages")
    if messages is None and "text" in asked and tokenizer.chat_template and _chats(subject):
        messages = [{"role": "user", "content": asked["text"]}]
    if messages is not None and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(prompt.shown))


def _chats(subject: Subject) -> bool:
    """Whether the run was trained on chats; where its data is gone, its template suggests so."""
    try:
        sources = Sources(subject.recipe)
        return bool(next(sources.examples(sources.train[0]))[1].messages)
    except (LauncherError, OSError, StopIteration):
        return True


def answers_of(
    model: Any,
    prompts: Sequence[list[int]],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    device: str,
    arithmetic: AbstractContextManager[Any],
) -> list[str]:
    """The most likely answer to each prompt, token by token, up to the end or the limit."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
    )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    inner.generation_config = config  # what the model brings along (temperature, penalties) would be merged in
    try:
        with torch.no_grad(), arithmetic:
            return [_answer(model, ids, tokenizer, device) for ids in prompts]
    finally:
        inner.generation_config = own


def _answer(model: Any, ids: list[int], tokenizer: Any, device: str) -> str:
    asked = torch.tensor([ids], device=device)
    found = model.generate(input_ids=asked, attention_mask=torch.ones_like(asked))
    new = found[0, len(ids) :] if found.shape[1] > len(ids) else found[0]
    return str(tokenizer.decode(new, skip_special_tokens=True))
