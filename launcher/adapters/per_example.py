"""per_example: the validation rows of runs as they were trained on, and the loss of a model on each.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from launcher.adapters.loaded import Subject
from launcher.errors import LauncherError
from launcher.worker.data import build_token_cache
from launcher.worker.packing import IGNORED, Row, collate
from launcher.worker.table import TokenCache, fingerprint, read_cache
from launcher.worker.tokenizer import load_tokenizer
from launcher.worker.tokens import Document

_BATCH_TOKENS = 2048
"""Padded tokens per forward pass; their logits are held in fp32 (V = 128,000: 1 GB)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """Validation documents that all runs share, or why there are none."""

    documents: tuple[Document, ...] = ()
    why_not: str | None = None


def shared_documents(subjects: Sequence[Subject], count: int) -> Shared:
    """The first `count` validation documents in the order of their hashes, which no packing or seed changes."""
    found: dict[str, list[Document]] = {}
    for subject in subjects:
        try:
            cache = _tokens(subject)
        except LauncherError as error:
            return Shared(why_not=f"{subject.run.run_id}: its validation rows cannot be read again ({error})")
        if cache is None:
            return Shared(why_not=f"{subject.run.run_id}: its data are not those it was trained on any more")
        if cache.validation is None:
            return Shared(why_not=f"{subject.run.run_id}: has no validation rows")
        documents = list(cache.validation.documents())
        found[fingerprint(documents)] = documents
    if len(found) > 1:
        return Shared(why_not="the runs were validated on different rows (or tokens): losses per row are left out")
    documents = sorted(next(iter(found.values())), key=_digest)
    return Shared(documents=tuple(documents[:count]))


def _digest(document: Document) -> bytes:
    return hashlib.sha256(document.input_ids.tobytes() + document.labels.tobytes()).digest()


def _tokens(subject: Subject) -> TokenCache | None:
    """The run's token cache, built again where it was removed; None where the data gives another one by now."""
    run = subject.run
    folder = Path(os.environ.get("LAUNCHER_CACHE") or run.path.parent / ".cache") / "tokens"
    key = (json.loads(run.result.read_text(encoding="utf-8")).get("data") or {}).get("key")
    if key and (cache := read_cache(folder / key)) is not None:
        return cache
    tokenizer = load_tokenizer(subject.recipe)
    cache = build_token_cache(subject.recipe, subject.candidate, tokenizer, folder, scope="compare")
    return cache if key in (None, cache.key) else None


def losses_of(
    model: Any,
    documents: Sequence[Document],
    *,
    pad_token_id: int,
    device: str,
    arithmetic: AbstractContextManager[Any],
) -> list[float]:
    """Mean loss over the trained tokens of each document, in nats, in the order given."""
    losses = [0.0] * len(documents)
    with torch.no_grad(), arithmetic:
        for numbers in _batches(documents):
            rows = [Row(documents[n].input_ids, documents[n].labels, None) for n in numbers]
            batch = {name: one.to(device) for name, one in collate(rows, pad_token_id=pad_token_id).items()}
            for number, loss in zip(numbers, _row_losses(model, batch), strict=True):
                losses[number] = loss
    return losses


def _row_losses(model: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, -labels.shape[1] - 1 : -1]  # virtual tokens stand before
    each = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    means: list[float] = (each.sum(1) / (labels != IGNORED).sum(1).clamp_min(1)).tolist()
    return means


def _batches(documents: Sequence[Document]) -> Iterator[list[int]]:
    """Numbers of documents of similar length, few enough that their padded tokens stay within the limit."""
    order = sorted(range(len(documents)), key=lambda number: len(documents[number].input_ids))
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) + 1) * len(documents[number].input_ids) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
