"""The smallest changes of a recipe that would make it fit, when nothing it allows does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from launcher.errors import RecipeError
from launcher.planning.checks import node_limit
from launcher.planning.estimate import GIB, Task
from launcher.planning.plan import Candidate, Estimate
from launcher.recipe.schema import AUTO, Recipe

_SHOWN = 3


def nearest_that_fits(
    task: Task,
    chosen: Estimate,
    best: Callable[[Task, str], Estimate],
    freed: Callable[[Recipe, str], Recipe],
) -> list[str]:
    """What to change, least first, each with the peak it leads to; at most three, empty when nothing helps."""
    found: list[str] = []
    for recipe, method in _relaxations(task, chosen.candidate, freed):
        try:
            relaxed = best(replace(task, recipe=recipe), method)
        except RecipeError:
            continue
        if relaxed.fits:
            said = _difference(task.recipe, chosen.candidate, relaxed.candidate)
            sentence = f"{said} ({relaxed.memory.peak_bytes.expected / GIB:.1f} GiB per GPU)"
            if said and sentence not in found:
                found.append(sentence)
        if len(found) == _SHOWN:
            break
    return found


def _relaxations(task: Task, now: Candidate, freed: Callable[[Recipe, str], Recipe]) -> Iterator[tuple[Recipe, str]]:
    """Recipes with ever more left open: batch and checkpointing, sharding, twice the nodes, any number, method."""
    recipe, method = task.recipe, now.method
    batch = replace(
        recipe,
        method=method,
        train=replace(recipe.train, per_device_train_batch_size=AUTO, gradient_checkpointing=AUTO),
    )
    yield batch, method
    sharded = replace(
        batch,
        train=replace(batch.train, optim=AUTO),
        deepspeed=replace(recipe.deepspeed, stage=AUTO, offload_optimizer=AUTO, offload_param=AUTO),
    )
    yield sharded, method
    if 2 * now.nodes <= node_limit(recipe, task.site)[0]:
        yield replace(sharded, slurm=replace(recipe.slurm, nodes=2 * now.nodes)), method
    yield replace(sharded, slurm=replace(recipe.slurm, nodes=AUTO, gpus_per_node=AUTO)), method
    for other in ("lora", "qlora"):
        if other != method:
            yield freed(recipe, other), other
    for other in ("lora", "qlora"):
        changed = freed(recipe, other)
        yield replace(changed, slurm=replace(recipe.slurm, nodes=AUTO, gpus_per_node=AUTO)), other


def _difference(recipe: Recipe, old: Candidate, new: Candidate) -> str:
    """Which recipe keys must change to get from one candidate to the other; what is auto changes by itself."""
    said = [f"method: {new.method}"] if new.method != old.method else []
    slurm, deepspeed, train = recipe.slurm, recipe.deepspeed, recipe.train
    pinned = {
        "slurm.nodes": (slurm.nodes, old.nodes, new.nodes),
        "slurm.gpus_per_node": (slurm.gpus_per_node, old.gpus_per_node, new.gpus_per_node),
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
    for key, (asked, before, after) in pinned.items():
        if asked != AUTO and before != after:
            said.append(f"{key}: {str(after).lower() if isinstance(after, bool) else after}")
    return ", ".join(said)
