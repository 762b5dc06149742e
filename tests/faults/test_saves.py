"""Faults while a checkpoint is written, and checkpoints that are not what they were: rows 31 to 36."""

from __future__ import annotations

import pytest

from launcher.runs.folder import RunFolder
from tests.faults.bed import SAVE_STEPS, LocalBed
from tests.faults.conftest import Reference
from tests.faults.gauntlet import Ordeal, as_parameters, check, run_gauntlet
from tests.faults.report import Row

IN_SAVES = [
    Ordeal(
        name=f"f31_killed_{stage}",
        fault=f"every rank killed {words}",
        clause=f"at={stage},do=killall",
        cause="rank_killed",
        in_save=True,
    )
    for stage, words in (
        ("after_share", "when the first had written its share of a checkpoint"),
        ("before_manifest", "before a checkpoint's manifest"),
        ("before_rename", "before a checkpoint got its name"),
        ("in_prune", "while an old checkpoint was deleted"),
    )
]


@pytest.fixture(scope="module")
def interrupted(local_bed: LocalBed) -> RunFolder:
    """A sharded run that is killed in four of its saves."""
    run = run_gauntlet(local_bed, "full-saves", IN_SAVES)
    local_bed.finished(run)
    return run


@pytest.mark.parametrize(("index", "ordeal"), as_parameters(IN_SAVES))
def test_killed_in_a_save(
    index: int, ordeal: Ordeal, interrupted: RunFolder, local_reference: Reference, row: Row
) -> None:
    """Whatever stage a save had reached, the run goes on from one that is whole."""
    row.where = "local"
    check(interrupted, index, ordeal, local_reference("full"), row)


@pytest.fixture(scope="module")
def interrupted_in_background(local_bed: LocalBed) -> RunFolder:
    """A LoRA run that saves in the background and is killed in four of its saves."""
    run = run_gauntlet(local_bed, "lora-background", BEHIND, checkpoint={"background": True})
    local_bed.finished(run)
    return run


BEHIND = [
    Ordeal(
        name=ordeal.name.replace("f31_killed_", "f31_background_"),
        fault=ordeal.fault + ", in the background",
        clause=ordeal.clause,
        cause=ordeal.cause,
        # Training goes on meanwhile: what it did beyond the step of the save is lost too.
        lost=2 * SAVE_STEPS,
        in_save=True,
    )
    for ordeal in [
        Ordeal(
            name="f31_killed_snapshot",
            fault="every rank killed while the state was copied",
            clause="at=snapshot,do=killall",
            cause="rank_killed",
        ),
        *IN_SAVES,
    ]
]


@pytest.mark.parametrize(("index", "ordeal"), as_parameters(BEHIND))
def test_killed_in_a_background_save(
    index: int, ordeal: Ordeal, interrupted_in_background: RunFolder, local_reference: Reference, row: Row
) -> None:
    """The same, where another thread writes while training goes on."""
    row.where = "local"
    check(interrupted_in_background, index, ordeal, local_reference("lora"), row)
