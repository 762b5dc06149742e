"""A run that paused where it was asked to: what status says, and that nothing brings it back."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.runs.diagnosis import Cause, diagnose
from launcher.runs.folder import RunFolder
from launcher.runs.policy import Action, History, Limits, decide
from launcher.runs.state import judge, read_evidence
from launcher.runs.view import JobView
from tests.unit.runs.material import make_run, note_job


@pytest.fixture
def paused(tmp_path: Path) -> RunFolder:
    run = make_run(tmp_path)
    note_job(run, "42", cluster="local")
    run.record("started", attempt="42.0", job_id="42", world_size=1)
    run.record("stopped", attempt="42.0", job_id="42", reason="paused", step=30, train_s=1.0, tokens=10)
    return run


def test_status_says_that_it_paused(paused: RunFolder) -> None:
    """It was told to, and nobody ended it."""
    state = judge(read_evidence(paused), None)
    assert (state.word, state.ended) == ("STOPPED", True)
    assert "paused after step 30, as asked" in state.sentence


@pytest.mark.parametrize("slurm", [None, "RUNNING", "PREEMPTED"])
def test_nothing_brings_it_back(paused: RunFolder, slurm: str | None) -> None:
    """Also where Slurm took the job's nodes in the same moment: the ranks had done what they were asked for."""
    view = None if slurm is None else JobView(job_id="42", state=slurm, preempted=slurm == "PREEMPTED")
    found = diagnose(read_evidence(paused), attempt="42.0", exit_code=0, slurm=view)
    assert (found.cause, found.sentence) == (Cause.STOPPED, "paused after step 30, as asked")
    assert decide(found, History(), Limits()).action is Action.STOP
