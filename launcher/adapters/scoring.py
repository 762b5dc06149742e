"""scoring: answers of models judged by a function: exact match, or the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.errors import RecipeError

EXACT = "exact"
Scorer = Callable[[str, str | None, str], float]
"""(answer, reference, prompt) -> a number; more is better."""


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Answer {"scorer", "generations": [{"prompt", "reference", "answers": {name: text}}]} with scores by name.

    Raises:
        RecipeError: no such function, or one that fails or gives no number.
    """
    judge = find_scorer(request["scorer"])
    found: dict[str, list[float]] = {}
    for row, one in enumerate(request["generations"]):
        for name, answer in one["answers"].items():
            value = _judged(judge, request["scorer"], row, answer, one)
            found.setdefault(name, []).append(value)
    return {"scores": found}


def _judged(judge: Scorer, name: str, row: int, answer: str, one: dict[str, Any]) -> float:
    try:
        value = float(judge(answer, one["reference"], one["prompt"]))
    except Exception as error:
        called = "it is called with answer, reference, prompt"
        raise RecipeError(f"--scorer {name}: {type(error).__name__} on row {row}: {error} ({called})") from error
    if not math.isfinite(value):
        raise RecipeError(f"--scorer {name}: {value} on row {row}; expected a finite number")
    return value


def find_scorer(name: str) -> Scorer:
    """The function that `exact`, FILE.py:FUNCTION or MODULE:FUNCTION names.

    Raises:
        RecipeError: there is none.
    """
    if name == EXACT:
        return exact
    where, colon, function = name.rpartition(":")
    if not colon or not where or not function.isidentifier():
        raise RecipeError(f"--scorer: expected exact, FILE.py:FUNCTION or MODULE:FUNCTION; found {name!r}")
    found = getattr(_module(where), function, None)
    if not callable(found):
        raise RecipeError(f"--scorer: {where} has no function {function!r}")
    return found


def _module(where: str) -> Any:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        if spec is None or spec.loader is None:
            raise ImportError("not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"--scorer: {where} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def exact(answer: str, reference: str | None, _prompt: str) -> float:
    """1 where the answer is the reference, but for white space around it."""
    return float(reference is not None and answer.strip() == reference.strip())
