"""A trial's standing, its table, what is a tie, and what is picked: all from the files of its runs."""

from __future__ import annotations

import io
import statistics
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from launcher.errors import ConflictError, JobFailedError, RecipeError
from launcher.recipe.load import load_recipe, recipe_to_yaml
from launcher.report.trial import print_table, verdict
from launcher.runs import trial_folder
from launcher.runs.folder import append_json_line, read_json, write_json
from launcher.runs.trial_choice import choose, write_choice
from launcher.runs.trial_confirm import confirmation_of
from launcher.runs.trial_folder import Trial
from launcher.runs.trial_progress import progress
from launcher.runs.trial_scorer import scores_path
from launcher.runs.trial_scores import failure_of
from launcher.runs.trial_standing import stand
from launcher.runs.trial_table import Row, confirmation, rows, smallest_difference, ties, to_json
from launcher.verbs.trial import command
from tests.tiny import make_recipe
from tests.unit.runs.material import note_job
from tests.unit.runs.trial_material import give_run, make_candidate, make_trial, reach


def todo(trial: Trial) -> list[str]:
    return [f"{task.candidate}{task.seed if len(trial.seeds) > 1 else ''}" for task in stand(trial).todo]


def table(trial: Trial) -> dict[str, Row]:
    return {row.candidate: row for row in rows(trial, stand(trial))}


@pytest.fixture
def finished(tmp_path: Path) -> Trial:
    """Four candidates: d and a stop after the first rung, b and c go to the end."""
    trial = make_trial(tmp_path)
    for name, loss in (("a", 4.0), ("b", 2.0), ("c", 3.0), ("d", 4.5)):
        reach(trial, name, 0, loss)
    for rung, losses in ((1, (2.5, 2.4)), (2, (1.5, 1.25))):
        reach(trial, "b", rung, losses[0])
        reach(trial, "c", rung, losses[1])
    return trial


# ---------------------------------------------------------------- standing


def test_a_trial_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """trial.json holds everything; the folder is found by name, by its beginning and by path."""
    trial = make_trial(tmp_path, seeds=(1, 2), parallel=3)
    assert trial_folder.read_trial(trial.path) == trial
    for word in (trial.name, trial.name[:-2], str(trial.path)):
        assert trial_folder.find_trial(word, tmp_path / "runs") == trial
    assert trial_folder.find_trial("tiny.yaml", tmp_path / "runs") is None


def test_a_word_means_a_run_or_a_trial(tmp_path: Path) -> None:
    """Exact names first; a beginning that both have means neither."""
    trial = make_trial(tmp_path)
    run = give_run(trial, "tiny-a")
    meant = lambda word: trial_folder.find_run_or_trial(word, tmp_path / "runs")  # noqa: E731
    assert [meant(word) for word in (trial.name, str(trial.path), trial.name[:-1])] == [trial] * 3
    assert [meant(word) for word in (run.run_id, str(run.path), "tiny-a-")] == [run] * 3
    with pytest.raises(RecipeError, match="beginning of a trial and of 1 runs"):
        meant("tiny")
    with pytest.raises(RecipeError, match="no run"):
        meant("other")


def test_every_run_is_taken_to_a_rung_before_anybody_to_the_next(tmp_path: Path) -> None:
    """What is to run next is what has not reached the rung, in the order of the list."""
    trial = make_trial(tmp_path)
    assert todo(trial) == ["a", "b", "c", "d"]
    reach(trial, "b", 0, 2.0)
    assert todo(trial) == ["a", "c", "d"]


def test_the_worse_half_stops(finished: Trial) -> None:
    """The table says who stopped where; nothing is left to run."""
    told = table(finished)
    assert stand(finished).finished
    assert [(row.candidate, row.status, row.steps) for row in told.values()] == [
        ("c", "finished", 8),
        ("b", "finished", 8),
        ("a", "stopped", 2),
        ("d", "stopped", 2),
    ]


def test_every_seed_counts(tmp_path: Path) -> None:
    """A rung is reached when all seeds of all candidates are there; the mean decides."""
    trial = make_trial(tmp_path, "abc", seeds=(1, 2))
    for name, losses in (("a", (1.0, 4.0)), ("b", (2.0, 2.0)), ("c", (2.4, 2.4))):
        reach(trial, name, 0, losses[0], seed=1)
        assert f"{name}2" in todo(trial)
        reach(trial, name, 0, losses[1], seed=2)
    assert todo(trial) == ["b1", "b2", "c1", "c2"]
    assert table(trial)["a"].validation_loss == 2.5


def test_a_candidate_that_cannot_go_on_is_out(tmp_path: Path) -> None:
    """It is named with why, and the others go on without it."""
    trial = make_trial(tmp_path, "abc")
    give_run(trial, "a")
    trial.folder.record("out", candidate="a", rung=0, why="ran out of GPU memory")
    assert todo(trial) == ["b", "c"]
    reach(trial, "b", 0, 2.0)
    reach(trial, "c", 0, 3.0)
    assert todo(trial) == ["b", "c"]
    assert (table(trial)["a"].status, table(trial)["a"].why) == ("failed", "ran out of GPU memory")


def test_a_loss_that_is_no_number_stops_a_candidate(tmp_path: Path) -> None:
    """metrics.jsonl holds null for it."""
    trial = make_trial(tmp_path, "abc")
    for name, loss in (("a", None), ("b", 9.0), ("c", 8.0)):
        reach(trial, name, 0, loss)
    assert todo(trial) == ["b", "c"]
    assert table(trial)["a"].validation_loss is None


@pytest.mark.parametrize(
    ("cause", "fault"), [("nan_loss", True), ("gpu_out_of_memory", True), ("cancelled", False), ("disk_full", False)]
)
def test_only_the_candidates_own_faults_put_it_out(tmp_path: Path, cause: str, fault: bool) -> None:
    """After anything else somebody has to say that the trial goes on."""
    run = give_run(make_trial(tmp_path), "a")
    run.record("decided", action="stop", cause=cause, sentence="what happened")
    assert failure_of(run) == ("what happened" if fault else None)


def test_work_that_was_done_twice_leaves_the_same_quality(tmp_path: Path, finished: Trial) -> None:
    """An interrupted run logs the same loss again, and takes longer: only times differ."""
    before = {name: row.quality() for name, row in table(finished).items()}
    run = finished.run_of(stand_task(finished, "b"))
    assert run is not None
    lines = run.metrics.read_text()
    run.metrics.write_text(lines + lines.splitlines(keepends=True)[1])
    run.record("started", attempt="2.0")
    run.record("ended", attempt="2.0")
    assert {name: row.quality() for name, row in table(finished).items()} == before


def stand_task(trial: Trial, name: str) -> trial_folder.Task:
    return trial_folder.Task(candidate=name, seed=trial.seeds[0])


# ---------------------------------------------------------------- where it is


def test_one_line_says_where_a_trial_is(tmp_path: Path) -> None:
    """Runs that have reached the rung, that were not sent yet, and that left; one that paused waits, it did not end."""
    trial = make_trial(tmp_path, "abc")
    reach(trial, "a", 0, 2.0)
    left = give_run(trial, "b")
    note_job(left, "7", cluster="local")
    assert (
        progress(trial).sentence
        == f"trial {trial.name}: rung 1 of 3 (to 1/4 of the steps): 1 done, 1 pending, 1 ended before it"
    )
    reach(trial, "b", 0, 1.0)
    reach(trial, "c", 0, 3.0)
    told = progress(trial)
    assert told.sentence.endswith("rung 2 of 3 (to 1/2 of the steps): 0 done, 2 pending; of 3 candidates 1 stopped")
    assert [run["run"] for run in told.to_json()["runs"]] == [run.run_id for run in trial.made()]
    trial.folder.record("cancelled")
    assert progress(trial).sentence.startswith(f"trial {trial.name}: cancelled in rung 2 of 3")


def test_the_line_of_a_finished_trial_counts_candidates(finished: Trial) -> None:
    """Nothing is left to run."""
    assert progress(finished).sentence == f"trial {finished.name}: finished; of 4 candidates 2 finished, 2 stopped"
    assert progress(finished).state == "finished"


# ---------------------------------------------------------------- the table


def test_the_table_has_what_the_guides_print(finished: Trial) -> None:
    """Loss, perplexity, retention, times and sizes, of the run's last rung."""
    best = table(finished)["c"]
    assert (best.validation_loss, best.base_loss, best.retention_change) == (1.25, 5.0, 0.25)
    assert best.perplexity == pytest.approx(3.4903, abs=1e-4)
    assert (best.train_s, best.train_device_hours, best.tokens) == (10.0, 10 / 3600, 100)
    assert best.gpu_hours is None and best.cost is None


def test_a_price_makes_a_cost(tmp_path: Path) -> None:
    """GPUs times wall time times the user's price; a CPU has no price."""
    candidates = (make_candidate("a", gpu_hours=8.0, devices=8), make_candidate("b", gpu_hours=8.0, devices=8))
    trial = make_trial(tmp_path, candidates=candidates, price=2.0)
    reach(trial, "a", 0, 1.0)
    run = trial.run_of(stand_task(trial, "a"))
    assert run is not None
    run.attempts.write_text(
        '{"event": "started", "attempt": "1.0", "time_s": 1000.0}\n'
        '{"event": "stopped", "attempt": "1.0", "reason": "paused", "step": 2, "time_s": 2800.0, "train_s": 900.0}\n'
    )
    row = table(trial)["a"]
    assert (row.wall_s, row.gpu_hours, row.cost, row.train_device_hours) == (1800.0, 4.0, 8.0, 2.0)


def test_memory_is_the_hosts_where_there_is_no_gpu(finished: Trial) -> None:
    """What each attempt had held at most when it left, paused or done; the column says whose memory it is."""
    run = finished.run_of(stand_task(finished, "c"))
    assert run is not None
    run.record("stopped", attempt="1.0", reason="preempted", step=5, host_peak_bytes=5 * 2**30)
    write_json(run.result, read_json(run.result) | {"host_peak_bytes": 4 * 2**30, "peak_bytes": None})
    assert (table(finished)["c"].host_peak_bytes, table(finished)["b"].host_peak_bytes) == (5 * 2**30, None)
    assert "HOST PEAK" in shown(finished) and "5.00 GiB" in shown(finished)
    append_json_line(run.metrics, {"step": 3, "peak_bytes": 2**30})
    assert "GPU PEAK" in shown(finished) and "5.00 GiB" not in shown(finished)


def shown(trial: Trial) -> str:
    """The table on a terminal."""
    out, told = Console(width=300, record=True, file=io.StringIO()), rows(trial, stand(trial))
    print_table(to_json(trial, stand(trial), told), told, console=out)
    return out.export_text()


def test_rejected_candidates_stay_in_the_table(tmp_path: Path) -> None:
    """With the planner's reason."""
    rejected = make_candidate("x", rejected="does not fit")
    trial = make_trial(tmp_path, candidates=(make_candidate("a"), rejected, make_candidate("b")))
    document = to_json(trial, stand(trial), rows(trial, stand(trial)))
    assert [(row["candidate"], row["why"]) for row in document["rows"]][-1] == ("x", "does not fit")
    assert [task.candidate for task in stand(trial).todo] == ["a", "b"]


# ---------------------------------------------------------------- ties


def row(name: str, *losses: float, **facts: float) -> Row:
    """A finished candidate."""
    values = {"train_device_hours": 1.0, "predicted_device_hours": 1.0, "base_loss": 5.0} | facts
    return Row(
        candidate=name,
        method="lora",
        lora_r=8,
        learning_rate=1e-3,
        status="finished",
        why=None,
        rung=3,
        steps=8,
        of_steps=8,
        seeds=len(losses),
        validation_loss=sum(losses) / len(losses),
        losses=losses,
        **values,  # type: ignore[arg-type]
    )


def test_a_difference_below_noise_is_a_tie() -> None:
    """Two candidates whose seeds overlap cannot be told apart; a third far away can."""
    told = [row("a", 1.0, 1.2, 1.1), row("b", 1.05, 1.15, 1.13), row("c", 3.0, 3.1, 3.2)]
    assert ties(told) == ["a", "b"]


def test_the_smallest_difference_is_students() -> None:
    """Two candidates of two seeds with deviation 0.1 each: t(2 degrees) 4.303, times 0.1, times the root of 2/2."""
    told = [row("a", 1.0, 1.0 + 0.1 * 2**0.5), row("b", 2.0, 2.0 + 0.1 * 2**0.5)]
    assert smallest_difference(told) == pytest.approx(0.4303)


def test_one_seed_says_nothing_of_noise() -> None:
    """The best measured is named, and that chance is unknown; no difference is called real."""
    told = [row("a", 1.0), row("b", 1.0001)]
    assert smallest_difference(told) is None
    assert "one seed" in choose(told, "quality").reasons[-1]


# ---------------------------------------------------------------- picking


def test_quality_takes_the_cheapest_of_a_tie() -> None:
    """By the plan, not by a clock: the choice must not depend on how busy a machine was."""
    told = [
        row("a", 1.0, 1.2, 1.1, predicted_device_hours=5.0, train_device_hours=0.1),
        row("b", 1.05, 1.15, 1.13, predicted_device_hours=2.0, train_device_hours=9.0),
    ]
    choice = choose(told, "quality")
    assert choice.candidate == "b"
    assert "a tie with a" in choice.reasons[0]


def scored(name: str, *scores: float, **facts: float) -> Row:
    """A finished candidate whose answers were judged; by its losses it would be the better the later its name."""
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    given = row(name, *(200.0 - ord(name) for _ in scores), **facts)
    return replace(given, score=statistics.mean(scores), scores=scores, score_spread=deviation, base_score=0.25)


def test_score_takes_the_highest_mean_score() -> None:
    """Whatever the losses say, and what was measured is told."""
    told = [scored("a", 0.9, 0.92, 0.91), scored("b", 0.5, 0.52, 0.51)]
    assert choose(told, "quality").candidate == "b"
    choice = choose(told, "score")
    assert (choice.candidate, choice.reasons[0]) == ("a", "highest mean score")
    assert choice.reasons[1] == "score 0.9100 +- 0.0100; the base has 0.2500"
    assert "b 0.5100" in choice.reasons


def test_scores_closer_than_noise_are_a_tie() -> None:
    """As of losses the cheapest by the plan; equal scores of one seed are one, too."""
    near = [scored("a", 0.9, 0.8, 0.85, predicted_device_hours=5.0), scored("b", 0.84, 0.88, 0.8)]
    assert ties(near, "score") == ["a", "b"]
    assert choose(near, "score").candidate == "b"
    assert (
        choose([scored("a", 1.0), scored("b", 1.0, predicted_device_hours=0.5)], "score")
        .reasons[0]
        .startswith("the same score as a")
    )


def test_nobody_is_chosen_by_scores_that_nobody_gave(finished: Trial) -> None:
    """A usage error that names what is missing, before anything is sent or started."""
    with pytest.raises(RecipeError, match="--scorer"):
        choose([row("a", 1.0)], "score")
    asked = CliRunner().invoke(command, [str(finished.path), "--objective", "score"])
    assert asked.exit_code == 2 and "--scorer" in asked.output
    assert CliRunner().invoke(command, ["my.yaml", "--objective", "score"]).exit_code == 2


def test_the_scores_of_the_seeds_are_kept(tmp_path: Path) -> None:
    """The table has their mean and spread; a candidate of which one run was not judged has neither."""
    trial = make_trial(tmp_path, "ab", seeds=(1, 2), shares=(Fraction(1),))
    for name in "ab":
        for seed in trial.seeds:
            reach(trial, name, 0, 1.0, seed=seed)
    runs = [run.run_id for run in trial.made()]
    write_json(scores_path(trial), {"scores": {runs[0]: 0.5, runs[1]: 0.7, runs[2]: 0.1, "base": 0.2}})
    told = table(trial)
    assert (told["a"].score, told["a"].scores) == (0.6, (0.5, 0.7))
    assert told["a"].score_spread == pytest.approx(0.1414, abs=1e-4)
    assert (told["b"].score, told["b"].scores, told["b"].base_score) == (None, (), 0.2)
    assert to_json(trial, stand(trial), rows(trial, stand(trial)))["score_ties"] == ["a"]


def test_cost_and_quality_per_cost_count_time_in_steps() -> None:
    """Least hours, or most loss taken off the base per hour; what is no better than the base is never chosen."""
    told = [
        row("good", 1.0, train_device_hours=8.0),
        row("cheap", 4.5, train_device_hours=1.0),
        row("fair", 2.0, train_device_hours=2.0),
        row("useless", 5.5, train_device_hours=0.1),
    ]
    assert choose(told, "quality").candidate == "good"
    assert choose(told, "cost").candidate == "cheap"
    assert choose(told, "quality-per-cost").candidate == "fair"
    assert any("for quality alone it would be good" in reason for reason in choose(told, "cost").reasons)


def test_nothing_is_chosen_where_nothing_helped() -> None:
    """A cheap way to make a model worse is no choice."""
    with pytest.raises(JobFailedError, match="better than the base"):
        choose([row("a", 6.0)], "cost")


def test_the_winning_recipe_says_why(tmp_path: Path) -> None:
    """Method, rank and rate are fixed, the rest is the user's, the reasons are comments; no file is overwritten."""
    text = "name: mine\nmodel: m/m\nmethod: full\ndata: {train: [a.jsonl]}\ntrain: {max_steps: 100}\n"
    overrides = ("train.learning_rate=auto", "method=lora", "slurm.nodes=4", "train.max_steps=50")
    winner = make_candidate("a", overrides=overrides, lora_r=16, learning_rate=3e-4)
    trial = make_trial(tmp_path, candidates=(winner, make_candidate("b")), asked=("train.weight_decay=0.1",))
    trial.recipe.write_text(text)
    path = tmp_path / "best.yaml"
    write_choice(trial, choose([row("a", 1.0), row("b", 2.0)], "quality"), path)
    recipe = load_recipe(path)
    assert (recipe.name, recipe.method, recipe.lora.r, recipe.train.learning_rate) == ("mine", "lora", 16, 3e-4)
    assert (recipe.train.weight_decay, recipe.slurm.nodes) == (0.1, "auto")
    assert "lowest validation loss" in path.read_text().split("name:")[0]
    with pytest.raises(ConflictError, match="not overwritten"):
        write_choice(trial, choose([row("a", 1.0)], "quality"), path)


# ---------------------------------------------------------------- once more, with new seeds


def confirmed(tmp_path: Path, **losses: tuple[float, ...]) -> dict[str, object]:
    """What table.json says of a confirmation: a won the trial before it, b was second."""
    trial = make_trial(
        tmp_path,
        "".join(losses),
        shares=(Fraction(1),),
        seeds=(43, 44, 45),
        confirms=trial_folder.Confirms(trial="tiny-1", winner="a", runner_up="b"),
    )
    for name, each in losses.items():
        for seed, loss in zip(trial.seeds, each, strict=True):
            reach(trial, name, 0, loss, seed=seed)
    standing = stand(trial_folder.read_trial(trial.path))
    document = to_json(trial, standing, rows(trial, standing))
    assert verdict(document, rows(trial, standing))[0].startswith(
        {"confirmed": "confirmed: a", "reversed": "NOT confirmed", "tie": "a tie", "unknown": "whether a"}[
            document["confirms"]["outcome"]
        ]
    )
    return document["confirms"]


def test_a_winner_is_confirmed_by_more_than_noise_or_not_at_all(tmp_path: Path) -> None:
    """New seeds decide between three words; the old losses play no part."""
    apart, close = (2.0, 2.01, 2.02), (2.005, 2.015, 2.025)
    assert confirmed(tmp_path / "1", a=apart, b=(3.0, 3.01, 3.02))["outcome"] == "confirmed"
    assert confirmed(tmp_path / "2", a=(3.0, 3.01, 3.02), b=apart)["outcome"] == "reversed"
    assert confirmed(tmp_path / "3", a=apart, b=close)["outcome"] == "tie"


def test_a_winner_by_score_is_confirmed_by_scores(tmp_path: Path) -> None:
    """Losses play no part; before the answers are judged, how to have them judged is said."""
    by_score = trial_folder.Confirms(trial="tiny-1", winner="a", runner_up="b", by="score")
    assert confirmation(by_score, [scored("a", 0.9, 0.91, 0.92), scored("b", 0.5, 0.51, 0.52)]) == "confirmed"
    assert confirmation(by_score, [scored("a", 0.5, 0.51, 0.52), scored("b", 0.9, 0.91, 0.92)]) == "reversed"
    trial = make_trial(tmp_path, "ab", shares=(Fraction(1),), seeds=(43, 44), confirms=by_score)
    for name in "ab":
        for seed in trial.seeds:
            reach(trial, name, 0, 1.0 + seed, seed=seed)
    told = rows(trial, stand(trial))
    document = to_json(trial_folder.read_trial(trial.path), stand(trial), told)
    assert document["confirms"]["outcome"] == "unknown"
    assert f"launcher trial {trial.name} --scorer" in verdict(document, told)[0]


def test_two_candidates_are_confirmed_on_the_rows_of_their_trial(finished: Trial, tmp_path: Path) -> None:
    """Winner and best of the others, seeds never used before, the held-out rows of the trial that chose."""
    recipe = make_recipe(tmp_path)
    finished.recipe.write_text(recipe_to_yaml(recipe))
    asked = confirmation_of(finished, "quality", 3)
    assert asked.specs is not None
    assert [(spec.name, spec.overrides) for spec in asked.specs] == [
        ("c", finished.candidate("c").overrides),
        ("b", finished.candidate("b").overrides),
    ]
    assert (asked.seeds, asked.shares) == (3, (Fraction(1),))
    assert set(asked.settled) == {"train.seed=43", f"data.split_seed={recipe.train.seed}"}
    assert asked.confirms == trial_folder.Confirms(trial=finished.name, winner="c", runner_up="b")


def test_what_has_not_ended_has_no_winner_to_confirm(tmp_path: Path) -> None:
    """The message says how to go on."""
    trial = make_trial(tmp_path)
    with pytest.raises(ConflictError, match=f"go on with: launcher trial {trial.name}"):
        confirmation_of(trial, "quality", 3)
