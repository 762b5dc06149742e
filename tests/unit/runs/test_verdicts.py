"""Verdicts of a rehearsal: what a run's files must say before a stage counts as well."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launcher.planning.shrunk import KILL_STEP, STEPS
from launcher.recipe.schema import DataSection, DataSource, ModelSection, Recipe, ValidationSpec
from launcher.runs.folder import RunFolder, append_json_line, write_json
from launcher.runs.verdicts import Tale, Verdict, exit_code, judge
from tests.unit.runs.material import make_run
from tests.unit.runs.story import Story

RECIPE = Recipe(name="tiny", model=ModelSection(name_or_path="model"), method="lora",
                data=DataSection(train=(DataSource(path="chats.jsonl"),)))  # fmt: skip
SAVED, RESUMED_FROM = 2, 4


@pytest.fixture
def run(tmp_path: Path, no_slurm: Path) -> RunFolder:
    """An empty run folder."""
    return make_run(tmp_path / "runs")


def trains(run: RunFolder, first: int, last: int, loss: float = 6.0) -> None:
    """Lines of steps in metrics.jsonl, the loss falling by a hundredth each."""
    for step in range(first, last + 1):
        append_json_line(run.metrics, {"step": step, "loss": loss - step / 100})


def first_attempt(run: RunFolder) -> Story:
    """Up to the kill: ranks met, evaluation, steps, a save, and the decision to start again."""
    story = Story(run, cluster="local", world_size=2).starts()
    append_json_line(run.metrics, {"step": 0, "validation_loss": 6.1})
    trains(run, 1, KILL_STEP - 1)
    story.tell("saved", job_id="5", attempt="5.0", step=SAVED, seconds=0.1, bytes=1000)
    story.tell("died", job_id="5", attempt="5.0", rank=1, signal="SIGKILL")
    return story.tell("decided", job_id="5", attempt="5.0", action="requeue", reason="again", step=RESUMED_FROM)


def second_attempt(story: Story, run: RunFolder, *, resumed: int = RESUMED_FROM, loss: float = 6.0) -> None:
    """From the resume to the result."""
    story.restart = 1
    story.starts(resumed=resumed)
    trains(run, resumed + 1, STEPS, loss)
    append_json_line(run.metrics, {"step": STEPS, "validation_loss": 6.0})
    write_json(run.result, {"step": STEPS, "artifact": {"path": "adapter", "tensors": 28}, "finished_time_s": 1e4})


def judged(run: RunFolder, recipe: Recipe = RECIPE, *, ended: bool = True) -> list[Verdict]:
    """The verdicts as they would be told."""
    return judge(Tale.of(run, recipe), began_s=1_000.0, ended=ended)


def failed(run: RunFolder) -> Verdict:
    """The one that failed; those before it are ok, those after it were never reached."""
    verdicts = judged(run)
    words = [verdict.verdict for verdict in verdicts]
    at = words.index("failed")
    assert set(words[:at]) <= {"ok"}
    assert set(words[at + 1 :]) <= {"not exercised"}
    return verdicts[at]


def test_a_whole_story_is_ok_in_every_stage(run: RunFolder) -> None:
    """Eight stages inside the job, none missing."""
    second_attempt(first_attempt(run), run)
    assert [(each.stage, each.verdict) for each in judged(run)] == [
        (stage, "ok") for stage in ("start", "steps", "evaluation", "save", "kill", "resume", "finish", "export")
    ]


def test_nothing_is_judged_before_it_is_known(run: RunFolder) -> None:
    """While the job goes on, stages without evidence have no verdict at all."""
    first_attempt(run)
    assert [each.stage for each in judged(run, ended=False)] == ["start", "steps", "evaluation", "save", "kill"]


def test_a_recipe_that_holds_nothing_out_has_no_evaluation_to_exercise(run: RunFolder) -> None:
    """Said, and no failure."""
    second_attempt(first_attempt(run), run)
    nothing = dataclasses.replace(RECIPE.data, validation=ValidationSpec())
    found = {each.stage: each.verdict for each in judged(run, dataclasses.replace(RECIPE, data=nothing))}
    assert found.pop("evaluation") == "not exercised"
    assert set(found.values()) == {"ok"}


def test_losses_that_differ_after_the_resume_fail_it(run: RunFolder) -> None:
    """A run that goes on with other numbers has lost something of its state."""
    second_attempt(first_attempt(run), run, loss=6.001)
    assert failed(run).stage == "resume"
    assert "step 5 had loss 5.950000 before the kill and 5.951000 after it" in failed(run).note


def test_going_on_from_another_step_than_the_newest_checkpoint_fails_the_resume(run: RunFolder) -> None:
    """A checkpoint that was there and not used."""
    second_attempt(first_attempt(run), run, resumed=SAVED)
    assert failed(run).stage == "resume"
    assert "step 2" in failed(run).note
    assert "step 4" in failed(run).note


def test_a_job_that_does_not_come_back_fails_the_kill(run: RunFolder) -> None:
    """The reason is the policy's own."""
    first_attempt(run)
    text = run.attempts.read_text().replace('"requeue"', '"stop"').replace('"again"', '"no restart is left"')
    run.attempts.write_text(text)
    assert failed(run).stage == "kill"
    assert "no restart is left" in failed(run).note


def test_a_loss_that_is_not_finite_fails_the_steps(run: RunFolder) -> None:
    """The tracker writes null for it; a run that went on is no excuse."""
    first_attempt(run)
    append_json_line(run.metrics, {"step": 3, "loss": None})
    assert failed(run).stage == "steps"


def test_a_save_that_failed_is_told_though_training_went_on(run: RunFolder) -> None:
    """A warning for a long run, a verdict for a rehearsal."""
    story = first_attempt(run)
    story.tell("save_failed", job_id="5", attempt="5.0", step=4, error="No space left on device")
    assert failed(run).stage == "save"
    assert "No space left" in failed(run).note


def test_an_artifact_that_was_not_proved_fails_the_export_alone(run: RunFolder) -> None:
    """All steps are done, rank 0 failed while it finished: the words of `launcher why`, and exit 8."""
    story = first_attempt(run)
    second_attempt(story, run)
    run.result.unlink()
    story.reports(0, "RuntimeError", "injected fault", phase="finishing", exit_code=1)
    story.tell("failed", job_id="5", attempt="5.1", error="RuntimeError: injected fault", rank=0, exit_code=1)
    assert failed(run).stage == "export"
    assert "injected fault" in failed(run).note
    assert exit_code(run) == 8


def test_an_error_of_several_lines_is_told_whole(run: RunFolder) -> None:
    """Its first line says what kind of error it is, the second which field."""
    story = Story(run, cluster="local", world_size=2)
    error = "1 validation error for DeepSpeedZeroConfig\nreduce_bucket_size\n  Input should be greater than 0"
    story.starts().reports(0, "ValidationError", error, phase="building", exit_code=1)
    story.tell("failed", job_id="5", attempt="5.0", error=f"ValidationError: {error}", rank=0, exit_code=1)
    append_json_line(run.metrics, {"event": "finished", "status": "failed"})
    assert failed(run).stage == "start"
    assert "reduce_bucket_size Input should be greater than 0" in failed(run).note


def test_an_error_in_the_data_keeps_its_exit_code(run: RunFolder) -> None:
    """What only the job could find is still the user's data."""
    story = Story(run, cluster="local", world_size=2)
    story.reports(0, "DataError", "no rows", phase="tokenizing", exit_code=3)
    story.tell("failed", job_id="5", attempt="5.0", error="DataError: no rows", rank=0, exit_code=3)
    assert failed(run).stage == "start"
    assert exit_code(run) == 3
