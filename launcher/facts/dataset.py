"""Row and token counts of the recipe's data, before anything heavy is loaded.

Local rows are all read, and refused here when the job would refuse them. Tokens are counted with the model's
own tokenizer and chat template over all rows, or over a fixed sample of them; without a tokenizer they are
estimated from characters. Data-set ids that are not on this machine come from a table of hints, or are assumed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import DataError, ModelError, raise_all
from launcher.facts.files import described, is_dataset_id
from launcher.facts.formats import Example, read_examples
from launcher.facts.lengths import Bin, Weighted, histogram, quantile, standard_error
from launcher.facts.split import held_out_rows
from launcher.facts.token_count import Length, TokenCounter
from launcher.recipe.schema import DataSection, DataSource

BASES = ("counted", "sampled", "characters", "hint", "assumed")
"""How tokens were found, best first."""
SAMPLE_ROWS = 2000
ASSUMED_ROWS = 10_000
ASSUMED_MEAN_TOKENS = 512
COMPARED_ROWS = 200_000
"""Rows of one source among which repeated ones are looked for: a few dozen megabytes of hashes."""
_HINTS = Path(__file__).parent / "catalogue" / "datasets.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFacts:
    """What is known of the training data; held-out validation rows are already taken off."""

    rows: int
    """Training sequences of one epoch before packing: rows (source weights applied), and pieces of long texts."""
    tokens: int
    """Tokens of one epoch, before packing or padding; rows beyond max_seq_length count as truncated."""
    basis: str
    """The weakest of BASES over all training sources."""
    max_tokens: int
    """Longest row looked at, before truncation."""
    mean_tokens: float
    """Tokens per row, after truncation."""
    trained_share: float | None = None
    """Estimated share of the tokens the loss looks at; None when unknown."""
    truncated_share: float = 0.0
    """Share of rows longer than max_seq_length; texts are cut into pieces instead and do not count."""
    validation_rows: int = 0
    notices: tuple[str, ...] = ()
    """Assumptions and oddities, one sentence each."""
    p50_tokens: int | None = None
    """Half of the rows are at most this long, before truncation; None where no row was looked at."""
    p95_tokens: int | None = None
    histogram: tuple[Bin, ...] = ()
    """Rows by length before truncation; empty where no row was looked at."""
    sampling_error: float = 0.0
    """Half the 95 % interval of `tokens` that comes from sampling, as a share of it; 0 where all rows were counted."""
    repeated_share: float = 0.0
    """Share of rows that are equal to an earlier one of the same source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFacts:
    """One source: its rows, and per-row means over the rows looked at."""

    rows: int
    basis: str
    mean_kept: float
    max_tokens: int
    pieces_per_row: float = 1.0
    trained_share: float | None = None
    truncated_share: float = 0.0
    notice: str | None = None
    lengths: tuple[int, ...] = ()
    """Tokens of the rows looked at, before truncation."""
    mean_error: float = 0.0
    """Standard error of `mean_kept`, in tokens."""
    repeated_share: float = 0.0


def dataset_facts(data: DataSection, tokenizer_dir: Path | None) -> DatasetFacts:
    """Rows and tokens of one epoch of `data`; `tokenizer_dir` is the local model folder, if there is one.

    Raises:
        DataError: files missing, malformed or empty; rows without the format; nothing left to train on.
        ModelError: chats, but neither the tokenizer nor the recipe has a chat template.
    """
    extra = [source for source in (data.validation.source, data.retention) if source is not None]
    sources = _all_sources([*data.train, *extra], TokenCounter(data, tokenizer_dir), data.max_seq_length)
    train = sources[: len(data.train)]
    found = sum(source.rows for source in train)
    if data.validation.source is not None:
        return _combine(data, train, kept_share=1.0, validation_rows=sources[len(train)].rows)
    held = held_out_rows(data.validation, found)
    return _combine(data, train, kept_share=1.0 - held / found, validation_rows=held)


def _combine(
    data: DataSection, train: Sequence[SourceFacts], *, kept_share: float, validation_rows: int
) -> DatasetFacts:
    used = [source.rows * kept_share * spec.weight for spec, source in zip(data.train, train, strict=True)]
    rows = max(1, round(sum(used)))
    tokens = round(sum(n * source.mean_kept for n, source in zip(used, train, strict=True)))
    known = all(source.trained_share is not None for source in train)
    trained = sum(n * s.mean_kept * (s.trained_share or 0.0) for n, s in zip(used, train, strict=True))
    error = math.sqrt(sum((n * s.mean_error) ** 2 for n, s in zip(used, train, strict=True)))
    lengths = _weighted_lengths(used, train)
    return DatasetFacts(
        rows=max(1, round(sum(n * s.pieces_per_row for n, s in zip(used, train, strict=True)))),
        tokens=tokens,
        basis=max((source.basis for source in train), key=BASES.index),
        max_tokens=max(source.max_tokens for source in train),
        mean_tokens=tokens / rows,
        trained_share=trained / tokens if known and tokens else None,
        truncated_share=sum(n * s.truncated_share for n, s in zip(used, train, strict=True)) / rows,
        validation_rows=validation_rows,
        notices=tuple(source.notice for source in train if source.notice),
        p50_tokens=quantile(lengths, 0.5),
        p95_tokens=quantile(lengths, 0.95),
        histogram=histogram(lengths),
        sampling_error=1.96 * error / tokens if tokens else 0.0,
        repeated_share=sum(n * s.repeated_share for n, s in zip(used, train, strict=True)) / rows,
    )


def _weighted_lengths(used: Sequence[float], train: Sequence[SourceFacts]) -> list[Weighted]:
    """(tokens, rows it stands for) of every row looked at; none where one source was not looked at."""
    if not all(source.lengths for source in train):
        return []
    return [(length, n / len(s.lengths)) for n, s in zip(used, train, strict=True) for length in s.lengths]


def _all_sources(sources: Sequence[DataSource], counter: TokenCounter, limit: int) -> list[SourceFacts]:
    """Facts of every source; problems of all of them are reported together."""
    facts: list[SourceFacts] = []
    data_problems: list[str] = []
    model_problems: list[str] = []
    for source in sources:
        try:
            facts.append(_hint(source, limit) if is_dataset_id(source.path) else _local(source, counter))
        except DataError as error:
            data_problems.extend(error.problems)
        except ModelError as error:
            model_problems.extend(error.problems)
    raise_all(DataError if data_problems else ModelError, list(dict.fromkeys(data_problems + model_problems)))
    return facts


def _local(source: DataSource, counter: TokenCounter) -> SourceFacts:
    rows = repeated = 0
    sample, seen = _Sample(), set[int]()
    for located, example in read_examples(source):
        rows += 1
        counter.check(located.where, example)
        sample.offer(located.where, example)
        if rows <= COMPARED_ROWS:
            # Equal rows have equal words; 64 bits of hash confuse two of 200,000 others once in a billion files.
            mark = hash(repr(example))
            repeated += mark in seen
            seen.add(mark)
    repeated_share = repeated / max(1, min(rows, COMPARED_ROWS))
    return _from_lengths(rows, counter.lengths(sample.kept), counter, repeated_share)


def _from_lengths(rows: int, lengths: Sequence[Length], counter: TokenCounter, repeated_share: float) -> SourceFacts:
    looked_at = len(lengths)
    kept = sum(length.kept for length in lengths)
    counted = "counted" if looked_at == rows else "sampled"
    return SourceFacts(
        rows=rows,
        basis=counted if counter.exact else "characters",
        mean_kept=kept / looked_at,
        max_tokens=max(length.tokens for length in lengths),
        pieces_per_row=sum(length.pieces for length in lengths) / looked_at,
        trained_share=sum(length.trained for length in lengths) / kept if kept else 0.0,
        truncated_share=sum(length.tokens > length.kept for length in lengths) / looked_at,
        lengths=tuple(length.tokens for length in lengths),
        mean_error=standard_error([length.kept for length in lengths], rows),
        repeated_share=repeated_share,
    )


class _Sample:
    """A reservoir with a fixed seed: every row equally likely to be kept, and the same ones every time."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Example]] = []
        self._seen = 0
        self._random = random.Random(0)

    def offer(self, where: str, example: Example) -> None:
        self._seen += 1
        if len(self.kept) < SAMPLE_ROWS:
            self.kept.append((where, example))
        elif (slot := self._random.randrange(self._seen)) < SAMPLE_ROWS:
            self.kept[slot] = (where, example)


def _hint(source: DataSource, limit: int) -> SourceFacts:
    """What the shipped table says of a data-set id, or an assumption that says that it is one."""
    import yaml

    table = yaml.safe_load(_HINTS.read_text(encoding="utf-8"))
    plain = source.config is None and source.revision is None  # what the table's counts are of
    known = table.get(source.path, {}).get(source.split) if plain else None
    if known is None:
        return _assumed(source, limit)
    mean = min(known["mean_tokens"], limit)
    return SourceFacts(
        rows=known["rows"],
        basis="hint",
        mean_kept=mean,
        max_tokens=limit,
        notice=f"{source.path} is not on this machine: {known['rows']:,} rows as published, "
        f"about {known['mean_tokens']} tokens each by our estimate",
    )


def _assumed(source: DataSource, limit: int) -> SourceFacts:
    mean = min(ASSUMED_MEAN_TOKENS, limit)
    return SourceFacts(
        rows=ASSUMED_ROWS,
        basis="assumed",
        mean_kept=mean,
        max_tokens=limit,
        notice=f"{described(source)} is neither on this machine nor in the table of known data sets: "
        f"assumed {ASSUMED_ROWS:,} rows of {mean} tokens; time and cost follow from that",
    )
