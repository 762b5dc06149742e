"""Answers judged by a function: exact match, or the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.adapters.scoring import find_scorer, score
from launcher.errors import RecipeError

ROWS = [
    {"prompt": "2+2?", "reference": "4", "answers": {"base": "five", "mine": " 4\n"}},
    {"prompt": "3+3?", "reference": "6", "answers": {"base": "6", "mine": "6"}},
]


def judged(name: str) -> dict[str, Any]:
    return score({"scorer": name, "generations": ROWS})["scores"]


def test_exact_match_forgives_white_space_around_an_answer() -> None:
    """Per run, row by row."""
    assert judged("exact") == {"base": [0.0, 1.0], "mine": [1.0, 1.0]}


def test_a_file_of_the_user_is_loaded(tmp_path: Path) -> None:
    """Its function gets answer, reference and prompt."""
    (tmp_path / "mine.py").write_text(
        "def judge(answer, reference, prompt):\n    return len(prompt) * (answer == '6')\n"
    )
    assert judged(f"{tmp_path}/mine.py:judge") == {"base": [0.0, 4.0], "mine": [0.0, 4.0]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def other(): pass", "has no function 'judge'"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def judge(answer, reference, prompt): return answer.missing", "AttributeError on row 0"),
        ("def judge(answer, reference, prompt): return float('nan')", "expected a finite number"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(tmp_path: Path, text: str, said: str) -> None:
    """With the row on which it failed."""
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(RecipeError, match=said):
        judged(f"{tmp_path}/mine.py:judge")


@pytest.mark.parametrize("name", ["", "judge", ":judge", "mine.py:", "mine.py:not a name"])
def test_a_scorer_is_named_by_file_and_function(name: str) -> None:
    """The message shows the forms there are."""
    with pytest.raises(RecipeError, match=r"FILE\.py:FUNCTION"):
        find_scorer(name)
