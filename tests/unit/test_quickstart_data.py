"""The quickstart's data: real, clean, repeatable, and with the questions of the final comparison kept out."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import json
import os.path
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "make-quickstart-data"


def run_script(folder: Path) -> Path:
    """Make the data in `folder`, as scripts/quickstart does."""
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_script(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The script as a module, for its pure functions."""
    loader = importlib.machinery.SourceFileLoader("make_quickstart_data", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions_and_answers(path: Path) -> dict[str, str]:
    return {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows(path)}


def test_a_few_thousand_questions_come_from_the_standard_library(made: Path) -> None:
    """Every row is one user message and one assistant message, and there are thousands of them."""
    found = rows(made / "qa" / "train.jsonl")
    assert len(found) > 3000
    assert {tuple(message["role"] for message in row["messages"]) for row in found} == {("user", "assistant")}


def test_no_answer_is_used_twice(made: Path) -> None:
    """Inherited and repeated docstrings would teach the model one answer for many questions."""
    answers = [row["messages"][1]["content"] for row in rows(made / "qa" / "train.jsonl")]
    assert len(set(answers)) == len(answers)


def test_answers_are_short_single_lines(made: Path) -> None:
    """An answer fits the few hundred tokens of a training row and holds no formatting of the source."""
    for answer in questions_and_answers(made / "qa" / "train.jsonl").values():
        assert 20 <= len(answer) <= 320
        assert answer == " ".join(answer.split())


def test_held_out_questions_are_not_trained_on(made: Path) -> None:
    """The answers shown before and after are to questions and answers the adapter never saw."""
    trained = questions_and_answers(made / "qa" / "train.jsonl")
    held_out = questions_and_answers(made / "held-out.jsonl")
    assert "What does `os.path.join` do?" in held_out
    assert not trained.keys() & held_out.keys()
    assert not set(trained.values()) & set(held_out.values())


def test_an_answer_is_the_first_paragraph_of_the_docstring(made: Path) -> None:
    """Nothing is invented: the text is what `help(os.path.join)` shows."""
    answer = questions_and_answers(made / "held-out.jsonl")["What does `os.path.join` do?"]
    assert " ".join((inspect.getdoc(os.path.join) or "").split()).startswith(answer)


def test_the_documentation_texts_are_short_enough_to_train_on_whole(made: Path) -> None:
    """Texts are cut into pieces, so that a row of 256 tokens loses nothing; together they are over a megabyte."""
    texts = [row["text"] for row in rows(made / "docs" / "train.jsonl")]
    assert max(map(len, texts)) < 1100
    assert sum(map(len, texts)) > 1_000_000


def test_the_same_python_makes_the_same_bytes(made: Path, tmp_path: Path) -> None:
    """The order of modules, members and rows does not depend on hashing, time or place."""
    again = run_script(tmp_path)
    for name in ("qa/train.jsonl", "docs/train.jsonl", "held-out.jsonl"):
        assert (again / name).read_bytes() == (made / name).read_bytes()


def test_a_module_that_prints_does_not_spoil_the_rows(maker: ModuleType) -> None:
    """`this` writes a poem while it is imported; the rows of the module behind it still arrive."""
    lines = [line for line in maker.walk_in_child(["this", "json"]) if "module" in line]
    assert [line["module"] for line in lines] == ["this", "json"]
    assert "json.dumps" in {entry["name"] for entry in lines[1]["entries"]}


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        pytest.param("Join two\n  parts.\n\nMore.", "Join two parts.", id="one line"),
        pytest.param(
            "find(sub[, start]) -> int\n\nReturn the lowest index.", "Return the lowest index.", id="signature"
        ),
        pytest.param("find(sub) -> int\nReturn the lowest index.", "Return the lowest index.", id="signature above"),
        pytest.param("First sentence. " + "word " * 80, "First sentence.", id="cut after a sentence"),
        pytest.param("word " * 80, "", id="no sentence ends in time"),
        pytest.param("", "", id="empty"),
    ],
)
def test_first_paragraph(maker: ModuleType, docstring: str, expected: str) -> None:
    """Signatures in front are passed over and long answers end with a sentence."""
    assert maker.first_paragraph(docstring) == expected


def test_pieces_lose_no_words(maker: ModuleType) -> None:
    """Cutting a long text moves no word and drops none."""
    text = "\n\n".join(" ".join(f"word{paragraph}-{n}" for n in range(40)) for paragraph in range(30))
    assert " ".join(maker.pieces(text)).split() == text.split()
