"""Whatever is written, the reader answers with a recipe or a RecipeError: never with a traceback."""

from __future__ import annotations

import contextlib

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launcher.errors import RecipeError
from launcher.recipe.build import field_paths
from launcher.recipe.forbidden import control_character
from launcher.recipe.load import recipe_from_text
from launcher.recipe.schema import Recipe
from launcher.recipe.tree import Scalar, Where, walk
from launcher.recipe.yaml_strict import Findings, parse
from tests.unit.recipe.material import GOOD

PIECES = [
    "[",
    "]",
    "{",
    "}",
    ": ",
    ", ",
    "- ",
    "\n",
    "  ",
    "&a ",
    "*a",
    "!!x ",
    "? ",
    "| ",
    '"',
    "'",
    "#",
    "a",
    "0",
    "null",
    "auto",
    "1e5",
]
KEYS = [
    "name",
    "model",
    "train",
    "data.train",
    "data.train.0",
    "data.validation",
    "slurm.extra",
    "wandb.tags",
    "lora",
    "0",
    "batch_size",
]
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def answers(text: str, *overrides: str) -> Recipe | None:
    """The recipe, or None when it was refused properly."""
    with contextlib.suppress(RecipeError):
        return recipe_from_text(text, "r.yaml", overrides).recipe
    return None


@quick
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=30).map("".join))
def test_any_text_is_answered(text: str) -> None:
    """Also behind a valid beginning."""
    answers(text)
    answers(GOOD + text)


@quick
@given(
    st.sampled_from(field_paths() + tuple(KEYS)),
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join),
)
@example("data.train.0", "null")
@example("data", "[]")
@example("train.seed", "9" * 400)
@example("train.learning_rate", "1e400")
@example("data.validation", "1e400")
@example("deepspeed.overrides", "{a: .inf}")
@example("slurm.time", "9" * 5000)
@example("name", "")
def test_any_override_is_answered(path: str, value: str) -> None:
    """Any value for any field, and for things that are almost fields."""
    answers(GOOD, f"{path}={value}")


@quick
@given(st.sampled_from(field_paths()), st.text(min_size=1, max_size=12))
def test_no_control_character_gets_into_a_recipe(path: str, value: str) -> None:
    """In any field, in the file or in an override."""
    recipe = answers(GOOD, f"{path}=x{value}y")
    if recipe is not None:
        assert control_character(repr(recipe).replace("\\n", "")) is None
        assert control_character(value) is None


def test_every_scalar_knows_its_place() -> None:
    """The place in a message is where the value stands in the file."""
    lines = GOOD.splitlines()
    for _, node in walk(parse(GOOD, "r.yaml", Findings())):
        where: Where = node.where
        if isinstance(node, Scalar):
            assert lines[where.line - 1][where.column - 1 :].startswith(node.text)
