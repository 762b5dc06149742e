"""Values are read as people mean them: the type of the field decides."""

from __future__ import annotations

import pytest

from launcher.errors import RecipeError
from launcher.recipe.load import recipe_from_text
from launcher.recipe.scalars import format_minutes, read_minutes
from launcher.recipe.schema import DataSource, Recipe, ValidationSpec
from tests.unit.recipe.material import GOOD, problems


def load(line: str, *overrides: str) -> Recipe:
    return recipe_from_text(GOOD + line + "\n", "r.yaml", overrides).recipe


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("24:00:00", 1440),
        ("'24:00:00'", 1440),
        ("00:30:00", 30),
        ("00:00:30", 1),
        ("120:00:00", 7200),
        ("1-00:00:00", 1440),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("90", 90),
        ("90m", 90),
        ("90min", 90),
        ("2h", 120),
        ("24h", 1440),
        ("2d", 2880),
        ("0130", 130),
        ("24:00", 24),
    ],
)
def test_times_are_read_as_sbatch_reads_them(written: str, minutes: int) -> None:
    """YAML 1.1 takes 24:00:00 for 86400, which sbatch would take for sixty days."""
    assert load(f"slurm: {{time: {written}}}").slurm.time == minutes


@pytest.mark.parametrize("written", ["0", "-1", "2.5x", "1:2:3:4", "12:60:00", "1-24:00:00", "soon", "''", "[1]", "0h"])
def test_other_times_are_told_the_accepted_forms(written: str) -> None:
    """The message lists every form."""
    (problem,) = problems(GOOD + f"slurm: {{time: {written}}}\n")
    assert problem.startswith("r.yaml:4:15: slurm.time: expected a time such as 24:00:00, 1-00:00:00, 1-12, 90m")


def test_auto_is_a_time() -> None:
    """The planner chooses it."""
    assert load("slurm: {time: auto}").slurm.time == "auto"


@pytest.mark.parametrize("minutes", [1, 59, 60, 1439, 1440, 4321])
def test_a_time_is_written_in_a_form_that_reads_back(minutes: int) -> None:
    """Slurm's own form; a bare number would have to be explained."""
    assert read_minutes(format_minutes(minutes)) == minutes


@pytest.mark.parametrize(
    ("line", "section", "name", "value"),
    [
        ("train: {learning_rate: 1e-4}", "train", "learning_rate", 1e-4),
        ("train: {learning_rate: 2E-5}", "train", "learning_rate", 2e-5),
        ("train: {learning_rate: .001}", "train", "learning_rate", 1e-3),
        ("train: {learning_rate: '1e-4'}", "train", "learning_rate", 1e-4),
        ("train: {num_train_epochs: 3}", "train", "num_train_epochs", 3.0),
        ("train: {max_steps: 1e3}", "train", "max_steps", 1000),
        ("train: {max_steps: 1_000}", "train", "max_steps", 1000),
        ("train: {max_steps: null}", "train", "max_steps", None),
        ("train: {max_steps: }", "train", "max_steps", None),
        ("train: {seed: 0123}", "train", "seed", 123),
        ("lora: {lora_alpha: 32}", "lora", "lora_alpha", 32.0),
        ("lora: {r: AUTO}", "lora", "r", "auto"),
        ("slurm: {requeue: no}", "slurm", "requeue", False),
        ("slurm: {exclusive: on}", "slurm", "exclusive", True),
        ("train: {gradient_checkpointing: yes}", "train", "gradient_checkpointing", True),
        ("train: {gradient_checkpointing: auto}", "train", "gradient_checkpointing", "auto"),
        ("slurm: {partition: no}", "slurm", "partition", "no"),
        ("slurm: {partition: on}", "slurm", "partition", "on"),
        ("slurm: {account: 0123}", "slurm", "account", "0123"),
        ("slurm: {account: 1e5}", "slurm", "account", "1e5"),
        ("slurm: {qos: 2024-05-01}", "slurm", "qos", "2024-05-01"),
        ("slurm: {qos: null}", "slurm", "qos", None),
        ("slurm: {qos: 'null'}", "slurm", "qos", "null"),
        ("wandb: {tags: [70b, no, 1.10]}", "wandb", "tags", ("70b", "no", "1.10")),
        ("wandb: {tags: solo}", "wandb", "tags", ("solo",)),
        ("lora: {target_modules: [q_proj, v_proj]}", "lora", "target_modules", ("q_proj", "v_proj")),
        ("lora: {target_modules: 'q_proj, v_proj'}", "lora", "target_modules", ("q_proj", "v_proj")),
        ("lora: {target_modules: all-linear}", "lora", "target_modules", "all-linear"),
        ("slurm: ", "slurm", "requeue", True),
    ],
)
def test_the_field_decides_what_text_means(line: str, section: str, name: str, value: object) -> None:
    """`no` is a partition's name and a boolean's value; `1e-4` is a number; 0123 is not octal."""
    found = getattr(getattr(load(line), section), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "place", "expected"),
    [
        ("train: {seed: abc}", "r.yaml:4:15: train.seed", "a whole number, found 'abc'"),
        ("train: {seed: 1.5}", "r.yaml:4:15: train.seed", "a whole number, found '1.5'"),
        ("train: {seed: true}", "r.yaml:4:15: train.seed", "a whole number, found 'true'"),
        ("train: {seed: null}", "r.yaml:4:15: train.seed", "a whole number, found 'null'"),
        ("lora: {r: big}", "r.yaml:4:11: lora.r", "a whole number or auto, found 'big'"),
        ("slurm: {requeue: 7}", "r.yaml:4:18: slurm.requeue", "true or false, found '7'"),
        ("slurm: {nodes: [1]}", "r.yaml:4:16: slurm.nodes", "a whole number or auto, found a list"),
        ("slurm: {extra: 3}", "r.yaml:4:16: slurm.extra", "a mapping of names to values, found '3'"),
        ("wandb: {tags: {a: b}}", "r.yaml:4:15: wandb.tags", "a list of words"),
        ("train: 3", "r.yaml:4:8: train", "a section with fields such as global_batch_size"),
        ("method: null", "r.yaml:4:9: method", "text, found 'null'"),
        ("method: [lora]", "r.yaml:4:9: method", "text, found a list"),
    ],
)
def test_a_value_of_the_wrong_type_says_what_is_expected(line: str, place: str, expected: str) -> None:
    """Place, field, expectation, value."""
    (problem,) = problems(GOOD + line + "\n")
    assert problem.startswith(f"{place}: expected {expected}")


@pytest.mark.parametrize(
    ("written", "spec"),
    [
        ("0.02", ValidationSpec(share=0.02)),
        ("500", ValidationSpec(count=500)),
        ("null", ValidationSpec()),
        ("0", ValidationSpec()),
        ("{path: v.jsonl, split: test}", ValidationSpec(source=DataSource(path="v.jsonl", split="test"))),
    ],
)
def test_validation_is_a_share_a_count_or_a_source(written: str, spec: ValidationSpec) -> None:
    """A number with a point is a share, one without is rows."""
    text = GOOD.replace("{train: [a.jsonl]}", f"{{train: a.jsonl, validation: {written}}}")
    assert recipe_from_text(text, "r.yaml").recipe.data.validation == spec


@pytest.mark.parametrize("written", ["1.5", "1.0", "-0.1", "-3", "v.jsonl", "true", "[a]", "{split: test}"])
def test_other_validations_are_refused(written: str) -> None:
    """1.0 would leave nothing to train on."""
    text = GOOD.replace("{train: [a.jsonl]}", f"{{train: a.jsonl, validation: {written}}}")
    (problem,) = problems(text)
    assert problem.startswith("r.yaml:3:") and "data.validation" in problem


@pytest.mark.parametrize(
    "written", ["a.jsonl", "[a.jsonl]", "{path: a.jsonl}", "[{path: a.jsonl}]", "\n    - path: a.jsonl\n  "]
)
def test_training_data_may_be_written_short(written: str) -> None:
    """A path, a list of paths, or the full form."""
    data = recipe_from_text(f"name: x\nmodel: m/m\ndata:\n  train: {written}\n", "r.yaml").recipe.data
    assert data.train == (DataSource(path="a.jsonl"),)


def test_free_mappings_take_numbers_and_keep_odd_words() -> None:
    """slurm.extra and deepspeed.overrides have no types to go by."""
    text = "deepspeed: {overrides: {a: 1, b: 1e-4, c: true, d: no, e: 012, f: [1, {g: null}], h: '3'}}"
    assert load(text).deepspeed.overrides == {
        "a": 1,
        "b": 1e-4,
        "c": True,
        "d": "no",
        "e": "012",
        "f": [1, {"g": None}],
        "h": "3",
    }


def test_a_missing_required_field_says_what_it_is_for() -> None:
    """All of them at once."""
    assert problems("method: lora\n") == (
        "r.yaml: name: needed: a name for the runs",
        "r.yaml: model.name_or_path: needed: a model folder or a hub id",
        "r.yaml: data.train: needed: files, folders or data-set ids to train on",
    )


def test_a_recipe_that_is_not_there_names_its_neighbours(tmp_path: object) -> None:
    """Most often a misspelt file name."""
    from pathlib import Path

    from launcher.recipe.load import load_recipe

    folder = Path(str(tmp_path))
    (folder / "right.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"no such recipe file; .*right\.yaml"):
        load_recipe(folder / "wrong.yaml")
    (folder / "latin.yaml").write_bytes("name: Zürich\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"not UTF-8 text \(byte 7\)"):
        load_recipe(folder / "latin.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(folder)


def test_windows_line_ends_and_a_byte_order_mark_are_read() -> None:
    """Editors add them unasked."""
    recipe = recipe_from_text("\ufeff" + GOOD.replace("\n", "\r\n"), "r.yaml").recipe
    assert recipe.name == "demo"
