"""Packed documents do not see each other: shown on logits and gradients, with the leak as the control."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.worker.packing import IGNORED, Row, collate
from tests import tiny

LENGTHS = ((5, 9, 1, 7), (12, 3))
"""Two rows of documents, one of a single token; the second row is shorter and gets a padded tail."""


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny.make_model_dir(folder / family, family=family) for family in ("llama", "qwen2", "mistral")}


def load(folder: Path, attention: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    # Larger weights than a fresh model's, so that a leak would be far above rounding.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    model.config.use_cache = False
    return model.train()


def make_documents() -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [[rng.integers(10, 500, length).astype(np.int32) for length in row] for row in LENGTHS]


def packed_row(documents: list[np.ndarray]) -> Row:
    labels = [np.concatenate([[IGNORED], ids[1:]]) for ids in documents]
    return Row(
        np.concatenate(documents),
        np.concatenate(labels).astype(np.int32),
        np.concatenate([np.arange(len(ids)) for ids in documents]).astype(np.int32),
    )


def alone(model: torch.nn.Module, ids: np.ndarray) -> torch.Tensor:
    """Logits (T, vocabulary) of one document by itself."""
    return model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]


def worst_difference(model: torch.nn.Module, logits: torch.Tensor, documents: list[list[np.ndarray]]) -> float:
    """Largest difference between packed logits (B, T, vocabulary) and each document's own."""
    worst = 0.0
    for line, row in zip(logits, documents, strict=True):
        start = 0
        for ids in row:
            part = line[start : start + len(ids)]
            worst = max(worst, float((part - alone(model, ids)).abs().max()))
            start += len(ids)
    return worst


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fixed_length", [None, 32])
def test_packed_documents_have_the_logits_they_have_alone(
    model_dirs: dict[str, Path], family: str, attention: str, fixed_length: int | None
) -> None:
    """A micro-batch of two packed rows, padded tails included."""
    model, documents = load(model_dirs[family], attention), make_documents()
    batch = collate([packed_row(row) for row in documents], pad_token_id=0, fixed_length=fixed_length)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        assert worst_difference(model, logits, documents) < 1e-5


def test_an_all_ones_mask_would_leak(model_dirs: dict[str, Path]) -> None:
    """The control: why a packed batch has no attention_mask. If this fails, transformers has changed."""
    model, documents = load(model_dirs["llama"], "sdpa"), make_documents()
    batch = collate([packed_row(row) for row in documents], pad_token_id=0, fixed_length=None)
    with torch.no_grad():
        mask = torch.ones_like(batch["input_ids"])
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask).logits
        assert worst_difference(model, logits, documents) > 0.1


def test_a_cache_would_leak_too(model_dirs: dict[str, Path]) -> None:
    """The second control: why the model runs with use_cache=False, which is not its default."""
    model, documents = load(model_dirs["llama"], "sdpa"), make_documents()
    batch = collate([packed_row(row) for row in documents], pad_token_id=0, fixed_length=None)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=True).logits
        assert worst_difference(model, logits, documents) > 0.1


def test_joined_rows_have_the_same_logits(model_dirs: dict[str, Path]) -> None:
    """The form for attention kernels that look for borders in one row only."""
    model, documents = load(model_dirs["llama"], "sdpa"), make_documents()
    batch = collate([packed_row(row) for row in documents], pad_token_id=0, fixed_length=None, flat=True)
    assert batch["input_ids"].shape == (1, sum(map(sum, LENGTHS)))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        assert worst_difference(model, logits, [[ids for row in documents for ids in row]]) < 1e-5


def summed_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Next-token loss summed over trained labels, and how many there are."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, int((labels != IGNORED).sum())


def test_packing_changes_neither_loss_nor_gradients(model_dirs: dict[str, Path]) -> None:
    """Packed, joined or one document a row: the same sum of losses, trained tokens and gradients."""
    model, documents = load(model_dirs["llama"], "sdpa"), make_documents()
    rows = [packed_row(row) for row in documents]
    singles = [dataclasses.replace(packed_row([ids]), position_ids=None) for row in documents for ids in row]
    results = []
    for batch in (
        collate(rows, pad_token_id=0, fixed_length=None),
        collate(rows, pad_token_id=0, fixed_length=None, flat=True),
        collate(singles, pad_token_id=0, fixed_length=None),
    ):
        model.zero_grad()
        loss, trained = summed_loss(model, batch)
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        results.append((loss.item(), trained, gradients))
    for loss, trained, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert trained == results[0][1]
        assert (gradients - results[0][2]).norm() < 1e-4 * gradients.norm()
