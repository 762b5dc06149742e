"""The smallest changes of a recipe that would make it fit, when what it allows does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from launcher.errors import LauncherError
from launcher.planning import memory
from launcher.planning.estimate import Task
from launcher.planning.explore import every
from launcher.planning.objective import fewest
from launcher.planning.plan import Candidate, Estimate
from launcher.planning.resolve import pin
from launcher.planning.retreat import METHOD_STEP, RETREAT, ROW_STEP, SAME_METHOD, Step
from launcher.recipe.schema import AUTO, Recipe

_SHOWN = 3
_LONGEST_ROW = 1 << 20
_ROW_GRAIN = 128


def nearest_that_fits(task: Task, chosen: Estimate) -> list[tuple[str, Estimate]]:
    """What to change in the recipe, least first, each with what it leads to; at most three, or none."""
    found: list[tuple[str, Estimate]] = []
    ways = set[tuple[str, int]]()
    for said, relaxed in _that_fit(task, task.recipe, chosen.candidate):
        way = (relaxed.candidate.method, relaxed.candidate.seq_len)
        if way not in ways:
            ways.add(way)
            found.append((said, relaxed))
        if len(found) == _SHOWN:
            break
    return found


def smallest_change(task: Task, rejected: Estimate) -> str | None:
    """What would make one rejected candidate fit, everything else of it kept; None where nothing does."""
    pinned = pin(task.recipe, rejected.candidate)
    return next((said for said, _ in _that_fit(task, pinned, rejected.candidate)), None)


def _that_fit(task: Task, recipe: Recipe, now: Candidate) -> Iterator[tuple[str, Estimate]]:
    """Changes in the order of retreat that lead to something that fits.

    One step alone, all steps that keep the method, one that changes method, rank or rows, and that on any GPUs; where
    none of these does, another method with shorter rows.
    """
    together = _together(recipe, now, RETREAT[:SAME_METHOD])
    fits = 0
    for changed in _fewest_steps(recipe, now, together):
        for found in _if_it_fits(task, recipe, now, changed):
            fits += 1
            yield found
    if not fits:
        yield from _shorter_too(task, recipe, now, together[-1])


def _fewest_steps(recipe: Recipe, now: Candidate, together: Sequence[Recipe]) -> Iterator[Recipe]:
    """Recipes one step away, then several, each once."""
    keeping, changing = RETREAT[:SAME_METHOD], RETREAT[SAME_METHOD:]
    seen: list[Recipe] = [recipe]
    for group in (_each(recipe, now, keeping), together, _each(recipe, now, changing)):
        for changed in group:
            if changed not in seen:
                seen.append(changed)
                yield changed
    yield from _each(together[-1], now, changing)


def _shorter_too(task: Task, recipe: Recipe, now: Candidate, widest: Recipe) -> Iterator[tuple[str, Estimate]]:
    """The methods that need less, each with the longest rows that fit."""
    for cheaper in _each(widest, now, (METHOD_STEP,)):
        for changed in _each(cheaper, now, (ROW_STEP,)):
            fitting = list(_if_it_fits(task, recipe, now, changed))
            if fitting:
                yield from fitting
                break


def _if_it_fits(task: Task, recipe: Recipe, now: Candidate, changed: Recipe) -> Iterator[tuple[str, Estimate]]:
    method = now.method if changed.method == AUTO else changed.method
    try:
        relaxed = fewest(every(replace(task, recipe=changed), method))
    except LauncherError:
        return
    said = difference(recipe, now, relaxed.candidate)
    if relaxed.fits and said:
        yield said, relaxed


def _each(recipe: Recipe, now: Candidate, steps: Sequence[Step]) -> Iterator[Recipe]:
    for step in steps:
        yield from step.relax(recipe, now)


def _together(recipe: Recipe, now: Candidate, steps: Sequence[Step]) -> list[Recipe]:
    """The recipe after the first step, after the first two, and so on."""
    found = []
    for step in steps:
        for changed in step.relax(recipe, now):
            recipe = changed
        found.append(recipe)
    return found


def difference(recipe: Recipe, old: Candidate, new: Candidate) -> str:
    """Which recipe keys must change to get from one candidate to the other; what is auto changes by itself."""
    said = [f"method: {new.method}"] if new.method != old.method else []
    for key, (asked, before, after) in _changes(recipe, old, new).items():
        if asked != AUTO and before != after:
            accumulation = f" with accumulation {new.gradient_accumulation}" if key.endswith("batch_size") else ""
            said.append(f"{key}: {str(after).lower() if isinstance(after, bool) else after}{accumulation}")
    return ", ".join(said)


def _changes(recipe: Recipe, old: Candidate, new: Candidate) -> dict[str, tuple[object, object, object]]:
    """Recipe key -> (asked for, in the old candidate, in the new one)."""
    slurm, deepspeed, train = recipe.slurm, recipe.deepspeed, recipe.train
    lengths = (recipe.data.max_seq_length, old.seq_len, new.seq_len)
    changes: dict[str, tuple[object, object, object]] = {
        "slurm.nodes": (slurm.nodes, old.nodes, new.nodes),
        "slurm.gpus_per_node": (slurm.gpus_per_node, old.gpus_per_node, new.gpus_per_node),
        "data.max_seq_length": lengths,
    }
    if new.method == old.method:
        before, after = (each.lora.r if each.lora else None for each in (old, new))
        changes["lora.r"] = (before, before, after)
    return changes | {
        "deepspeed.stage": (deepspeed.stage, old.zero_stage, new.zero_stage),
        "deepspeed.offload_optimizer": (deepspeed.offload_optimizer, old.offload_optimizer, new.offload_optimizer),
        "deepspeed.offload_param": (deepspeed.offload_param, old.offload_param, new.offload_param),
        "train.gradient_checkpointing": (
            train.gradient_checkpointing,
            old.gradient_checkpointing,
            new.gradient_checkpointing,
        ),
        "train.per_device_train_batch_size": (train.per_device_train_batch_size, old.micro_batch, new.micro_batch),
    }


def tokens_that_fit(task: Task, candidate: Candidate) -> int:
    """Most tokens of one micro-batch (a single row) that fit this candidate's GPU; 0 where not even 128 do."""

    def fits(tokens: int) -> bool:
        alone = replace(candidate, micro_batch=1, seq_len=tokens)
        return memory.fits(memory.estimate_memory(task.model, alone, task.site))

    low, high = 0, _ROW_GRAIN
    while high <= _LONGEST_ROW and fits(high):
        low, high = high, 2 * high
    while high - low > _ROW_GRAIN:
        middle = (low + high) // 2 // _ROW_GRAIN * _ROW_GRAIN
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
