"""Retention: what the base knew is measured before, during and after training, and its loss is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.planning.advice import FULL_RATES, LORA_RATES
from launcher.runs.folder import RunFolder, read_json_lines
from tests.tiny import make_recipe
from tests.train.ranks import Ranks
from tests.train.runs import candidate_for, make_run, result, train_here

STEPS = 60
ADVISED = {"full": FULL_RATES[1], "lora": LORA_RATES[0]}


def prepared(
    base: Path, method: str = "lora", rate: float = 1e-3, *, world: int = 1, stage: int = 0, **changes: Any
) -> RunFolder:
    """A run over the trained base that measures retention on what the base writes, unless `changes` say otherwise."""
    train = {"max_steps": STEPS, "learning_rate": rate, "eval_steps": 20}
    data = {"retention_builtin": True, "packing": method not in ("prompt", "prefix")}
    recipe = make_recipe(base, **({"method": method, "train": train, "data": data} | changes))
    packing = recipe.data.packing
    return make_run(recipe, candidate_for(world, stage, method=method, learning_rate=rate, packing=packing))


def told(run: RunFolder, name: str) -> dict[int, float]:
    """Step -> number of that name in metrics.jsonl."""
    return {line["step"]: line[name] for line in read_json_lines(run.metrics) if name in line and "step" in line}


def warnings(run: RunFolder) -> list[dict[str, Any]]:
    """Warnings in metrics.jsonl."""
    return [line for line in read_json_lines(run.metrics) if line.get("event") == "warning"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_thirty_times_the_advised_rate_is_noticed_and_the_advised_rate_is_not(
    method: str, base: Path, ranks: Ranks
) -> None:
    """At the advised rate the number stays below its limit without a word; at 30 times as much it rises and warns."""
    gentle, rough = prepared(base, method, ADVISED[method]), prepared(base, method, 30 * ADVISED[method])
    for run in (gentle, rough):
        ranks.run(train_here, run.path)
        assert list(told(run, "retention_loss")) == [0, 20, 40, 60]
        assert result(run)["retention_loss"]["before"] == told(run, "retention_loss")[0]
    assert (warnings(gentle), result(gentle)["warnings"]) == ([], [])
    assert abs(result(gentle)["retention_rise"]) < 0.03
    rise = result(rough)["retention_rise"]
    assert rise > 0.2
    assert rise == told(rough, "retention_rise")[STEPS]
    (found,) = [one for one in result(rough)["warnings"] if one["code"] == "retention"]
    assert (found["code"], found["limit"], found["rise"]) == ("retention", 0.2, rise)
    assert len(warnings(rough)) == 1
    assert "the base is being forgotten" in warnings(rough)[0]["message"]
    beat = json.loads(rough.heartbeat.read_text(encoding="utf-8"))
    assert [warning["message"] for warning in beat["warnings"]] == [found["message"]]


def test_both_runs_are_measured_on_the_same_text_of_the_base(base: Path, ranks: Ranks) -> None:
    """Fixed openings and a fixed seed; methods whose model is more than the base sample from the base all the same."""
    runs = [prepared(base, method, train={"max_steps": 1}) for method in ("lora", "full", "prompt")]
    for run in runs:
        ranks.run(train_here, run.path)
    texts = {run.retention.read_text(encoding="utf-8") for run in runs}
    assert len(texts) == 1
    lines = [json.loads(line) for line in texts.pop().splitlines()]
    assert len(lines) == 32
    assert len({line["text"] for line in lines}) == 32
    lora, full, _ = (result(run)["retention_loss"]["before"] for run in runs)
    assert lora == pytest.approx(full, rel=1e-5)


def test_a_resumed_run_measures_on_the_rows_it_began_with(base: Path, ranks: Ranks) -> None:
    """Rows are sampled once: other rows in the folder are what the next attempt uses, and the first loss is kept."""
    run = prepared(base, train={"max_steps": 6, "eval_steps": 2}, checkpoint={"save_steps": 1})
    ranks.run(train_here, run.path, "job.0", 3)
    first = told(run, "retention_loss")[0]
    lines = run.retention.read_text(encoding="utf-8").splitlines(keepends=True)
    run.retention.write_text("".join(lines[:16]), encoding="utf-8")
    ranks.run(train_here, run.path, "job.1")
    assert len(run.retention.read_text(encoding="utf-8").splitlines()) == 16
    assert result(run)["retention_loss"]["before"] == first


def test_a_lost_sample_is_drawn_again_from_the_base_and_not_from_what_was_trained(base: Path, ranks: Ranks) -> None:
    """The file removed between two attempts comes back with the same rows."""
    run = prepared(base, "full", 3e-3, train={"max_steps": 6}, checkpoint={"save_steps": 1})
    ranks.run(train_here, run.path, "job.0", 3)
    rows = run.retention.read_text(encoding="utf-8")
    run.retention.unlink()
    ranks.run(train_here, run.path, "job.1")
    assert run.retention.read_text(encoding="utf-8") == rows


def test_rows_of_ones_own_are_measured_and_warned_of_too(base: Path, ranks: Ranks, tmp_path: Path) -> None:
    """data.retention with a path, and a limit of the user's own."""
    from pydoc_data.topics import topics

    rows = tmp_path / "general.jsonl"
    rows.write_text("".join(json.dumps({"text": topics[name][:400]}) + "\n" for name in sorted(topics)[:12]))
    from launcher.recipe.schema import DataSource

    data = {"retention": DataSource(path=str(rows)), "retention_max_rise": 0.001}
    run = prepared(base, rate=30 * ADVISED["lora"], data=data)
    ranks.run(train_here, run.path)
    assert not run.retention.exists()
    assert result(run)["retention_loss"]["before"] < 3.5, "the base has learnt this text"
    assert result(run)["warnings"][0]["limit"] == 0.001


def test_sharded_weights_are_sampled_from_together(base: Path, ranks: Ranks, tmp_path: Path) -> None:
    """ZeRO-3 on two ranks: every rank takes part, the rows and the loss are those of one rank with whole weights."""
    whole = prepared(base, "full", train={"max_steps": 1})
    ranks.run(train_here, whole.path)
    shutil.rmtree(tmp_path / "rdv", ignore_errors=True)
    pair = Ranks(2, tmp_path / "rdv")
    try:
        sharded = prepared(base, "full", world=2, stage=3, train={"max_steps": 1})
        pair.run(train_here, sharded.path)
    finally:
        pair.close()
    assert sharded.retention.read_text(encoding="utf-8") == whole.retention.read_text(encoding="utf-8")
    before = [result(run)["retention_loss"]["before"] for run in (whole, sharded)]
    assert before[0] == pytest.approx(before[1], rel=1e-4)
