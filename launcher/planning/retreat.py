"""The order of retreat from too little memory (rule R10): one step after the other, each with the field it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from launcher.planning.plan import Candidate
from launcher.recipe.schema import AUTO, LORA_METHODS, Recipe

SMALLEST_RANK = 8
SHORTEST_ROWS = 256
"""Tokens below which a shorter max_seq_length is not proposed."""
METHODS_BY_MEMORY = ("full", "lora", "qlora", "prompt")
"""`method: auto` goes down this list until one fits; a 4-bit base is the last that trains all layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of the retreat: what it is called, and the recipe it leads to (unchanged where it says nothing)."""

    name: str
    relax: Callable[[Recipe, Candidate], Iterator[Recipe]]


def _checkpointing(recipe: Recipe, _now: Candidate) -> Iterator[Recipe]:
    yield replace(recipe, train=replace(recipe.train, gradient_checkpointing=AUTO))


def _micro_batch(recipe: Recipe, _now: Candidate) -> Iterator[Recipe]:
    yield replace(recipe, train=replace(recipe.train, per_device_train_batch_size=AUTO))


def _stage(recipe: Recipe, _now: Candidate) -> Iterator[Recipe]:
    yield replace(recipe, deepspeed=replace(recipe.deepspeed, stage=AUTO))


def _offload_optimizer(recipe: Recipe, _now: Candidate) -> Iterator[Recipe]:
    """A pinned fused or 8-bit optimizer has to go with it."""
    freed = replace(recipe, train=replace(recipe.train, optim=AUTO))
    yield replace(freed, deepspeed=replace(recipe.deepspeed, offload_optimizer=AUTO))


def _offload_param(recipe: Recipe, _now: Candidate) -> Iterator[Recipe]:
    yield replace(recipe, deepspeed=replace(recipe.deepspeed, offload_param=AUTO))


def _ranks(recipe: Recipe, _now: Candidate) -> Iterator[Recipe]:
    yield replace(recipe, slurm=replace(recipe.slurm, nodes=AUTO, gpus_per_node=AUTO))


def _cheaper_methods(recipe: Recipe, now: Candidate) -> Iterator[Recipe]:
    if now.method in METHODS_BY_MEMORY[:2] or now.method in ("dora", "adalora"):
        yield freed(recipe, "lora")
        yield freed(recipe, "qlora")


def _rank(recipe: Recipe, now: Candidate) -> Iterator[Recipe]:
    if now.method in LORA_METHODS and now.lora is not None and now.lora.r > SMALLEST_RANK:
        yield replace(recipe, lora=replace(recipe.lora, r=SMALLEST_RANK, lora_alpha=AUTO))


def _rows(recipe: Recipe, _now: Candidate) -> Iterator[Recipe]:
    length = recipe.data.max_seq_length // 2
    while length >= SHORTEST_ROWS:
        yield replace(recipe, data=replace(recipe.data, max_seq_length=length))
        length //= 2


def _prompt(recipe: Recipe, now: Candidate) -> Iterator[Recipe]:
    if now.method != "prompt":
        yield freed(recipe, "prompt")


METHOD_STEP = Step(name="adapter, then 4-bit base", relax=_cheaper_methods)
ROW_STEP = Step(name="shorter rows", relax=_rows)
RETREAT = (
    Step(name="gradient checkpointing", relax=_checkpointing),
    Step(name="smaller micro-batch with accumulation", relax=_micro_batch),
    Step(name="higher ZeRO stage", relax=_stage),
    Step(name="optimizer offload", relax=_offload_optimizer),
    Step(name="parameter offload", relax=_offload_param),
    Step(name="more GPUs", relax=_ranks),
    METHOD_STEP,
    Step(name="smaller rank", relax=_rank),
    ROW_STEP,
    Step(name="prompt-based tuning", relax=_prompt),
)
"""R10's order, guides G1 and G4; GPUs of the same site come before giving up the method."""
SAME_METHOD = 6
"""Steps of RETREAT that keep the method, the rank and the rows."""


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
