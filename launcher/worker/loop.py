"""The training loop: which rows each rank trains at which step, and what happens between steps.

Optimizer step `s` (from 0) trains the rows `order.indices(s)`, whoever the ranks are. They are dealt in
micro-batches: `indices` is cut into accumulation x world x micro_batch, and rank `r` takes part `[:, r]`. So the
set of rows, and with it the loss, is the same for every world size and accumulation.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import psutil
import torch

from launcher.errors import JobFailedError
from launcher.worker import faults, forgetting
from launcher.worker.loss import IGNORED, sum_over_ranks, trained_tokens
from launcher.worker.progress import Progress, step_line
from launcher.worker.stopping import StopFlag

Batch = dict[str, torch.Tensor]
PAUSED = "paused"
"""Why a run stopped at the step it was asked to pause after."""
_VOTES = 7
"""Stop, save, three of a save in the background, tokens read and trained; the ranks' paces follow."""


class Rows(Protocol):
    """A token table: rows by number, and how many of their tokens are trained."""

    trained_tokens: np.ndarray

    def __len__(self) -> int:
        """How many rows there are."""

    def row(self, index: int) -> Any:
        """One row of tokens."""


class Order(Protocol):
    """Which rows form the global batch of a step."""

    def indices(self, step: int) -> np.ndarray:
        """Row numbers of optimizer step `step`, from 0."""


class Trains(Protocol):
    """The part of an engine the loop needs."""

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        *,
        trained_tokens: int,
        learning_rate: float,
        step: int,
        votes: Callable[[], Sequence[int]],
    ) -> Any:
        """One optimizer step: loss, grad_norm, votes, applied."""

    def evaluate(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Summed loss and trained tokens of this rank's batches."""


class Saves(Protocol):
    """How checkpoints come about; see saving.py."""

    saved_step: int

    def votes(self) -> Sequence[int]:
        """Three numbers that say how far a save in the background is."""

    def heard(self, votes: Sequence[int]) -> None:
        """Their sums over the ranks."""

    def save(self, memory: Any) -> None:
        """A save is due; collective."""

    def save_last(self, memory: Any) -> None:
        """The save before a stop; on return it is on disk."""

    def join(self) -> None:
        """Wait for a save in the background."""


class Paces(Protocol):
    """How fast each rank is by itself; see pace.py."""

    def start(self) -> None:
        """A step begins."""

    def votes(self) -> Sequence[int]:
        """This rank's time in its place."""

    def heard(self, votes: Sequence[int], wall_s: float) -> None:
        """The times of all ranks, and how long the step took."""


class Tracks(Protocol):
    """The part of a tracker the loop needs."""

    def log(self, step: int, **numbers: Any) -> None:
        """Record numbers of a step."""

    def event(self, name: str, **facts: Any) -> None:
        """Record that something happened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a global batch is dealt to the ranks."""

    rank: int
    world_size: int
    micro_batch: int
    """Rows per forward pass of one rank."""
    accumulation: int

    def share(self, indices: np.ndarray) -> np.ndarray:
        """This rank's row numbers of a global batch: (accumulation, micro_batch)."""
        dealt = indices.reshape(self.accumulation, self.world_size, self.micro_batch)
        return dealt[:, self.rank]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rhythm:
    """After how many steps, or seconds, something is due; None is never."""

    total_steps: int
    logging_steps: int
    eval_steps: int | None
    save_steps: int | None
    save_s: float | None
    pause_step: int | None = None
    """Step after which to evaluate, save and leave although there are more; the schedule stays that of all steps."""

    @property
    def last_step(self) -> int:
        """Where this attempt ends."""
        return self.total_steps if self.pause_step is None else min(self.pause_step, self.total_steps)


@dataclass(kw_only=True, slots=True)
class Memory:
    """What a run remembers besides weights; saved in every checkpoint, as plain values."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens read, over all ranks."""
    train_s: float = 0.0
    """Time inside training steps, over all attempts."""
    first_loss: float | None = None
    last_loss: float | None = None
    before: dict[str, float] = field(default_factory=dict)
    """Loss of the untrained model on each held-out table (validation, retention)."""
    after: dict[str, float] = field(default_factory=dict)
    """Newest loss on each held-out table."""
    evaluated_step: int = -1
    """Step of the newest evaluation."""
    forgetting: bool = False
    """Whether the retention loss was past its limit at the newest evaluation."""


@dataclass(kw_only=True)
class Loop:
    """One rank's loop. `run` returns when training is done or the ranks agreed to stop."""

    engine: Trains
    train: Rows
    held_out: Mapping[str, Rows]
    """Tables that are evaluated and never trained, by name."""
    order: Order
    layout: Layout
    rhythm: Rhythm
    device: torch.device
    collate: Callable[[list[Any]], Batch]
    learning_rate: Callable[[int], float]
    saving: Saves
    tracker: Tracks
    progress: Progress
    stop: StopFlag
    pace: Paces | None = None
    """None: nobody to compare with."""
    retention_max_rise: float | None = None
    method: str = "full"
    """For what is said when the base is forgotten."""
    """Relative rise of the retention perplexity past which to warn."""
    memory: Memory = field(default_factory=Memory)
    _saved_s: float = field(default_factory=time.monotonic)
    _interval_tokens: int = 0
    _interval_s: float = 0.0

    def run(self) -> str | None:
        """Train from `memory.step` to the last step; None when done, else why it stopped (a checkpoint is there)."""
        self.saving.saved_step = self.memory.step if self.memory.step else -1
        if self.memory.step == 0:
            self._evaluate()
        self._in_state("training")
        while self.memory.step < self.rhythm.last_step:
            stop, save = self._step()
            done = self.memory.step == self.rhythm.last_step
            if self._due(self.rhythm.eval_steps) and not (stop and not done):
                self._evaluate()
            if stop and not done:
                self._save(self.saving.save_last)
                return self.stop.reason or "another rank was told to stop"
            if save:
                self._save(self.saving.save)
        self.progress.phase("saving")
        self.saving.join()
        if self.memory.evaluated_step != self.memory.step:
            self._evaluate()
        if self.memory.step < self.rhythm.total_steps:
            self._save(self.saving.save_last)
            return PAUSED
        return None

    # --- training ------------------------------------------------------------------------------

    def _step(self) -> tuple[bool, bool]:
        """One optimizer step; whether to stop and whether to save after it, the same on every rank."""
        step = self.memory.step + 1
        started = time.monotonic()
        if self.pace:
            self.pace.start()
        faults.at("step", rank=self.layout.rank, step=step, model=getattr(self.engine, "module", None))
        indices = self.order.indices(step - 1)
        batches = [self._batch(self.train, part) for part in self.layout.share(indices)]
        expected = int(self.train.trained_tokens[indices].sum())
        rate = self.learning_rate(step - 1)

        def votes() -> list[int]:
            # Summed over ranks: a signal anywhere stops all; only rank 0's clock decides about saving.
            told = [int(self.stop.raised), int(self._save_due(step)), *self.saving.votes(), *_count(batches)]
            return [*told, *(self.pace.votes() if self.pace else ())]

        try:
            result = self.engine.train_step(
                batches, trained_tokens=expected, learning_rate=rate, step=step, votes=votes
            )
        except JobFailedError:  # a loss that is not finite, on every rank: what was good before it is kept
            self.saving.join()
            raise
        stop, save, *saving, tokens, counted = result.votes[:_VOTES]
        if counted != expected:
            raise RuntimeError(f"step {step}: {counted} trained tokens in the batches, {expected} in the table")
        seconds = time.monotonic() - started
        if self.pace:
            self.pace.heard(result.votes[_VOTES:], seconds)
        self._note(step, result, rate, indices, tokens, seconds)
        faults.at("after_step", rank=self.layout.rank, step=step)
        self.saving.heard(saving)
        return stop > 0, save > 0

    def _note(self, step: int, result: Any, rate: float, indices: np.ndarray, tokens: int, seconds: float) -> None:
        memory = self.memory
        memory.step, memory.tokens, memory.train_s = step, memory.tokens + tokens, memory.train_s + seconds
        memory.first_loss = result.loss if memory.first_loss is None else memory.first_loss
        memory.last_loss = result.loss
        self._interval_tokens += tokens
        self._interval_s += seconds
        total = self.rhythm.total_steps
        speed = self._interval_tokens / max(self._interval_s, 1e-9)
        eta_s = memory.train_s / step * (total - step)
        peak_bytes = self._peak()
        self.progress.step(
            step=step, total_steps=total, loss=result.loss, tokens_per_s=speed, eta_s=eta_s, peak_bytes=peak_bytes
        )
        if self._due(self.rhythm.logging_steps) or step in (1, total):
            numbers = {
                "loss": result.loss,
                "learning_rate": rate,
                "grad_norm": result.grad_norm,
                "tokens_per_s": speed,
            }
            self.tracker.log(
                step,
                **numbers,
                **({"peak_bytes": peak_bytes} if peak_bytes else {}),
                host_bytes=psutil.Process().memory_info().rss,
                tokens=memory.tokens,
                samples=fingerprint(indices),
                applied=int(result.applied),
            )
            self.progress.line(step_line(step, total, numbers, eta_s))
            self._interval_tokens, self._interval_s = 0, 0.0

    def _batch(self, rows: Rows, numbers: Sequence[int]) -> Batch:
        return self.collate([rows.row(int(number)) for number in numbers])

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.memory.step % int(every or 1) == 0

    def _save_due(self, step: int) -> bool:
        if self.rhythm.save_steps and step % self.rhythm.save_steps == 0:
            return True
        waited = time.monotonic() - self._saved_s
        return self.layout.rank == 0 and self.rhythm.save_s is not None and waited >= self.rhythm.save_s

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    # --- between steps -------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Losses on the held-out tables now; remembered as before and after."""
        memory = self.memory
        memory.evaluated_step = memory.step
        if not self.held_out:
            return
        self._in_state("evaluating")
        memory.after = {name: self.evaluate(rows) for name, rows in self.held_out.items()}
        if memory.step == 0:
            memory.before = dict(memory.after)
        rise = forgetting.rise(memory.before, memory.after)
        numbers = {f"{name}_loss": loss for name, loss in memory.after.items()}
        self.tracker.log(memory.step, **numbers, **({} if rise is None else {"retention_rise": rise}))
        told = "  ".join(f"{name} loss {loss:.4f}" for name, loss in memory.after.items())
        self.progress.line(f"step {memory.step}/{self.rhythm.total_steps}  {told}")
        self._warn_of_forgetting()
        self._in_state("training")

    def _warn_of_forgetting(self) -> None:
        """Once each time the retention loss passes its limit."""
        memory, limit = self.memory, self.retention_max_rise
        found = None
        if limit is not None:
            found = forgetting.warning(memory.step, memory.before, memory.after, limit, method=self.method)
        if found and not memory.forgetting:
            self.progress.say(f"warning: {found['message']}")
            self.tracker.event("warning", **found)
        if found or memory.forgetting:
            self.progress.warned([found] if found else [])
        memory.forgetting = found is not None

    def evaluate(self, rows: Rows) -> float:
        """Mean loss over the trained tokens of all rows, the same on every rank; collective."""
        loss, tokens = self.engine.evaluate(self._evaluation_batches(rows))
        total, count = sum_over_ranks([loss, tokens], self.device)
        return total / max(count, 1.0)

    def _evaluation_batches(self, rows: Rows) -> Iterator[Batch]:
        """This rank's batches. Every rank gets equally many: ZeRO-3 gathers weights in every forward pass."""
        layout = self.layout
        width = layout.world_size * layout.micro_batch
        for first in range(0, len(rows), width):
            start = first + layout.rank * layout.micro_batch
            numbers = range(start, min(start + layout.micro_batch, len(rows)))
            self.progress.alive()
            batch = self._batch(rows, numbers or [0])
            if not numbers:
                batch["labels"] = torch.full_like(batch["labels"], IGNORED)
            yield batch

    def _save(self, save: Callable[[Memory], None]) -> None:
        self._in_state("saving")
        save(self.memory)
        self._saved_s = time.monotonic()
        self._in_state("training")

    def _in_state(self, state: str) -> None:
        self.progress.state(state, step=self.memory.step, total_steps=self.rhythm.total_steps)


def fingerprint(indices: np.ndarray) -> int:
    """48 bits that name a global batch: equal for equal rows in equal order (a float64 holds them exactly)."""
    digest = hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").tobytes()).digest()
    return int.from_bytes(digest[:6], "big")


def _count(batches: Sequence[Batch]) -> tuple[int, int]:
    """Tokens read and tokens trained in this rank's micro-batches."""
    read = sum(int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
               for batch in batches)  # fmt: skip
    return read, sum(trained_tokens(batch) for batch in batches)
