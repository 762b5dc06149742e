"""When silence is a hang: limits by phase, and what does not count."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.runs.folder import RunFolder, write_json
from launcher.runs.pulse import PHASES, PulseReading
from launcher.runs.watch import JOINING_S, Limits, Watch
from launcher.worker.main import JOIN_TIMEOUT_S


def _reading(beats: int, phase: str = "training") -> PulseReading:
    return PulseReading(phase=phase, step=beats, position=0, beats=beats, age_s=0.0)


def _silence(watch: Watch, phase: str = "training", *, stopped: bool = False, told: bool = False) -> int:
    """Seconds after which a rank that has just beaten and beats no more counts as hung, looked at once a second."""
    for second in range(100_000):
        if watch.look(_reading(5, phase), float(second), stopped=stopped, told_to_stop=told) is not None:
            return second
    return -1


@pytest.mark.parametrize("phase", ["training", "evaluating", "saving"])
def test_the_recipes_limit_holds_while_training(phase: str) -> None:
    """survival.hang_minutes, to the second."""
    assert _silence(Watch(Limits(hang_s=60.0)), phase) == 60


def test_a_beat_starts_the_count_again() -> None:
    """Fifty seconds, a beat, fifty seconds: no hang."""
    watch = Watch(Limits(hang_s=60.0))
    looks = [watch.look(_reading(second // 50), second, stopped=False, told_to_stop=False) for second in range(100)]
    assert set(looks) == {None}


def test_tokenizing_has_no_limit_but_a_stopped_process_has_one_in_every_phase() -> None:
    """Any corpus may take any time; a process in state T does nothing for its time."""
    assert _silence(Watch(Limits(hang_s=60.0)), "tokenizing") == -1
    for phase in PHASES[:9]:
        assert _silence(Watch(Limits(hang_s=60.0)), phase, stopped=True) == 60


def test_phases_that_move_whole_models_have_generous_limits() -> None:
    """Never shorter than the ranks' own time-outs, which know more than the supervisor."""
    limits = Limits(hang_s=600.0)
    assert limits.of_phase("joining") == JOINING_S == JOIN_TIMEOUT_S + 60
    assert limits.of_phase("building") == limits.of_phase("loading") == 7200
    assert limits.of_phase("finishing") == 14_700
    assert Limits(hang_s=3600.0).of_phase("building") == 12 * 3600


def test_time_in_which_the_supervisor_did_not_run_does_not_count() -> None:
    """A suspended job stops rank and supervisor alike; after it goes on, the rank gets its time back."""
    watch = Watch(Limits(hang_s=60.0))
    watch.look(_reading(5), 0.0, stopped=False, told_to_stop=False)
    assert watch.look(_reading(5), 7200.0, stopped=False, told_to_stop=False) is None
    assert watch.silent_s < 10


def test_after_a_stop_signal_a_silent_rank_is_given_up_sooner() -> None:
    """The scheduler's grace is short: half a minute, not the ten of the hang limit."""
    assert _silence(Watch(Limits(hang_s=600.0)), told=True) == 30
    assert _silence(Watch(Limits(hang_s=6.0)), told=True) == 6


def test_after_a_stop_signal_slow_steps_keep_their_time() -> None:
    """A rank whose steps take 40 s reaches the next step boundary and its checkpoint."""
    watch = Watch(Limits(hang_s=600.0))
    for second in range(200):
        watch.look(_reading(second // 40), float(second), stopped=False, told_to_stop=False)
    hung = [
        second
        for second in range(200, 400)
        if watch.look(_reading(5), float(second), stopped=False, told_to_stop=True) is not None
    ]
    assert hung[0] == pytest.approx(200 + 3 * 40, abs=3)


def test_a_save_that_was_asked_for_by_a_signal_keeps_the_whole_limit() -> None:
    """It is what the grace is for."""
    assert _silence(Watch(Limits(hang_s=600.0)), "saving", told=True) == 600


def test_the_limit_comes_from_the_resolved_recipe_or_is_ten_minutes(tmp_path: Path) -> None:
    """An unreadable recipe is the rank's to complain about."""
    run = RunFolder(tmp_path)
    assert Limits.of(run).hang_s == 600
    run.resolved.write_text("survival:\n  hang_minutes: 0.5\n")
    assert Limits.of(run).hang_s == 30
    run.resolved.write_text("survival: {hang_minutes: auto}\n")
    assert Limits.of(run).hang_s == 600


def test_a_large_checkpoint_may_take_longer_than_the_hang_limit(tmp_path: Path) -> None:
    """Five times what the plan says; a terabyte takes longer than ten slow steps."""
    run = RunFolder(tmp_path)
    write_json(run.plan, {"chosen": {"save_s": 900.0}})
    limits = Limits.of(run)
    assert (limits.of_phase("saving"), limits.of_phase("training")) == (4500, 600)
    assert Limits(hang_s=600.0, save_s=3.0).of_phase("saving") == 600
