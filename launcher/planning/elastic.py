"""elastic: the layouts on which a run may go on when fewer nodes are free than it was planned for.

`survival.min_nodes` allows them. Each is the same training on fewer ranks: global batch, row order and schedule stay.
"""

from __future__ import annotations

from dataclasses import replace

from launcher.errors import RecipeError
from launcher.facts.dataset import DatasetFacts
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.estimate import Task
from launcher.planning.explore import every
from launcher.planning.objective import pick
from launcher.planning.plan import Candidate, Estimate, Plan, Warning_
from launcher.planning.replan import same_training
from launcher.planning.resolve import pin
from launcher.recipe.schema import AUTO, Recipe


def with_elastic(recipe: Recipe, plan: Plan, model: ModelShape, data: DatasetFacts, site: Site) -> Plan:
    """The plan with a layout for every number of nodes from survival.min_nodes to one below the chosen one.

    Numbers that do not divide the global batch, or on which nothing fits, are left out; a warning names them.

    Raises:
        RecipeError: min_nodes is more than the nodes of the plan, or leaves nothing below them.
    """
    fewest, chosen = recipe.survival.min_nodes, plan.chosen.candidate
    if fewest is None or site.executor != "slurm" or fewest == chosen.nodes:
        return plan
    if fewest > chosen.nodes:
        raise RecipeError(f"survival.min_nodes: {fewest} is more than the {chosen.nodes} nodes of the plan")
    found = {nodes: _layout(recipe, chosen, nodes, model, data, site) for nodes in range(fewest, chosen.nodes)}
    elastic = tuple(each.candidate for each in found.values() if each is not None)
    if found[fewest] is None:
        possible = [nodes for nodes, each in found.items() if each is not None]
        hint = f"the fewest that do: {possible[0]}" if possible else f"only the planned {chosen.nodes} do"
        raise RecipeError(
            f"survival.min_nodes: {fewest} x {chosen.gpus_per_node} ranks do not divide the global batch of "
            f"{chosen.global_batch}, or the run does not fit on them; {hint}"
        )
    return replace(plan, elastic=elastic, warnings=(*plan.warnings, *_idle(found, chosen)))


def _layout(
    recipe: Recipe, chosen: Candidate, nodes: int, model: ModelShape, data: DatasetFacts, site: Site
) -> Estimate | None:
    """The chosen way on so many nodes; micro-batch and checkpointing as they were where they can be."""
    pinned = pin(recipe, chosen)
    pinned = replace(pinned, slurm=replace(pinned.slurm, nodes=nodes))
    freed = replace(pinned, train=replace(pinned.train, per_device_train_batch_size=AUTO, gradient_checkpointing=AUTO))
    for attempt in (pinned, freed):
        try:
            best = pick(every(Task(recipe=attempt, model=model, data=data, site=site), chosen.method))
        except RecipeError:
            continue
        if best.fits:
            same_training(chosen, best.candidate)
            return best
    return None


def _idle(found: dict[int, Estimate | None], chosen: Candidate) -> list[Warning_]:
    unused = [str(nodes) for nodes, each in found.items() if each is None]
    if not unused:
        return []
    message = (
        f"on {', '.join(unused)} nodes the run uses fewer and the rest stand idle: so many ranks do not divide the "
        f"global batch of {chosen.global_batch}, or it does not fit there"
    )
    return [Warning_(code="idle-nodes", message=message)]
