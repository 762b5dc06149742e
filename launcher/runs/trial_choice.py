"""trial_choice: which candidate a trial's table speaks for, by the user's objective, and the recipe of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.errors import ConflictError, JobFailedError, RecipeError
from launcher.recipe.load import load_recipe_with_notices, recipe_to_yaml
from launcher.runs.folder import write_atomic
from launcher.runs.trial_folder import Trial
from launcher.runs.trial_table import Measure, Row, badness, measured, smallest_difference, ties

Objective = Literal["quality", "cost", "quality-per-cost", "score"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One candidate and why."""

    candidate: str
    objective: str
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"candidate": self.candidate, "objective": self.objective, "reasons": list(self.reasons)}


def choose(told: Sequence[Row], objective: Objective) -> Choice:
    """The candidate for an objective, among those that went through every rung.

    quality: the lowest validation loss; of those that noise cannot tell apart, the cheapest by the plan.
    cost: the least time in training steps, of those that are better than the base.
    quality-per-cost: the most loss taken off the base per hour in training steps.
    score: the highest mean score of the answers; of those that noise cannot tell apart, the cheapest by the plan.

    Raises:
        RecipeError: (score) nobody has judged the answers.
        JobFailedError: none finished, or (cost, quality-per-cost) none is better than the base.
    """
    finished = [row for row in told if row.status == "finished" and row.validation_loss is not None]
    if not finished:
        raise JobFailedError("no candidate finished with a loss that can be compared; nothing can be chosen")
    if objective == "score" and not any(row.score is not None for row in finished):
        raise RecipeError("--objective score: nobody has judged the answers; add --scorer exact or FILE.py:FUNCTION")
    if objective in ("quality", "score"):
        return _best(told, finished, "score" if objective == "score" else "loss")
    better = [row for row in finished if gain(row) > 0]
    if not better:
        raise JobFailedError("no candidate is better than the base on the held-out rows; nothing can be chosen by cost")
    if objective == "cost":
        best = min(better, key=lambda row: row.train_device_hours or 0.0)
        reasons = [f"least time in training steps of {len(better)} finished candidates better than the base"]
    else:
        best = max(better, key=_gain_per_hour)
        reasons = [f"most loss taken off the base per hour in training steps: {_gain_per_hour(best):.4g}"]
    quality = _best(told, finished, "loss")
    if quality.candidate != best.candidate:
        reasons.append(f"for quality alone it would be {quality.candidate}")
    return Choice(candidate=best.candidate, objective=objective, reasons=(*reasons, *_facts(best, finished)))


def gain(row: Row) -> float:
    """Loss taken off the base's on the held-out rows."""
    return (row.base_loss or 0.0) - (row.validation_loss or 0.0)


def _gain_per_hour(row: Row) -> float:
    return gain(row) / max(row.train_device_hours or 0.0, 1e-9)


def _best(told: Sequence[Row], finished: Sequence[Row], by: Measure) -> Choice:
    by_name = {row.candidate: row for row in finished}
    tied = [by_name[name] for name in ties(told, by)]
    order = {row.candidate: index for index, row in enumerate(tied)}
    chosen = min(tied, key=lambda row: (row.predicted_device_hours or 0.0, row.trainable_params, order[row.candidate]))
    objective, words = ("quality", "lowest validation loss") if by == "loss" else ("score", "highest mean score")
    others = ", ".join(row.candidate for row in tied if row.candidate != chosen.candidate)
    if others and smallest_difference(finished, by) is None:
        words = f"the same {by} as {others}; this one costs least by the plan"
    elif others:
        words = f"a tie with {others}: the difference is less than seed-to-seed noise; this one costs least by the plan"
    return Choice(candidate=chosen.candidate, objective=objective, reasons=(words, *_facts(chosen, finished, by)))


def _facts(chosen: Row, finished: Sequence[Row], by: Measure = "loss") -> tuple[str, ...]:
    """The measurements behind it, and what they cannot say."""
    loss = f"validation loss {_number(chosen.validation_loss)}{_spread(chosen.spread)} after {chosen.steps} steps"
    facts = [f"{loss}; the base has {_number(chosen.base_loss)}"]
    if by == "score":
        score = f"score {_number(chosen.score)}{_spread(chosen.score_spread)}"
        facts.insert(0, f"{score}; the base has {_number(chosen.base_score)}")
    others = [row for row in finished if row is not chosen and badness(row, by) < math.inf]
    if others:
        others.sort(key=lambda row: badness(row, by))
        facts.append("; ".join(f"{row.candidate} {_number(measured(row, by))}" for row in others[:4]))
    if chosen.retention_change is not None:
        facts.append(f"loss on the retention set changed by {chosen.retention_change:+.4f}")
    noise = smallest_difference(finished, by)
    if noise is None:
        facts.append(
            f"one seed: how much a {by} varies by chance was not measured, so this is the best measured, no more"
        )
    else:
        facts.append(f"differences below {noise:.4f} are noise ({chosen.seeds} seeds, 95 %)")
    return tuple(facts)


def _spread(value: float | None) -> str:
    return "" if value is None else f" +- {value:.4f}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


# ---------------------------------------------------------------- the recipe


def winning_recipe(trial: Trial, choice: Choice) -> str:
    """The recipe of the choice, with the reasons as comments: what was measured is fixed, the ranks stay open."""
    candidate = trial.candidate(choice.candidate)
    numbers = [f"method={candidate.method}", f"train.learning_rate={candidate.learning_rate!r}"]
    if candidate.lora_r is not None:
        numbers.append(f"lora.r={candidate.lora_r}")
    replaced = ["slurm.", "method=", "train.learning_rate=", "lora.r="]
    if load_recipe_with_notices(trial.recipe, trial.asked).recipe.train.max_steps is None:
        replaced.append("train.max_steps=")  # the user counts epochs
    own = [word for word in candidate.overrides if not word.startswith(tuple(replaced))]
    recipe = load_recipe_with_notices(trial.recipe, [*trial.asked, *own, *numbers]).recipe
    lines = [f"chosen by `launcher trial` ({trial.name}) for {choice.objective}: {choice.candidate}", *choice.reasons]
    return "".join(f"# {_one_line(line)}\n" for line in lines) + recipe_to_yaml(recipe)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def write_choice(trial: Trial, choice: Choice, path: Path) -> None:
    """Write the winning recipe to a file that is not there yet.

    Raises:
        ConflictError: the file exists.
    """
    if path.exists():
        raise ConflictError(f"--pick {path}: is there already, and is not overwritten; name another file or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, winning_recipe(trial, choice))
