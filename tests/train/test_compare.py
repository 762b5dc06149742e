"""`launcher compare`: losses per row are those the runs were evaluated with; a winner is one beyond chance."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launcher.cli import main
from launcher.recipe.schema import ValidationSpec
from launcher.runs.folder import RunFolder
from tests.tiny import make_recipe
from tests.train.ranks import Ranks
from tests.train.runs import candidate_for, make_run, result, train_here

ROWS = 24


def trained(base: Path, ranks: Ranks, method: str, rate: float, *, steps: int = 20, seed: int = 42) -> RunFolder:
    """A finished run, as `submit` would have made its folder."""
    packing = method not in ("prompt", "prefix")
    train = {"max_steps": steps, "learning_rate": rate, "seed": seed}
    data = {"validation": ValidationSpec(count=ROWS), "packing": packing, "retention_builtin": True}
    recipe = make_recipe(base, method=method, train=train, data=data)
    run = make_run(recipe, candidate_for(1, method=method, learning_rate=rate, packing=packing))
    run.recipe.write_text(run.resolved.read_text(encoding="utf-8"), encoding="utf-8")
    ranks.run(train_here, run.path)
    return run


@pytest.fixture(scope="module")
def runs(base: Path, ranks: Ranks) -> dict[str, RunFolder]:
    """One run of each kind that is loaded in a way of its own; `lora` twice with the same seed."""
    asked = {"full": 3e-4, "dora": 2e-3, "prompt": 1e-2, "adalora": 2e-3, "qlora": 2e-3}
    asked |= {"slow": 1e-5, "lora": 6e-3, "again": 6e-3}
    kinds = {"slow": "lora", "again": "lora"}
    return {name: trained(base, ranks, kinds.get(name, name), rate) for name, rate in asked.items()}


def invoke(base: Path, *words: str) -> Result:
    """`launcher compare` on the runs below `base`."""
    return CliRunner().invoke(main, ["compare", *words, "--runs", str(base / "runs")])


def compared(base: Path, *words: str) -> dict[str, Any]:
    """Its JSON document."""
    done = invoke(base, *words, "--json")
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def test_losses_per_row_add_up_to_what_the_runs_measured(base: Path, runs: dict[str, RunFolder]) -> None:
    """Weighted by trained tokens, the losses of each run are its own validation loss, and the base's the one before."""
    names = {kind: runs[kind].run_id for kind in ("full", "dora", "prompt", "adalora", "qlora", "lora")}
    told = compared(base, *names.values(), "--generations", "1", "--max-new-tokens", "8")["per_example"]
    assert set(told["losses"]) == {"base", *names.values()}
    total = sum(told["tokens"])
    assert len(told["tokens"]) >= ROWS
    for kind, name in names.items():
        mean = math.fsum(loss * n for loss, n in zip(told["losses"][name], told["tokens"], strict=True)) / total
        assert mean == pytest.approx(result(runs[kind])["validation_loss"]["after"], rel=1e-4), kind
    mean = math.fsum(loss * n for loss, n in zip(told["losses"]["base"], told["tokens"], strict=True)) / total
    assert mean == pytest.approx(result(runs["lora"])["validation_loss"]["before"], rel=1e-4)


def test_a_clear_difference_has_a_winner_and_equal_runs_have_none(base: Path, runs: dict[str, RunFolder]) -> None:
    """A rate that learns against one that does not; then the same training twice, where every row is a tie."""
    lora, slow, again = (runs[name].run_id for name in ("lora", "slow", "again"))
    clear = compared(base, lora, slow, "--generations", "0")
    assert clear["winner"] == lora
    assert "another seed is another matter" in clear["verdict"]
    (pair,) = [pair for pair in clear["pairs"] if {pair["one"], pair["other"]} == {lora, slow}]
    assert pair["wins"] > 0.8 * pair["rows"]
    assert pair["high"] < 0
    equal = compared(base, lora, again, "--generations", "0")
    (pair,) = [pair for pair in equal["pairs"] if {pair["one"], pair["other"]} == {lora, again}]
    assert (pair["ties"], pair["better"], equal["winner"]) == (pair["rows"], None, None)
    assert equal["verdict"].startswith("no winner")


def test_answers_stand_side_by_side(base: Path, runs: dict[str, RunFolder], tmp_path: Path) -> None:
    """Held-out rows with the data's own answer; prompts of a file are put as the chats the runs were trained on."""
    lora, slow = runs["lora"].run_id, runs["slow"].run_id
    asked = compared(base, lora, slow, "--generations", "3", "--max-new-tokens", "12")["generations"]
    assert len(asked) == 3
    for one in asked:
        assert set(one["answers"]) == {"base", lora, slow}
        assert one["prompt"].endswith("<|assistant|>")
        assert one["reference"] in one["prompt"], "the answer repeats the question: so the rows are made"
    assert any(one["answers"][lora] != one["answers"]["base"] for one in asked)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Repeat: the value of the object\n\nRepeat: a name\n")
    told = compared(base, lora, "--prompts", str(prompts), "--max-new-tokens", "8")["generations"]
    assert [one["prompt"] for one in told] == ["Repeat: the value of the object", "Repeat: a name"]
    assert [one["reference"] for one in told] == [None, None]


def test_an_adapter_that_no_run_made_is_measured_beside_the_runs(
    base: Path, runs: dict[str, RunFolder], tmp_path: Path
) -> None:
    """A copy of one run's adapter ties with it on every row; a fully tuned run alone lends it no base."""
    lora = runs["lora"]
    copy = Path(shutil.copytree(lora.adapter, tmp_path / "copied"))
    told = compared(base, lora.run_id, "--adapter", str(copy), "--generations", "0")
    assert told["per_example"]["losses"]["copied"] == told["per_example"]["losses"][lora.run_id]
    assert (told["winner"], told["verdict"][:9]) == (None, "no winner")
    refused = invoke(base, runs["full"].run_id, "--adapter", str(copy))
    assert refused.exit_code == 7
    assert "none of the runs is an adapter on its base" in refused.stderr


def test_runs_on_other_rows_are_compared_by_their_numbers_alone(
    base: Path, ranks: Ranks, runs: dict[str, RunFolder]
) -> None:
    """Another seed holds out other rows: it says so, leaves losses per row out, and calls nobody better."""
    other = trained(base, ranks, "lora", 6e-3, steps=2, seed=7)
    told = compared(base, runs["lora"].run_id, other.run_id, "--generations", "1")
    assert (told["per_example"], told["pairs"], told["winner"]) == (None, [], None)
    assert any("validation sets differ" in note for note in told["notes"])
    assert any("validated on different rows" in note for note in told["notes"])
    assert [run["validation"]["last"] is not None for run in told["runs"]] == [True, True]


def test_without_models_the_numbers_remain(base: Path, runs: dict[str, RunFolder]) -> None:
    """--no-model reads folders only; what was forgotten is in the notes and the table."""
    lora = runs["lora"].run_id
    done = invoke(base, lora, runs["slow"].run_id, "--no-model")
    assert done.exit_code == 0, done.output
    assert "retention perplexity" in done.stdout
    assert "no winner is called: differences were not measured row by row" in done.stdout
    told = compared(base, lora, "--no-model")
    assert told["runs"][0]["retention_rise"] == result(runs["lora"])["retention_rise"]
    assert told["runs"][0]["against"]


def test_the_page_holds_everything(base: Path, runs: dict[str, RunFolder], tmp_path: Path) -> None:
    """--html writes the same comparison; answers are text, whatever a model writes."""
    page = tmp_path / "compare.html"
    names = (runs["lora"].run_id, runs["slow"].run_id)
    done = invoke(base, *names, "--html", str(page), "--generations", "1", "--max-new-tokens", "8")
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert all(name in text for name in names)
    assert "&lt;|assistant|&gt;" in text
    assert "<|assistant|>" not in text
