"""Which candidates a trial compares, and what is refused before anything is written."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ClusterError, ModelError, RecipeError
from launcher.recipe.load import recipe_to_yaml
from launcher.recipe.schema import ValidationSpec
from launcher.runs import trial
from launcher.runs.trial import Asked, Planned
from launcher.runs.trial_candidates import Planner, Spec, parse_specs, read_specs
from tests.tiny import make_recipe

SHARES = (Fraction(1, 4), Fraction(1, 2), Fraction(1))


@pytest.fixture
def here(tmp_path: Path, no_slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **overrides: Any) -> Path:
    """A recipe file over a tiny model, without packing, so that prompt tuning takes as many steps."""
    usual = {"slurm": {"site": "local"}, "data.packing": False, "train": {"learning_rate": "auto", "max_steps": 40}}
    path = folder / "tiny.yaml"
    path.write_text(recipe_to_yaml(make_recipe(folder, **(usual | overrides))))
    return path


def asked(path: Path, **facts: Any) -> Asked:
    return Asked(recipe=path, **({"shares": SHARES, "local": True} | facts))


def small_site(folder: Path, executor: str = "local") -> str:
    """A machine of 2 GiB, as an override."""
    (folder / "slurm").mkdir()
    (folder / "slurm" / "small.yaml").write_text(
        f"executor: {executor}\ngpu: cpu\ngpus_per_node: 1\nmax_nodes: 1\ncpus_per_node: 4\n"
        "mem_bytes_per_node: 2G\nmax_array_size: 5\n"
    )
    return "slurm.site=small"


# ---------------------------------------------------------------- the usual ones


def test_the_usual_candidates(here: Path) -> None:
    """Full, LoRA at two ranks, QLoRA and a prompt method, each at the advised rate and at three times that."""
    found = Planner(path=write(here), shared=()).candidates(None)
    rates = {one.name: one.learning_rate for one in found if one.rejected is None}
    assert [(one.method, one.lora_r) for one in found[::2]] == [
        ("full", None),
        ("lora", 8),
        ("lora", 32),
        ("qlora", 8),
        ("prompt", None),
    ]
    assert list(rates) == [one.name for one in found]
    values = list(rates.values())
    assert [high / low for low, high in zip(values[::2], values[1::2], strict=True)] == pytest.approx([3.0] * 5)


def test_what_the_recipe_chose_for_its_method_holds_for_it_alone(here: Path) -> None:
    """A rate for LoRA is none for full fine-tuning, which gets the advised one; the low-rank methods share theirs."""
    path = write(here, method="lora", lora={"r": 16}, train={"learning_rate": 4e-3, "max_steps": 40})
    found = {one.name: one for one in Planner(path=path, shared=()).candidates(None)}
    assert "lora-r16-lr4e-3" in found and "qlora-r16-lr4e-3" in found and "lora-r64-lr4e-3" in found
    assert max(one.learning_rate for one in found.values() if one.method == "full") < 1e-4


@pytest.mark.parametrize(
    ("own", "found"), [("dora", "full lora qlora prompt dora"), ("prefix", "full lora qlora prefix")]
)
def test_the_recipes_own_method_is_always_among_them(here: Path, own: str, found: str) -> None:
    """One prompt method is enough; any other comes on top."""
    methods = [one.method for one in Planner(path=write(here, method=own), shared=()).candidates(None)]
    assert list(dict.fromkeys(methods)) == found.split()


def test_all_take_the_same_tokens(here: Path) -> None:
    """Steps without packing are shorter, so a prompt method takes more of them."""
    found = Planner(path=write(here, **{"data.packing": True}), shared=()).candidates(None)
    steps = {one.method: one.steps for one in found}
    assert steps["full"] == steps["lora"] == steps["qlora"] == 40
    assert steps["prompt"] > 60
    assert all(f"train.max_steps={one.steps}" in one.overrides for one in found)


def test_what_the_planner_rejects_stays_in_the_list(here: Path) -> None:
    """With its reason; the others go on."""
    specs = [Spec(name="fits", overrides=("lora.r=4",)), Spec(name="not", overrides=("lora.r=100000",))]
    found = Planner(path=write(here), shared=(small_site(here),)).candidates(specs)
    assert found[0].rejected is None
    assert found[1].rejected is not None and "No plan fits" in found[1].rejected


def test_a_mistake_in_a_named_candidate_is_an_error(here: Path) -> None:
    """It is not left out in silence."""
    specs = [Spec(name="good", overrides=("lora.r=4",)), Spec(name="bad", overrides=("lora.r=0",))]
    with pytest.raises(RecipeError, match=r"bad: .*lora\.r"):
        Planner(path=write(here), shared=()).candidates(specs)


def test_a_recipe_that_cannot_be_planned_is_refused_as_ever(here: Path) -> None:
    """Once, with the error's own class, not once per candidate."""
    path = write(here, **{"model.name_or_path": str(here / "missing")})
    with pytest.raises((ModelError, RecipeError)) as caught:
        Planner(path=path, shared=()).candidates(None)
    assert len(caught.value.problems) == len(set(caught.value.problems))


# ---------------------------------------------------------------- named ones


def test_candidates_are_named_on_lines(tmp_path: Path) -> None:
    """On the command line or in a file, where empty lines and comments are passed over."""
    (tmp_path / "list").write_text("# mine\n\nsmall: lora.r=4\nall:  method=full train.learning_rate=1e-5\n")
    assert read_specs(tmp_path / "list") == [
        Spec(name="small", overrides=("lora.r=4",)),
        Spec(name="all", overrides=("method=full", "train.learning_rate=1e-5")),
    ]


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    """A comparison on other data, other steps or other ranks would be none."""
    lines = ["a: lora.r=4", "a: lora.r=8", "b: data.packing=false train.max_steps=7", "c: lora.r", "no name", 'd: "x']
    with pytest.raises(RecipeError) as caught:
        parse_specs(lines, "list")
    said = "\n".join(caught.value.problems)
    assert "two candidates are called 'a'" in said
    assert "list:3: b: data.packing must be the same for all candidates" in said
    assert "list:3: b: train.max_steps must be the same" in said
    assert "list:4: c: 'lora.r' is not FIELD=VALUE" in said
    assert "list:5" in said and "list:6" in said


# ---------------------------------------------------------------- refused


def plan(path: Path, *lines: str, **facts: Any) -> Planned:
    specs = tuple(parse_specs(lines or ("a: lora.r=4", "b: lora.r=8"), "test"))
    return trial.plan(asked(path, specs=specs, **facts))


def test_a_trial_needs_something_to_compare_on(here: Path) -> None:
    """Without held-out rows there is no quality."""
    path = write(here, **{"data.validation": ValidationSpec()})
    with pytest.raises(RecipeError, match=r"data\.validation: nothing is held out"):
        plan(path)


def test_one_candidate_is_no_comparison(here: Path) -> None:
    """What was left out, and why, is said."""
    with pytest.raises(RecipeError, match=r"at least two candidates; 1 can be planned.*b: No plan fits"):
        plan(write(here), "a: lora.r=4", "b: lora.r=100000", overrides=(small_site(here),), local=False)


def test_seeds_share_the_held_out_rows(here: Path) -> None:
    """Else seeds would be compared on different rows; a split that the user fixed stays."""
    planned = plan(write(here), seeds=3)
    assert planned.seeds == (42, 43, 44)
    assert "data.split_seed=42" in planned.shared
    assert not any("split_seed" in word for word in plan(write(here)).shared)


def test_more_runs_than_an_array_may_have_are_refused(here: Path) -> None:
    """With the number and the limit."""
    with pytest.raises(ClusterError, match=r"6 runs .*MaxArraySize 5"):
        plan(write(here), seeds=3, local=False, overrides=(small_site(here, "slurm"),))


def test_a_trial_over_the_budget_is_refused(here: Path) -> None:
    """The dearest candidates may be those that go on, so they are what counts."""
    site = (
        "executor: slurm\ngpu: A100-80GB\ngpus_per_node: 1\nmax_nodes: 1\ncpus_per_node: 8\nmem_bytes_per_node: 64G\n"
    )
    (here / "slurm").mkdir()
    (here / "slurm" / "gpu.yaml").write_text(site)
    path = write(here, slurm={"site": "gpu"}, train={"learning_rate": "auto", "max_steps": 40, "precision": "auto"})
    fits = plan(path, local=False)
    assert 0 < fits.most_gpu_hours < 1
    with pytest.raises(RecipeError, match=r"budget\.max_gpu_hours.*fewer candidates"):
        plan(path, local=False, seeds=2, overrides=(f"budget.max_gpu_hours={fits.most_gpu_hours}",))
