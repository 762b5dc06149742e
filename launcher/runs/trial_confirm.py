"""trial_confirm: the winner of a finished trial and its runner-up once more, with seeds that nothing was chosen by.

The best of many is partly the luckiest, and its loss in the trial that chose it too low (the winner's curse). New seeds
on the same held-out rows know nothing of the choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from launcher.errors import ConflictError
from launcher.recipe.load import load_recipe
from launcher.runs.trial import Asked
from launcher.runs.trial_candidates import Spec
from launcher.runs.trial_choice import Objective, choose
from launcher.runs.trial_folder import Confirms, Trial
from launcher.runs.trial_standing import stand
from launcher.runs.trial_table import Measure, Row, badness, rows

SEEDS = 3
"""With fewer, noise is known badly; the table says what it is either way."""


def confirmation_of(trial: Trial, objective: Objective, seeds: int) -> Asked:
    """The trial that confirms this one: two candidates to the end, `seeds` new seeds each. Call it in its folder.

    Raises:
        ConflictError: the trial has not ended, or fewer than two candidates finished.
        JobFailedError: nothing can be chosen by this objective.
        RecipeError: it is the score, and nobody has judged the answers.
    """
    standing = stand(trial)
    if not standing.finished:
        raise ConflictError(f"{trial.name} has not ended, so nobody has won; go on with: launcher trial {trial.name}")
    told = rows(trial, standing)
    winner = choose(told, objective).candidate
    by: Measure = "score" if objective == "score" else "loss"
    runner_up = _runner_up(trial, told, winner, by)
    recipe = load_recipe(trial.recipe, trial.overrides)
    split = recipe.train.seed if recipe.data.split_seed is None else recipe.data.split_seed
    return Asked(
        recipe=trial.recipe,
        overrides=trial.asked,
        specs=tuple(Spec(name=name, overrides=trial.candidate(name).overrides) for name in (winner, runner_up)),
        seeds=seeds,
        shares=(Fraction(1),),
        parallel=trial.parallel,
        parent=trial.runs,
        settled=(*trial.overrides, f"train.seed={max(trial.seeds) + 1}", f"data.split_seed={split}"),
        confirms=Confirms(trial=trial.name, winner=winner, runner_up=runner_up, by=by),
    )


def _runner_up(trial: Trial, told: Sequence[Row], winner: str, by: Measure) -> str:
    """The best measured of the other finished ones.

    Raises:
        ConflictError: there is none.
    """
    others = [row for row in told if row.status == "finished" and row.candidate != winner]
    measured = [row for row in others if badness(row, by) < math.inf]
    if not measured:
        raise ConflictError(f"{trial.name}: only {winner} finished; there is nothing to confirm it against")
    return min(measured, key=lambda row: badness(row, by)).candidate
