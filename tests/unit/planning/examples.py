"""The six published cases of the planner, and sites to plan them on, in one place for every test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.errors import DoesNotFitError
from launcher.facts.dataset import DatasetFacts
from launcher.facts.model import model_shape
from launcher.facts.site import Site
from launcher.planning.plan import Plan
from launcher.planning.search import make_plan
from launcher.recipe.schema import (
    DataSection,
    DataSource,
    DeepSpeedSection,
    ModelSection,
    Recipe,
    SlurmSection,
    TrainSection,
)

GIB = 2**30
LLAMA_70B, LLAMA_8B, MIXTRAL = "meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-8B", "mistralai/Mixtral-8x7B-v0.1"
MISTRAL, QWEN_HALF = "mistralai/Mistral-7B-v0.1", "Qwen/Qwen2.5-0.5B"

A100 = Site(
    name="a100",
    executor="slurm",
    gpu="A100-80GB",
    gpus_per_node=8,
    max_nodes=16,
    cpus_per_node=128,
    mem_bytes_per_node=1000 * GIB,
)
RTX4090 = replace(
    A100, name="desk", executor="local", gpu="RTX-4090", gpus_per_node=1, max_nodes=1, mem_bytes_per_node=64 * GIB
)
CPU = replace(RTX4090, name="laptop", gpu="cpu", gpus_per_node=4, cpus_per_node=4, mem_bytes_per_node=16 * GIB)
DATA = DatasetFacts(
    rows=50_000, tokens=30_000_000, basis="counted", max_tokens=4096, mean_tokens=600.0, validation_rows=1000
)


def a_recipe(model: str = LLAMA_8B, method: str = "auto", **fields: Any) -> Recipe:
    """A recipe on an id; `fields` are sections or top-level values."""
    sections: dict[str, Any] = {
        "data": DataSection(train=(DataSource(path="owner/rows"),)),
        "train": TrainSection(global_batch_size=128),
    }
    return Recipe(name="example", model=ModelSection(name_or_path=model), method=method, **(sections | fields))


def on(nodes: int, gpus: int) -> SlurmSection:
    """So many nodes with so many ranks each."""
    return SlurmSection(nodes=nodes, gpus_per_node=gpus)


SIX = {
    "70b-full-8x8": a_recipe(LLAMA_70B, "full", slurm=on(8, 8)),
    "70b-full-2x8-offload": a_recipe(
        LLAMA_70B, "full", slurm=on(2, 8), deepspeed=DeepSpeedSection(stage=3, offload_optimizer="cpu")
    ),
    "8b-full-1x8": a_recipe(LLAMA_8B, "full", slurm=on(1, 8)),
    "70b-qlora-1x8": a_recipe(LLAMA_70B, "qlora", slurm=on(1, 8), deepspeed=DeepSpeedSection(stage=3)),
    "8b-lora-1x1": a_recipe(LLAMA_8B, "lora", slurm=on(1, 1), deepspeed=DeepSpeedSection(stage=2)),
    "8x7b-lora-1x8": a_recipe(MIXTRAL, "lora", slurm=on(1, 8)),
}
"""The six configurations that are kept as golden files; two ask for a stage that auto would not choose."""


def plan_of(recipe: Recipe, site: Site = A100, data: DatasetFacts = DATA) -> Plan:
    """The plan, whether it fits or not."""
    try:
        return make_plan(recipe, model_shape(recipe.model), data, site)
    except DoesNotFitError as error:
        plan: Plan = error.plan
        return plan


def refused(recipe: Recipe, site: Site = A100, data: DatasetFacts = DATA) -> DoesNotFitError:
    """The refusal of a recipe that does not fit."""
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(recipe, model_shape(recipe.model), data, site)
    return caught.value
