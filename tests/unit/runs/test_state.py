"""What the ledger, the heartbeat and Slurm together mean: the words a person reads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.runs import story
from launcher.runs.folder import RunFolder, write_json
from launcher.runs.slurm import SlurmJob
from launcher.runs.state import State, judge, read_evidence
from tests.unit.runs.material import make_run, note_job, write_result


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was submitted as job 42 and started once."""
    run = make_run(tmp_path / "runs")
    note_job(run, "42")
    run.record("started", job_id="42", attempt="42.0", world_size=4)
    return run


def beat(run: RunFolder, **facts: Any) -> None:
    write_json(run.heartbeat, {"time_s": time.time(), "job_id": "42", "state": "training", "step": 7} | facts)


def state(run: RunFolder, word: str, reason: str | None = None, **facts: Any) -> State:
    return judge(read_evidence(run), SlurmJob(job_id="42", state=word, reason=reason), **facts)


# ---------------------------------------------------------------- why it ended


def test_a_hung_rank_is_named_before_those_it_kept_waiting(run: RunFolder) -> None:
    """Peers time out a moment later and tell less."""
    run.record("failed", rank=0, error="JobFailedError: timed out")
    run.record("hung", rank=1, host="n2", why="stopped (SIGSTOP)", step=12, attempt="42.0", job_id="42")
    assert "rank 1 on n2 was hung after step 12: stopped (SIGSTOP)" in state(run, "FAILED").sentence


def test_a_killed_rank_is_named_before_its_peers(run: RunFolder) -> None:
    """The connection it broke is not the cause."""
    run.record("failed", rank=0, error="JobFailedError: connection reset by peer")
    run.record("died", rank=1, host="n2", signal="SIGKILL", attempt="42.0", job_id="42")
    assert "rank 1 on n2 was killed by SIGKILL" in state(run, "FAILED").sentence


def test_the_decision_has_the_last_word(run: RunFolder) -> None:
    """What was concluded and why nothing more happens; the checkpoint that is there."""
    run.record("died", rank=1, host="n2", signal="SIGKILL", attempt="42.0", job_id="42")
    run.record(
        "decided", attempt="42.0", job_id="42", action="stop", cause="crash_loop",
        reason="3 attempts without a new checkpoint", sentence="rank 1 on n2 was killed by SIGKILL again",
    )  # fmt: skip
    assert state(run, "FAILED", "NonZeroExitCode").sentence == (
        "failed: rank 1 on n2 was killed by SIGKILL again; not started again: 3 attempts without a new checkpoint; "
        "no checkpoint was written"
    )


def test_what_happened_before_the_last_start_is_history(run: RunFolder) -> None:
    """An attempt that was survived does not explain the next one's end."""
    run.record("hung", rank=1, host="n2", why="x", attempt="42.0", job_id="42")
    run.record("started", job_id="42", attempt="42.1")
    assert "hung" not in state(run, "FAILED", "NonZeroExitCode").sentence


def test_a_cancelled_run_is_cancelled_whoever_did_it(run: RunFolder) -> None:
    """scancel by hand: Slurm's word; nothing about failures of ranks that were ended by it."""
    run.record("failed", rank=0, error="JobFailedError: connection reset by peer")
    now = state(run, "CANCELLED")
    assert (now.word, now.ended) == ("CANCELLED", True)
    assert now.sentence.startswith("was cancelled; ")


# ---------------------------------------------------------------- while it goes on


def test_a_requeued_job_says_why_it_waits_again(run: RunFolder) -> None:
    """The decision's words, and how often it was started."""
    run.record(
        "decided", attempt="42.0", job_id="42", action="requeue", cause="node_lost", sentence="lost node n2", reason="x"
    )
    now = state(run, "PENDING", "BeginTime")
    assert "it was started once before (attempt 42.0 lost node n2)" in now.sentence
    assert not now.ended


@pytest.mark.parametrize(
    ("word", "reason"),
    [("PENDING", "JobHeldUser"), ("PENDING", "job_requeued_in_held_state"), ("REQUEUE_HOLD", "JobHeldUser")],
)
def test_a_job_put_back_and_held_says_how_to_release_it(run: RunFolder, word: str, reason: str) -> None:
    """scontrol requeuehold: nothing happens until somebody releases it."""
    sentence = state(run, word, reason).sentence
    assert sentence.startswith("held (requeued)") and "scontrol release 42" in sentence


def test_a_job_held_before_it_ever_ran_is_not_called_requeued(tmp_path: Path) -> None:
    """sbatch --hold."""
    run = make_run(tmp_path)
    note_job(run, "42")
    sentence = state(run, "PENDING", "JobHeldUser").sentence
    assert "requeued" not in sentence and "scontrol release 42" in sentence


def test_a_slow_rank_is_named(run: RunFolder) -> None:
    """Where the heartbeat says which rank the others wait for."""
    beat(run, slow={"rank": 3, "host": "n2", "times": 2.5})
    assert "rank 3 on n2 is slow: it takes 2.5 times as long" in state(run, "RUNNING").sentence


def test_a_rank_that_hangs_is_shown_while_the_job_still_runs(run: RunFolder) -> None:
    """Between the watchdog's word and the end of the job."""
    beat(run)
    run.record("hung", rank=1, host="n2", why="stopped", step=7, attempt="42.0", job_id="42")
    assert state(run, "RUNNING").sentence.startswith("runs: training, step 7")
    assert "rank 1 on n2 was hung" in state(run, "RUNNING").sentence


def test_an_unreachable_controller_is_not_a_failure(run: RunFolder) -> None:
    """Training goes on without the controller; what the run says of itself is shown."""
    beat(run)
    now = judge(read_evidence(run), None, unreachable="Slurm does not answer")
    assert (now.word, now.ended) == ("UNKNOWN", False)
    assert "the run itself said" in now.sentence and "training, step 7" in now.sentence


def test_a_finished_job_that_was_requeued_by_hand_is_finished(run: RunFolder) -> None:
    """Slurm takes the command and rewrites its own record; ours stands."""
    write_result(run, step=9)
    now = state(run, "PENDING", "BeginTime")
    assert (now.word, now.sentence) == ("COMPLETED", "finished after step 9; the result is verified")


# ---------------------------------------------------------------- counting


def test_restarts_are_counted_over_requeues_follow_ups_and_resumes(run: RunFolder) -> None:
    """Every start after the first, whichever job it was in; a line written twice counts once."""
    run.record("started", job_id="42", attempt="42.0")
    run.record("started", job_id="42", attempt="42.1")
    run.record("submitted", job_id="43", purpose="follow_up")
    run.record("started", job_id="43", attempt="43.0")
    run.record("submitted", job_id="44", purpose="resume")
    assert read_evidence(run).restarts == 2
    assert read_evidence(run).job_id == "44"


def test_a_late_line_about_an_old_job_does_not_make_it_the_newest(run: RunFolder) -> None:
    """The old job's last words come after its follow-up was submitted."""
    run.record("submitted", job_id="43", purpose="follow_up")
    run.record("decided", attempt="42.0", job_id="42", action="follow_up", cause="node_lost", sentence="x", reason="y")
    run.record("cancelled", job_id="42")
    assert read_evidence(run).job_id == "43"
    assert not read_evidence(run).cancelled


_ANY = st.one_of(st.none(), st.integers(), st.text(max_size=9), st.lists(st.integers(), max_size=2))
_EVENTS = ("submitted", "started", "stopped", "failed", "died", "hung", "decided", "cancelled", "ended", "saved", "odd")
_FIELDS = ("attempt", "rank", "host", "why", "step", "signal", "error", "exit_code", "sentence", "reason", "action")
_EVENT = st.builds(
    lambda name, facts: {"event": name, **facts},
    st.sampled_from(_EVENTS),
    st.dictionaries(st.sampled_from(_FIELDS), _ANY),
)


@given(events=st.lists(_EVENT, max_size=12))
@settings(max_examples=300, deadline=None)
def test_no_ledger_confuses_the_reader(events: list[dict[str, Any]]) -> None:
    """Whatever a dying process wrote, there is an answer of one line."""
    assert story.restarts(events) >= 0
    for words in (story.trouble(events), story.decision(events), story.coming_back(events)):
        assert words is None or "\n" not in words
