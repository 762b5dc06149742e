"""Ranks that die, in every way a process can: rows 7 to 10, 14 and 24 of the fault matrix."""

from __future__ import annotations

import pytest

from launcher.runs.folder import RunFolder
from tests.faults.bed import LocalBed
from tests.faults.conftest import Reference
from tests.faults.gauntlet import Ordeal, as_parameters, check, run_gauntlet
from tests.faults.invariants import assert_no_orphans
from tests.faults.report import Row
from tests.faults.story import events, story

DEATHS = [
    Ordeal(
        name="f07_kill_rank_1",
        fault="kill -9 of rank 1 before a step",
        clause="at=step,rank=1,do=kill",
        cause="rank_killed",
    ),
    Ordeal(
        name="f08_kill_rank_0",
        fault="kill -9 of rank 0, which holds the store",
        clause="at=after_step,rank=0,do=kill",
        cause="rank_killed",
    ),
    Ordeal(
        name="f09_exit_0_early",
        fault="rank 1 exits with code 0 in the middle",
        clause="at=step,rank=1,do=exit0",
        cause="rank_exited",
    ),
    Ordeal(name="f14_segfault", fault="segmentation fault of rank 1", clause="at=step,rank=1,do=segv", cause="crashed"),
    Ordeal(
        name="f31_killed_in_a_save",
        fault="every rank killed before a checkpoint got its name",
        clause="at=before_rename,do=killall",
        cause="rank_killed",
        in_save=True,
    ),
]
MORE = [
    Ordeal(name="f14_abort", fault="abort() in rank 0", clause="at=step,rank=0,do=abort", cause="crashed"),
    Ordeal(
        name="f07_kill_all_ranks",
        fault="kill -9 of every rank at once",
        clause="at=step,rank=0,do=killall",
        cause="rank_killed",
    ),
    Ordeal(
        name="f09_rank_0_exits_0",
        fault="rank 0 exits with code 0 in the middle",
        clause="at=step,rank=0,do=exit0",
        cause="rank_exited",
    ),
    Ordeal(
        name="f14_segfault_of_rank_0",
        fault="segmentation fault of rank 0",
        clause="at=step,rank=0,do=segv",
        cause="crashed",
    ),
]


@pytest.fixture(scope="module")
def killed(local_bed: LocalBed) -> RunFolder:
    """A run that dies five times."""
    run = run_gauntlet(local_bed, "lora-deaths", DEATHS)
    local_bed.finished(run)
    return run


@pytest.mark.fast
@pytest.mark.parametrize(("index", "ordeal"), as_parameters(DEATHS))
def test_death(index: int, ordeal: Ordeal, killed: RunFolder, local_reference: Reference, row: Row) -> None:
    """A rank that dies takes its peers along at once, and the run goes on from the newest checkpoint."""
    row.where = "local"
    check(killed, index, ordeal, local_reference("lora"), row)


@pytest.fixture(scope="module")
def killed_more(local_bed: LocalBed) -> RunFolder:
    """A run of a full model in shards that dies in further ways."""
    run = run_gauntlet(local_bed, "full-deaths", MORE)
    local_bed.finished(run)
    return run


@pytest.mark.parametrize(("index", "ordeal"), as_parameters(MORE))
def test_more_deaths(index: int, ordeal: Ordeal, killed_more: RunFolder, local_reference: Reference, row: Row) -> None:
    """The same under ZeRO-2."""
    row.where = "local"
    check(killed_more, index, ordeal, local_reference("full"), row)


@pytest.mark.parametrize("action", [pytest.param("raise", id="f10_exception_on_rank_1")])
def test_exception(action: str, local_bed: LocalBed, row: Row) -> None:
    """An error of the program is not tried again, and the first rank that failed is named with its traceback."""
    row.where, row.fault = "local", "an exception in rank 1"
    run = local_bed.inject("lora-exception", f"at=step,rank=1,step=6,do={action}")
    assert local_bed.wait(run).code == 8
    (attempt,) = story(run)
    row.seen = f"cause {attempt.cause}, action {attempt.decision.get('action')}"
    assert attempt.decision["action"] == "stop"
    assert events(run, "failed")[0]["rank"] == 1
    why = local_bed.launcher("why", run.run_id).expect().out
    assert "injected fault" in why
    assert_no_orphans(run)
    assert not run.result.exists()


@pytest.mark.fast
@pytest.mark.parametrize("action", [pytest.param("child", id="f24_setsid_child_ignores_term")])
def test_orphans(action: str, local_bed: LocalBed, row: Row) -> None:
    """Cancelling leaves no process: not one in a session of its own either, that ignores SIGTERM."""
    row.where, row.fault = "local", "cancel; a rank left a child in its own session that ignores SIGTERM"
    run = local_bed.inject("lora-orphan", f"at=step,rank=1,step=3,do={action};at=step,rank=0,do=sleep:0.4,always")
    local_bed.after_step(run, 4)
    local_bed.launcher("cancel", run.run_id).expect()
    assert_no_orphans(run)
    assert local_bed.status(run)["state"] == "CANCELLED"
    assert len(story(run)) == 1
