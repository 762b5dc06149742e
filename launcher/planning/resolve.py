"""resolve: a recipe with everything the planner decided filled in."""

from __future__ import annotations

from dataclasses import replace

from launcher.planning.estimate import evaluation_steps
from launcher.planning.plan import Candidate, Plan
from launcher.recipe.schema import Recipe


def resolve(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with everything the planner decides filled in from `plan.chosen`.

    What others decide stays `auto`: row formats (the reader), W&B mode (the tracker), output_dir and site (the caller).
    """
    candidate = plan.chosen.candidate
    pinned = pin(recipe, candidate)
    return replace(
        pinned,
        train=replace(pinned.train, eval_steps=evaluation_steps(recipe, plan.chosen.steps)),
        checkpoint=replace(pinned.checkpoint, background=_background(recipe, plan)),
        survival=replace(pinned.survival, hang_minutes=hang_minutes(recipe, plan)),
        slurm=replace(pinned.slurm, time=plan.job.time_limit_min, cpus_per_task=plan.job.cpus_per_task),
    )


def _background(recipe: Recipe, plan: Plan) -> bool:
    asked = recipe.checkpoint.background
    return asked if isinstance(asked, bool) else plan.chosen.background_saves


def hang_minutes(recipe: Recipe, plan: Plan) -> float:
    """Minutes without progress after which a rank counts as hung.

    A slow file system or a neighbour's traffic may make a step several times slower, and the first step compiles
    kernels: ten slow steps, and never less than ten minutes.
    """
    asked = recipe.survival.hang_minutes
    return asked if isinstance(asked, int | float) else max(10.0, round(10 * plan.chosen.step_s.high / 60, 1))


def pin(recipe: Recipe, candidate: Candidate) -> Recipe:
    """The recipe that allows this candidate and no other."""
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
        ),
        deepspeed=replace(
            recipe.deepspeed,
            stage=candidate.zero_stage,
            offload_optimizer=candidate.offload_optimizer,
            offload_param=candidate.offload_param,
        ),
        slurm=replace(recipe.slurm, nodes=candidate.nodes, gpus_per_node=candidate.gpus_per_node),
    )
