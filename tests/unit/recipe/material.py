"""The smallest recipe, and how to ask for the problems of a broken one."""

from __future__ import annotations

import pytest

from launcher.errors import RecipeError
from launcher.recipe.load import recipe_from_text

GOOD = "name: demo\nmodel: {name_or_path: some/model}\ndata: {train: [a.jsonl]}\n"


def problems(text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as raised:
        recipe_from_text(text, "r.yaml", overrides)
    return raised.value.problems
