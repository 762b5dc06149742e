"""What a run would train on, looked at without training: rows with their masks, counts, or the finished token cache.

A process of its own in the train environment, asked by `launcher data` (launcher/runs/preview.py): one JSON request
on stdin, one JSON answer as the last line of stdout. The worker's own reader, tokenizer and masks do the work, so
what is shown is what would be trained.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.errors import LauncherError
from launcher.facts.formats import Example
from launcher.recipe.load import recipe_from_text
from launcher.recipe.schema import DataSource, Recipe
from launcher.worker.packing import IGNORED
from launcher.worker.sources import Sources
from launcher.worker.tokens import Document, Tokenized, Tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS = 1000


@dataclass(slots=True)
class Count:
    """What was seen of one source."""

    rows: int = 0
    tokens: int = 0
    """After truncation."""
    trained: int = 0
    truncated: int = 0
    nothing_trained: int = 0
    repeated: int = 0
    """Rows equal, token for token and label for label, to an earlier one of the source."""
    empty_turns: int = 0
    without_eos: int = 0
    """Rows in which no end-of-sequence token is trained."""
    lengths: list[int] = field(default_factory=list)
    digests: set[bytes] = field(default_factory=set)

    def add(self, example: Example, tokenized: Tokenized, eos: int) -> None:
        """Count one row."""
        self.rows += 1
        self.truncated += tokenized.truncated
        self.nothing_trained += not tokenized.documents
        self.empty_turns += sum(not str(message.get("content") or "").strip() and not message.get("tool_calls")
                                for message in example.messages)  # fmt: skip
        ends = any(((one.input_ids == eos) & (one.labels != IGNORED)).any() for one in tokenized.documents)
        self.without_eos += bool(tokenized.documents) and not ends
        for document in tokenized.documents:
            self.tokens += len(document.input_ids)
            self.trained += document.trained
            self.lengths.append(len(document.input_ids))
            digest = _digest(document)
            self.repeated += digest in self.digests
            self.digests.add(digest)

    def facts(self) -> dict[str, Any]:
        """Plain values."""
        lengths = np.asarray(self.lengths or [0])
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "trained_share": self.trained / self.tokens if self.tokens else 0.0,
            "truncated_rows": self.truncated,
            "rows_without_trained_tokens": self.nothing_trained,
            "repeated_rows": self.repeated,
            "empty_turns": self.empty_turns,
            "rows_without_trained_eos": self.without_eos,
            "length": {
                "mean": float(lengths.mean()),
                "p50": int(np.quantile(lengths, 0.5, method="inverted_cdf")),
                "p95": int(np.quantile(lengths, 0.95, method="inverted_cdf")),
                "max": int(lengths.max()),
            },
            "histogram": _histogram(lengths),
        }


def _digest(document: Document) -> bytes:
    return hashlib.sha256(document.input_ids.tobytes() + document.labels.tobytes()).digest()[:16]


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Rows per power of two of tokens: {"up_to": tokens, "rows": count}."""
    edges = 2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    values, counts = np.unique(edges, return_counts=True)
    return [{"up_to": int(edge), "rows": int(count)} for edge, count in zip(values, counts, strict=True)]


def show(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: int, skip: int) -> list[dict[str, Any]]:
    """`rows` rows of each training source from row `skip`, as pieces of text: trained, masked, or special."""
    sources, tokenizing = Sources(recipe), _tokenizing(recipe, tokenizer)
    shown = []
    for source in sources.train:
        chosen = list(itertools.islice(sources.examples(source), skip, skip + rows))
        for (where, _), tokenized in zip(chosen, tokenizing(chosen), strict=True):
            shown.append(
                {
                    "where": where,
                    "truncated": tokenized.truncated,
                    "tokens": sum(len(one.input_ids) for one in tokenized.documents),
                    "trained_tokens": sum(one.trained for one in tokenized.documents),
                    "documents": [_pieces(one, tokenizer) for one in tokenized.documents],
                }
            )
    return shown


def _pieces(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Runs of tokens alike: {"text", "trained", "eos"}; each run is decoded at once, so that no character is torn."""
    trained = document.labels != IGNORED
    eos = document.input_ids == tokenizer.eos_token_id
    pieces = []
    for (is_trained, is_eos), run in itertools.groupby(range(len(trained)), lambda i: (bool(trained[i]), bool(eos[i]))):
        ids = document.input_ids[list(run)].tolist()
        pieces.append({"text": tokenizer.decode(ids), "trained": is_trained, "eos": is_eos, "tokens": len(ids)})
    return pieces


def stats(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Counts of every source, and how much of the validation data is also trained on."""
    sources, tokenizing = Sources(recipe), _tokenizing(recipe, tokenizer)
    counts = [(source, _count(sources, source, tokenizing, tokenizer.eos_token_id)) for source in sources.all]
    trained = set().union(*(count.digests for source, count in counts if source in sources.train))
    told = [{"path": source.path, "used_for": _use(recipe, source)} | count.facts() for source, count in counts]
    held = next((count for source, count in counts if source is sources.validation), None)
    return {"sources": told, "validation_rows_also_trained": len(held.digests & trained) if held else None}


def _count(sources: Sources, source: DataSource, tokenizing: Tokenizing, eos: int) -> Count:
    count = Count()
    for batch in _batches(sources.examples(source)):
        for (_, example), tokenized in zip(batch, tokenizing(batch), strict=True):
            count.add(example, tokenized, eos)
    return count


def _use(recipe: Recipe, source: DataSource) -> str:
    if source in recipe.data.train:
        return "train"
    return "validation" if source is recipe.data.validation.source else "retention"


def _batches(examples: Iterator[tuple[str, Example]]) -> Iterator[list[tuple[str, Example]]]:
    while batch := list(itertools.islice(examples, _BATCH_ROWS)):
        yield batch


def _tokenizing(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Tokenizing:
    return Tokenizing(tokenizer, max_seq_length=recipe.data.max_seq_length, loss_on=recipe.data.loss_on)


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, plan: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Build the token cache that the run's rank 0 would build, or find it."""
    from launcher.planning.plan import plan_from_json
    from launcher.worker.data import build_token_cache

    found = {path.name for path in cache.glob("*") if path.is_dir()}
    candidate = plan_from_json(plan).chosen.candidate
    built = build_token_cache(recipe, candidate, tokenizer, cache, scope="prepare")
    return {"key": built.key, "path": str(cache / built.key), "reused": built.key in found, "stats": built.stats}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request: {"ask": show | stats | prepare, "recipe": YAML, ...}.

    Raises:
        LauncherError: the recipe's data or tokenizer cannot be used.
    """
    from launcher.worker.tokenizer import load_tokenizer

    recipe = recipe_from_text(request["recipe"], "recipe").recipe
    tokenizer = load_tokenizer(recipe)
    if request["ask"] == "show":
        return {"rows": show(recipe, tokenizer, request["rows"], request["skip"])}
    if request["ask"] == "stats":
        return stats(recipe, tokenizer)
    return prepare(recipe, tokenizer, request["plan"], Path(request["cache"]))


def main() -> int:
    """One question, one answer; a user's error is an answer too."""
    try:
        told = answer(json.load(sys.stdin))
    except LauncherError as error:
        told = {"error": type(error).__name__, "problems": list(error.problems)}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
