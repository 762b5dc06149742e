"""make_plan: estimate everything the recipe allows, reject with reasons, and choose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from launcher.errors import DoesNotFitError, RecipeError, raise_all
from launcher.facts.dataset import DatasetFacts
from launcher.facts.gpu import gpu, gpu_names
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.advice import advise_method
from launcher.planning.candidates import Layout, layouts, shardings
from launcher.planning.checks import check
from launcher.planning.estimate import GIB, Task, memory_sentence
from launcher.planning.explore import every, of_layout, of_sharding, tuning_of
from launcher.planning.job import job_problems, job_shape, job_warnings
from launcher.planning.lint import Linted, lint
from launcher.planning.notes import notes
from launcher.planning.objective import (
    QUALITY_ORDER,
    Objective,
    device_hours,
    excess_bytes,
    needed_bytes,
    pick,
)
from launcher.planning.plan import Advice, DataNumbers, Estimate, Plan, Warning_
from launcher.planning.queue import NoQueue, Queue
from launcher.planning.remedies import nearest_that_fits, smallest_change, tokens_that_fit
from launcher.planning.resolve import resolve
from launcher.planning.retreat import METHODS_BY_MEMORY, SMALLEST_RANK, freed
from launcher.planning.savings import hours, nearest_within, over_budget, refusal, smallest_saving
from launcher.recipe.schema import AUTO, Recipe

__all__ = ["make_plan", "resolve"]

_COMPARED = ("full", "lora", "qlora")
_NO_QUEUE = NoQueue()


def make_plan(
    recipe: Recipe,
    model: ModelShape,
    data: DatasetFacts,
    site: Site,
    *,
    objective: Objective = "time",
    queue: Queue = _NO_QUEUE,
) -> Plan:
    """Decide everything the recipe leaves open and predict what it costs.

    `objective`: the earliest result within the budget, the cheapest, or the best method the budget allows; `queue`
    says when Slurm would start each alternative, so that results are ranked by when they are there.

    Raises:
        RecipeError, ClusterError: the recipe contradicts itself, asks for more than the site has, or for a job that
            a preemption would rob of everything; or it leaves a choice open and nothing that fits is within the budget.
        DoesNotFitError: nothing the recipe allows fits; the estimate is in `.plan`, the message says what would.
    """
    check(recipe, model, site)
    task = Task(recipe=recipe, model=model, data=data, site=site, objective=objective)
    chosen, method_advice = _choose(task, queue)
    if chosen.fits and over_budget(task, chosen) and not _as_written(task):
        raise refusal(task, chosen)
    job = job_shape(task, chosen)
    alternatives = _alternatives(task, chosen, queue)
    numbers = _numbers(task, chosen)
    plan = Plan(
        recipe=recipe.name,
        model=model.name,
        params=model.params,
        chosen=chosen,
        alternatives=alternatives,
        advice=(*method_advice, *numbers, *notes(task, chosen, alternatives)),
        warnings=(*_warnings(task, chosen), *job_warnings(task, chosen, job)),
        data=_data_numbers(data),
        job=job,
        site=site.name,
    )
    if not chosen.fits:
        raise _does_not_fit(task, plan)
    raise_all(RecipeError, list(job_problems(task, chosen, job)))
    return plan


# ---------------------------------------------------------------- the choice


def _choose(task: Task, queue: Queue) -> tuple[Estimate, list[Advice]]:
    """The recipe's method at its best; `method: auto` takes what the rules prefer and retreats until one will do."""
    if task.recipe.method != AUTO:
        return _best(task, task.recipe.method, queue), []
    method, first = advise_method(task.recipe, task.model, task.data)
    if task.objective == "quality":
        method = QUALITY_ORDER[0]
        reason = "the objective is quality: methods are tried from the one guides expect most of"
        first = replace(first, rule="R1", value=method, reason=reason, source="guides G1 G2 G3 G4")
    if task.objective == "cost":
        return _cheapest(task, method, first, queue)
    advice, tried = [first], list[Estimate]()
    for name, recipe in _descent(task.recipe, method):
        if name == "prompt" and any(each.fits for each in tried):
            break  # Virtual tokens are weak: a last resort where memory is short, never a saving.
        best = _best(replace(task, recipe=recipe), name, queue)
        tried.append(best)
        advice += _step_down(tried)
        if best.fits and not over_budget(task, best):
            return best, advice
    fallback = _least_bad(tried)
    return fallback, [*advice[:1], *_step_down([tried[0], fallback])]


def _as_written(task: Task) -> bool:
    """Whether the recipe leaves one candidate only: it is estimated, whatever it costs."""
    return task.recipe.method != AUTO and len(every(task, task.recipe.method)) == 1


def _descent(recipe: Recipe, method: str) -> Iterator[tuple[str, Recipe]]:
    """Methods from `method` down by memory (rule R10): full, LoRA, QLoRA, QLoRA of the smallest rank, prompt tuning."""
    for name in METHODS_BY_MEMORY[METHODS_BY_MEMORY.index(method) :]:
        yield name, recipe
        if name == "qlora" and recipe.lora.r == AUTO:
            yield name, replace(recipe, lora=replace(recipe.lora, r=SMALLEST_RANK))


def _step_down(tried: Sequence[Estimate]) -> list[Advice]:
    """Why the method before the last one was given up."""
    if len(tried) < 2 or tried[-1].candidate.method == tried[-2].candidate.method:
        return []
    before, now = tried[-2], tried[-1].candidate.method
    over = f"takes {hours(before.gpu_hours)} GPU-hours, over the budget"
    reason = f"{before.candidate.method} {before.rejected_because or over}"
    rule = "R14" if before.fits else "R3" if now == "qlora" else "R10"
    source = "budget" if before.fits else "guides G1 G4; memory model, not fixed thresholds"
    return [Advice(rule=rule, field="method", value=now, reason=reason, source=source)]


def _least_bad(tried: Sequence[Estimate]) -> Estimate:
    """Nothing is within the budget: the cheapest that fits; nothing fits: the nearest miss."""
    fitting = [each for each in tried if each.fits]
    return min(fitting, key=device_hours) if fitting else min(tried, key=excess_bytes)


def _cheapest(task: Task, method: str, first: Advice, queue: Queue) -> tuple[Estimate, list[Advice]]:
    """The cheapest of the preferred method and those that need less memory."""
    tried = [_best(replace(task, recipe=recipe), name, queue) for name, recipe in _descent(task.recipe, method)]
    # Virtual tokens are cheap and weak: a last resort, never a saving.
    fitting = [each for each in tried if each.fits and each.candidate.method != "prompt"] or tried
    chosen = _least_bad(fitting)
    if chosen.candidate.method == method:
        return chosen, [first]
    reason = f"the cheapest that fits: {device_hours(chosen):,.2g} device-hours, {method} {device_hours(tried[0]):,.2g}"
    value = chosen.candidate.method
    return chosen, [first, Advice(rule="R14", field="method", value=value, reason=reason, source="objective cost")]


def _best(task: Task, method: str, queue: Queue) -> Estimate:
    """The best estimate of one method by the task's objective.

    Raises:
        RecipeError: no number of ranks divides the global batch, or nothing shards as asked.
    """
    found = _with_starts(task, every(task, method), queue)
    return pick(found, task.objective, task.recipe.budget.max_gpu_hours)


def _with_starts(task: Task, found: list[Estimate], queue: Queue) -> list[Estimate]:
    """Estimates of the layouts whose start Slurm tells, with it; all of them as they are where it tells none."""
    first: dict[Layout, Estimate] = {}
    for each in sorted((each for each in found if each.fits), key=lambda each: each.wall_s):
        first.setdefault(_layout(each), each)
    starts = {layout: queue.start_s(each.candidate, job_shape(task, each)) for layout, each in first.items()}
    known = {layout: start for layout, start in starts.items() if start is not None}
    told = [replace(each, start_s=known[_layout(each)]) for each in found if _layout(each) in known]
    return told or found


def _layout(each: Estimate) -> Layout:
    return Layout(nodes=each.candidate.nodes, gpus_per_node=each.candidate.gpus_per_node)


def _numbers(task: Task, chosen: Estimate) -> list[Advice]:
    """Advice on rank, alpha, dropout, targets and rate, of the rank that the retreat settled on."""
    method, lora = chosen.candidate.method, chosen.candidate.lora
    tuning, advice = tuning_of(task, method)
    if lora is None or tuning.lora is None or lora.r == tuning.lora.r:
        return advice
    narrowed = replace(task.recipe, lora=replace(task.recipe.lora, r=lora.r))
    _, advice = tuning_of(replace(task, recipe=narrowed), method)
    reason = f"rank {tuning.lora.r}, which the task asks for, does not fit"
    return [Advice(rule="R10", field="lora.r", value=lora.r, reason=reason, source="guides G1 G4"), *advice]


# ---------------------------------------------------------------- what else


def _alternatives(task: Task, chosen: Estimate, queue: Queue) -> tuple[Estimate, ...]:
    """Other methods at their best, other layouts and other stages of the chosen method; the chosen one left out.

    Those that fit and are within the budget come first, by the objective; a rejected one says what would change that.
    """
    found = [_best(_freed(task, method), method, queue) for method in _COMPARED if method != chosen.candidate.method]
    found += _with_starts(task, _other_layouts(task, chosen), queue)
    found += _other_stages(task, chosen)
    kept = list({each.candidate: each for each in found if each.candidate != chosen.candidate}.values())
    told = [_judged(task, each) for each in kept]
    by_objective = device_hours if task.objective == "cost" else _result_s
    return tuple(sorted(told, key=lambda each: (not each.fits, each.rejected_because is not None, by_objective(each))))


def _judged(task: Task, each: Estimate) -> Estimate:
    """An alternative with its way out, where it does not fit or is over the budget."""
    if not each.fits:
        return replace(each, would_fit=smallest_change(task, each))
    because = over_budget(task, each)
    if because is None:
        return each
    return replace(each, rejected_because=because, would_fit=smallest_saving(task, each))


def _result_s(each: Estimate) -> float:
    return each.result_s


def _freed(task: Task, method: str) -> Task:
    return replace(task, recipe=freed(task.recipe, method))


def _other_layouts(task: Task, chosen: Estimate) -> list[Estimate]:
    """The chosen method on every other number of ranks the recipe leaves open; where it leaves none, half and twice."""
    recipe, now = task.recipe, chosen.candidate
    opened = replace(recipe, slurm=replace(recipe.slurm, nodes=AUTO, gpus_per_node=AUTO))
    near = (now.world_size // 2, now.world_size * 2)
    allowed = set(layouts(recipe, task.site))
    found = []
    for layout in layouts(opened, task.site):
        if layout != _layout(chosen) and (layout in allowed or layout.world_size in near):
            found += _representative(task, of_layout(task, now.method, layout))
    return found


def _other_stages(task: Task, chosen: Estimate) -> list[Estimate]:
    """Other shardings of the chosen method on the chosen ranks."""
    if task.recipe.deepspeed.stage != AUTO:
        return []
    now = chosen.candidate
    found = []
    for sharding in shardings(task.recipe, now.method, _layout(chosen), gpu(task.site.gpu)):
        same = (sharding.stage, sharding.offload_optimizer, sharding.offload_param, sharding.hpz)
        if same != (now.zero_stage, now.offload_optimizer, now.offload_param, now.hpz_partition > 1):
            found += _representative(task, of_sharding(task, now.method, _layout(chosen), sharding))
    return [replace(each, start_s=chosen.start_s) for each in found]


def _representative(task: Task, found: Sequence[Estimate]) -> list[Estimate]:
    return [pick(found, task.objective)] if found else []


# ---------------------------------------------------------------- what is said about it


def _warnings(task: Task, chosen: Estimate) -> list[Warning_]:
    candidate = chosen.candidate
    found = lint(
        Linted(recipe=task.recipe, model=task.model, data=task.data, method=candidate.method, lora=candidate.lora)
    )
    because = over_budget(task, chosen)
    if because is not None:
        message = f"{because}; the recipe leaves nothing open, so it is planned as written"
        ways = nearest_within(task, chosen)
        if ways:
            message += f". Nearest within the budget: {'; or '.join(ways)}"
        found.append(Warning_(code="over-budget", message=message))
    return found


def _data_numbers(data: DatasetFacts) -> DataNumbers:
    return DataNumbers(
        rows=data.rows,
        tokens=data.tokens,
        basis=data.basis,
        sampling_error=data.sampling_error,
        mean_tokens=data.mean_tokens,
        p50_tokens=data.p50_tokens,
        p95_tokens=data.p95_tokens,
        max_tokens=data.max_tokens,
        histogram=data.histogram,
        truncated_share=data.truncated_share,
        trained_share=data.trained_share,
        repeated_share=data.repeated_share,
        validation_rows=data.validation_rows,
    )


def _does_not_fit(task: Task, plan: Plan) -> DoesNotFitError:
    chosen = plan.chosen
    candidate = chosen.candidate
    where = f"{candidate.nodes} x {candidate.gpus_per_node} {candidate.gpu}"
    sharding = f"ZeRO-{candidate.zero_stage}" if candidate.zero_stage else "without sharding"
    why = chosen.rejected_because or memory_sentence(chosen.memory, candidate)
    what = f"{candidate.method} fine-tuning of {plan.model} {why}; tried {sharding} on {where}, the closest it gets"
    nearest = nearest_that_fits(task, chosen)
    ways = [f"{change} ({each.memory.peak_bytes.expected / GIB:.1f} GiB per GPU)" for change, each in nearest]
    hint = f"Nearest that fits: {'; or '.join(ways)}." if ways else _elsewhere(chosen)
    most = tokens_that_fit(task, candidate)
    if most == 0 and candidate.device == "cuda" and excess_bytes(chosen):
        hint += " As it is, no number of tokens per micro-batch fits."
    elif 0 < most < candidate.micro_batch * candidate.seq_len:
        hint += f" As it is, up to {most:,} tokens per micro-batch ({most / candidate.seq_len:.2g} of a row) fit."
    error = DoesNotFitError(f"No plan fits: {what}. {hint}")
    error.plan = replace(plan, chosen=replace(chosen, would_fit=nearest[0][0] if nearest else None))
    return error


def _elsewhere(chosen: Estimate) -> str:
    """What would do, where this site has nothing: the smallest catalogued GPU that holds the nearest miss."""
    needed = needed_bytes(chosen)
    amd = chosen.candidate.gpu.startswith("MI")
    same_make = [gpu(name) for name in gpu_names() if name.startswith("MI") == amd]
    larger = [each for each in same_make if each.memory_bytes >= needed]
    if chosen.candidate.device == "cpu" or not larger or excess_bytes(chosen) == 0:
        return "Nothing on this site fits this model; a smaller model would."
    smallest = min(larger, key=lambda each: each.memory_bytes)
    return (
        f"Nothing on this site fits this model: a GPU with at least {needed / GIB:.0f} GiB would, such as the "
        f"{smallest.name}, or more GPUs to share it, or a smaller model."
    )
