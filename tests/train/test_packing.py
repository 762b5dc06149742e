"""Documents into rows, rows into batches, steps into rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import DataError
from launcher.worker.packing import Order, Row, collate, needs_flat, pack


def test_packing_is_best_fit_longest_first() -> None:
    """Known by hand: 7+3, 6+4, 5+2+2 in rows of 10."""
    assert pack([2, 7, 3, 6, 5, 4, 2], 10) == [[1, 2], [3, 5], [4, 0, 6]]
    assert pack([], 10) == []
    with pytest.raises(ValueError, match="document 1 has 11 tokens, a row holds 10"):
        pack([3, 11], 10)


def test_packing_wastes_little_on_real_lengths() -> None:
    """Lengths spread like real chats leave under 2 % of the rows empty."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.0, 0.8, 5000).astype(int), 2, 512)
    rows = pack(lengths, 512)
    assert sorted(index for row in rows for index in row) == list(range(5000))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 512
    assert lengths.sum() / (512 * len(rows)) > 0.98


@given(lengths=st.lists(st.integers(2, 50), max_size=200), capacity=st.integers(50, 80))
def test_packing_is_a_partition_that_fits(lengths: list[int], capacity: int) -> None:
    """For any lengths: every document once, no row too long, and no two rows that would fit into one."""
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    totals = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(total <= capacity for total in totals)
    assert len(totals) < 2 or totals[0] + totals[1] > capacity


@given(rows=st.integers(1, 40), batch=st.integers(1, 90), seed=st.integers(0, 5), epochs=st.integers(1, 4))
def test_the_order_is_fair_for_any_sizes(rows: int, batch: int, seed: int, epochs: int) -> None:
    """After n epochs' worth of places, every row was trained n times; later steps need no earlier ones."""
    steps = -(-rows * epochs // batch)
    order = Order(rows, batch, seed)
    sequence = np.concatenate([order.indices(step) for step in range(steps)])[: rows * epochs]
    assert np.bincount(sequence, minlength=rows).tolist() == [epochs] * rows
    assert Order(rows, batch, seed).indices(steps - 1).tolist() == order.indices(steps - 1).tolist()


def row(length: int, *, packed: bool) -> Row:
    ids = np.arange(1, length + 1, dtype=np.int32)
    return Row(ids, ids.copy(), np.arange(length, dtype=np.int32) if packed else None)


def test_packed_batches_carry_positions_and_never_an_attention_mask() -> None:
    """The padded tail is a document of its own that the loss does not look at."""
    batch = collate([row(3, packed=True), row(5, packed=True)], pad_token_id=0, fixed_length=6)
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0], [1, 2, 3, 4, 5, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3, -100, -100, -100], [1, 2, 3, 4, 5, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]]
    flat = collate([row(3, packed=True), row(5, packed=True)], pad_token_id=0, fixed_length=None, flat=True)
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert needs_flat("flash_attention_2") and not needs_flat("sdpa")


def test_other_batches_are_padded_to_the_longest_and_masked() -> None:
    batch = collate([row(3, packed=False), row(5, packed=False)], pad_token_id=9, fixed_length=None)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="does not fit the fixed length 4"):
        collate([row(5, packed=False)], pad_token_id=0, fixed_length=4)


def test_every_epoch_trains_every_row_once_in_its_own_order() -> None:
    """Steps may straddle epochs; ten rows in batches of four."""
    order = Order(10, 4, seed=3)
    assert order.steps_per_epoch == 3
    sequence = np.concatenate([order.indices(step) for step in range(10)])
    epochs = sequence.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    """Resume needs the step number only: no state, any order of asking, also far ahead."""
    there = Order(10, 4, seed=3)
    walked = [there.indices(step).tolist() for step in range(50)]
    jumped = [Order(10, 4, seed=3).indices(step).tolist() for step in range(50)]
    backwards = [there.indices(step).tolist() for step in reversed(range(50))]
    assert walked == jumped == backwards[::-1]
    assert Order(10, 4, seed=4).indices(0).tolist() != walked[0]
    assert len(Order(1_000_000, 8, seed=3).indices(10**9)) == 8


def test_fewer_rows_than_a_batch_repeat_within_it() -> None:
    counts = np.bincount(Order(3, 9, seed=0).indices(0))
    assert counts.tolist() == [3, 3, 3]
    with pytest.raises(DataError, match="no rows to train on"):
        Order(0, 8, seed=0)


def test_the_order_does_not_change_between_versions() -> None:
    """A resumed run continues the order its first attempt began; a change here breaks exact resume."""
    assert Order(10, 10, seed=42).indices(0).tolist() == ORDER_OF_SEED_42


ORDER_OF_SEED_42 = [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]
