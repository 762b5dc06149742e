"""What every task starts: before and after the rank, with a fake supervisor in place of the rank's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.runs import supervisor
from launcher.runs.train_job import EARLY_SIGNAL, main


@pytest.fixture
def fake_supervisor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Path], int]], None]]:
    """Puts a function in the supervisor's place; handlers, mask and environment are as before afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    mask = os.umask(0o022)
    monkeypatch.delenv(EARLY_SIGNAL, raising=False)

    def use(supervise: Callable[[Path], int]) -> None:
        monkeypatch.setattr(supervisor, "supervise", supervise)

    yield use
    os.umask(mask)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.pop(EARLY_SIGNAL, None)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_during_the_imports_is_noted_not_obeyed(
    fake_supervisor: Callable[..., None], number: signal.Signals
) -> None:
    """By default it would end the task here; ours only leaves word for the rank, which inherits it."""
    seen: list[str | None] = []

    def run(_run_dir: Path) -> int:
        os.kill(os.getpid(), number)
        seen.append(os.environ.get(EARLY_SIGNAL))
        return 0

    fake_supervisor(run)
    assert main(["train_job", "/runs/x"]) == 0
    assert seen == [number.name]


def test_the_ranks_exit_code_is_the_tasks(fake_supervisor: Callable[..., None]) -> None:
    """srun must see a failing rank fail."""
    fake_supervisor(lambda run_dir: 3 if run_dir == Path("/runs/x") else 0)
    assert main(["train_job", "/runs/x"]) == 3
