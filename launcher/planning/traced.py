"""plan_by_trace: memory of the layout a recipe fixes, where the closed form refuses the model's shape by name.

States, shards and buffers follow from counts of the real class (`anatomy`), everything that grows with tokens is
measured in one traced step of it (`trace`). There is no search and no time: each candidate costs a process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import RecipeError, raise_all
from launcher.facts.dataset import DatasetFacts, dataset_facts
from launcher.facts.gpu import gpu
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site, site_facts
from launcher.planning.anatomy import measured_shape
from launcher.planning.candidates import Layout, candidates, shardings
from launcher.planning.checks import check
from launcher.planning.estimate import Task, memory_sentence
from launcher.planning.explore import tuning_of
from launcher.planning.memory import TERMS, Moment, estimate_memory, fits, moments
from launcher.planning.plan import Candidate, Interval, MemoryEstimate
from launcher.planning.prepare import load_located
from launcher.planning.stack import OUR_STACK
from launcher.planning.trace import Trace, model_config, python_of, trace_step
from launcher.planning.trainable import trainable_params
from launcher.recipe.schema import AUTO, LORA_METHODS, Recipe

_MEASURED_IN = {
    "loss forward": ("loss forward",),
    "loss backward": ("loss backward",),
    "backward of one layer": ("backward of the last layer",),
    "end of backward": ("backward of the first layer", "embedding backward"),
}
"""A moment of the closed form -> the traced moments that are it."""
_MUST_BE_FIXED = {
    "train.per_device_train_batch_size": "1",
    "deepspeed.stage": "0",
    "slurm.nodes": "1",
    "slurm.gpus_per_node": "1",
}
"""Recipe key -> what to set it to for the smallest run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedPlan:
    """One candidate whose memory was measured on fake tensors."""

    recipe: str
    model: str
    site: str
    refusal: str
    """Why there is no closed form."""
    params: int
    trainable_params: int
    candidate: Candidate
    memory: MemoryEstimate
    trace: Trace

    @property
    def fits(self) -> bool:
        """Whether the cautious end of it fits the device."""
        return fits(self.memory)

    @property
    def rejected_because(self) -> str | None:
        """Such as: needs 30.1 GiB per GPU (...), the RTX-4090 has 23.5."""
        return None if self.fits else memory_sentence(self.memory, self.candidate)


def plan_by_trace(recipe: Recipe, site: Site, data: DatasetFacts) -> TracedPlan:
    """Trace the recipe's layout; with gradient_checkpointing auto first without, then with it.

    Raises:
        RecipeError: the recipe leaves open what only a search could decide; all such keys are named.
        ModelError, ClusterError: the real class cannot be built or traced.
    """
    raise_all(RecipeError, list(_left_open(recipe)))
    config, python = model_config(recipe.model), python_of(site)
    shape = measured_shape(config, name=recipe.model.name_or_path, python=python)
    check(recipe, shape, site)
    found: TracedPlan | None = None
    for candidate in _candidates(Task(recipe=recipe, model=shape, data=data, site=site)):
        trace = trace_step(config, candidate, python=python)
        found = TracedPlan(
            recipe=recipe.name,
            model=recipe.model.name_or_path,
            site=site.name,
            refusal=f"architecture {config.get('model_type')!r} is not known to the planner",
            params=shape.params,
            trainable_params=trainable_params(shape, candidate),
            candidate=candidate,
            memory=traced_memory(shape, candidate, trace, site),
            trace=trace,
        )
        if found.fits:
            break
    if found is None:
        raise RecipeError("deepspeed: no sharding of this stage runs the recipe's method; set deepspeed.stage to 0")
    return found


def trace_recipe_file(path: Path, overrides: Sequence[str] = ()) -> tuple[TracedPlan, tuple[str, ...]]:
    """`plan_by_trace` of a recipe file, its facts gathered, and the notices of its reading.

    Raises:
        RecipeError, DataError, ModelError, ClusterError: what the stage that failed found.
    """
    loaded = load_located(path, overrides)
    recipe, folder = loaded.recipe, Path(loaded.recipe.model.name_or_path)
    data = dataset_facts(recipe.data, folder if folder.is_dir() else None)
    return plan_by_trace(recipe, site_facts(recipe.slurm.site), data), tuple(loaded.notices)


def _left_open(recipe: Recipe) -> Iterator[str]:
    if recipe.method not in ("full", *LORA_METHODS):
        yield (
            f"method: {recipe.method}: a traced plan measures the one method it is given; set method to full, "
            f"{', '.join(LORA_METHODS)}"
        )
    for key, smallest in _MUST_BE_FIXED.items():
        section, _, field = key.partition(".")
        if getattr(getattr(recipe, section), field) == AUTO:
            yield f"{key}: auto: a traced plan measures one layout and searches none; set it, such as {key}={smallest}"


def _candidates(task: Task) -> Iterator[Candidate]:
    """The recipe's layout without and with checkpointing; offloaded only as far as the recipe asks for it."""
    recipe = task.recipe
    tuning, _ = tuning_of(task, recipe.method)
    layout = Layout(nodes=int(recipe.slurm.nodes), gpus_per_node=int(recipe.slurm.gpus_per_node))
    asked = recipe.deepspeed
    stays = replace(
        asked,
        offload_optimizer="none" if asked.offload_optimizer == AUTO else asked.offload_optimizer,
        offload_param="none" if asked.offload_param == AUTO else asked.offload_param,
    )
    fixed = replace(recipe, deepspeed=stays)
    for sharding in shardings(fixed, recipe.method, layout, gpu(task.site.gpu)):
        if not sharding.hpz:
            yield from candidates(fixed, task.model, task.site, tuning, layout, sharding)


def traced_memory(shape: ModelShape, candidate: Candidate, trace: Trace, site: Site) -> MemoryEstimate:
    """Peak of one rank: states of the counted shape, tokens as traced, at the largest moment of a step."""
    closed = estimate_memory(shape, candidate, site)
    alive = [_measured(moment, candidate, trace) for moment in moments(shape, candidate)]
    moment = max(alive, key=lambda each: each.total_bytes)
    terms = {term: round(getattr(moment, term)) for term in TERMS if term != "runtime"}
    runtime = closed.terms_bytes["runtime"]
    peak = _peak(terms)
    reserved = OUR_STACK.fragmentation if candidate.device == "cuda" else (1.0, 1.0, 1.0)
    ceiling = max(closed.usable_bytes, peak.high + runtime)
    low, expected, high = (
        min(value * share + runtime, ceiling)
        for value, share in zip((peak.low, peak.expected, peak.high), reserved, strict=True)
    )
    return MemoryEstimate(
        terms_bytes={**terms, "runtime": runtime},
        peak_bytes=peak,
        device_bytes=Interval(low=round(low), expected=round(expected), high=round(high)),
        usable_bytes=closed.usable_bytes,
        binding=moment.name,
    )


def _peak(terms: dict[str, int]) -> Interval:
    """The stack's band around the sum; the tracer's own error is within it."""
    expected = sum(terms.values())
    low, high = OUR_STACK.peak_band
    return Interval(low=round(expected * low), expected=expected, high=round(expected * high))


def _measured(moment: Moment, candidate: Candidate, trace: Trace) -> Moment:
    """The moment with what was traced of it; whole weights that ZeRO-3 gathers are not part of a trace."""
    names = _MEASURED_IN.get(moment.name)
    if names is None:
        return moment
    # Frozen embeddings have no backward, so not every moment is in every trace.
    peak = max(each.peak_bytes for each in trace.moments if each.name in names)
    kept = min(trace.activations_bytes, peak) if moment.name.startswith("loss") else peak
    gathered = moment.gathered if candidate.zero_stage == 3 else 0.0
    return replace(moment, activations=kept, logits=peak - kept, gathered=gathered)
