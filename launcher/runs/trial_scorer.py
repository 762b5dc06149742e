"""trial_scorer: what a finished trial's runs answer to held-out prompts, judged by a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.errors import DataError
from launcher.facts.train_environment import ask, train_python
from launcher.runs.folder import write_json
from launcher.runs.trial_folder import Trial
from launcher.runs.trial_standing import Standing

MODULE = "launcher.adapters.job"
ROWS = 100
"""Most held-out rows that are answered."""
_NEW_TOKENS = 128
_TIMEOUT_S = 6 * 3600.0


def measure(trial: Trial, standing: Standing, scorer: str) -> dict[str, Any]:
    """Answer the first held-out rows with every finished run, greedily, judge them, and keep the means.

    Raises:
        RecipeError: what is wrong with the function.
        DataError: the held-out rows can no longer be read.
        ModelError, ClusterError: a base is not here, or there is no train environment.
    """
    runs = [each.run for ended in standing.candidates.values() if ended.status == "finished" for each in ended.scores]
    _ask("score", scorer=scorer, generations=[])  # a wrong function is told before models are loaded
    told = _ask(
        "compare",
        runs=[str(trial.runs / run) for run in runs],
        rows=ROWS,
        generations=ROWS,
        max_new_tokens=_NEW_TOKENS,
        prompts=None,
    )
    if not told["generations"]:
        raise DataError(f"--scorer: there is nothing to answer: {'; '.join(told['notes'])}")
    found = _ask("score", scorer=scorer, generations=told["generations"])
    means = {run: sum(scores) / len(scores) for run, scores in found["scores"].items()}
    document = {"schema": 1, "scorer": scorer, "rows": len(told["generations"]), "scores": means}
    write_json(scores_path(trial), document)
    return document


def scores_path(trial: Trial) -> Path:
    """Where the scores of the runs are kept; `base` is among them."""
    return trial.path / "scores.json"


def _ask(question: str, **words: Any) -> dict[str, Any]:
    return ask(MODULE, {"ask": question, **words}, python=train_python(), verb="trial", timeout_s=_TIMEOUT_S)
