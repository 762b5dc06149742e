"""Runs side by side from their folders alone: what is known, what is missing, and what cannot be compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.errors import RecipeError
from launcher.runs.comparison import compare, find_adapters, find_runs, read_prompts
from launcher.runs.folder import RunFolder, append_json_line, write_json
from launcher.runs.run_facts import quality, run_facts
from tests.unit.runs.material import make_run
from tests.unit.runs.story import Story


def finished(parent: Path, *, validation: dict[int, float], retention: tuple[float, float] | None = None,
             sha: str | None = "v") -> RunFolder:  # fmt: skip
    """A run that was interrupted once and then finished."""
    run = make_run(parent)
    story = Story(run, world_size=2).starts().stops(2)
    story.restart = 1
    story.starts(resumed=2).tell("completed", job_id="5", attempt=story.attempt, step=4)
    for step, loss in validation.items():
        append_json_line(run.metrics, {"step": step, "validation_loss": loss})
    for step, loss in zip((0, 4), retention or (), strict=False):
        append_json_line(run.metrics, {"step": step, "retention_loss": loss})
    for step in range(1, 5):
        append_json_line(run.metrics, {"step": step, "loss": 2.0, "tokens_per_s": 100.0, "peak_bytes": 10**9 + step})
    write_json(run.result, {"method": "lora", "step": 4, "train_s": 8.0, "tokens": 400,
                            "data": {"key": "k", "validation_sha256": sha, "retention_sha256": "r"}})  # fmt: skip
    return run


def test_base_best_and_last_are_told_apart(tmp_path: Path) -> None:
    """The best evaluation need not be the last; a step evaluated again after an interruption counts once."""
    lines: list[dict[str, Any]] = [{"step": 0, "validation_loss": 3.0}, {"step": 2, "validation_loss": 9.9},
             {"step": 2, "validation_loss": 2.0}, {"step": 4, "validation_loss": 2.5},
             {"step": 3, "validation_loss": None}]  # fmt: skip
    found = quality(lines, "validation")
    assert (found.base, found.best, found.best_step, found.last) == (3.0, 2.0, 2, 2.5)
    assert quality([], "validation").best is None


def test_time_is_that_of_all_attempts_and_memory_the_highest(tmp_path: Path) -> None:
    """What a run took includes what interruptions took."""
    facts = run_facts(finished(tmp_path, validation={0: 3.0, 4: 2.0}, retention=(2.0, 2.4)))
    assert facts.restarts == 1
    assert facts.wall_s is not None and facts.wall_s >= 5
    assert facts.peak_bytes == 10**9 + 4
    assert facts.retention_rise == pytest.approx(math.exp(0.4) - 1), "of the perplexity"
    step = next(one for one in facts.against if one.name == "step")
    assert step.measured == 1.0, "400 tokens in 4 steps at 100 tokens per second"
    assert step.error == (None if not step.predicted else pytest.approx(step.predicted / 1.0 - 1))


def test_other_validation_rows_are_said_to_be_others(tmp_path: Path) -> None:
    """Different hashes, and hashes that nobody wrote down, are two different sentences."""
    one, two = (finished(tmp_path, validation={0: 3.0, 4: 2.0}, sha=sha) for sha in ("v", "w"))
    assert any("the validation sets differ" in note for note in compare([one, two], None).notes)
    three = finished(tmp_path, validation={0: 3.0, 4: 2.0}, sha=None)
    assert any("is not recorded for every run" in note for note in compare([one, three], None).notes)
    same = compare([one, finished(tmp_path, validation={0: 3.0, 4: 2.0})], None)
    assert not same.notes
    assert same.verdict == "no winner is called: differences were not measured row by row"


def test_a_run_that_goes_on_is_compared_with_what_it_has(tmp_path: Path) -> None:
    """Interim numbers are called so; no model is asked for."""
    run = make_run(tmp_path)
    append_json_line(run.metrics, {"step": 0, "validation_loss": 3.0})
    done = finished(tmp_path, validation={0: 3.0, 4: 2.0})
    found = compare([run, done], None)
    assert found.notes[0].startswith(f"{run.run_id} has not finished")
    assert found.runs[0].validation.last == 3.0


def test_all_names_that_are_wrong_are_told_at_once(tmp_path: Path) -> None:
    """Two unknown runs and one named twice: three problems, exit 2."""
    run = finished(tmp_path, validation={0: 3.0})
    with pytest.raises(RecipeError) as caught:
        find_runs(["nobody", run.run_id, run.run_id, "nothing"], tmp_path)
    assert len(caught.value.problems) == 3


def test_folders_that_are_no_adapters_are_all_named(tmp_path: Path) -> None:
    """Two of them, and one whose name a run has."""
    run = make_run(tmp_path)
    (tmp_path / run.run_id / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError) as caught:
        find_adapters([str(tmp_path / "a"), str(run.path), str(tmp_path / "b")], [run], tmp_path)
    assert len(caught.value.problems) == 3


def test_prompts_are_lines_or_rows(tmp_path: Path) -> None:
    """Text lines, chats whose last answer becomes the reference, and a file without any."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    assert read_prompts(rows)[0].messages[0]["content"] == "a"
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\ntwo\n")
    assert [one.text for one in read_prompts(lines)] == ["one", "two"]
    lines.write_text("\n")
    with pytest.raises(RecipeError, match="holds no prompt"):
        read_prompts(lines)


def test_the_table_and_the_json_say_the_same(tmp_path: Path) -> None:
    """`launcher compare --no-model`, for people and for scripts."""
    names = [finished(tmp_path, validation={0: 3.0, 2: 1.5, 4: 2.0}).run_id for _ in range(2)]
    words = ["compare", *names, "--no-model", "--runs", str(tmp_path)]
    table = CliRunner().invoke(main, words)
    assert table.exit_code == 0, table.output
    assert "1.5000 (step 2)" in table.stdout
    assert "0.93 GiB" in table.stdout
    document = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert document["schema"] == 1
    assert [run["validation"]["best"] for run in document["runs"]] == [1.5, 1.5]
