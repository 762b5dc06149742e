"""smaller: a run whose micro-batch did not fit goes on with a smaller one and the same global batch.

plan.json, recipe.resolved.yaml and ds_config.json are rewritten together; what they were stays as plan-1.json and so
on. plan.json, which the worker believes, comes last: a half-done change is done again from the start.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from launcher.errors import ConflictError
from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.plan import Candidate, Plan, Warning_, plan_from_json, plan_to_json
from launcher.planning.resolve import pin
from launcher.recipe.load import load_recipe, recipe_to_yaml
from launcher.runs.folder import RunFolder, write_atomic, write_json


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
    """Rewrite the run's plan for micro-batches of `size` sequences.

    Raises:
        ConflictError: the size does not divide a rank's share, or the files are another version's.
        OSError: the run folder cannot be written.
    """
    plan = plan_from_json(json.loads(run.plan.read_text(encoding="utf-8")))
    recipe = load_recipe(run.resolved)
    candidate = with_micro_batch(plan.chosen.candidate, size)
    number = _next_number(run)
    for path in (run.plan, run.resolved, run.ds_config):
        if path.exists():
            shutil.copyfile(path, _numbered(path, number))
    if candidate.zero_stage > 0:
        write_json(run.ds_config, deepspeed_config(candidate, recipe.deepspeed.overrides))
    write_atomic(run.resolved, recipe_to_yaml(pin(recipe, candidate)))
    write_json(run.plan, plan_to_json(_replanned(plan, candidate)))


def _replanned(plan: Plan, candidate: Candidate) -> Plan:
    before = plan.chosen.candidate.micro_batch
    message = (
        f"the GPU was too small for micro-batches of {before}; the run went on with {candidate.micro_batch} and the "
        f"same global batch. The predicted memory and times are still those of {before}"
    )
    return replace(
        plan,
        chosen=replace(plan.chosen, candidate=candidate),
        warnings=(*plan.warnings, Warning_(code="smaller-micro-batch", message=message)),
    )


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _next_number(run: RunFolder) -> int:
    """The first number under which no older plan is kept."""
    number = 1
    while _numbered(run.plan, number).exists():
        number += 1
    return number
