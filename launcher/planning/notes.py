"""Notes on a decided plan: rules that need its numbers (R3, R9 to R16), each with its reason and source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launcher.facts.gpu import gpu
from launcher.planning.advice import SMALL_DATA_ROWS
from launcher.planning.candidates import largest_micro_batch
from launcher.planning.estimate import GIB, Task, estimate
from launcher.planning.multinode import HPZ_SOURCE, zero3_vs_alternatives
from launcher.planning.objective import THRIFT, device_hours, excess_bytes
from launcher.planning.plan import Advice, Estimate
from launcher.planning.remedies import tokens_that_fit
from launcher.planning.served import serving_notes
from launcher.planning.states import weight_bytes
from launcher.recipe.schema import AUTO, LORA_METHODS, PROMPT_METHODS

_SAMPLED_TOKENS = 128
"""Tokens per row of `data.retention: builtin` (worker/retention.py)."""
_G4_FULL_GB, _G4_ADAPTER_GB, _G4_SMALL_PARAMS = 140, 14, 7e9
_MEMORY = "memory model"
_BASES = {
    "counted": "tokens counted",
    "sampled": "tokens counted in a sample",
    "characters": "tokens guessed from characters",
    "hint": "tokens as published",
    "assumed": "rows and tokens assumed",
}


def notes(task: Task, chosen: Estimate, alternatives: Sequence[Estimate]) -> list[Advice]:
    """Every note that matters for this plan, by rule."""
    return [
        *base_fits(task, chosen),
        *epochs(task),
        *forgetting(task, chosen),
        *retreats(task, chosen),
        *across_nodes(task, chosen),
        *tokens(task, chosen),
        *virtual_tokens(task, chosen),
        *other_adapters(task, chosen),
        *serving_notes(task.recipe, task.model, chosen.candidate),
        *budget(task, chosen, alternatives),
        *queue(chosen),
        *trial(task, chosen),
        *without_weights(task),
        *learned(task),
    ]


def learned(task: Task) -> Iterator[Advice]:
    """Where the site's own runs corrected the predictions, how many did, and how far off they still are."""
    found = task.site.learned
    if found is None:
        return
    value = f"time x {found.step_factor:.2f}, memory x {found.memory_factor:.2f}"
    yield Advice(
        rule="calibration",
        field="predictions",
        value=value,
        reason=f"{found.sentence} of {task.site.name}",
        source=f"{task.site.name}.learned.yaml",
    )


def base_fits(task: Task, chosen: Estimate) -> Iterator[Advice]:
    """R3: LoRA where the base in 16 bits fits the GPUs at hand, else a 4-bit base; G4's fixed thresholds beside it."""
    candidate = chosen.candidate
    if task.recipe.method != AUTO or not chosen.fits:
        return
    base, usable = weight_bytes(task.model, candidate) / GIB, chosen.memory.usable_bytes / GIB
    shared = f" over {candidate.world_size} GPUs" if candidate.zero_stage == 3 else ""
    bits = "4-bit" if candidate.quant else candidate.precision
    said = f"the {bits} base takes {base:.1f} GiB{shared} of {usable:.1f} GiB each, and the whole step fits"
    tree = guide_tree(usable * candidate.world_size * GIB / 1e9, task.model.params)
    if candidate.device == "cuda" and candidate.method not in tree:
        fixed = f"{usable * candidate.world_size * GIB / 1e9:.0f} GB in reach"
        said += f"; G4's fixed thresholds would say {' or '.join(tree)} for {fixed}, the estimate decides instead"
    source = f"guides G1 G3 G4; {_MEMORY}"
    yield Advice(rule="R3", field="method", value=candidate.method, reason=said, source=source)


def guide_tree(memory_gb: float, params: float) -> tuple[str, ...]:
    """G4's decision tree, as printed: methods it proposes for so much GPU memory in reach."""
    if memory_gb >= _G4_FULL_GB:
        return ("full", "lora")
    if memory_gb >= _G4_ADAPTER_GB:
        return ("lora", "qlora")
    return ("full", "lora") if params < _G4_SMALL_PARAMS and memory_gb >= 8 else ("prompt",)


def epochs(task: Task) -> Iterator[Advice]:
    """R8: few rows want few epochs and an eye on validation."""
    train, rows = task.recipe.train, task.data.rows
    if rows < SMALL_DATA_ROWS and train.max_steps is None and train.num_train_epochs > 3:
        reason = f"{rows:,} rows seen {train.num_train_epochs:g} times: take the step with the lowest validation loss"
        yield Advice(rule="R8", field="train.num_train_epochs", value=3, reason=reason, source="guide G4")


def forgetting(task: Task, chosen: Estimate) -> Iterator[Advice]:
    """R9: warm-up always; a retention set where the base can be forgotten, that is in full tuning or with new facts."""
    recipe, source = task.recipe, "guides G2 G4"
    if recipe.train.warmup_ratio == 0 and recipe.train.lr_scheduler_type not in ("constant",):
        reason = "the first steps at full rate undo what the base knows; warm up over a few per cent of them"
        yield Advice(rule="R9", field="train.warmup_ratio", value=0.03, reason=reason, source=source)
    risky = chosen.candidate.method == "full" or recipe.task.goal == "knowledge"
    if risky and not recipe.data.measures_retention:
        reason = "the base may forget what these rows do not show: measure it on text of the base's own, or on yours"
        yield Advice(rule="R9", field="data.retention", value="builtin", reason=reason, source=source)
    if risky and len(recipe.data.train) == 1:
        value = "[..., {path: general.jsonl, weight: 0.1}]"
        reason = "replay: a share of general text among the rows, set by its weight, keeps what they do not show"
        yield Advice(rule="R9", field="data.train", value=value, reason=reason, source=source)
    if recipe.data.retention_builtin and chosen.candidate.offload_param != "none":
        yield _slow_sample(chosen)


def _slow_sample(chosen: Estimate) -> Advice:
    """One forward pass per token of the sample; a step has one per micro-batch, beside two thirds of other work."""
    passes_s = _SAMPLED_TOKENS * chosen.step_s.expected / chosen.candidate.gradient_accumulation / 3
    reason = (
        f"{_SAMPLED_TOKENS} forward passes with weights from {chosen.candidate.offload_param} before step 0 take about "
        f"{passes_s / 60:.0f} min; rows of your own ({{path: ...}}) need none"
    )
    return Advice(rule="R9", field="data.retention", value="builtin", reason=reason, source=_MEMORY)


def retreats(task: Task, chosen: Estimate) -> Iterator[Advice]:
    """R10: which steps of the retreat from too little memory were taken, in its order."""
    if not chosen.fits:
        return
    candidate, recipe = chosen.candidate, task.recipe
    peak = f"peak {chosen.memory.peak_bytes.expected / GIB:.1f} of {chosen.memory.usable_bytes / GIB:.1f} GiB"
    taken: list[tuple[str, object, str]] = []
    if recipe.train.gradient_checkpointing == AUTO and candidate.gradient_checkpointing:
        taken.append(("train.gradient_checkpointing", True, f"activations recomputed instead of kept: {peak}"))
    if recipe.train.per_device_train_batch_size == AUTO and candidate.micro_batch < largest_micro_batch(candidate):
        said = (
            f"larger ones do not fit or are no faster; {candidate.gradient_accumulation} accumulated keep the batch "
            f"at {candidate.global_batch}"
        )
        taken.append(("train.per_device_train_batch_size", candidate.micro_batch, said))
    if recipe.deepspeed.stage == AUTO and candidate.zero_stage:
        taken.append(("deepspeed.stage", candidate.zero_stage, f"the fastest sharding that fits: {peak}"))
    if recipe.deepspeed.offload_optimizer == AUTO and candidate.offload_optimizer != "none":
        reason = "without offload these GPUs do not hold the optimizer states"
        taken.append(("deepspeed.offload_optimizer", candidate.offload_optimizer, reason))
    if recipe.deepspeed.offload_param == AUTO and candidate.offload_param != "none":
        taken.append(("deepspeed.offload_param", candidate.offload_param, "weights do not fit beside activations"))
    for field, value, reason in taken:
        yield Advice(rule="R10", field=field, value=value, reason=reason, source=f"guides G1 G4; {_MEMORY}")


def across_nodes(task: Task, chosen: Estimate) -> Iterator[Advice]:
    """R14: ZeRO-3 over several nodes beside what it competes with, by bandwidth; what does not fit is said so."""
    ways = zero3_vs_alternatives(task.model, chosen.candidate, task.site)
    if ways and chosen.fits:
        said = ", ".join(
            f"{way.name} {way.step_s:.3g} s per step at {way.link_bytes_s / 1e9:.0f} GB/s"
            + ("" if estimate(task, way.candidate).fits else " (does not fit)")
            for way in ways
        )
        value = "hpZ" if chosen.candidate.hpz_partition > 1 else "ZeRO-3"
        yield Advice(rule="R14", field="deepspeed.stage", value=value, reason=said, source=HPZ_SOURCE)


def tokens(task: Task, chosen: Estimate) -> Iterator[Advice]:
    """R10: whether it fits depends on the tokens of a micro-batch, so say on how many."""
    candidate = chosen.candidate
    if candidate.device != "cuda":
        return
    most, now = tokens_that_fit(task, candidate), candidate.micro_batch * candidate.seq_len
    if most or excess_bytes(chosen):
        upto = f"fits up to {most:,} tokens per micro-batch on" if most else "no number of tokens per micro-batch fits"
        reason = f"{upto} the {candidate.gpu}; this plan has {now:,}"
        yield Advice(rule="R10", field="tokens_per_micro_batch", value=most, reason=reason, source=_MEMORY)


def virtual_tokens(task: Task, chosen: Estimate) -> Iterator[Advice]:
    """R11: prompt methods cannot pack."""
    if chosen.candidate.method in PROMPT_METHODS and task.recipe.data.packing:
        reason = "virtual tokens stand before the first document of a row only, so rows are not packed"
        source = "P-tuning, arXiv 2103.10385"
        yield Advice(rule="R11", field="data.packing", value=False, reason=reason, source=source)


def other_adapters(task: Task, chosen: Estimate) -> Iterator[Advice]:
    """R11: another adapter is one line of the recipe."""
    if task.recipe.method == AUTO and chosen.candidate.method == "lora":
        reason = "one line swaps the adapter, everything else stays: method: dora | adalora | prefix | prompt"
        yield Advice(rule="R11", field="method", value="lora", reason=reason, source="guides G2 G4")


def budget(task: Task, chosen: Estimate, alternatives: Sequence[Estimate]) -> Iterator[Advice]:
    """R14: what each method would cost, before anything is spent, and how the budget set the number of GPUs."""
    unit = "GPU-hours" if chosen.candidate.device == "cuda" else "node-hours"
    best: dict[str, Estimate] = {}
    for each in (*alternatives, chosen):
        best[each.candidate.method] = min(best.get(each.candidate.method, each), each, key=_cost_of_fitting)
    told = sorted((each for each in best.values() if each.fits), key=device_hours)
    if len(told) > 1:
        said = ", ".join(f"{each.candidate.method} {_hours(each)}" for each in told)
        reason = f"{unit} of this run by method, cheapest first: {said}"
        yield Advice(rule="R14", field="method", value=chosen.candidate.method, reason=reason, source="guides G1 G3")
    if task.recipe.slurm.nodes == AUTO and chosen.fits and chosen.candidate.world_size > 1:
        limit = task.recipe.budget.max_gpu_hours
        kept = f"the budget of {limit:,.4g} GPU-hours" if limit else f"{THRIFT:g} times the {unit} of the cheapest plan"
        best_of = " of the best method" if task.objective == "quality" else ""
        reason = f"the fewest {unit}" if task.objective == "cost" else f"the earliest result{best_of} within {kept}"
        value = chosen.candidate.nodes
        yield Advice(rule="R14", field="slurm.nodes", value=value, reason=reason, source=f"objective {task.objective}")


def _hours(each: Estimate) -> str:
    hours = device_hours(each)
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _cost_of_fitting(each: Estimate) -> tuple[bool, float]:
    return not each.fits, device_hours(each)


def queue(chosen: Estimate) -> Iterator[Advice]:
    """R14: the wait in the queue belongs to the time to a result."""
    if chosen.start_s is None:
        return
    nodes = chosen.candidate.nodes
    reason = (
        f"Slurm would start {nodes} node{'s' if nodes > 1 else ''} in {chosen.start_s / 60:,.0f} min, so the result "
        f"comes in {chosen.result_s / 3600:,.1f} h"
    )
    yield Advice(rule="R14", field="slurm.nodes", value=nodes, reason=reason, source="sbatch --test-only")


def trial(task: Task, chosen: Estimate) -> Iterator[Advice]:
    """R15: rules choose where to start, measurements on the user's own data choose what to keep."""
    recipe, candidate = task.recipe, chosen.candidate
    if candidate.method in LORA_METHODS and candidate.lora is not None and recipe.lora.r == AUTO:
        half, twice = max(4, candidate.lora.r // 2), 2 * candidate.lora.r
        reason = (
            f"no rule beats a validation set: run lora.r={half} and lora.r={twice} on a slice (train.max_steps) and "
            "compare their validation loss"
        )
        yield Advice(rule="R15", field="lora.r", value=candidate.lora.r, reason=reason, source="guides G1 G3 G4")


def without_weights(task: Task) -> Iterator[Advice]:
    """R16: what the plan rests on; nothing of it needed weights, a GPU or the cluster."""
    error = f", give or take {task.data.sampling_error:.1%} (95 %)" if task.data.sampling_error else ""
    device = gpu(task.site.gpu)
    reason = (
        f"planned from the model's shape, {task.data.rows:,} rows ({_BASES[task.data.basis]}{error}) and the figures "
        f"of {'this CPU' if device.is_cpu else device.name}: no weights, GPU or job needed"
    )
    yield Advice(rule="R16", field="data.tokens", value=task.data.basis, reason=reason, source="guide G1")
