"""Documents into rows, rows into batches, steps into rows.

Shapes: B rows of a micro-batch, T tokens of a row.

A packed row holds several documents; their position_ids restart at 0 and NO attention_mask is made. transformers
finds the document borders in position_ids only while there is neither a mask nor a key-value cache: with an
all-ones mask, or with the default use_cache=True, documents silently attend to each other. Whoever runs the model
passes use_cache=False. The first label of every document is masked, so nothing predicts across a border.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from launcher.errors import DataError

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of tokens the loss does not look at (PyTorch's and transformers' own value)."""
FLAT_ATTENTION = ("flash_attention_2", "flash_attention_3")
"""Attention kernels that find document borders only in a batch of one row."""

Ints: TypeAlias = npt.NDArray[np.int64]
Tokens: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence, all arrays of shape (T,)."""

    input_ids: Tokens
    labels: Tokens
    """Not shifted: the model's own loss shifts; IGNORED where the loss does not look."""
    position_ids: Tokens | None
    """Restarting at 0 for each document; None in rows that are not packed."""


def pack(lengths: Sequence[int] | Ints, capacity: int) -> list[list[int]]:
    """Documents (by index) of each row: best fit, longest first; deterministic.

    Raises:
        ValueError: a document is longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"document {sizes.argmax()} has {sizes.max()} tokens, a row holds {capacity}")
    rows: list[list[int]] = []
    gaps = _Gaps()
    for index in np.argsort(-sizes, kind="stable").tolist():
        length = int(sizes[index])
        free, row = gaps.take(length) or (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        gaps.give(free - length, row)
    return rows


class _Gaps:
    """Rows with room left, by how much; there are at most `capacity` different gaps, however many rows."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._rows: dict[int, list[int]] = {}

    def take(self, length: int) -> tuple[int, int] | None:
        """The smallest gap that holds `length` and a row that has it, no longer listed; None if there is none."""
        at = bisect_left(self._sizes, length)
        if at == len(self._sizes):
            return None
        size = self._sizes[at]
        row = self._rows[size].pop()
        if not self._rows[size]:
            del self._sizes[at], self._rows[size]
        return size, row

    def give(self, size: int, row: int) -> None:
        """List `row` as having `size` tokens of room."""
        if size <= 0:
            return
        if size not in self._rows:
            self._rows[size] = []
            insort(self._sizes, size)
        self._rows[size].append(row)


class Order:
    """Which rows an optimizer step trains: an endless sequence of reshuffled epochs, addressed by step.

    Step s takes the next `global_batch` places of that sequence, so a step may straddle two epochs and every row
    is trained once per epoch. Depends on (rows, global_batch, seed) alone: not on world size, nor on what ran before.
    """

    def __init__(self, rows: int, global_batch: int, seed: int) -> None:
        if rows < 1:
            raise DataError("no rows to train on")
        self.rows = rows
        self.global_batch = global_batch
        self.seed = seed
        self._epochs: dict[int, Ints] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps until every row was seen at least once more."""
        return -(-self.rows // self.global_batch)

    def indices(self, step: int) -> Ints:
        """Rows of optimizer step `step` (from 0), shape (global_batch,)."""
        places: Ints = np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64)
        epochs, offsets = np.divmod(places, self.rows)
        self._keep(epochs[0], epochs[-1])
        parts = [self._epoch(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def epoch_of(self, step: int) -> float:
        """Epochs completed before optimizer step `step`."""
        return step * self.global_batch / self.rows

    def _epoch(self, epoch: int) -> Ints:
        if epoch not in self._epochs:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._epochs[epoch] = generator.permutation(self.rows).astype(np.int64)
        return self._epochs[epoch]

    def _keep(self, first: int, last: int) -> None:
        """Forget epochs other than those of this step."""
        self._epochs = {epoch: order for epoch, order in self._epochs.items() if first <= epoch <= last}


def collate(
    rows: Sequence[Row], *, pad_token_id: int, fixed_length: int | None = None, flat: bool = False
) -> dict[str, torch.Tensor]:
    """One micro-batch as int64 tensors of shape (B, T), T the longest row or `fixed_length`.

    Packed rows: input_ids, labels, position_ids, and never an attention_mask; the padded tail of a row is a
    document of its own. `flat` joins them into one row (1, sum of T) without padding, for FLAT_ATTENTION kernels.
    Other rows: input_ids, labels, attention_mask.

    Raises:
        ValueError: no rows, packed and unpacked rows mixed, or a row longer than `fixed_length`.
    """
    packed = {row.position_ids is not None for row in rows}
    if len(packed) != 1:
        raise ValueError("a micro-batch needs at least one row, and packed rows do not mix with others")
    if packed == {True} and flat:
        return _flat(rows)
    longest = max(len(row.input_ids) for row in rows)
    length = fixed_length or longest
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit the fixed length {length}")
    batch = {
        "input_ids": _padded([row.input_ids for row in rows], length, pad_token_id),
        "labels": _padded([row.labels for row in rows], length, IGNORED),
    }
    if packed == {True}:
        batch["position_ids"] = _padded([_positions(row) for row in rows], length, None)
    else:
        batch["attention_mask"] = _padded([np.ones_like(row.input_ids) for row in rows], length, 0)
    return _tensors(batch)


def needs_flat(attn_implementation: str) -> bool:
    """Whether packed micro-batches must be joined into one row for this attention kernel."""
    return attn_implementation in FLAT_ATTENTION


def _flat(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    return _tensors(
        {
            "input_ids": np.concatenate([row.input_ids for row in rows])[None],
            "labels": np.concatenate([row.labels for row in rows])[None],
            "position_ids": np.concatenate([_positions(row) for row in rows])[None],
        }
    )


def _positions(row: Row) -> Tokens:
    if row.position_ids is None:
        raise ValueError("the row is not packed")
    return row.position_ids


def _padded(arrays: Sequence[Tokens], length: int, fill: int | None) -> Tokens:
    """Arrays padded on the right; `fill` None counts up from 0, which makes the tail a document of its own."""
    out: Tokens = np.empty((len(arrays), length), dtype=np.int32)
    for line, values in zip(out, arrays, strict=True):
        line[: len(values)] = values
        line[len(values) :] = np.arange(length - len(values)) if fill is None else fill
    return out


def _tensors(arrays: dict[str, Tokens]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
