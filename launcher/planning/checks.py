"""What is refused before anything is estimated: contradictions inside a recipe, and with the site."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.errors import ClusterError, RecipeError, raise_all
from launcher.facts.gpu import gpu
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.deepspeed_config import override_problems
from launcher.planning.plan import LoraNumbers
from launcher.planning.served import export_problems
from launcher.planning.trainable import expert_problem, targeted
from launcher.recipe.schema import LORA_METHODS, Recipe


def check(recipe: Recipe, model: ModelShape, site: Site) -> None:
    """Refuse what can never run, all problems at once.

    Raises:
        ClusterError: it asks for more than the site has, or for what its GPUs cannot do; with everything below.
        RecipeError: the recipe contradicts itself, its batch does not divide, or LoRA targets match nothing.
    """
    impossible = [*_site_problems(recipe, site), *_device_problems(recipe, site)]
    problems = [*_batch_problems(recipe), *_sharding_problems(recipe)]
    problems += override_problems(recipe.deepspeed.overrides)
    if recipe.model.attn_implementation == "sdpa" and model.attention_softcap:
        problems.append(
            f"model.attn_implementation: sdpa cannot cap attention scores, which {recipe.model.name_or_path} does; "
            "use eager or, on a GPU, flash_attention_2"
        )
    if recipe.method in (*LORA_METHODS, "auto"):
        try:
            targeted(model, recipe.lora.target_modules)
        except RecipeError as error:
            problems += error.problems
        problems += _expert_problems(recipe, model)
    problems += export_problems(recipe, model)
    raise_all(ClusterError if impossible else RecipeError, [*impossible, *problems])


def _expert_problems(recipe: Recipe, model: ModelShape) -> list[str]:
    """What PEFT refuses on fused experts, as far as the recipe says it itself."""
    asked = recipe.lora
    lora = LoraNumbers(
        r=1,
        lora_alpha=1.0,
        lora_dropout=asked.lora_dropout if isinstance(asked.lora_dropout, float) else 0.0,
        target_modules=asked.target_modules,
        use_rslora=asked.use_rslora,
        use_dora=recipe.method == "dora",
    )
    problem = expert_problem(model, lora)
    return [problem] if problem else []


def node_limit(recipe: Recipe, site: Site) -> tuple[int, str]:
    """Most nodes one job may have, and who says so."""
    wanted = recipe.slurm.partition or site.default_partition
    for partition in site.partitions:
        if partition.name == wanted:
            limit = min(partition.nodes, partition.max_nodes or partition.nodes, site.max_nodes)
            return limit, f"partition {partition.name} of {site.name}"
    return site.max_nodes, f"site {site.name}"


def _site_problems(recipe: Recipe, site: Site) -> Iterator[str]:
    asked, (limit, who) = recipe.slurm, node_limit(recipe, site)
    if isinstance(asked.nodes, int) and asked.nodes > limit:
        yield f"slurm.nodes: {asked.nodes} asked for, {who} has {limit}; set slurm.nodes: {limit} or fewer"
    known_gpus = site.gpu != "cpu"
    if isinstance(asked.gpus_per_node, int) and known_gpus and asked.gpus_per_node > site.gpus_per_node:
        yield (
            f"slurm.gpus_per_node: {asked.gpus_per_node} asked for, a node of site {site.name} has "
            f"{site.gpus_per_node} {site.gpu}; set slurm.gpus_per_node: {site.gpus_per_node} or fewer"
        )
    for key in ("offload_optimizer", "offload_param"):
        if getattr(recipe.deepspeed, key) == "nvme" and not site.nvme_path:
            yield f"deepspeed.{key}: nvme, but site {site.name} names no nvme_path; use cpu, or set it in its profile"


def _batch_problems(recipe: Recipe) -> Iterator[str]:
    """The global batch must be micro-batch x accumulation x ranks, all whole numbers."""
    total, micro = recipe.train.global_batch_size, recipe.train.per_device_train_batch_size
    nodes = recipe.slurm.nodes if isinstance(recipe.slurm.nodes, int) else None
    per_node = recipe.slurm.gpus_per_node if isinstance(recipe.slurm.gpus_per_node, int) else None
    factors = {
        "nodes": nodes,
        "GPUs per node": per_node,
        "sequences per GPU": micro if isinstance(micro, int) else None,
    }
    known = {name: value for name, value in factors.items() if value}
    unit = 1
    for value in known.values():
        unit *= value
    if total % unit == 0:
        return
    product = " x ".join(f"{value} {name}" for name, value in known.items())
    nearest = sorted({max(unit, total // unit * unit), (total // unit + 1) * unit})
    yield (
        f"train.global_batch_size: {total} does not divide by {product} = {unit} "
        f"({total} = {total // unit} x {unit} + {total % unit}); nearest that do: {', '.join(map(str, nearest))}"
    )


def _sharding_problems(recipe: Recipe) -> Iterator[str]:
    section, stage = recipe.deepspeed, recipe.deepspeed.stage
    if stage == 0 and section.offload_optimizer not in ("auto", "none"):
        yield f"deepspeed.offload_optimizer: {section.offload_optimizer} needs deepspeed.stage 1, 2 or 3, not 0"
    if stage in (0, 1, 2) and section.offload_param not in ("auto", "none"):
        yield f"deepspeed.offload_param: {section.offload_param} needs deepspeed.stage: 3, not {stage}"
    if recipe.method == "adalora" and stage in (1, 2, 3):
        yield f"deepspeed.stage: {stage} does not work with adalora, whose rank allocation reads whole gradients; use 0"
    if recipe.method == "prefix" and recipe.train.gradient_checkpointing is True:
        yield "train.gradient_checkpointing: true drops the cache that prefix tuning writes to; set it to false or auto"
    if "8bit" in recipe.train.optim and section.offload_optimizer not in ("auto", "none"):
        yield f"train.optim: {recipe.train.optim} keeps its states on the GPU; use adamw_torch to offload them"
    if section.overrides and stage == 0:
        yield "deepspeed.overrides: stage 0 runs without DeepSpeed; set deepspeed.stage to 1, 2 or 3, or remove them"


def _device_problems(recipe: Recipe, site: Site) -> Iterator[str]:
    device = gpu(site.gpu)
    if recipe.train.precision == "bf16" and not device.bf16 and not device.is_cpu:
        yield f"train.precision: bf16, but {device.name} has no bf16 units; use fp16"
    if recipe.train.precision == "fp16" and device.is_cpu:
        yield "train.precision: fp16 does not train on a CPU; use fp32 or bf16"
    if recipe.model.attn_implementation == "flash_attention_2" and device.is_cpu:
        yield "model.attn_implementation: flash_attention_2 needs a GPU; use sdpa"
    if recipe.train.optim in ("adamw_torch_fused",) and device.is_cpu:
        yield "train.optim: adamw_torch_fused needs a GPU; use adamw_torch"
