"""Preflight of the data: every row once, and whether there is enough to train on."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launcher.errors import DataError
from launcher.facts.dataset import COMPARED_ROWS
from launcher.facts.files import is_dataset_id
from launcher.facts.formats import read_examples
from launcher.planning.plan import Plan
from launcher.recipe.schema import DataSource, Recipe

_LOOKED_AT = ("counted", "sampled")


def sources(recipe: Recipe) -> Iterator[DataSource]:
    """Everything that rows come from."""
    yield from recipe.data.train
    if recipe.data.validation.source is not None:
        yield recipe.data.validation.source
    if recipe.data.retention is not None:
        yield recipe.data.retention


def read_source(source: DataSource) -> frozenset[int]:
    """Read every row of a local source; returns marks of the first ones, by which equal rows are told.

    Raises:
        DataError: rows that cannot be read or have another format, or none at all.
    """
    rows, marks = 0, set[int]()
    for _, example in read_examples(source):
        rows += 1
        if rows <= COMPARED_ROWS:
            marks.add(hash(repr(example)))
    if rows == 0:
        raise DataError(f"{source.path}: no rows")
    return frozenset(marks)


def overlaps(recipe: Recipe, marks: dict[DataSource, frozenset[int]]) -> Iterator[str]:
    """Evaluation rows that are trained on as well: their loss says nothing about rows never seen."""
    trained = frozenset().union(*(marks.get(source, frozenset()) for source in recipe.data.train))
    held_out = {"data.validation": recipe.data.validation.source, "data.retention": recipe.data.retention}
    for key, source in held_out.items():
        own = marks.get(source, frozenset()) if source is not None else frozenset()
        if source is not None and (both := len(own & trained)):
            share = f"{both} of the {len(own)} different rows of {source.path} ({both / len(own):.0%})"
            yield f"{key}: {share} are trained on too, so their loss is no test; take them out of one of the two"


def too_little(recipe: Recipe, plan: Plan, notices: list[str]) -> Iterator[str]:
    """Nothing to learn from, or fewer sequences in an epoch than one optimizer step takes.

    With train.max_steps the second is a notice: so many steps were asked for, whatever they repeat.
    """
    data = plan.data
    if data.basis not in _LOOKED_AT or any(is_dataset_id(source.path) for source in recipe.data.train):
        return
    if data.trained_share == 0:
        looked_at = "all rows" if data.basis == "counted" else "the rows looked at"
        yield (
            f"data: no token of {looked_at} would be trained on: data.loss_on is {recipe.data.loss_on}, and "
            f"{data.truncated_share:.0%} of the rows are cut at data.max_seq_length {recipe.data.max_seq_length}; "
            "raise it, or check the rows' roles with launcher data show"
        )
    found = list(_epoch_below_a_step(plan))
    if recipe.train.max_steps is None:
        yield from found
    else:
        notices += found


def _epoch_below_a_step(plan: Plan) -> Iterator[str]:
    data, candidate = plan.data, plan.chosen.candidate
    sequences = math.ceil(data.tokens / candidate.seq_len) if candidate.packing else data.rows
    if sequences >= candidate.global_batch:
        return
    ranks = candidate.world_size
    fits = sequences // ranks * ranks
    packed = f", packed into {sequences} sequences of {candidate.seq_len}" if candidate.packing else ""
    smaller = f"set train.global_batch_size={fits}" if fits else f"use fewer than {ranks} ranks"
    unpacked = " or data.packing=false" if candidate.packing and data.rows >= candidate.global_batch else ""
    yield (
        f"train.global_batch_size: one step takes {candidate.global_batch} sequences, and an epoch has {sequences} "
        f"({data.rows} rows, {data.tokens} tokens{packed}), so rows repeat within a step; {smaller}{unpacked}"
    )
