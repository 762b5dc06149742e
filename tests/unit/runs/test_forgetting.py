"""What earlier runs on the same base forgot is told before another one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.recipe.dump import recipe_to_yaml
from launcher.runs.folder import write_json
from tests.tiny import make_recipe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A recipe of full tuning at rate 1e-4, its runs below tmp_path/runs."""
    recipe = make_recipe(tmp_path, method="full", train={"learning_rate": 1e-4}, **{"slurm.site": "local"})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe))
    return path


def planned(file: Path) -> dict[str, Any]:
    """`launcher plan --json`."""
    done = CliRunner().invoke(main, ["plan", str(file), "--json"])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def earlier(parent: Path, base: str, *, rate: float, rise: float | None, method: str = "full") -> None:
    """A finished run as its files tell it."""
    folder = parent / f"old-{method}-{rate:g}-{rise}"
    folder.mkdir(parents=True)
    write_json(folder / "plan.json", {"model": {"name": base}, "chosen": {"learning_rate": rate}})
    write_json(folder / "result.json", {"method": method, "retention_rise": rise})


def told(plan: dict[str, Any]) -> list[str]:
    """Messages of the warning."""
    return [warning["message"] for warning in plan["warnings"] if warning["code"] == "forgot-before"]


def test_a_plan_names_the_run_that_forgot_at_no_higher_rate(file: Path) -> None:
    """Same base, same method, no higher rate and past the limit: the worst of them is named."""
    base, runs = planned(file)["model"]["name"], file.parent / "runs"
    earlier(runs, base, rate=5e-5, rise=0.25)
    earlier(runs, base, rate=1e-4, rise=0.4)
    (message,) = told(planned(file))
    assert message.startswith("old-full-0.0001-0.4 trained the same base with full at learning rate 0.0001")
    assert "rose by 40% (the limit is 20%)" in message


@pytest.mark.parametrize(
    "other",
    [{"rate": 3e-4, "rise": 0.4}, {"rate": 1e-4, "rise": 0.05}, {"rate": 1e-4, "rise": None},
     {"rate": 1e-4, "rise": 0.4, "method": "lora"}],
)  # fmt: skip
def test_other_runs_say_nothing_about_this_one(file: Path, other: dict[str, Any]) -> None:
    """A higher rate, a rise within the limit, none measured, another method: no warning."""
    earlier(file.parent / "runs", planned(file)["model"]["name"], **other)
    assert not told(planned(file))


def test_a_damaged_run_is_passed_over(file: Path) -> None:
    """Planning does not depend on the state of old folders."""
    folder = file.parent / "runs" / "torn"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("[")
    assert not told(planned(file))
