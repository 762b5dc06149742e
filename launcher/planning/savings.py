"""The smallest changes of a recipe that bring it within its budget of GPU-hours, when what it allows is over it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import floor

from launcher.errors import LauncherError, RecipeError
from launcher.planning.estimate import Task, estimate
from launcher.planning.explore import every
from launcher.planning.objective import pick, within
from launcher.planning.plan import Candidate, Estimate
from launcher.planning.remedies import difference
from launcher.planning.resolve import pin
from launcher.planning.retreat import METHODS_BY_MEMORY, freed
from launcher.recipe.schema import AUTO, Recipe

_SHOWN = 3
_SHORTEST_EPOCHS = 0.1
"""Share of an epoch below which training less is not proposed."""


def over_budget(task: Task, each: Estimate) -> str | None:
    """Why an estimate is over the budget, as the end of a sentence about it; None where it is within."""
    limit = task.recipe.budget.max_gpu_hours
    if limit is None or within(each, limit):
        return None
    return f"takes {hours(each.gpu_hours)} GPU-hours, over the budget of {limit:,.4g}"


def hours(number: float) -> str:
    """Whole GPU-hours, or two digits of few."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def smallest_saving(task: Task, over: Estimate) -> str | None:
    """What would bring one estimate within the budget, everything else of it kept; None where nothing does."""
    return next((said for said, _ in _savings(task, pin(task.recipe, over.candidate), over)), None)


def nearest_within(task: Task, cheapest: Estimate) -> list[str]:
    """What to change in a recipe that allows nothing within its budget, each with the GPU-hours it leads to."""
    found = [f"{said} ({hours(each.gpu_hours)} GPU-hours)" for said, each in _savings(task, task.recipe, cheapest)]
    # The last one trains less of the data and keeps everything else: it always belongs there.
    return found if len(found) <= _SHOWN else [*found[: _SHOWN - 1], found[-1]]


def refusal(task: Task, cheapest: Estimate) -> RecipeError:
    """The error of a recipe whose cheapest plan that fits is over the budget."""
    now = cheapest.candidate
    where = f"{now.method} on {now.nodes} x {now.gpus_per_node} {now.gpu}"
    ways = [*nearest_within(task, cheapest), f"budget.max_gpu_hours: {_rounded_up(cheapest.gpu_hours)}"]
    return RecipeError(
        f"budget.max_gpu_hours: {task.recipe.budget.max_gpu_hours:,.4g}, but the cheapest that fits, {where}, takes "
        f"{hours(cheapest.gpu_hours)} GPU-hours. Nearest within the budget: {'; or '.join(ways)}."
    )


def _rounded_up(number: float) -> str:
    return f"{floor(number) + 1}" if number >= 10 else f"{floor(number * 10 + 1) / 10:g}"


def _savings(task: Task, recipe: Recipe, over: Estimate) -> Iterator[tuple[str, Estimate]]:
    """Fewer GPUs, another sharding, a method that trains less, fewer steps: each with the estimate it leads to."""
    now = over.candidate
    told = set[str]()
    for changed in _cheaper(recipe, now):
        found = _best_within(task, changed, now)
        said = difference(recipe, now, found.candidate) if found is not None else ""
        if found is not None and said and said not in told:
            told.add(said)
            yield said, found
    yield from _shorter(task, over)


def _cheaper(recipe: Recipe, now: Candidate) -> Iterator[Recipe]:
    """Recipes with more left open than this one, in the order in which they change what the user asked for."""
    spread = replace(recipe, slurm=replace(recipe.slurm, nodes=AUTO, gpus_per_node=AUTO))
    changes = [spread, _reshaped(recipe), _reshaped(spread)]
    if now.method in METHODS_BY_MEMORY[:2]:
        for method in METHODS_BY_MEMORY[METHODS_BY_MEMORY.index(now.method) + 1 : 3]:
            changes += [freed(recipe, method), freed(spread, method)]
    seen: list[Recipe] = [recipe]
    for changed in changes:
        if changed not in seen:
            seen.append(changed)
            yield changed


def _reshaped(recipe: Recipe) -> Recipe:
    """The same training, sharded and cut into micro-batches as the planner likes."""
    return replace(
        recipe,
        train=replace(recipe.train, per_device_train_batch_size=AUTO, gradient_checkpointing=AUTO, optim=AUTO),
        deepspeed=replace(recipe.deepspeed, stage=AUTO, offload_optimizer=AUTO, offload_param=AUTO),
    )


def _best_within(task: Task, recipe: Recipe, now: Candidate) -> Estimate | None:
    """The earliest result of the changed recipe within the budget, if there is one."""
    method = now.method if recipe.method == AUTO else recipe.method
    limit = task.recipe.budget.max_gpu_hours
    try:
        best = pick(every(replace(task, recipe=recipe), method), max_hours=limit)
    except LauncherError:
        return None
    return best if best.fits and within(best, limit) else None


def _shorter(task: Task, over: Estimate) -> Iterator[tuple[str, Estimate]]:
    """The most steps or tenths of epochs within the budget; GPU-hours grow with them, apart from start and end."""
    train, limit = task.recipe.train, task.recipe.budget.max_gpu_hours or 0.0
    share = limit / over.gpu_hours
    if train.max_steps is not None:
        for steps in {floor(train.max_steps * share), floor(train.max_steps * share * 0.9)} - {0}:
            shorter = _estimated(task, replace(task.recipe, train=replace(train, max_steps=steps)), over)
            if within(shorter, limit):
                yield f"train.max_steps: {steps}", shorter
                return
        return
    tenths = floor(10 * train.num_train_epochs * share)
    while tenths >= 10 * _SHORTEST_EPOCHS:
        epochs = tenths / 10
        shorter = _estimated(task, replace(task.recipe, train=replace(train, num_train_epochs=epochs)), over)
        if within(shorter, limit):
            yield f"train.num_train_epochs: {epochs:g}", shorter
            return
        tenths -= 1


def _estimated(task: Task, recipe: Recipe, over: Estimate) -> Estimate:
    """The same candidate on another number of steps; estimates made so far hold for the old number only."""
    return estimate(replace(task, recipe=recipe, known={}), over.candidate)
