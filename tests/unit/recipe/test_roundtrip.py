"""A recipe written out loads to an equal recipe."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import RecipeError
from launcher.recipe.checks import CHOICES
from launcher.recipe.forbidden import control_character, is_secret
from launcher.recipe.load import recipe_from_text, recipe_to_yaml
from launcher.recipe.schema import (
    FORMATS,
    DataSection,
    DataSource,
    DeepSpeedSection,
    LoraSection,
    ModelSection,
    Recipe,
    SlurmSection,
    TrainSection,
    ValidationSpec,
    WandbSection,
)

GENERATOR = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
"""Complaints about how recipes are drawn, which depend on the machine's load; no complaint about what is tested."""

ODD = [
    "no",
    "yes",
    "null",
    "~",
    "true",
    "0123",
    "1e-4",
    "24:00:00",
    "1.5",
    "2024-01-01",
    "- a",
    "a: b",
    "# x",
    "a, b",
    "é",
    " x ",
]


def allowed(text: str) -> bool:
    harmless = control_character(text) is None and not is_secret("x", text) and "${" not in text
    return harmless and text != "???" and bool(text.strip())


words = st.one_of(st.sampled_from(ODD), st.text(min_size=1, max_size=20)).filter(allowed)
names = st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True).filter(lambda name: not is_secret(name, "x"))
positive = st.floats(min_value=1e-12, max_value=1e6, allow_nan=False)
counts = st.integers(1, 10**6)
auto = st.just("auto")
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), words)
free = st.dictionaries(
    names, st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(names, x, max_size=3)), max_size=4
)
sources = st.builds(DataSource, path=words, split=words, format=st.sampled_from(FORMATS), weight=positive)
validations = st.one_of(
    st.just(ValidationSpec()),
    st.builds(ValidationSpec, share=st.floats(0.001, 0.999)),
    st.builds(ValidationSpec, count=counts),
    st.builds(ValidationSpec, source=sources),
)
modules = st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=3).map(tuple)


def choice(path: str) -> st.SearchStrategy[str]:
    return st.sampled_from(CHOICES[path])


recipes = st.builds(
    Recipe,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(allowed),
    model=st.builds(ModelSection, name_or_path=words, revision=st.none() | words, trust_remote_code=st.booleans()),
    method=choice("method"),
    data=st.builds(
        DataSection,
        train=st.lists(sources, min_size=1, max_size=3).map(tuple),
        validation=validations,
        retention=st.none() | sources,
        retention_max_rise=positive,
        packing=st.booleans(),
        loss_on=choice("data.loss_on"),
        chat_template=words,
    ),
    lora=st.builds(
        LoraSection, r=auto | counts, lora_alpha=auto | positive, target_modules=st.just("all-linear") | modules
    ),
    train=st.builds(
        TrainSection,
        learning_rate=auto | positive,
        num_train_epochs=positive,
        max_steps=st.none() | counts,
        gradient_checkpointing=auto | st.booleans(),
        eval_steps=auto | counts,
    ),
    deepspeed=st.builds(DeepSpeedSection, overrides=free),
    slurm=st.builds(SlurmSection, time=auto | counts, partition=st.none() | words, account=st.none() | words),
    wandb=st.builds(WandbSection, tags=st.lists(words, max_size=3).map(tuple), project=st.none() | words),
    output_dir=words,
)


@settings(max_examples=40, deadline=None, suppress_health_check=GENERATOR)
@given(recipes)
def test_any_recipe_survives_being_written_and_read(recipe: Recipe) -> None:
    """Odd words stay words, numbers stay numbers, defaults stay defaults."""
    assert recipe_from_text(recipe_to_yaml(recipe), "again.yaml").recipe == recipe


def test_the_builtin_retention_set_is_one_word() -> None:
    """Written and read as `retention: builtin`; it replaces and is replaced by rows, and both at once are refused."""
    text = "name: demo\nmodel: m/m\ndata: {train: a.jsonl, retention: builtin}\n"
    recipe = recipe_from_text(text, "r.yaml").recipe
    assert (recipe.data.retention_builtin, recipe.data.retention) == (True, None)
    written = recipe_to_yaml(recipe)
    assert "  retention: builtin\n" in written
    assert recipe_from_text(written, "again.yaml").recipe == recipe
    own = recipe_from_text(text, "r.yaml", ["data.retention={path: own.jsonl}"]).recipe
    assert own.data.retention is not None and not own.data.retention_builtin
    assert recipe_from_text(recipe_to_yaml(own), "own.yaml", ["data.retention=builtin"]).recipe.data.retention_builtin
    with pytest.raises(RecipeError, match="choose one of both"):
        recipe_from_text(text.replace("builtin", "own.jsonl"), "r.yaml", ["data.retention_builtin=true"])


def test_other_yaml_readers_see_the_same_values() -> None:
    """Strings that YAML 1.1 would take for times or booleans are quoted."""
    recipe = Recipe(
        name="x",
        model=ModelSection(name_or_path="m/m"),
        data=DataSection(train=(DataSource(path="a.jsonl"),)),
        slurm=SlurmSection(partition="no", account="0123", qos="12:30:00"),
    )
    slurm: dict[str, Any] = yaml.safe_load(recipe_to_yaml(recipe))["slurm"]
    assert (slurm["partition"], slurm["account"], slurm["qos"]) == ("no", "0123", "12:30:00")


def test_every_field_is_written() -> None:
    """What was defaulted is there too, so that a run's stored recipe says everything."""
    recipe = Recipe(name="x", model=ModelSection(name_or_path="m"), data=DataSection(train=(DataSource(path="a"),)))
    written = yaml.safe_load(recipe_to_yaml(recipe))
    for field in dataclasses.fields(Recipe):
        section = getattr(recipe, field.name)
        if dataclasses.is_dataclass(section):
            fields = {inner.name for inner in dataclasses.fields(section)} - {"retention_builtin"}
            assert set(written[field.name]) == fields, "retention_builtin is written as `retention: builtin`"
    assert math.isclose(written["data"]["validation"], 0.02)
