"""A rank that makes the others wait is named, and one that does not is not."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from launcher.runs.folder import RunFolder
from launcher.worker.pace import Stopwatch, Stragglers
from tests.tiny import make_recipe
from tests.train.ranks import Ranks
from tests.train.runs import candidate_for, events, make_run, train_here


def _after(windows: int, own_s: list[float], *, wall_s: float = 1.0, watch: Stragglers | None = None) -> Stragglers:
    """What stands after so many windows of 20 equal steps."""
    watch = watch or Stragglers(hosts=[f"n{rank}" for rank in range(len(own_s))])
    for _ in range(20 * windows):
        watch.heard(own_s, wall_s)
    return watch


def test_a_rank_twice_as_slow_is_named_after_three_windows() -> None:
    """Not after two: everybody is slow at times."""
    assert _after(2, [0.1, 0.1, 0.25, 0.1]).slow is None
    assert _after(3, [0.1, 0.1, 0.25, 0.1]).slow == {"rank": 2, "host": "n2", "times": 2.5}


def test_of_two_ranks_the_slower_one_is_named() -> None:
    """The other one alone says what is usual."""
    assert _after(3, [0.3, 0.1]).slow == {"rank": 0, "host": "n0", "times": 3.0}


def test_a_rank_that_recovers_is_named_no_more() -> None:
    """The next window takes the word back."""
    watch = _after(3, [0.1, 0.3])
    assert _after(1, [0.1, 0.1], watch=watch).slow is None


def test_two_ranks_in_turn_are_nobodys_fault() -> None:
    """Three windows in a row must blame the same one."""
    watch = _after(2, [0.3, 0.1, 0.1])
    assert _after(2, [0.1, 0.3, 0.1], watch=watch).slow is None


def test_a_slowness_that_costs_nothing_is_not_worth_a_word() -> None:
    """Four times as long for a hundredth of the step; but one of ten micro-batches stands for ten times as much."""
    assert _after(3, [0.001, 0.004], wall_s=0.1).slow is None
    watch = Stragglers(hosts=["n0", "n1"], share=0.1)
    assert _after(3, [0.001, 0.004], wall_s=0.1, watch=watch).slow is not None


def test_long_steps_need_not_be_twenty() -> None:
    """A window ends after a minute too: nobody waits an hour for a name."""
    watch = Stragglers(hosts=["n0", "n1"])
    for _ in range(9):
        watch.heard([5.0, 15.0], 30.0)
    assert watch.slow is not None


@given(st.lists(st.floats(1.0, 1.9), min_size=2, max_size=16))
def test_ordinary_differences_name_nobody(times: list[float]) -> None:
    """Whatever the ranks, while none takes twice as long as another."""
    assert _after(4, times).slow is None


class Timed(nn.Module):
    """Remembers when its forward pass began and ended."""

    def forward(self) -> torch.Tensor:
        self.began_s = time.monotonic()
        time.sleep(0.001)
        self.ended_s = time.monotonic()
        return torch.zeros(())


@pytest.mark.parametrize("stage", [0, 3])
def test_own_time_ends_with_the_first_forward_pass(stage: int) -> None:
    """At stage 3 before it, where waiting for the others begins; later passes of the step do not count."""
    module = Timed()
    watch = Stopwatch(module, device=torch.device("cpu"), zero_stage=stage)
    assert watch.read_s() == 0.0
    before_s = time.monotonic()
    watch.start()
    started_s = time.monotonic()
    module()
    read_s = watch.read_s()
    if stage == 3:
        assert 0 < read_s <= module.began_s - before_s
    else:
        assert read_s >= module.ended_s - started_s
    module()
    assert watch.read_s() == read_s


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    group = Ranks(2, tmp_path_factory.mktemp("rendezvous"))
    yield group
    group.close()


class Disturber(threading.Thread):
    """Stops a process and lets it go on, again and again, until the run's heartbeat names a slow rank."""

    def __init__(self, pid: int, run: RunFolder) -> None:
        super().__init__(daemon=True)
        self._pid, self._run = pid, run
        self._over = threading.Event()
        self.named: dict[str, Any] | None = None

    def run(self) -> None:
        while self._step() < 5 and not self._over.is_set():
            self._over.wait(0.1)
        while not self._over.is_set() and self.named is None:
            os.kill(self._pid, signal.SIGSTOP)
            self._over.wait(0.4)
            os.kill(self._pid, signal.SIGCONT)
            self._over.wait(0.1)
            self.named = self._beat().get("slow")

    def _beat(self) -> dict[str, Any]:
        return dict(json.loads(self._run.heartbeat.read_text())) if self._run.heartbeat.exists() else {}

    def _step(self) -> int:
        return int(self._beat().get("step", 0))

    def end(self) -> None:
        self._over.set()
        self.join()


def test_a_rank_that_is_stopped_again_and_again_is_named_and_the_run_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    """SIGSTOP and SIGCONT as on an overloaded node: the heartbeat names rank 1, nothing fails."""
    checkpoint = {"save_minutes": None, "save_steps": None}
    # Many short steps: on idle cores 160 are over before the first heartbeat that the disturber waits for.
    recipe = make_recipe(tmp_path, method="lora", train={"max_steps": 1200}, checkpoint=checkpoint)
    run = make_run(recipe, candidate_for(2, 0))
    pid = ranks.run(os.getpid)[1]
    disturber = Disturber(pid, run)
    disturber.start()
    try:
        ranks.run(train_here, run.path)
    finally:
        disturber.end()
    assert disturber.named is not None
    assert disturber.named["rank"] == 1
    assert disturber.named["times"] >= 2
    assert events(run)[-1] == "completed"
