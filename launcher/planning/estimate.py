"""One candidate with all its predictions, and why it is rejected where it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from launcher.facts.dataset import DatasetFacts
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning import host, memory, speed
from launcher.planning.candidates import misaligned_for_nvme
from launcher.planning.objective import Objective
from launcher.planning.plan import Candidate, Estimate, MemoryEstimate
from launcher.planning.trainable import trainable_params
from launcher.recipe.schema import Recipe

GIB = 2**30
_EVALUATIONS = 10
"""Validations per run where the recipe leaves eval_steps open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What every candidate of one plan is estimated for."""

    recipe: Recipe
    model: ModelShape
    data: DatasetFacts
    site: Site
    objective: Objective = "time"
    known: dict[Candidate, Estimate] = field(default_factory=dict, compare=False, repr=False)
    """Estimates made so far. Tasks that differ in what the recipe leaves open share them: a candidate has it all."""


def estimate(task: Task, candidate: Candidate) -> Estimate:
    """Predict memory, time and cost of one candidate; each once per task."""
    if candidate not in task.known:
        task.known[candidate] = _estimate(task, candidate)
    return task.known[candidate]


def _estimate(task: Task, candidate: Candidate) -> Estimate:
    model, site = task.model, task.site
    needed = memory.estimate_memory(model, candidate, site)
    host_bytes = host.host_ram_bytes_per_node(model, candidate)
    rejected = _rejection(task, candidate, needed, host_bytes)
    step = speed.step_interval(speed.step_time(model, candidate, site), candidate)
    steps = _steps(task, candidate)
    wall = wall_s(task, candidate, step.expected, steps)
    gpu_hours = wall / 3600 * candidate.world_size if candidate.device == "cuda" else 0.0
    tokens = candidate.global_batch * candidate.seq_len
    return Estimate(
        candidate=candidate,
        trainable_params=trainable_params(model, candidate),
        fits=rejected is None,
        memory=needed,
        host_ram_bytes_per_node=host_bytes,
        checkpoint_bytes=host.checkpoint_bytes(model, candidate),
        step_s=step,
        tokens_per_s_per_gpu=tokens / step.expected / candidate.world_size,
        steps=steps,
        wall_s=wall,
        gpu_hours=gpu_hours,
        cost=speed.cost(gpu_hours, task.recipe.budget.gpu_hour_price),
        rejected_because=rejected,
        save_s=save_s(task, candidate),
        background_saves=host.background_saves_fit(model, candidate, site.mem_bytes_per_node),
    )


def _steps(task: Task, candidate: Candidate) -> int:
    train = task.recipe.train
    return speed.steps_of_run(
        rows=task.data.rows,
        tokens=task.data.tokens,
        candidate=candidate,
        epochs=train.num_train_epochs,
        max_steps=train.max_steps,
    )


def evaluation_steps(recipe: Recipe, steps: int) -> int:
    """Optimizer steps between two validations: as asked, or about ten per run."""
    asked = recipe.train.eval_steps
    return asked if isinstance(asked, int) else max(1, min(500, math.ceil(steps / _EVALUATIONS)))


def wall_s(task: Task, candidate: Candidate, step_s: float, steps: int) -> float:
    """Seconds of the whole run when a step takes `step_s`: one save at the end, the others by the recipe's interval."""
    rows = task.data.validation_rows
    if candidate.packing:
        rows = math.ceil(rows * task.data.mean_tokens / candidate.seq_len)
    interval = save_interval_s(task.recipe, step_s)
    evaluations = steps // evaluation_steps(task.recipe, steps) if rows else 0
    return speed.wall_s(
        task.model,
        candidate,
        step_s=step_s,
        steps=steps,
        evaluations=evaluations,
        evaluation_rows=rows,
        saves=1 + (int(steps * step_s // interval) if interval else 0),
        save_s=save_s(task, candidate),
    )


def save_s(task: Task, candidate: Candidate) -> float:
    """Seconds one checkpoint takes to write."""
    return speed.save_s(host.checkpoint_bytes(task.model, candidate), candidate.nodes, task.site)


def save_interval_s(recipe: Recipe, step_s: float) -> float | None:
    """Seconds between two checkpoints; None when none is written on the way."""
    asked = recipe.checkpoint
    by_time = asked.save_minutes * 60 if asked.save_minutes else None
    by_steps = asked.save_steps * step_s if asked.save_steps else None
    return min((interval for interval in (by_time, by_steps) if interval), default=None)


def _rejection(task: Task, candidate: Candidate, needed: MemoryEstimate, host_bytes: int) -> str | None:
    if not memory.fits(needed):
        return memory_sentence(needed, candidate)
    if host_bytes > task.site.mem_bytes_per_node:
        return (
            f"needs {host_bytes / GIB:,.0f} GiB of host memory per node, "
            f"site {task.site.name} has {task.site.mem_bytes_per_node / GIB:,.0f} GiB"
        )
    return misaligned_for_nvme(task.model, candidate)


def memory_sentence(needed: MemoryEstimate, candidate: Candidate) -> str:
    """Such as: needs 141.2 GiB per GPU (optimizer 98.5, weights 16.4, gathered 1.9), the A100-80GB has 79.2."""
    total = (needed.peak_bytes.high + needed.terms_bytes["runtime"]) / GIB
    terms = sorted(needed.terms_bytes.items(), key=lambda item: -item[1])
    largest = ", ".join(f"{name} {value / GIB:.1f}" for name, value in terms[:3] if value)
    what = "rank" if candidate.device == "cpu" else "GPU"
    has = "a rank's share of this host is" if candidate.device == "cpu" else f"the {candidate.gpu} has"
    return f"needs {total:.1f} GiB per {what} ({largest}), {has} {needed.usable_bytes / GIB:.1f}"
