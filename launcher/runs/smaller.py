"""smaller: a run whose micro-batch did not fit goes on with a smaller one and the same global batch."""

from __future__ import annotations

import json
from dataclasses import replace

from launcher.errors import ConflictError
from launcher.planning.plan import Candidate, Plan, Warning_, plan_from_json
from launcher.planning.resolve import pin
from launcher.recipe.load import load_recipe
from launcher.runs.folder import RunFolder
from launcher.runs.plan_files import archive, write_plan


def with_micro_batch(candidate: Candidate, size: int) -> Candidate:
    """The candidate with micro-batches of `size` sequences and as many of them as the global batch takes.

    Raises:
        ConflictError: `size` does not divide what a rank trains in a step.
    """
    rows = candidate.micro_batch * candidate.gradient_accumulation
    if size < 1 or rows % size:
        raise ConflictError(f"a rank trains {rows} sequences in a step; micro-batches of {size} do not divide them")
    return replace(candidate, micro_batch=size, gradient_accumulation=rows // size)


def use_micro_batch(run: RunFolder, size: int) -> None:
    """Rewrite the run's plan for micro-batches of `size` sequences; what was planned is kept.

    Raises:
        ConflictError: the size does not divide a rank's share, or the files are another version's.
        OSError: the run folder cannot be written.
    """
    plan = plan_from_json(json.loads(run.plan.read_text(encoding="utf-8")))
    recipe = load_recipe(run.resolved)
    candidate = with_micro_batch(plan.chosen.candidate, size)
    archive(run)
    write_plan(run, pin(recipe, candidate), _replanned(plan, candidate))


def _at_most(candidate: Candidate, size: int) -> Candidate:
    """A layout on fewer nodes with micro-batches of `size`, or the next smaller ones that divide a rank's share."""
    rows = candidate.micro_batch * candidate.gradient_accumulation
    return with_micro_batch(candidate, max(n for n in range(1, min(size, candidate.micro_batch) + 1) if rows % n == 0))


def _replanned(plan: Plan, candidate: Candidate) -> Plan:
    before = plan.chosen.candidate.micro_batch
    message = (
        f"the GPU was too small for micro-batches of {before}; the run went on with {candidate.micro_batch} and the "
        f"same global batch. The predicted memory and times are still those of {before}"
    )
    return replace(
        plan,
        chosen=replace(plan.chosen, candidate=candidate),
        elastic=tuple(_at_most(each, candidate.micro_batch) for each in plan.elastic),
        warnings=(*plan.warnings, Warning_(code="smaller-micro-batch", message=message)),
    )
