"""Estimates of everything a recipe allows for one method: every layout, sharding, micro-batch and checkpointing."""

from __future__ import annotations

from launcher.errors import RecipeError
from launcher.facts.gpu import gpu
from launcher.planning.advice import advise_learning_rate, advise_lora
from launcher.planning.candidates import Layout, Sharding, Tuning, candidates, layouts, shardings
from launcher.planning.estimate import Task, estimate
from launcher.planning.plan import Advice, Estimate, LoraNumbers
from launcher.recipe.schema import LORA_METHODS


def tuning_of(task: Task, method: str) -> tuple[Tuning, list[Advice]]:
    """Rank, alpha, dropout and learning rate of a method, with the advice behind them."""
    lora: LoraNumbers | None = None
    advice: list[Advice] = []
    if method in LORA_METHODS:
        lora, advice = advise_lora(task.recipe, task.model, task.data, method, quality=task.objective == "quality")
    rate, more = advise_learning_rate(task.recipe, task.model, task.data, method)
    return Tuning(method=method, lora=lora, learning_rate=rate), [*advice, *more]


def every(task: Task, method: str) -> list[Estimate]:
    """Estimates of all the recipe allows with this method.

    Raises:
        RecipeError: no number of ranks divides the global batch, or nothing shards as asked.
    """
    possible = layouts(task.recipe, task.site)
    if not possible:
        raise RecipeError(_no_layout(task))
    found = [each for layout in possible for each in of_layout(task, method, layout)]
    if not found:
        raise RecipeError(_no_sharding(task, method))
    return found


def of_layout(task: Task, method: str, layout: Layout) -> list[Estimate]:
    """Estimates of one layout; what leaves the GPU only where nothing that stays fits (rule R10's order)."""
    found: list[Estimate] = []
    for offloading in (False, True):
        for sharding in shardings(task.recipe, method, layout, gpu(task.site.gpu)):
            if sharding.offloads == offloading:
                found += of_sharding(task, method, layout, sharding)
        if any(each.fits for each in found):
            break
    return found


def of_sharding(task: Task, method: str, layout: Layout, sharding: Sharding) -> list[Estimate]:
    """Estimates of one sharding, micro-batches ascending.

    A larger micro-batch never needs less, so none follows one that does not fit.
    """
    tuning, _ = tuning_of(task, method)
    found: list[Estimate] = []
    full: set[bool] = set()
    for candidate in candidates(task.recipe, task.model, task.site, tuning, layout, sharding):
        if candidate.gradient_checkpointing not in full:
            found.append(estimate(task, candidate))
            if not found[-1].fits:
                full.add(candidate.gradient_checkpointing)
    return found


def _no_layout(task: Task) -> str:
    total, site = task.recipe.train.global_batch_size, task.site
    return (
        f"train.global_batch_size: {total} divides by no number of ranks that slurm.nodes {task.recipe.slurm.nodes} "
        f"and slurm.gpus_per_node {task.recipe.slurm.gpus_per_node} allow on site {site.name} "
        f"({site.gpus_per_node} per node); nearest that does: "
        f"{max(1, round(total / site.gpus_per_node)) * site.gpus_per_node}"
    )


def _no_sharding(task: Task, method: str) -> str:
    asked = task.recipe.deepspeed
    return (
        f"deepspeed: stage {asked.stage} with offload_optimizer {asked.offload_optimizer} and offload_param "
        f"{asked.offload_param} is no way to run {method}; leave them auto"
    )
