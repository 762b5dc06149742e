"""replan: the same training on other ranks.

What a run has fixed stays: method, adapter, global batch, rates, precision, packing and length. Nodes, GPUs and, where
it must, the micro-batch and the sharding are decided anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from launcher.errors import DoesNotFitError, RecipeError
from launcher.facts.dataset import DatasetFacts
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.plan import Candidate, Plan
from launcher.planning.search import make_plan
from launcher.recipe.schema import AUTO, Recipe

_FREE = frozenset(
    {
        *("gpu", "device", "nodes", "gpus_per_node", "attn_implementation"),
        *("zero_stage", "offload_optimizer", "offload_param", "nvme_path", "buckets", "hpz_partition"),
        *("micro_batch", "gradient_accumulation", "gradient_checkpointing", "checkpointing_reentrant"),
    }
)
"""Fields of a candidate that say how the work is done, not what is computed."""


def replan(recipe: Recipe, before: Plan, model: ModelShape, data: DatasetFacts, site: Site) -> tuple[Recipe, Plan]:
    """Plan the run of `before` for the nodes and GPUs that `recipe`, its resolved recipe, names now.

    Returns the recipe as it was planned (the smallest number of values freed that gave a plan), and the plan.

    Raises:
        RecipeError: the global batch divides by no such number of ranks; names the nearest that do.
        DoesNotFitError, ClusterError: as for a new plan.
    """
    candidate = before.chosen.candidate
    nodes, per_node = recipe.slurm.nodes, recipe.slurm.gpus_per_node
    if isinstance(nodes, int) and isinstance(per_node, int):
        refuse_ragged(recipe.train.global_batch_size, nodes, per_node, max(site.max_nodes, candidate.nodes))
    refused: RecipeError | DoesNotFitError | None = None
    for attempt in _attempts(recipe, candidate):
        try:
            plan = make_plan(attempt, model, data, site)
        except (RecipeError, DoesNotFitError) as error:
            refused = refused or error
            continue
        same_training(candidate, plan.chosen.candidate)
        return attempt, plan
    raise refused or RecipeError("nothing to plan")


def _attempts(recipe: Recipe, before: Candidate) -> Iterator[Recipe]:
    """The recipe as it was, then freed step by step: micro-batch, checkpointing, and a deeper sharding."""
    yield recipe
    if recipe.train.per_device_train_batch_size == before.micro_batch:
        recipe = replace(recipe, train=replace(recipe.train, per_device_train_batch_size=AUTO))
        yield recipe
    recipe = replace(recipe, train=replace(recipe.train, gradient_checkpointing=AUTO))
    yield recipe
    if before.zero_stage in (1, 2):
        yield replace(recipe, deepspeed=replace(recipe.deepspeed, stage=3))


def refuse_ragged(batch: int, nodes: int, per_node: int, most_nodes: int) -> None:
    """Every rank must get the same number of the `batch` sequences; up to `most_nodes` nodes are proposed instead.

    Raises:
        RecipeError: `nodes` x `per_node` ranks do not divide it; names the nearest that do.
    """
    if batch % (nodes * per_node) == 0:
        return
    whole = [count for count in range(1, max(nodes, most_nodes) + 1) if batch % (count * per_node) == 0]
    near = sorted({*[n for n in whole if n < nodes][-1:], *[n for n in whole if n > nodes][:1]})
    counts = " or ".join(map(str, near))
    hint = f"with {per_node} per node, slurm.nodes {counts} would" if near else _per_node(batch, nodes)
    raise RecipeError(
        f"slurm.nodes: {nodes} x {per_node} = {nodes * per_node} ranks do not divide the global batch of {batch} "
        f"sequences, which the run keeps; {hint}"
    )


def _per_node(batch: int, nodes: int) -> str:
    counts = [count for count in range(1, 9) if batch % (count * nodes) == 0]
    return f"slurm.gpus_per_node {' or '.join(map(str, counts))} would" if counts else "another number of nodes would"


def same_training(before: Candidate, after: Candidate) -> None:
    """The plan changed how, not what.

    Raises:
        RuntimeError: it did not; a bug of the planner, and no reason to go on.
    """
    kept = [each.name for each in fields(Candidate) if each.name not in _FREE]
    changed = [name for name in kept if getattr(before, name) != getattr(after, name)]
    if changed or before.global_batch != after.global_batch:
        raise RuntimeError(f"planning for other ranks changed what is computed: {', '.join(changed) or 'global batch'}")
