"""Fence: only the newest attempt may write.

`fences/000003` names the attempt that came third. Rank 0 of an attempt claims the next number at its start, by a file
that only one process can create. Whoever sees a higher number than its own is a leftover of an older attempt (a rank
on a node that Slurm gave up, which is not the same as dead) and ends. A check costs one listing of a small folder.

Between a check and the write after it lies a moment in which a newer attempt may begin. It does no harm: what is
written then is a whole checkpoint of the same run, or a line in a ledger that names its attempt.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import ConflictError
from launcher.runs.folder import RunFolder

GLANCE_S = 5.0
"""Frequent writers look no more often than this: the folder is on a shared file system."""


class FencedError(ConflictError):
    """A newer attempt of this run has begun; this one must not write any more."""


@dataclass(kw_only=True, slots=True)
class Fence:
    """One attempt's right to write."""

    folder: Path
    number: int
    attempt: str
    _looked_s: float = field(default=float("-inf"), repr=False)

    @classmethod
    def of(cls, run: RunFolder, attempt: str) -> Fence:
        """The fence that `attempt`'s rank 0 has claimed.

        Raises:
            FencedError: it has claimed none.
        """
        numbers = [number for number, path in _claims(run.fences) if _attempt(path) == attempt]
        if not numbers:
            raise FencedError(f"attempt {attempt} of {run.run_id} has no fence in {run.fences}")
        return cls(folder=run.fences, number=max(numbers), attempt=attempt)

    def check(self) -> None:
        """Look whether we are the newest attempt.

        Raises:
            FencedError: a newer one has begun; names it.
        """
        self._looked_s = time.monotonic()
        number, path = max(_claims(self.folder), default=(0, self.folder))
        if number > self.number:
            raise FencedError(
                f"attempt {self.attempt} was replaced by attempt {_attempt(path) or 'of number ' + str(number)}; "
                "it stops without writing"
            )

    def glance(self) -> None:
        """`check`, at most every GLANCE_S seconds."""
        if time.monotonic() - self._looked_s >= GLANCE_S:
            self.check()

    def older(self, attempt: str) -> bool:
        """Whether `attempt` may be swept up after: it is not ours and did not begin after us."""
        if attempt == self.attempt:
            return False
        return all(number < self.number for number, path in _claims(self.folder) if _attempt(path) == attempt)


def claim(run: RunFolder, attempt: str) -> Fence:
    """Become the newest attempt; whoever held the run before finds out at its next check.

    Raises:
        OSError: the run folder cannot be written.
    """
    run.fences.mkdir(mode=0o700, exist_ok=True)
    facts = {"attempt": attempt, "host": socket.gethostname(), "pid": os.getpid(), "time_s": time.time()}
    text = json.dumps(facts, sort_keys=True) + "\n"
    while True:
        number = max((number for number, _ in _claims(run.fences)), default=0) + 1
        try:
            descriptor = os.open(run.fences / f"{number:06d}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue  # another attempt took this number in the meantime: ours is the next
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        return Fence(folder=run.fences, number=number, attempt=attempt)


def replaced(run: RunFolder, attempt: str) -> bool:
    """Whether a newer attempt has begun after `attempt`; False where that never claimed anything."""
    try:
        Fence.of(run, attempt).check()
    except FencedError:
        return any(_attempt(path) == attempt for _, path in _claims(run.fences))
    return False


def _claims(folder: Path) -> list[tuple[int, Path]]:
    """Numbered files of the folder; none where there is no folder yet."""
    try:
        return [(int(name), folder / name) for name in os.listdir(folder) if name.isdecimal()]  # noqa: PTH208
    except FileNotFoundError:
        return []


def _attempt(path: Path) -> str | None:
    """Which attempt a file names; None while its writer has not got that far."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["attempt"])
    except (OSError, ValueError, KeyError):
        return None
