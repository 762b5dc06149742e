"""Two real ranks under their supervisors: what a dead, hung or signalled rank does to a run, and what is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import process
from launcher.runs.diagnosis import diagnose
from launcher.runs.folder import RunFolder, read_json_lines
from launcher.runs.state import read_evidence
from tests.tiny import make_recipe
from tests.train.runs import candidate_for, events, losses, make_run, result

PATIENCE_S = 300.0
HANG_S = 15.0
STEPS = 20


@dataclass
class Pair:
    """The two supervisors of one attempt, as srun or the local controller would start them."""

    run: RunFolder
    fault: str = ""
    restart: int = 0
    supervisors: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def attempt(self) -> str:
        """Name of this attempt."""
        return f"job.{self.restart}"

    def start(self) -> None:
        """Start both."""
        for rank in range(2):
            with self._log(rank).open("wb") as log:
                words = [sys.executable, "-m", "launcher.runs.supervisor", str(self.run.path)]
                environment = self._environment(rank)
                self.supervisors.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))

    def _environment(self, rank: int) -> dict[str, str]:
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SUBMITIT_"))}
        return ours | {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "TORCHELASTIC_RUN_ID": "job",
            "TORCHELASTIC_RESTART_COUNT": str(self.restart),
            "OMP_NUM_THREADS": "1",
            "LAUNCHER_FAULT": self.fault,
        }

    def rank(self, rank: int) -> int:
        """Process number of a rank."""
        return process.descendants(self.supervisors[rank].pid)[0]

    def end(self) -> list[int]:
        """Wait for both; their exit codes."""
        return [supervisor.wait(timeout=PATIENCE_S) for supervisor in self.supervisors]

    def log(self, rank: int) -> str:
        """What a rank and its supervisor printed."""
        return self._log(rank).read_text()

    def _log(self, rank: int) -> Path:
        return self.run.logs / f"{self.attempt}_{rank}.out"

    def close(self) -> None:
        """Leave nothing behind."""
        for supervisor in self.supervisors:
            supervisor.kill()
            supervisor.wait()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """Starts attempts of one run of 20 steps that saves every 5 and may be silent for 15 s."""
    recipe = make_recipe(
        tmp_path,
        train={"max_steps": STEPS},
        checkpoint={"save_steps": 5, "save_minutes": None},
        survival={"hang_minutes": HANG_S / 60},
    )
    run = make_run(recipe, candidate_for(2, 0))
    pairs: list[Pair] = []

    def start(fault: str = "") -> Pair:
        pairs.append(Pair(run, fault, len(pairs)))
        pairs[-1].start()
        return pairs[-1]

    yield start
    for started in pairs:
        started.close()


def _until(condition: Callable[[], Any], pair: Pair) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, pair.log(0) + pair.log(1)
        time.sleep(0.05)


def _stopped(pair: Pair, rank: int) -> bool:
    family = process.descendants(pair.supervisors[rank].pid)
    activity = process.activity(family[0]) if family else None
    return activity is not None and activity.stopped


def _last(run: RunFolder, event: str) -> dict[str, Any]:
    return [line for line in read_json_lines(run.attempts) if line["event"] == event][-1]


@pytest.mark.parametrize("told_to_stop", [False, True], ids=["alone", "and a stop signal in the stalled collective"])
def test_a_stopped_rank_is_named_by_both_and_the_next_attempt_goes_on_from_the_last_checkpoint(
    told_to_stop: bool, pair: Callable[..., Pair]
) -> None:
    """Within the limit and 10 s both ranks are gone, with the stacks of the one that could answer.

    A stop signal that arrives now cannot be agreed on; the attempt ends as a hang, not as an orderly stop.
    """
    hung = pair("at=step,rank=1,step=13,do=stop")
    run = hung.run
    _until(lambda: _stopped(hung, 1), hung)
    began_s = time.monotonic()
    if told_to_stop:
        for number in (*(supervisor.pid for supervisor in hung.supervisors), hung.rank(0), hung.rank(1)):
            os.kill(number, signal.SIGUSR2)
    assert hung.end() == [94, 94], hung.log(0) + hung.log(1)
    assert time.monotonic() - began_s < HANG_S + 10
    told = _last(run, "hung")
    assert (told["rank"], told["host"], told["step"]) == (1, os.uname().nodename, 12)
    assert events(run).count("hung") == 1
    assert "stopped" not in events(run)
    assert "in train_step" in (run.errors / "job.0" / "stack-rank-0.txt").read_text()
    for rank in (0, 1):
        assert "hung: rank 1 on" in hung.log(rank)

    again = pair()
    assert again.end() == [0, 0], again.log(0) + again.log(1)
    assert _last(run, "resumed")["step"] == 10
    assert (result(run)["step"], len(losses(run))) == (STEPS, STEPS)


@pytest.mark.parametrize(
    ("action", "kind", "code"),
    [("kill", "SIGKILL", 137), ("exit0", "Vanished", 95), ("raise", None, 1)],
)
def test_a_dead_rank_ends_the_attempt_and_is_shown_before_what_it_caused(
    action: str, kind: str | None, code: int, pair: Callable[..., Pair]
) -> None:
    """In less than 10 s, with an exit code that is not 0, and the rank that is named is not one that only noticed."""
    dead = pair(f"at=step,rank=1,step=13,do={action}")
    run = dead.run
    assert dead.supervisors[1].wait(timeout=PATIENCE_S) == code, dead.log(1)
    gone_s = time.monotonic()
    assert dead.end()[0] != 0
    assert time.monotonic() - gone_s < 10
    assert diagnose(read_evidence(run), attempt="job.0").rank == 1
    first = json.loads(run.error("job.0", 1).read_text())
    assert (first["rank"], first["step"], first["phase"]) == (1, 12, "training")
    if kind:
        assert first["type"] == kind
        assert _last(run, "died")["rank"] == 1
    else:
        assert "Traceback" in first["traceback"]
        assert "died" not in events(run)
    assert not run.result.exists()


def test_a_rank_that_holds_the_gil_is_found_by_its_stack(pair: Callable[..., Pair]) -> None:
    """No Python thread of its own could have told; nor could a handler. Being asked ends the call that held it."""
    hung = pair("at=step,rank=1,step=13,do=gil")
    other, guilty = hung.end()
    assert guilty == 94, hung.log(1)
    assert other != 0, hung.log(0)
    assert not hung.run.result.exists()
    told = _last(hung.run, "hung")
    assert told["rank"] == 1
    assert "it does not wait for the others" in told["why"]
    assert "faults.py" in (hung.run.errors / "job.0" / "stack-rank-1.txt").read_text()


def test_a_stop_signal_to_one_supervisor_stops_both_ranks_in_order(pair: Callable[..., Pair]) -> None:
    """What the local controller sends; nobody died, and the checkpoint of the agreed step is there."""
    stopping = pair("at=step,rank=0,step=8,do=sleep:2")
    _until(lambda: stopping.run.metrics.exists() and len(losses(stopping.run)) >= 2, stopping)
    stopping.supervisors[1].send_signal(signal.SIGTERM)
    assert stopping.end() == [0, 0], stopping.log(0) + stopping.log(1)
    assert events(stopping.run)[-1] == "stopped"
    assert stopping.run.checkpoint(_last(stopping.run, "stopped")["step"]).is_dir()
    assert not stopping.run.errors.exists()
