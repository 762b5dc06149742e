"""What the loop promises between steps: who trains which rows, when it saves and evaluates, and that ranks agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.worker.loop import Layout, Loop, Memory, Rhythm, fingerprint
from launcher.worker.loss import IGNORED
from launcher.worker.stopping import StopFlag


@given(
    world=st.integers(1, 8),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 4),
)
def test_every_row_of_a_global_batch_is_trained_once_whatever_the_layout(
    world: int, micro: int, accumulation: int
) -> None:
    """The ranks' shares are disjoint and together they are the batch."""
    indices = np.random.default_rng(0).permutation(1000)[: world * micro * accumulation]
    layouts = [Layout(rank=r, world_size=world, micro_batch=micro, accumulation=accumulation) for r in range(world)]
    shares = [layout.share(indices) for layout in layouts]
    assert {share.shape for share in shares} == {(accumulation, micro)}
    assert sorted(np.concatenate([share.ravel() for share in shares]).tolist()) == sorted(indices.tolist())


def test_a_fingerprint_names_rows_and_their_order() -> None:
    """Equal batches have equal numbers, whatever the integer type; others do not; JSON keeps it exactly."""
    assert fingerprint(np.array([1, 2, 3])) == fingerprint(np.array([1, 2, 3], dtype=np.int32))
    assert fingerprint(np.array([1, 2, 3])) != fingerprint(np.array([2, 1, 3]))
    assert fingerprint(np.array([1, 2, 3])) < 2**48


class FakeTable:
    """Rows whose tokens are their number."""

    def __init__(self, rows: int) -> None:
        self.trained_tokens = np.full(rows, 3)

    def __len__(self) -> int:
        return len(self.trained_tokens)

    def row(self, index: int) -> int:
        return index


def _collate(rows: list[int]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(rows)[:, None].expand(-1, 4).clone()
    labels = tokens.clone()
    labels[:, 0] = IGNORED
    return {"input_ids": tokens, "labels": labels}


@dataclass
class FakeEngine:
    """Remembers what it was asked to train and evaluate; its loss is 1 per token."""

    trained: list[list[int]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    forwards: int = 0
    during: Any = None
    """Called in the middle of every step."""
    world: int = 1
    """Peers bring as many tokens as this rank and vote for nothing."""

    def train_step(
        self, micro_batches: Any, *, trained_tokens: int, learning_rate: float, step: int, votes: Any
    ) -> Any:
        assert trained_tokens == 6
        self.trained.append([int(row) for batch in micro_batches for row in batch["input_ids"][:, 0]])
        self.rates.append(learning_rate)
        if self.during:
            self.during(step)
        stop, save, *saving, read, trained = votes()
        summed = (stop, save, *saving, read * self.world, trained * self.world)
        return SimpleNamespace(loss=1.0, grad_norm=1.0, votes=summed, applied=True)

    def evaluate(self, batches: Any) -> tuple[float, int]:
        tokens = 0
        for batch in batches:
            self.forwards += 1
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
        return float(tokens), tokens


class FakeTracker:
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def log(self, step: int, **numbers: Any) -> None:
        self.lines.append({"step": step, **numbers})


class FakeSaving:
    """Notes which steps were saved."""

    def __init__(self) -> None:
        self.saved: list[int] = []
        self.saved_step = -1

    def votes(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def heard(self, votes: Any) -> None:
        assert list(votes) == [0, 0, 0]

    def save(self, memory: Memory) -> None:
        if memory.step not in self.saved:
            self.saved.append(memory.step)

    save_last = save

    def join(self) -> None:
        pass


class FakeProgress:
    """Shows nothing."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_named: None


def _loop(engine: FakeEngine, *, rows: int = 8, memory: Memory | None = None, **fields: Any) -> Loop:
    rhythm = {"total_steps": 6, "logging_steps": 1, "eval_steps": None, "save_steps": None, "save_s": None}
    rhythm |= {name: fields.pop(name) for name in list(fields) if name in rhythm}
    saving = FakeSaving()
    values: dict[str, Any] = {
        "engine": engine,
        "train": FakeTable(rows),
        "held_out": {},
        "order": SimpleNamespace(indices=lambda step: np.array([2 * step % rows, (2 * step + 1) % rows])),
        "layout": Layout(rank=0, world_size=1, micro_batch=1, accumulation=2),
        "rhythm": Rhythm(**rhythm),
        "device": torch.device("cpu"),
        "collate": _collate,
        "learning_rate": lambda step: 0.1 * step,
        "saving": saving,
        "tracker": FakeTracker(),
        "progress": FakeProgress(),
        "stop": StopFlag(),
        "memory": memory or Memory(),
    }
    loop = Loop(**(values | fields))
    loop.saved = saving.saved  # type: ignore[attr-defined]
    return loop


def test_a_resumed_loop_trains_the_rows_and_rates_that_are_left() -> None:
    """Only the step number is needed to go on."""
    whole, rest = FakeEngine(), FakeEngine()
    assert _loop(whole).run() is None
    assert _loop(rest, memory=Memory(step=4)).run() is None
    assert rest.trained == whole.trained[4:]
    assert rest.rates == whole.rates[4:]


def test_a_signal_during_a_step_stops_after_that_step_with_a_checkpoint() -> None:
    """Votes are asked for at the end of a step, so a long step does not cost another one."""
    stop = StopFlag()
    engine = FakeEngine(during=lambda step: stop.raise_(15) if step == 3 else None)
    loop = _loop(engine, stop=stop)
    assert loop.run() == "SIGTERM"
    assert (loop.memory.step, loop.saved) == (3, [3])  # type: ignore[attr-defined]


def test_a_signal_during_the_last_step_changes_nothing() -> None:
    """There is nothing to come back for: the run finishes."""
    stop = StopFlag()
    engine = FakeEngine(during=lambda step: stop.raise_(15) if step == 6 else None)
    assert _loop(engine, stop=stop).run() is None


def test_a_checkpoint_is_written_once_when_several_reasons_meet() -> None:
    """save_steps and a stop at the same step make one checkpoint."""
    stop = StopFlag()
    engine = FakeEngine(during=lambda step: stop.raise_(15) if step == 4 else None)
    loop = _loop(engine, stop=stop, save_steps=2)
    loop.run()
    assert loop.saved == [2, 4]  # type: ignore[attr-defined]


def test_saving_by_time_is_rank_zeros_decision() -> None:
    """Clocks differ between machines; the others follow rank 0's vote."""
    first = _loop(FakeEngine(), save_s=0.0)
    first.run()
    second = _loop(FakeEngine(world=2), save_s=0.0, layout=Layout(rank=1, world_size=2, micro_batch=1, accumulation=1))
    second.run()
    assert (first.saved, second.saved) == ([1, 2, 3, 4, 5, 6], [])  # type: ignore[attr-defined]


def test_evaluation_brings_every_rank_equally_many_batches() -> None:
    """ZeRO-3 gathers weights in every forward pass: a rank without rows runs one that counts for nothing."""
    counts = []
    for rank in range(4):
        engine = FakeEngine()
        loop = _loop(engine, layout=Layout(rank=rank, world_size=4, micro_batch=2, accumulation=1))
        counts.append((engine.evaluate(loop._evaluation_batches(FakeTable(11)))[1], engine.forwards))
    assert [forwards for _, forwards in counts] == [2, 2, 2, 2]
    assert sum(tokens for tokens, _ in counts) == 11 * 3


def test_held_out_tables_are_evaluated_before_during_and_after() -> None:
    """Each has its own number; the first and the last are remembered."""
    loop = _loop(FakeEngine(), eval_steps=4, held_out={"validation": FakeTable(4), "retention": FakeTable(2)})
    loop.run()
    evaluated = [line["step"] for line in loop.tracker.lines if "retention_loss" in line]  # type: ignore[attr-defined]
    assert evaluated == [0, 4, 6]
    assert loop.memory.before.keys() == loop.memory.after.keys() == {"validation", "retention"}


def test_rows_that_do_not_add_up_to_the_table_are_our_bug_and_stop_the_run() -> None:
    """The loss is divided by the table's count; a collator that drops labels must not pass."""

    def lossy(rows: list[int]) -> dict[str, torch.Tensor]:
        batch = _collate(rows)
        batch["labels"][:, 2] = IGNORED
        return batch

    with pytest.raises(RuntimeError, match="step 1: 4 trained tokens in the batches, 6 in the table"):
        _loop(FakeEngine(), collate=lossy).run()
