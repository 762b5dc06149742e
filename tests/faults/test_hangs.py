"""Ranks that neither go on nor die: rows 11 to 13, 39 and 55 of the fault matrix."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from launcher.runs.folder import RunFolder
from tests.faults.bed import SLOW, LocalBed
from tests.faults.conftest import Reference
from tests.faults.gauntlet import Ordeal, as_parameters, check, check_survival, run_gauntlet
from tests.faults.report import Row
from tests.faults.story import events, marks, story

HANG_S = 20.0
"""Longer than importing the training stack's slowest part, shorter than anybody's patience."""
HANG = {"hang_minutes": HANG_S / 60}

HANGS = [
    Ordeal(name="f11_stopped_rank", fault="SIGSTOP to rank 1", clause="at=step,rank=1,do=stop", cause="hung|peer_lost"),
    Ordeal(
        name="f12_gil_held",
        fault="a C call that never returns and keeps Python's lock, rank 0",
        clause="at=step,rank=0,do=gil",
        cause="hung|peer_lost",
    ),
    Ordeal(
        name="f11_late_rank",
        fault="rank 1 asleep for an hour while rank 0 waits in a collective",
        clause="at=step,rank=1,do=sleep:3600",
        cause="hung|peer_lost",
    ),
]


@pytest.fixture(scope="module")
def hung(local_bed: LocalBed) -> RunFolder:
    """A run that hangs three times."""
    run = run_gauntlet(local_bed, "lora-hangs", HANGS, survival=HANG)
    local_bed.finished(run)
    return run


@pytest.mark.parametrize(("index", "ordeal"), as_parameters(HANGS))
def test_hang(index: int, ordeal: Ordeal, hung: RunFolder, local_reference: Reference, row: Row) -> None:
    """The rank that stands still is named within the configured time and ten seconds, and the run goes on."""
    row.where = "local"
    check(hung, index, ordeal, local_reference("lora"), row)
    struck, attempt = marks(hung)[index], story(hung)[index]
    (told,) = [event for event in events(hung, "hung") if event["attempt"] == attempt.name]
    assert told["rank"] == struck["rank"]
    assert told["time_s"] - struck["time_s"] <= HANG_S + 10


@pytest.mark.parametrize("_case", [pytest.param(None, id="f13_signal_during_a_hang")])
def test_signal_while_hanging(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """A stop signal that arrives in a stuck collective does not keep the hang from being ended."""
    row.where, row.fault = "local", "SIGSTOP to rank 1, then SIGUSR2 to all"
    run = local_bed.inject("lora-signal", "at=step,rank=1,step=6,do=stop", survival=HANG)
    local_bed.until(lambda: marks(run), "the fault", run, 300)
    for rank in (0, 1):
        os.kill(local_bed.rank_process(run, rank), signal.SIGUSR2)
    check_survival(local_bed, run, local_reference("lora"), row, causes=("hung|peer_lost|stopped", "finished"))


@pytest.mark.parametrize("_case", [pytest.param(None, id="f39_peer_never_arrives")])
def test_rank_that_never_joins(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """A rank that dies before the ranks have met does not leave the others waiting for it."""
    row.where, row.fault = "local", "rank 1 killed before it joined"
    run = local_bed.inject("lora-absent", "at=start,rank=1,do=kill")
    check_survival(local_bed, run, local_reference("lora"), row, causes=("rank_killed|rendezvous", "finished"))


@pytest.mark.parametrize("_case", [pytest.param(None, id="f55_straggler")])
def test_straggler(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """A rank that stops and goes on again and again makes the run slow, never wrong, and is not restarted."""
    row.where, row.fault = "local", "rank 1 stopped for 1 s, five times"
    run = local_bed.inject("lora-straggler", SLOW, survival=HANG)
    local_bed.after_step(run, 3)
    pid = local_bed.rank_process(run, 1)
    wait = threading.Event()
    for _ in range(5):
        os.kill(pid, signal.SIGSTOP)
        wait.wait(1.0)
        os.kill(pid, signal.SIGCONT)
        wait.wait(0.5)
    check_survival(local_bed, run, local_reference("lora"), row, causes=("finished",))
