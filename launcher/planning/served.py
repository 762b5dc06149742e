"""Served: what the engine that an adapter is meant for will refuse, known before it is trained.

The rules are those of the export (facts/serving.py); here a recipe or a plan's candidate is put before them.
"""

from __future__ import annotations

from collections.abc import Iterator

from launcher.facts.serving import ENGINES, VLLM_RANKS, Refusal, Served, max_lora_rank, reasons
from launcher.facts.shape import ModelShape
from launcher.planning.plan import Advice, Candidate
from launcher.planning.trainable import expert_targets
from launcher.recipe.schema import AUTO, LORA_METHODS, Recipe

_NAMES = {"vllm": "vLLM", "tgi": "TGI", "sglang": "SGLang", "merged": "a merge"}
_SOURCE = "guides G2 G3; the engines' documentation of LoRA"
_RULES = {"method": "R13"}
_VALUES = {"lora.target_modules": "modules of attention and MLP"}


def export_problems(recipe: Recipe, model: ModelShape) -> Iterator[str]:
    """What export.engine would refuse of the adapter that this recipe trains; nothing where it names no engine.

    method: auto chooses among whole models and plain LoRA, so it is looked at as lora.
    """
    engine = recipe.export.engine
    if engine is None:
        return
    method = "lora" if recipe.method == AUTO else recipe.method
    lora = recipe.lora
    rank = lora.r if isinstance(lora.r, int) and method in LORA_METHODS else None
    adapter = Served(
        method=method,
        rank=rank,
        target_modules=lora.target_modules,
        fused_experts=method in LORA_METHODS and bool(expert_targets(model, lora.target_modules)),
    )
    for one in reasons(engine, adapter):
        yield f"{one.field}: {_NAMES[engine]} (export.engine: {engine}) would refuse the adapter: {one.sentence}"


def serving_notes(recipe: Recipe, model: ModelShape, candidate: Candidate) -> Iterator[Advice]:
    """R12, R13: what inference servers will refuse later is said now, and what a rank between vLLM's steps costs."""
    adapter = _of_candidate(model, candidate)
    if recipe.export.engine is None:
        yield from _by_reason(adapter, candidate)
    rank = adapter.rank
    if recipe.export.engine == "vllm" and rank is not None and rank not in VLLM_RANKS and rank < VLLM_RANKS[-1]:
        step = max_lora_rank(rank)
        reason = f"vLLM serves rank {rank} with --max-lora-rank {step} and keeps as much memory as for rank {step}"
        yield Advice(rule="R12", field="lora.r", value=step, reason=reason, source=_SOURCE)


def _by_reason(adapter: Served, candidate: Candidate) -> Iterator[Advice]:
    """Each reason once, with the engines whose it is."""
    whose: dict[Refusal, list[str]] = {}
    for engine in ENGINES:
        for one in reasons(engine, adapter):
            whose.setdefault(one, []).append(_NAMES[engine])
    for one, engines in whose.items():
        known = {"method": candidate.method, "lora.r": adapter.rank} | _VALUES
        reason = f"{_listed(engines)} would refuse it: {one.sentence}"
        rule = _RULES.get(one.field, "R12")
        yield Advice(rule=rule, field=one.field, value=known[one.field], reason=reason, source=_SOURCE)


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _of_candidate(model: ModelShape, candidate: Candidate) -> Served:
    lora = candidate.lora
    if lora is None:
        return Served(method=candidate.method, rank=None)
    return Served(
        method=candidate.method,
        rank=lora.r,
        target_modules=lora.target_modules,
        fused_experts=bool(expert_targets(model, lora.target_modules)),
    )
