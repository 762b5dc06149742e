"""make_plan: enumerate what the recipe allows, estimate, reject with reasons, choose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from launcher.errors import DoesNotFitError, RecipeError
from launcher.facts.dataset import DatasetFacts
from launcher.facts.gpu import gpu
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.advice import advise_learning_rate, advise_lora, advise_method, lint
from launcher.planning.candidates import Layout, Sharding, Tuning, candidates, layouts, shardings
from launcher.planning.checks import check
from launcher.planning.estimate import GIB, Task, estimate, evaluation_steps, memory_sentence, wall_s
from launcher.planning.plan import Advice, Candidate, DataNumbers, Estimate, JobShape, Plan, Warning_
from launcher.planning.remedies import nearest_that_fits
from launcher.recipe.schema import AUTO, LORA_METHODS, PROMPT_METHODS, Recipe

__all__ = ["make_plan", "resolve"]

_SAME_SPEED = 1.03
"""Step times this close are equal; the simpler candidate wins."""
_COMFORTABLE = 0.92
"""Share of a device's memory the chosen plan should stay below, where any does."""
_RETREAT = {"full": "lora", "lora": "qlora"}
"""What `method: auto` tries next when a method does not fit."""
_COMPARED = ("full", "lora", "qlora")
_SAFE_TIME = 1.3
"""Time limit over the slow end of the prediction."""
_TIME_MARGIN_MIN = 10


def make_plan(recipe: Recipe, model: ModelShape, data: DatasetFacts, site: Site) -> Plan:
    """Decide everything the recipe leaves open and predict what it costs.

    Raises:
        RecipeError, ClusterError: the recipe contradicts itself or asks for more than the site has.
        DoesNotFitError: nothing the recipe allows fits; the estimate is in `.plan`, the message says what would.
    """
    check(recipe, model, site)
    task = Task(recipe=recipe, model=model, data=data, site=site)
    chosen, advice = _choose(task)
    plan = Plan(
        recipe=recipe.name,
        model=model.name,
        params=model.params,
        chosen=chosen,
        alternatives=_alternatives(task, chosen),
        advice=tuple(advice),
        warnings=tuple(_warnings(task, chosen)),
        data=DataNumbers(rows=data.rows, tokens=data.tokens, basis=data.basis),
        job=_job(task, chosen),
        site=site.name,
    )
    if not chosen.fits:
        raise _does_not_fit(task, plan)
    return plan


def _choose(task: Task) -> tuple[Estimate, list[Advice]]:
    """The method's best candidate; `method: auto` retreats from full to LoRA to QLoRA until one fits."""
    recipe = task.recipe
    if recipe.method != AUTO:
        chosen = best_of_method(task, recipe.method)
        return chosen, _advice_of(task, recipe.method, chosen)
    method, first = advise_method(recipe, task.model, task.data)
    advice, chosen = [first], best_of_method(task, method)
    while not chosen.fits and method in _RETREAT:
        reason = f"{method} does not fit: {chosen.rejected_because}"
        method = _RETREAT[method]
        rule = "R3" if method == "qlora" else "R10"
        advice = [Advice(rule=rule, field="method", value=method, reason=reason, source="memory model")]
        chosen = best_of_method(task, method)
    return chosen, [*advice, *_advice_of(task, method, chosen)]


def tuning_of(task: Task, method: str) -> tuple[Tuning, list[Advice]]:
    """Rank, alpha, dropout and learning rate of a method, with the advice behind them."""
    lora, advice = advise_lora(task.recipe, task.data, method) if method in LORA_METHODS else (None, [])
    rate, more = advise_learning_rate(task.recipe, task.model, task.data, method)
    return Tuning(method=method, lora=lora, learning_rate=rate), [*advice, *more]


def best_of_method(task: Task, method: str) -> Estimate:
    """Best estimate of one method: on the fewest ranks that fit without offload, else with it, else the nearest miss.

    Raises:
        RecipeError: no number of ranks divides the global batch, or nothing shards as asked.
    """
    tuning, _ = tuning_of(task, method)
    possible = layouts(task.recipe, task.site)
    if not possible:
        raise RecipeError(_no_layout(task))
    every: list[Estimate] = []
    for offloading in (False, True):
        for layout in possible:
            found = _of_layout(task, tuning, layout, offloading=offloading)
            fitting = [each for each in found if each.fits]
            if fitting:
                return fastest(fitting)
            every += found
    if not every:
        raise RecipeError(_no_sharding(task, method))
    return min(every, key=lambda each: (_excess(each), each.wall_s))


def _of_layout(task: Task, tuning: Tuning, layout: Layout, *, offloading: bool) -> list[Estimate]:
    """Estimates of one layout, of the shardings that offload or of those that do not."""
    device = gpu(task.site.gpu)
    wanted = [each for each in shardings(task.recipe, tuning.method, layout, device) if each.offloads == offloading]
    return [found for sharding in wanted for found in _of_sharding(task, tuning, layout, sharding)]


def _of_sharding(task: Task, tuning: Tuning, layout: Layout, sharding: Sharding) -> Iterable[Estimate]:
    spelled_out = candidates(task.recipe, task.model, task.site, tuning, layout, sharding)
    return [estimate(task, candidate) for candidate in spelled_out]


def fastest(found: Sequence[Estimate]) -> Estimate:
    """The shortest step with some room left; among equally fast ones the simplest, then the smallest.

    Of 454 published runs none failed whose estimate left a fifth of the device free (arXiv 2411.06465); the peak
    used here is the cautious one already, so less room is asked for.
    """
    roomy = [each for each in found if _needed(each) <= _COMFORTABLE * each.memory.usable_bytes]
    allowed = roomy or found
    best = min(each.step_s.expected for each in allowed)
    equal = [each for each in allowed if each.step_s.expected <= best * _SAME_SPEED]
    return min(equal, key=lambda each: (*_complexity(each.candidate), each.memory.peak_bytes.expected))


def _complexity(candidate: Candidate) -> tuple[int, int]:
    """Fewer offloads first, then the lower stage."""
    offloads = (candidate.offload_optimizer != "none") + (candidate.offload_param != "none")
    return offloads, candidate.zero_stage


def _needed(each: Estimate) -> float:
    """Bytes the device must have: cautious peak, context and communication buffers."""
    return each.memory.peak_bytes.high + each.memory.terms_bytes["runtime"]


def _excess(each: Estimate) -> float:
    """How many bytes a candidate is over the device's memory."""
    return max(0.0, _needed(each) - each.memory.usable_bytes)


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


# ---------------------------------------------------------------- around the choice


def _advice_of(task: Task, method: str, chosen: Estimate) -> list[Advice]:
    _, advice = tuning_of(task, method)
    if method in PROMPT_METHODS and task.recipe.data.packing:
        reason = "virtual tokens stand before the first document of a row only, so rows are not packed"
        source = "P-tuning, arXiv 2103.10385"
        advice.append(Advice(rule="R11", field="data.packing", value=False, reason=reason, source=source))
    return [*advice, *_retreats(task, chosen)]


def _retreats(task: Task, chosen: Estimate) -> list[Advice]:
    """Which steps of the retreat from too little memory were taken (rule R10)."""
    if not chosen.fits:
        return []
    candidate, recipe = chosen.candidate, task.recipe
    peak = f"peak {chosen.memory.peak_bytes.expected / GIB:.1f} of {chosen.memory.usable_bytes / GIB:.1f} GiB"
    taken: list[tuple[str, object, str]] = []
    if recipe.train.gradient_checkpointing == AUTO and candidate.gradient_checkpointing:
        taken.append(("train.gradient_checkpointing", True, f"activations recomputed instead of kept: {peak}"))
    if recipe.deepspeed.stage == AUTO and candidate.zero_stage:
        taken.append(("deepspeed.stage", candidate.zero_stage, f"the fastest sharding that fits: {peak}"))
    if recipe.deepspeed.offload_optimizer == AUTO and candidate.offload_optimizer != "none":
        reason = "without offload no allowed number of GPUs holds the optimizer states"
        taken.append(("deepspeed.offload_optimizer", candidate.offload_optimizer, reason))
    if recipe.deepspeed.offload_param == AUTO and candidate.offload_param != "none":
        taken.append(("deepspeed.offload_param", candidate.offload_param, "weights do not fit beside activations"))
    return [
        Advice(rule="R10", field=field, value=value, reason=reason, source="memory model")
        for field, value, reason in taken
    ]


def _alternatives(task: Task, chosen: Estimate) -> tuple[Estimate, ...]:
    """Other methods at their best, other node counts and other stages of the chosen method; chosen one left out."""
    found = [_other_method(task, method) for method in _COMPARED if method != chosen.candidate.method]
    found += _other_layouts(task, chosen)
    found += _other_stages(task, chosen)
    kept = list({each.candidate: each for each in found if each.candidate != chosen.candidate}.values())
    return tuple(sorted(kept, key=lambda each: (not each.fits, each.wall_s)))


def _other_method(task: Task, method: str) -> Estimate:
    """Another method on the same site, its own numbers and sharding left open."""
    return best_of_method(replace(task, recipe=freed(task.recipe, method)), method)


def freed(recipe: Recipe, method: str) -> Recipe:
    """The recipe with another method and everything that depended on the old one left open."""
    return replace(
        recipe,
        method=method,
        lora=replace(recipe.lora, r=AUTO, lora_alpha=AUTO, lora_dropout=AUTO),
        train=replace(
            recipe.train, learning_rate=AUTO, per_device_train_batch_size=AUTO, gradient_checkpointing=AUTO, optim=AUTO
        ),
        deepspeed=replace(recipe.deepspeed, stage=AUTO, offload_optimizer=AUTO, offload_param=AUTO, overrides={}),
    )


def _other_layouts(task: Task, chosen: Estimate) -> list[Estimate]:
    """Half and twice the ranks, where site and batch allow."""
    recipe, now = task.recipe, chosen.candidate
    open_layout = replace(recipe, slurm=replace(recipe.slurm, nodes=AUTO, gpus_per_node=AUTO))
    wanted = (now.world_size // 2, now.world_size * 2)
    tuning, _ = tuning_of(task, now.method)
    found = []
    for layout in layouts(open_layout, task.site):
        if layout.world_size in wanted:
            both = [each for off in (False, True) for each in _of_layout(task, tuning, layout, offloading=off)]
            found += _representative(both)
    return found


def _other_stages(task: Task, chosen: Estimate) -> list[Estimate]:
    """Other shardings of the chosen method on the chosen ranks."""
    if task.recipe.deepspeed.stage != AUTO:
        return []
    now = chosen.candidate
    layout = Layout(nodes=now.nodes, gpus_per_node=now.gpus_per_node)
    tuning, _ = tuning_of(task, now.method)
    found = []
    for sharding in shardings(task.recipe, now.method, layout, gpu(task.site.gpu)):
        same = (sharding.stage, sharding.offload_optimizer, sharding.offload_param)
        if same != (now.zero_stage, now.offload_optimizer, now.offload_param):
            found += _representative(list(_of_sharding(task, tuning, layout, sharding)))
    return found


def _representative(found: Sequence[Estimate]) -> list[Estimate]:
    """The fastest that fits, or the nearest miss."""
    fitting = [each for each in found if each.fits]
    if fitting:
        return [fastest(fitting)]
    return [min(found, key=lambda each: (_excess(each), each.wall_s))] if found else []


def _warnings(task: Task, chosen: Estimate) -> list[Warning_]:
    candidate = chosen.candidate
    found = lint(task.recipe, task.model, task.data, candidate.method, candidate.lora)
    if candidate.quant is not None and task.model.experts:
        message = "4-bit loading reaches linear layers only: expert weights stay in 16 bits"
        found.append(Warning_(code="experts-16-bit", message=message))
    limit = task.recipe.budget.max_gpu_hours
    if limit is not None and chosen.gpu_hours > limit:
        message = f"predicted {chosen.gpu_hours:,.1f} GPU-hours, the budget is {limit:,.1f}"
        found.append(Warning_(code="over-budget", message=message))
    job = _job(task, chosen)
    if job.time_limit_min * 60 < chosen.wall_s:
        message = (
            f"the run is predicted to take {chosen.wall_s / 3600:.1f} h, one job may take {job.time_limit_min} min"
        )
        found.append(Warning_(code="time-limit", message=message))
    return found


def _job(task: Task, chosen: Estimate) -> JobShape:
    """Time limit, cores per rank and memory of the job."""
    slurm, site, candidate = task.recipe.slurm, task.site, chosen.candidate
    asked = slurm.time if isinstance(slurm.time, int) else None
    slow = wall_s(task, candidate, chosen.step_s.high, chosen.steps)
    limit = asked or math.ceil(_SAFE_TIME * slow / 60) + _TIME_MARGIN_MIN
    longest = _longest_job_min(task.recipe, site)
    if asked is None and longest is not None:
        limit = min(limit, longest)
    # On a cluster a rank takes its share of the node, others may use the rest; this machine is all ours.
    ranks = candidate.gpus_per_node if site.executor == "local" else max(candidate.gpus_per_node, site.gpus_per_node)
    cpus = slurm.cpus_per_task if isinstance(slurm.cpus_per_task, int) else max(1, site.cpus_per_node // ranks)
    return JobShape(time_limit_min=limit, cpus_per_task=cpus, mem=slurm.mem)


def _longest_job_min(recipe: Recipe, site: Site) -> int | None:
    wanted = recipe.slurm.partition or site.default_partition
    limits = [partition.max_time_min for partition in site.partitions if partition.name == wanted]
    known = [limit for limit in (*limits, site.max_time_min) if limit is not None]
    return min(known) if known else None


def _does_not_fit(task: Task, plan: Plan) -> DoesNotFitError:
    chosen = plan.chosen
    candidate = chosen.candidate
    where = f"{candidate.nodes} x {candidate.gpus_per_node} {candidate.gpu}"
    sharding = f"ZeRO-{candidate.zero_stage}" if candidate.zero_stage else "without sharding"
    why = chosen.rejected_because or memory_sentence(chosen.memory, candidate)
    what = f"{candidate.method} fine-tuning of {plan.model} {why}; tried {sharding} on {where}, the closest it gets"
    nearest = nearest_that_fits(task, chosen, best_of_method, freed)
    hint = f"Nearest that fits: {'; or '.join(nearest)}." if nearest else "Nothing on this site fits this model."
    error = DoesNotFitError(f"No plan fits: {what}. {hint}")
    error.plan = plan
    return error


# ---------------------------------------------------------------- back into the recipe


def resolve(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with everything the planner decides filled in from `plan.chosen`.

    What others decide stays `auto`: row formats (the reader), W&B mode (the tracker), output_dir and site (the caller).
    """
    candidate = plan.chosen.candidate
    lora = recipe.lora
    if candidate.lora is not None:
        numbers = candidate.lora
        lora = replace(lora, r=numbers.r, lora_alpha=numbers.lora_alpha, lora_dropout=numbers.lora_dropout)
    quantization = recipe.quantization
    if candidate.quant is not None:
        quantization = replace(quantization, bnb_4bit_compute_dtype=candidate.quant.compute_dtype)
    return replace(
        recipe,
        method=candidate.method,
        model=replace(recipe.model, attn_implementation=candidate.attn_implementation),
        data=replace(recipe.data, packing=candidate.packing),
        lora=lora,
        quantization=quantization,
        train=replace(
            recipe.train,
            per_device_train_batch_size=candidate.micro_batch,
            learning_rate=candidate.learning_rate,
            precision=candidate.precision,
            gradient_checkpointing=candidate.gradient_checkpointing,
            optim=candidate.optim,
            eval_steps=evaluation_steps(recipe, plan.chosen.steps),
        ),
        deepspeed=replace(
            recipe.deepspeed,
            stage=candidate.zero_stage,
            offload_optimizer=candidate.offload_optimizer,
            offload_param=candidate.offload_param,
        ),
        slurm=replace(
            recipe.slurm,
            time=plan.job.time_limit_min,
            nodes=candidate.nodes,
            gpus_per_node=candidate.gpus_per_node,
            cpus_per_task=plan.job.cpus_per_task,
        ),
    )
