"""Own runs as measurements: what their folders say, and what calibration keeps of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.errors import ClusterError
from launcher.facts.site import site_facts
from launcher.planning.plan import plan_to_json
from launcher.planning.speed import step_time
from launcher.recipe.dump import recipe_to_yaml
from launcher.runs.folder import RunFolder, append_json_line, write_json
from launcher.runs.measured import calibrate_site, sample, scored
from tests.tiny import make_recipe
from tests.unit.runs.material import make_plan

PROFILE = """executor: local
gpu: cpu
gpus_per_node: 1
max_nodes: 1
cpus_per_node: 4
mem_bytes_per_node: 16G
"""


def finished(
    tmp_path: Path,
    *,
    seconds: float = 2.0,
    steps: int = 4,
    speeds: tuple[float, ...] = (),
    peak_bytes: int | None = None,
) -> RunFolder:
    """A run that took so many seconds a step, and logged `speeds` in tokens per second."""
    recipe = make_recipe(tmp_path)
    run = RunFolder.create(tmp_path / "runs", "tiny")
    run.recipe.write_text(recipe_to_yaml(recipe))
    write_json(run.plan, plan_to_json(make_plan()))
    write_json(run.result, {"step": steps, "tokens": 1000 * steps, "train_s": seconds * steps})
    run.beat(state="finishing", peak_bytes=peak_bytes)
    for number, speed in enumerate(speeds, 1):
        append_json_line(run.metrics, {"step": number, "tokens_per_s": speed})
    return run


def predicted_s(run: RunFolder, profile: Path) -> float:
    """What the formulas say of one step of a run."""
    took = sample(run)
    return step_time(took.model, took.candidate, site_facts(str(profile))).total_s


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "slurm" / "test.yaml"
    path.parent.mkdir()
    path.write_text(PROFILE)
    return path


def test_the_first_interval_does_not_count(tmp_path: Path) -> None:
    """The first steps pay for start-up: with enough logged, the median of the others is the speed."""
    assert sample(finished(tmp_path)).step_s == 2.0
    assert sample(finished(tmp_path, speeds=(10.0, 1000.0, 1000.0))).step_s == 1.0


def test_a_run_is_scored_with_its_own_plan(tmp_path: Path) -> None:
    """Predicted is what plan.json said before the run; measured memory is there on GPUs alone."""
    on_cpu = scored(finished(tmp_path))
    assert (on_cpu.kind, on_cpu.measured_gib, on_cpu.predicted_tokens_per_s) == (None, None, 1.0)
    on_gpu = scored(finished(tmp_path, peak_bytes=2**30))
    assert (on_gpu.kind, on_gpu.measured_gib) == ("allocated", 1.0)


def test_an_unfinished_run_is_skipped_with_its_reason(tmp_path: Path) -> None:
    """No result.json: shown, not counted."""
    run = finished(tmp_path)
    run.result.unlink()
    assert "has not finished" in (scored(run).skipped or "")


def test_calibration_keeps_what_it_learned_beside_the_profile(tmp_path: Path, profile: Path) -> None:
    """All finished runs of the site count; a dry run writes nothing."""
    seconds = 1.5 * predicted_s(finished(tmp_path), profile)
    shutil.rmtree(tmp_path / "runs")
    runs = [finished(tmp_path, seconds=seconds), finished(tmp_path, seconds=seconds)]
    odd = finished(tmp_path, seconds=100 * seconds)
    found, path, outliers = calibrate_site(str(profile), (), tmp_path / "runs", dry_run=True)
    assert not path.exists()
    assert calibrate_site(str(profile), (), tmp_path / "runs") == (found, path, outliers)
    assert (found.runs, path) == (len(runs), profile.with_name("test.learned.yaml"))
    assert found.step_factor == pytest.approx(1.5, rel=0.01)
    assert outliers == [odd.run_id]
    assert "step_factor" in path.read_text()


def test_a_run_of_another_site_is_refused(tmp_path: Path, profile: Path) -> None:
    """Another machine's speed says nothing of this one's."""
    other = profile.rename(profile.with_name("other.yaml"))
    run = finished(tmp_path)
    with pytest.raises(ClusterError, match=run.run_id):
        calibrate_site(str(other), (run.run_id,), tmp_path / "runs")


def test_the_verb_scores_rows_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One document over files of rows and runs; without either, the usage says what to name."""
    monkeypatch.setenv("LAUNCHER_RUNS", str(tmp_path / "runs"))
    run = finished(tmp_path)
    row = {"id": "a", "model": "nobody/nothing", "setup": {"method": "full"}, "measured": {"outcome": "ok"}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    result = CliRunner().invoke(main, ["score", str(tmp_path / "rows.jsonl"), run.run_id, "--json"])
    document = json.loads(result.stdout)
    assert (document["schema"], document["n"], document["skipped"]) == (1, 2, 1)
    assert [each["id"] for each in document["rows"]] == ["a", run.run_id]
    assert CliRunner().invoke(main, ["score"]).exit_code == 2
