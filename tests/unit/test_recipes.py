"""Every shipped recipe loads, plans and fits, and its first line says what the planner says."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import time
from pathlib import Path
from types import ModuleType

import pytest

from launcher.errors import DoesNotFitError
from launcher.planning.headline import duration
from launcher.planning.prepare import plan_recipe
from launcher.recipe.load import load_recipe, load_recipe_with_notices, recipe_from_text, recipe_to_yaml
from launcher.recipe.shipped import shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def headers() -> ModuleType:
    """scripts/recipe-headers as a module."""
    loader = importlib.machinery.SourceFileLoader("recipe_headers", str(ROOT / "scripts" / "recipe-headers"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_shipped_recipes_are_all_there() -> None:
    """The starting points that the README promises; the tests below look at each file of the folder."""
    assert {path.stem for path in RECIPES} >= {
        *("llama3.1-70b-full", "llama3.1-70b-full-offload", "llama3.1-70b-lora", "llama3.1-70b-qlora"),
        *("llama3.1-8b-full", "llama3.1-8b-lora", "mistral-7b-qlora-24gb", "mixtral-8x7b-lora"),
        *("smollm2-360m-full", "tiny-cpu", "quickstart-base"),
    }
    assert {path.stem for path in shipped_recipes()} == {path.stem for path in RECIPES}


@every_recipe
def test_a_shipped_recipe_is_in_our_own_words(path: Path) -> None:
    """Named like its file, without foreign names or settings that have no effect, and equal when written out."""
    loaded = load_recipe_with_notices(path)
    assert loaded.recipe.name == path.stem
    assert loaded.notices == ()
    assert recipe_from_text(recipe_to_yaml(loaded.recipe), "again.yaml").recipe == loaded.recipe


@every_recipe
def test_the_first_line_says_what_the_planner_says(path: Path, headers: ModuleType) -> None:
    """Hardware, peak per GPU and time; scripts/recipe-headers rewrites it after a change."""
    header = headers.header_of(path)
    assert path.read_text().splitlines()[0] == header, "out of date; type: scripts/recipe-headers"
    assert "does not fit" not in header


@every_recipe
def test_a_shipped_recipe_plans_and_fits_where_it_stands(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path `launcher plan` takes, without network, weights or GPU; every number of the plan is explicit."""
    monkeypatch.chdir(tmp_path)
    plan = plan_recipe(path).plan
    recipe = load_recipe(path)
    assert plan.chosen.fits and plan.chosen.rejected_because is None
    assert plan.chosen.candidate.global_batch == recipe.train.global_batch_size
    assert plan.chosen.memory.peak_bytes.expected <= plan.chosen.memory.usable_bytes


@pytest.mark.parametrize(
    ("name", "nodes", "gpus", "stage", "offload"),
    [
        ("llama3.1-70b-full", 8, 8, 3, "none"),
        ("llama3.1-70b-full-offload", 2, 8, 3, "cpu"),
        ("llama3.1-8b-full", 1, 8, 2, "none"),
        ("llama3.1-70b-qlora", 1, 8, 2, "none"),
        ("llama3.1-8b-lora", 1, 1, 0, "none"),
        ("mixtral-8x7b-lora", 1, 8, 3, "none"),
    ],
)
def test_the_reference_layouts_are_kept(name: str, nodes: int, gpus: int, stage: int, offload: str) -> None:
    """Other tests and pages stand on these six."""
    candidate = plan_recipe(ROOT / "recipes" / f"{name}.yaml").plan.chosen.candidate
    assert (candidate.nodes, candidate.gpus_per_node) == (nodes, gpus)
    assert (candidate.zero_stage, candidate.offload_optimizer) == (stage, offload)


def test_the_large_recipe_is_out_of_reach_of_one_node() -> None:
    """The header test can fail: with an eighth of the GPUs the same recipe does not fit."""
    with pytest.raises(DoesNotFitError):
        plan_recipe(ROOT / "recipes" / "llama3.1-70b-full.yaml", ["slurm.nodes=1"])


def test_planning_the_largest_recipe_takes_about_a_second_at_most() -> None:
    """Processor time, with the imports already paid; documented as under one second."""
    path = ROOT / "recipes" / "llama3.1-70b-full.yaml"
    plan_recipe(path)
    start = time.process_time()
    plan_recipe(path)
    spent = time.process_time() - start
    print(f"plan of {path.stem}: {spent:.2f} s of processor time")
    assert spent < 3


def test_an_outdated_header_is_replaced_and_a_missing_one_is_added(headers: ModuleType) -> None:
    """Only the generated line is touched."""
    new = "# 1 x GPU: peak 1.0 GiB, 1 minute (predicted)"
    assert (
        headers.with_header("# 8 x OLD: peak 2 GiB (predicted)\n# kept\nname: x\n", new) == f"{new}\n# kept\nname: x\n"
    )
    assert headers.with_header("# kept\nname: x\n", new) == f"{new}\n# kept\nname: x\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (10, "1 minute"),
        (150, "2 minutes"),
        (3599, "60 minutes"),
        (5400, "1.5 hours"),
        (86400, "24 hours"),
        (180_000, "2.1 days"),
    ],
)
def test_durations_are_read_at_a_glance(seconds: float, words: str) -> None:
    """Two digits are all a prediction is good for."""
    assert duration(seconds) == words
