"""One run through many faults, one after the other: every fault costs one attempt, and the run must come out whole.

Importing the training stack takes most of an attempt's time, so a run per fault would take twice as long; and a run
that survives them all has shown more than many that survived one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from launcher.runs.folder import RunFolder
from tests.faults.bed import SAVE_STEPS, FaultBed
from tests.faults.invariants import (
    assert_equal_sequence,
    assert_lost_at_most,
    assert_no_orphans,
    assert_one_artifact,
    assert_record,
)
from tests.faults.report import Row
from tests.faults.story import events, lost_steps, marks, story


@dataclass(frozen=True, kw_only=True)
class Ordeal:
    """One fault of a gauntlet."""

    name: str
    """fNN_what, with the number of the fault matrix."""
    fault: str
    """In words."""
    clause: str
    """For LAUNCHER_FAULT; without `step`, which follows from the place in the gauntlet."""
    cause: str
    """What the launcher must find, or several with | between them."""
    lost: int = SAVE_STEPS
    """How many steps it may cost."""
    in_save: bool = False
    """Whether it strikes while a checkpoint is written."""


def clauses(ordeals: Sequence[Ordeal]) -> str:
    """LAUNCHER_FAULT for a gauntlet: one fault between any two checkpoints, so that every attempt makes progress."""
    told = []
    for index, ordeal in enumerate(ordeals):
        checkpoint = SAVE_STEPS * (index + 2)
        step = checkpoint if ordeal.in_save else checkpoint - SAVE_STEPS + 2
        told.append(f"{ordeal.clause},step={step}")
    return ";".join(told)


def as_parameters(ordeals: Sequence[Ordeal]) -> list[object]:
    """For pytest.mark.parametrize: index and ordeal, under the ordeal's name."""
    return [pytest.param(index, ordeal, id=ordeal.name) for index, ordeal in enumerate(ordeals)]


def run_gauntlet(bed: FaultBed, recipe: str, ordeals: Sequence[Ordeal], **changes: object) -> RunFolder:
    """Submit the run; it goes on by itself."""
    changes.setdefault("slurm", {"max_restarts": len(ordeals) + 2})
    return bed.inject(recipe, clauses(ordeals), **changes)


def check(run: RunFolder, index: int, ordeal: Ordeal, reference: RunFolder, row: Row) -> None:
    """The fault happened, was understood, cost no more than promised, and left a run equal to the undisturbed one."""
    row.fault = ordeal.fault
    row.measure(run, index)
    struck, attempt = marks(run)[index], story(run)[index]
    assert struck["attempt"] == attempt.name
    row.seen = f"cause {attempt.cause}{noticed_after(run, attempt.name, struck['time_s'])}"
    assert attempt.cause in ordeal.cause.split("|"), attempt.decision
    assert lost_steps(run)[index] <= ordeal.lost
    assert_equal_sequence(run, reference)
    assert_one_artifact(run)
    assert_no_orphans(run)


def noticed_after(run: RunFolder, attempt: str, struck_s: float) -> str:
    """How long the first word in the ledger about a dead or hung rank took, in words."""
    kinds = ("died", "hung", "failed")
    told = [e["time_s"] for kind in kinds for e in events(run, kind) if e.get("attempt", attempt) == attempt]
    later = [time_s - struck_s for time_s in told if time_s >= struck_s]
    return f", noticed after {min(later):.1f} s" if later else ""


def check_survival(
    bed: FaultBed,
    run: RunFolder,
    reference: RunFolder,
    row: Row,
    *,
    causes: Sequence[str],
    states: Sequence[str] = (),
    lost: int = SAVE_STEPS,
) -> None:
    """Wait for the end of a run that was disturbed, and hold it against every invariant; `states` are sacct's."""
    bed.finished(run)
    row.measure(run)
    seen: list[str] = []
    if states:
        bed.until(lambda: bed.accounting(run)[-1:] not in (["RUNNING"], ["COMPLETING"]), "accounting sees the end", run)
        seen = bed.accounting(run)
    row.seen = row.seen or " then ".join([*seen] or [attempt.cause for attempt in story(run)])
    assert_equal_sequence(run, reference)
    assert_lost_at_most(run, lost)
    assert_one_artifact(run)
    assert_no_orphans(run)
    assert_record(run, causes, states, seen)
