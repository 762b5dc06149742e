"""engine: the one thread that works with the model: it answers rows in batches, and changes adapters between two steps.

Rows join and leave at every step (continuous batching), so a short answer does not wait for a long one.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from launcher.serving.cohort import Cohort
from launcher.serving.model import Served
from launcher.serving.names import BASE
from launcher.serving.problems import ApiError, no_such_model
from launcher.serving.rows import Broken, Finished, Row

_READ_TOKENS = 4096
"""Padded prompt tokens that are read between two steps of the others; one prompt may have more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much is done at once."""

    rows: int
    """Answers that are made at the same time."""
    waiting: int
    """Answers that may wait for that; more are told to come later."""


class Engine:
    """Answers rows; `start` it, and `stop` it in the end."""

    def __init__(self, model: Served, limits: Limits) -> None:
        self._model, self._limits = model, limits
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._reading: list[Row] = []
        """Rows whose first token is being made."""
        self._cohorts: list[Cohort] = []
        self._leaving: set[str] = set()
        self._gone: set[str] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def end(self) -> None:
        """End after the present step; answers that are not complete are told so."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self) -> None:
        """The same, and wait for it."""
        self.end()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether answers can be expected."""
        return self._thread.is_alive()

    def load(self) -> dict[str, int]:
        """How many answers are made now, and how many wait."""
        with self._changed:
            return {"running": self._running(), "waiting": len(self._waiting)}

    def _running(self) -> int:
        return len({id(row) for row in (*self._reading, *self._rows())})

    def submit(self, *rows: Row) -> None:
        """Ask for answers: for all of them, or for none.

        Raises:
            ApiError: 429; too many wait. 400: these alone are too many. 404: the adapter was unloaded a moment ago.
                503: the server ends.
        """
        with self._changed:
            if self._stopping or not self.alive:
                raise ApiError(503, "the server ends")
            for row in rows:
                if row.entry.key in self._gone:
                    raise no_such_model(row.entry.name, [])
            self._forget_cancelled()
            self._refuse_too_many(len(rows))
            self._waiting += (row for row in rows if not row.wants_nothing)
            self._changed.notify()
        for row in rows:
            if row.wants_nothing:
                row.sink(Finished("length", 0))

    def _refuse_too_many(self, new: int) -> None:
        most = self._limits.rows + self._limits.waiting
        if new > most:
            raise ApiError(400, f"one request for {new} answers; this server takes {most} at most")
        if self._running() + len(self._waiting) + new > most:
            raise ApiError(429, f"{len(self._waiting)} answers wait already; try again later", code="queue_full")

    def _forget_cancelled(self) -> None:
        self._waiting = deque(row for row in self._waiting if not row.cancelled)

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Have `work` done on the model's thread between two steps.

        Raises:
            ApiError: 503; the server ends.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._stopping:
                raise ApiError(503, "the server ends")
            self._calls.append((work, future))
            self._changed.notify()
        return future

    def retire(self, key: str) -> None:
        """Take no more rows of an adapter, and forget it when its last one is answered."""
        with self._changed:
            self._gone.add(key)
            self._leaving.add(key)
            self._changed.notify()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._work():
                    pass
        finally:
            self._leave_nobody_waiting()

    def _leave_nobody_waiting(self) -> None:
        with self._changed:
            self._stopping = True
            rows = {id(row): row for row in (*self._reading, *self._rows(), *self._waiting)}
            calls = [future for _, future in self._calls]
        for row in rows.values():
            row.sink(Broken("the server ended before the answer was complete", status=503))
        for future in calls:
            future.set_exception(ApiError(503, "the server ends"))

    def _work(self) -> bool:
        """One step of everything; False when it is time to end."""
        with self._changed:
            while not (self._calls or self._waiting or self._cohorts or self._leaving or self._stopping):
                self._changed.wait()
            if self._stopping:
                return False
            calls = [self._calls.popleft() for _ in range(len(self._calls))]
        for work, future in calls:
            _do(work, future)
        with self._changed:
            # Only now: what can be read together depends on the adapters that are there.
            new = self._reading = self._admitted()
        self._read(new)
        self._reading = []
        self._cohorts = [part for cohort in self._cohorts if cohort.rows for part in self._split(cohort)]
        for cohort in self._cohorts:
            self._step(cohort)
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]
        self._forget_retired()
        return True

    def _rows(self) -> Iterator[Row]:
        return (row for cohort in self._cohorts for row in cohort.rows)

    def _admitted(self) -> list[Row]:
        """Rows that are to begin now: as many as have room, of one group, of prompts that are read in one go."""
        self._forget_cancelled()
        room = self._limits.rows - sum(1 for _ in self._rows())
        new: list[Row] = []
        while self._waiting and len(new) < room and (not new or self._fits(new, self._waiting[0])):
            new.append(self._waiting.popleft())
        return new

    def _fits(self, new: list[Row], row: Row) -> bool:
        longest = max(len(one.prompt) for one in (*new, row))
        apart = any(one.scores_prompt or self._model.reads_by_itself(one.entry) for one in (*new, row))
        together = self._model.can_join and not apart
        return together and self._same(new[0], row) and longest * (len(new) + 1) <= _READ_TOKENS

    def _same(self, one: Row, other: Row) -> bool:
        return self._model.group(one.entry) == self._model.group(other.entry)

    def _read(self, new: list[Row]) -> None:
        if not new:
            return
        try:
            cohort = Cohort.read(self._model, new)
            same = (one for one in self._cohorts if one.rows and one.group == self._model.group(new[0].entry))
            others = next(same, None) if self._model.can_join and cohort.rows else None
            if others is None:
                self._cohorts.append(cohort)
            else:
                others.join(cohort)
        except Exception as error:
            _break(new, error)

    @staticmethod
    def _split(cohort: Cohort) -> Sequence[Cohort]:
        try:
            return cohort.split()
        except Exception as error:
            _break(cohort.rows, error)
            return []

    @staticmethod
    def _step(cohort: Cohort) -> None:
        try:
            cohort.step()
        except Exception as error:
            _break(cohort.rows, error)
            cohort.rows = []

    def _forget_retired(self) -> None:
        with self._changed:
            used = {row.entry.key for row in (*self._rows(), *self._waiting)}
            free, self._leaving = self._leaving - used, self._leaving & used
        for key in free - {BASE}:
            self._model.drop(key)


def _do(work: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        # Tensors made in inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad():
            future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _break(rows: list[Row], error: Exception) -> None:
    """An error ends the answers that it hits, and no others."""
    traceback.print_exception(error)
    for row in rows:
        row.sink(Broken(f"the model failed: {type(error).__name__}"))
