"""The user's data as tokens: built once by rank 0 into a content-addressed cache, opened by every rank.

Rank 0 builds beside and renames, so that nobody sees half a cache; two jobs that build the same one at once
do the work twice and keep one. How it went is handed to the other ranks through a small file, an error included:
they raise what rank 0 raised instead of waiting for ever.

The validation split is made of whole rows of the user's files, before packing and before weights: no part of a
held-out row is trained.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.errors import DataError, RecipeError, TemporaryError
from launcher.facts.formats import Example
from launcher.facts.split import held_out_rows
from launcher.planning.plan import Candidate
from launcher.recipe.schema import PROMPT_METHODS, Recipe
from launcher.worker.handoff import Handoff
from launcher.worker.packing import Ints, Order, Row, collate, needs_flat, pack
from launcher.worker.sources import Sources
from launcher.worker.table import StoreWriter, TokenCache, TokenTable, read_cache, write_meta
from launcher.worker.tokens import Tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Order",
    "Row",
    "TokenCache",
    "TokenTable",
    "build_token_cache",
    "collate",
    "needs_flat",
    "open_token_cache",
]

CACHE_VERSION = 1
"""Part of every key: raise it when the same input gives other tokens."""
BATCH_ROWS = 1000
"""Rows tokenized at once (tokenizers spreads a batch over threads)."""
LOGGED_ROWS = 100_000
"""Rows between two lines in the log."""
NOTICED_SHARE = 0.1
"""Share of truncated or dropped rows from which a notice is due."""
STALE_BUILD_S = 24 * 3600
POLL_S = 0.5
_SPLIT_STREAM, _WEIGHT_STREAM = 1, 2
"""Separate random streams of the recipe's seed."""
_log = logging.getLogger(__name__)


def build_token_cache(
    recipe: Recipe, candidate: Candidate, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, *, scope: str = ""
) -> TokenCache:
    """Build the recipe's token cache below `cache_dir`, or return the one that is there. Rank 0 only.

    `scope` names this attempt of this job (the same on all its ranks), so that nobody reads the outcome of another.

    Raises:
        DataError: rows cannot be read or have nothing to train on.
        ModelError: the tokenizer lacks something.
        RecipeError: packing with virtual tokens.
        TemporaryError: the cache cannot be written.
    """
    handoff = _handoff(recipe, candidate, cache_dir, scope)
    try:
        handoff.clear()
        cache = _find_or_build(recipe, candidate, tokenizer, cache_dir)
    except OSError as error:
        failure = TemporaryError(f"{cache_dir}: cannot write the token cache ({error.strerror or error})")
        handoff.failed(failure)
        raise failure from error
    except BaseException as error:
        handoff.failed(error)
        raise
    handoff.done(cache.key)
    return cache


def open_token_cache(
    recipe: Recipe,
    candidate: Candidate,
    tokenizer: PreTrainedTokenizerBase,  # noqa: ARG001 (same call as rank 0's)
    cache_dir: Path,
    *,
    wait_s: float,
    scope: str = "",
) -> TokenCache:
    """Wait for rank 0's token cache and open it. `scope` as for `build_token_cache`.

    Raises:
        LauncherError: what rank 0 raised, in its class and words.
        TemporaryError: rank 0 was not done within `wait_s` seconds.
    """
    handoff = _handoff(recipe, candidate, cache_dir, scope)
    deadline = time.monotonic() + wait_s
    while (key := handoff.key()) is None:
        if time.monotonic() >= deadline:
            raise TemporaryError(
                f"{cache_dir}: rank 0 has not finished the token cache within {wait_s:.0f} s; "
                "see the log of rank 0, or prepare the data beforehand"
            )
        time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
    cache = read_cache(cache_dir / key)
    if cache is None:
        raise TemporaryError(
            f"{cache_dir / key}: rank 0 says that the token cache is complete, this node does not see it"
        )
    return cache


def _handoff(recipe: Recipe, candidate: Candidate, cache_dir: Path, scope: str) -> Handoff:
    """Where rank 0 of this attempt says how it went; named without looking at the data."""
    asked = [asdict(recipe.data), _split_seed(recipe), recipe.model.name_or_path, _shape(candidate), scope]
    return Handoff(cache_dir, _digest(asked))


def _shape(candidate: Candidate) -> list[Any]:
    return [candidate.seq_len, candidate.packing]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _find_or_build(
    recipe: Recipe, candidate: Candidate, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
) -> TokenCache:
    if candidate.packing and candidate.method in PROMPT_METHODS:
        raise RecipeError(
            f"data.packing: true with method {candidate.method}: only the first document of a row would see the "
            "virtual tokens; set data.packing: false"
        )
    sources = Sources(recipe)
    tokenizing = Tokenizing(tokenizer, max_seq_length=candidate.seq_len, loss_on=recipe.data.loss_on)
    key = _key(recipe, candidate, tokenizer, sources)
    found = read_cache(cache_dir / key)
    if found is not None:
        _log.info("token cache %s found", key)
        return found
    _log.info("building the token cache %s", key)
    return _build(recipe, candidate, tokenizing, sources, cache_dir / key)


def _key(recipe: Recipe, candidate: Candidate, tokenizer: PreTrainedTokenizerBase, sources: Sources) -> str:
    """Hash of everything that decides the tokens and their arrangement; file names and times do not."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # left behind by earlier calls
        backend.pop(state, None)
    return _digest(
        [
            CACHE_VERSION,
            [[sources.fingerprint(source), source.split, source.format, source.weight] for source in sources.all],
            [recipe.data.validation.share, recipe.data.validation.count, len(recipe.data.train)],
            [recipe.data.validation.source is not None, recipe.data.retention is not None],
            [recipe.data.loss_on, _split_seed(recipe), _shape(candidate)],
            [_digest(backend), tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items())],
        ]
    )


@dataclass(slots=True)
class _Tally:
    """What happened to the rows of the build."""

    rows: int = 0
    truncated: int = 0
    dropped: int = 0
    notices: list[str] = field(default_factory=list)


def _build(recipe: Recipe, candidate: Candidate, tokenizing: Tokenizing, sources: Sources, final: Path) -> TokenCache:
    _remove_stale(final.parent)
    building = final.with_name(f"{final.name}.building-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        stats = _write(recipe, candidate, tokenizing, sources, building)
        write_meta(building, key=final.name, packed=candidate.packing, stats=stats)
        _publish(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    cache = read_cache(final)
    if cache is None:
        raise TemporaryError(f"{final}: the token cache just written cannot be read back")
    return cache


def _publish(building: Path, final: Path) -> None:
    """Rename into place; another job's complete cache of the same key is as good as ours."""
    if final.exists() and read_cache(final) is None:
        shutil.rmtree(final)
    try:
        building.rename(final)
    except OSError:
        if read_cache(final) is None:
            raise


def _remove_stale(cache_dir: Path) -> None:
    """Remove what killed builds left behind."""
    for path in cache_dir.glob("*.building-*"):
        if time.time() - path.stat().st_mtime > STALE_BUILD_S:
            shutil.rmtree(path, ignore_errors=True)


def _write(
    recipe: Recipe, candidate: Candidate, tokenizing: Tokenizing, sources: Sources, folder: Path
) -> dict[str, Any]:
    """Tokenize every source into `folder` and arrange the tables; returns the stats."""
    store, tally = StoreWriter(folder), _Tally()
    train = [_store(sources.examples(source), tokenizing, store, tally, source.path) for source in sources.train]
    _notice_losses(tally, candidate.seq_len)
    others = {
        name: _store(sources.examples(source), tokenizing, store, _Tally(), source.path)
        for name, source in (("validation", sources.validation), ("retention", sources.retention))
        if source is not None
    }
    store.close()
    kept, held = _hold_out(train, recipe)
    weighted = _weigh(kept, [source.weight for source in sources.train], _split_seed(recipe))
    tables = {"train": weighted, "validation": held} | others
    tables = {name: rows for name, rows in tables.items() if rows}
    _notice_overlap(tables, store, tally)
    sequences = {name: _arrange(rows, store, candidate) for name, rows in tables.items()}
    for name, rows in sequences.items():
        store.table(name, rows)
    return _stats(tables, sequences, store, tally, candidate)


Rows = list[list[int]]
"""Per row of the user's data: the numbers of its documents."""


def _store(
    examples: Iterable[tuple[str, Example]], tokenizing: Tokenizing, store: StoreWriter, tally: _Tally, name: str
) -> Rows:
    """Tokenize and store one source; rows of which nothing is trained are left out and counted."""
    rows: Rows = []
    before = tally.rows
    for batch in _batches(examples):
        if (tally.rows + len(batch)) // LOGGED_ROWS > tally.rows // LOGGED_ROWS:
            _log.info("%s: %d rows tokenized so far", name, tally.rows + len(batch) - before)
        for tokenized in tokenizing(batch):
            tally.rows += 1
            tally.truncated += tokenized.truncated
            tally.dropped += not tokenized.documents
            if tokenized.documents:
                rows.append([store.add(document) for document in tokenized.documents])
    if not rows:
        raise DataError(
            f"{name}: nothing to train on: in all {tally.rows - before} rows every label is masked "
            f"({tally.truncated} rows were cut to data.max_seq_length; is the answer behind that?)"
        )
    return rows


def _batches(examples: Iterable[tuple[str, Example]]) -> Iterator[list[tuple[str, Example]]]:
    iterator = iter(examples)
    while batch := list(itertools.islice(iterator, BATCH_ROWS)):
        yield batch


def _hold_out(train: Sequence[Rows], recipe: Recipe) -> tuple[list[Rows], Rows]:
    """Rows left per source, and the held-out ones; the choice depends on the seed and the number of rows alone."""
    if recipe.data.validation.source is not None:
        return list(train), []
    total = sum(len(rows) for rows in train)
    held = held_out_rows(recipe.data.validation, total)
    chosen = set(_random(_split_seed(recipe), _SPLIT_STREAM).permutation(total)[:held].tolist())
    numbers = itertools.count()
    kept: list[Rows] = []
    out: Rows = []
    for rows in train:
        kept.append([])
        for row in rows:
            (out if next(numbers) in chosen else kept[-1]).append(row)
    return kept, out


def _split_seed(recipe: Recipe) -> int:
    """Runs that differ in train.seed alone are compared on the same held-out rows where data.split_seed says so."""
    return recipe.train.seed if recipe.data.split_seed is None else recipe.data.split_seed


def _weigh(sources: Sequence[Rows], weights: Sequence[float], seed: int) -> Rows:
    """Rows of all sources, each repeated by its weight; a fraction of a repeat is a random part of the rows.

    A repeated row is the same documents once more, so a weight costs no disk.
    """
    weighted: Rows = []
    for index, (rows, weight) in enumerate(zip(sources, weights, strict=True)):
        repeats = int(weight)
        extra = round((weight - repeats) * len(rows))
        chosen = _random(seed, _WEIGHT_STREAM, index).permutation(len(rows))[:extra]
        weighted += rows * repeats + [rows[number] for number in sorted(chosen.tolist())]
    if not weighted:
        raise DataError("data.train: the weights and the validation split leave no row to train on")
    return weighted


def _random(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))


def _arrange(rows: Rows, store: StoreWriter, candidate: Candidate) -> Rows:
    """Sequences of document numbers: packed, or one document each."""
    documents = [document for row in rows for document in row]
    if not candidate.packing:
        return [[document] for document in documents]
    packed = pack([store.lengths[document] for document in documents], candidate.seq_len)
    return [[documents[place] for place in places] for places in packed]


def _notice_losses(tally: _Tally, seq_len: int) -> None:
    for count, what in (
        (tally.truncated, f"are longer than data.max_seq_length {seq_len} and were cut"),
        (tally.dropped, "have nothing to train on and were left out"),
    ):
        if count > NOTICED_SHARE * tally.rows:
            tally.notices.append(f"{count} of {tally.rows} training rows ({count / tally.rows:.0%}) {what}")


def _notice_overlap(tables: dict[str, Rows], store: StoreWriter, tally: _Tally) -> None:
    """Say how much of the validation data is also trained on."""
    held = [document for row in tables.get("validation", []) for document in row]
    trained = {store.digests[document] for row in tables["train"] for document in row}
    both = sum(store.digests[document] in trained for document in held)
    if both:
        tally.notices.append(f"{both} of {len(held)} validation documents are also in the training data, word for word")


def _stats(
    tables: dict[str, Rows], sequences: dict[str, Rows], store: StoreWriter, tally: _Tally, candidate: Candidate
) -> dict[str, Any]:
    lengths: Ints = np.asarray(store.lengths, dtype=np.int64)
    trained: Ints = np.asarray(store.trained, dtype=np.int64)
    used = [document for row in tables["train"] for document in row]
    tokens = int(lengths[used].sum())
    return {
        "rows": len(tables["train"]),
        "documents": len(used),
        "sequences": len(sequences["train"]),
        "tokens": tokens,
        "trained_tokens": int(trained[used].sum()),
        "fill": tokens / (len(sequences["train"]) * candidate.seq_len),
        "read_rows": tally.rows,
        "truncated_rows": tally.truncated,
        "dropped_rows": tally.dropped,
        "validation_rows": len(tables.get("validation", [])),
        "retention_rows": len(tables.get("retention", [])),
        "notices": tally.notices,
    }
