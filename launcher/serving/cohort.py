"""cohort: rows that are decoded together, with the keys and values of what they have read so far.

Rows are left-padded to one length, so that the last position is every row's newest token; a new row joins by padding
the shorter side, one that has finished is cut out. B rows, T positions, H heads, D numbers per head, V vocabulary,
E width of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from launcher.serving.model import Served
from launcher.serving.rows import Broken, Row
from launcher.serving.sampling import choose
from launcher.serving.scores import Scored, score


class Cohort:
    """Rows of one group."""

    def __init__(self, model: Served, rows: Sequence[Row], cache: DynamicCache, mask: Tensor, logits: Tensor) -> None:
        self._model, self.rows, self._cache, self._mask = model, list(rows), cache, mask
        self._next: list[int] = [0] * len(self.rows)
        self._advance(logits)

    @property
    def group(self) -> str | None:
        """Which rows may join."""
        return self._model.group(self.rows[0].entry)

    @classmethod
    def read(cls, model: Served, rows: Sequence[Row]) -> Cohort:
        """Read the rows' prompts and choose their first tokens; all rows of one group.

        Raises:
            RuntimeError: the device has too little memory, or whatever torch finds.
        """
        cache, before = _with_prefix(model, rows[0])  # a row with a prefix comes by itself
        inputs, mask = _left_padded([model.embedded(row) for row in rows])
        mask = torch.cat([mask.new_ones(len(rows), before), mask], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, before:]
        named = "input_ids" if inputs.dim() == 2 else "inputs_embeds"
        whole = rows[0].scores_prompt  # such a row comes by itself, too
        logits = model.logits(rows, {named: inputs}, mask, positions, cache, every=whole)
        if whole and not _score_prompt(rows[0], logits[0]):
            rows = []
        return cls(model, rows, cache, mask, logits[: len(rows), -1])

    def step(self) -> None:
        """One more token for every row; rows that are finished or that nobody waits for leave."""
        self._keep([index for index, row in enumerate(self.rows) if not row.cancelled])
        if not self.rows:
            return
        ones = self._mask.new_ones(len(self.rows), 1)
        self._mask = torch.cat([self._mask, ones], dim=1)
        ids = torch.tensor(self._next, device=self._mask.device)[:, None]
        positions = self._mask.sum(1, keepdim=True) - 1
        self._advance(self._model.logits(self.rows, {"input_ids": ids}, self._mask, positions, self._cache)[:, -1])

    def split(self) -> list[Cohort]:
        """Itself, or a cohort for each group that its rows have come to be in."""
        groups = [self._model.group(row.entry) for row in self.rows]
        if len(set(groups)) < 2:
            return [self]
        return [self._part([n for n, one in enumerate(groups) if one == group]) for group in dict.fromkeys(groups)]

    def _part(self, kept: list[int]) -> Cohort:
        part = copy.copy(self)
        part._cache = DynamicCache()
        for number, layer in enumerate(self._cache.layers):
            part._cache.update(layer.keys, layer.values, number)
        part._keep(kept)
        return part

    def join(self, other: Cohort) -> None:
        """Take in the rows of another cohort of the same group."""
        if not other.rows:
            return
        width = max(self._mask.shape[1], other._mask.shape[1])
        joined = DynamicCache()
        for number, (mine, its) in enumerate(zip(self._cache.layers, other._cache.layers, strict=True)):
            pairs = ((mine.keys, its.keys), (mine.values, its.values))
            keys, values = (torch.cat([_widened(one, width, 2) for one in pair]) for pair in pairs)
            joined.update(keys, values, number)
        # Before anything is changed: where memory ends, those who are here already go on.
        mask = torch.cat([_widened(one, width, 1) for one in (self._mask, other._mask)])
        self._cache, self._mask = joined, mask
        self.rows += other.rows
        self._next += other._next

    def _advance(self, logits: Tensor) -> None:
        logits = self._sound(logits)
        if not self.rows:
            return
        self._next = choose(logits, [(row.sampling, row.generator) for row in self.rows])
        going_on = []
        for row, token, one in zip(self.rows, self._next, logits, strict=True):
            scored = None if row.alternatives is None else score(one[None], [token], row.alternatives)[0]
            going_on.append(row.take(token, scored))
        self._keep([index for index, goes_on in enumerate(going_on) if goes_on])

    def _sound(self, logits: Tensor) -> Tensor:
        """The logits of the rows that have some; one adapter's overflow must not end its neighbours' answers."""
        lost = logits.isnan().any(dim=-1).tolist()
        if not any(lost):
            return logits
        for row, gone in zip(self.rows, lost, strict=True):
            if gone:
                row.sink(Broken(f"{row.entry.name}: its numbers overflow (NaN)"))
        kept = [index for index, gone in enumerate(lost) if not gone]
        self._keep(kept)
        return logits[kept]

    def _keep(self, kept: list[int]) -> None:
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in kept]
        self._next = [self._next[index] for index in kept]
        if not kept:
            return
        indices = torch.tensor(kept, device=self._mask.device)
        self._cache.batch_select_indices(indices)
        self._mask = self._mask[indices]
        if self._model.can_join:
            self._trim()

    def _trim(self) -> None:
        """Cut off the padding that the rows left have in common: the longest may just have gone."""
        empty = int((self._mask.cumsum(1) == 0).sum(1).min())
        if empty:
            self._mask = self._mask[:, empty:]
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[:, :, empty:], layer.values[:, :, empty:]


def _widened(tensor: Tensor, width: int, dim: int) -> Tensor:
    """Zeros put before `tensor` along `dim` until it is `width` long."""
    shape = list(tensor.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim) if shape[dim] else tensor


def _left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts (T or T,E each) as one batch, and its mask."""
    width = max(len(prompt) for prompt in prompts)
    batch = torch.stack([_widened(prompt, width, 0) for prompt in prompts])
    masks = [_widened(torch.ones(len(one), dtype=torch.long, device=one.device), width, 0) for one in prompts]
    return batch, torch.stack(masks)


def _score_prompt(row: Row, logits: Tensor) -> bool:
    """Tell the prompt's scores by its logits (T, V; virtual tokens come first); whether the row goes on."""
    length = len(row.prompt)
    rest = score(logits[len(logits) - length : -1], row.prompt[1:], row.alternatives or 0)
    return row.take_prompt([Scored(row.prompt[0], None), *rest])


def _with_prefix(model: Served, row: Row) -> tuple[DynamicCache, int]:
    """A cache that holds what stands before the row's prompt (layers, 2, H, P, D), and P."""
    prefix, cache = model.prefix(row.entry), model.new_cache()
    if prefix is None:
        return cache, 0
    for number, (keys, values) in enumerate(prefix):
        cache.update(keys[None], values[None], number)
    return cache, prefix.shape[3]
