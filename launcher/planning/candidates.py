"""Every candidate the recipe allows: layouts, shardings, micro-batches and checkpointing, spelled out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launcher.facts.gpu import Gpu, gpu
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.checks import node_limit
from launcher.planning.multinode import hpz_may_help
from launcher.planning.plan import Buckets, Candidate, LoraNumbers, QuantNumbers
from launcher.recipe.schema import AUTO, PROMPT_METHODS, Recipe

_USEFUL_TOKENS = {"cuda": 16_384, "cpu": 4_096}
"""Tokens per micro-batch beyond which a larger one is no faster."""
_DIRECT_IO_BYTES = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where ranks are."""

    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        """Data-parallel ranks."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """What is partitioned and what leaves the GPU."""

    stage: int
    offload_optimizer: str = "none"
    offload_param: str = "none"
    hpz: bool = False
    """Whether each node holds a second partition of the weights, so that backward gathers inside it."""

    @property
    def offloads(self) -> bool:
        """Whether anything leaves the GPU."""
        return self.offload_optimizer != "none" or self.offload_param != "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What advice decided, the same in every layout."""

    method: str
    lora: LoraNumbers | None
    learning_rate: float


def layouts(recipe: Recipe, site: Site) -> list[Layout]:
    """Layouts the recipe and the site allow and the global batch divides by, fewest ranks first."""
    asked = recipe.train.per_device_train_batch_size
    sequences_per_rank = asked if isinstance(asked, int) else 1
    found = []
    for nodes in _node_counts(recipe, site):
        for per_node in _ranks_per_node(recipe, site, nodes):
            layout = Layout(nodes=nodes, gpus_per_node=per_node)
            if recipe.train.global_batch_size % (layout.world_size * sequences_per_rank) == 0:
                found.append(layout)
    return sorted(found, key=lambda layout: (layout.world_size, layout.nodes))


def _powers_of_two(limit: int) -> list[int]:
    powers = [1 << exponent for exponent in range(limit.bit_length()) if 1 << exponent <= limit]
    return powers if not powers or powers[-1] == limit else [*powers, limit]


def _node_counts(recipe: Recipe, site: Site) -> list[int]:
    if isinstance(recipe.slurm.nodes, int):
        return [recipe.slurm.nodes]
    most = node_limit(recipe, site)[0]
    total = recipe.train.global_batch_size
    return [nodes for nodes in range(1, min(most, total) + 1) if total % nodes == 0]


def _ranks_per_node(recipe: Recipe, site: Site, nodes: int) -> list[int]:
    """Part of a node only where one node is enough: half-used nodes cost whole ones."""
    if isinstance(recipe.slurm.gpus_per_node, int):
        return [recipe.slurm.gpus_per_node]
    return _powers_of_two(site.gpus_per_node) if nodes == 1 else [site.gpus_per_node]


def shardings(recipe: Recipe, method: str, layout: Layout, device: Gpu) -> list[Sharding]:
    """Shardings worth trying, simplest first (frozen weights gain nothing from stages 1 and 2)."""
    asked = recipe.deepspeed
    stages = [asked.stage] if isinstance(asked.stage, int) else _stages(method, layout)
    if asked.overrides and not isinstance(asked.stage, int):
        # Overrides ask for DeepSpeed, which stage 0 does without.
        stages = [stage for stage in stages if stage] or [2]
    found = []
    for stage in stages:
        for optimizer in _offloads(asked.offload_optimizer, allowed=stage > 0 and method == "full", device=device):
            # Nobody has shown 4-bit weights to survive parameter offload; never chosen, only obeyed.
            params_may = stage == 3 and method != "qlora" and (optimizer != "none" or method != "full")
            for param in _offloads(asked.offload_param, allowed=params_may, device=device):
                found.append(Sharding(stage=stage, offload_optimizer=optimizer, offload_param=param))
        stays = {asked.offload_optimizer, asked.offload_param} <= {AUTO, "none"}
        if stage == 3 and method == "full" and layout.nodes > 1 and stays and not asked.overrides:
            found.append(Sharding(stage=3, hpz=True))
    if asked.stage == AUTO and layout.world_size == 1 and method == "full":
        # One rank has nothing to shard; DeepSpeed is there for offload alone.
        found = [each for each in found if each.stage == 0 or each.offloads]
    return [each for each in found if _possible(each)]


def _stages(method: str, layout: Layout) -> list[int]:
    if method == "adalora" or (layout.world_size == 1 and method != "full"):
        return [0]
    if method == "full":
        return [0, 2] if layout.world_size == 1 else [0, 2, 3]
    return [0, 3]


def _offloads(asked: str, *, allowed: bool, device: Gpu) -> list[str]:
    if asked != AUTO:
        return [asked]
    return ["none", "cpu"] if allowed and not device.is_cpu else ["none"]


def _possible(sharding: Sharding) -> bool:
    if sharding.offload_param != "none" and sharding.stage < 3:
        return False
    return sharding.offload_optimizer == "none" or sharding.stage > 0


def candidates(
    recipe: Recipe, model: ModelShape, site: Site, tuning: Tuning, layout: Layout, sharding: Sharding
) -> Iterator[Candidate]:
    """Every micro-batch with and without checkpointing, as far as the recipe leaves them open."""
    first = _base(recipe, model, site, tuning, layout, sharding)
    if sharding.hpz and not hpz_may_help(first, site):
        return
    checkpointing = recipe.train.gradient_checkpointing
    choices = [checkpointing] if isinstance(checkpointing, bool) else [False, True]
    if tuning.method == "prefix":
        choices = [False]
    for micro in _micro_batches(recipe, layout, first.device):
        for checkpointed in choices:
            yield replace(
                first,
                micro_batch=micro,
                gradient_accumulation=recipe.train.global_batch_size // (layout.world_size * micro),
                gradient_checkpointing=checkpointed,
                checkpointing_reentrant=checkpointed and sharding.stage == 3 and tuning.method != "full",
            )


def _micro_batches(recipe: Recipe, layout: Layout, device: str) -> list[int]:
    """Powers of two that divide one rank's share of the batch, up to what is useful."""
    asked = recipe.train.per_device_train_batch_size
    if isinstance(asked, int):
        return [asked]
    share = recipe.train.global_batch_size // layout.world_size
    return _useful_micro_batches(share, recipe.data.max_seq_length, device)


def _useful_micro_batches(share: int, seq_len: int, device: str) -> list[int]:
    useful = max(1, _USEFUL_TOKENS[device] // seq_len)
    return [size for size in _powers_of_two(min(share, useful)) if share % size == 0 and size & (size - 1) == 0]


def largest_micro_batch(candidate: Candidate) -> int:
    """The largest micro-batch that was considered for this candidate's layout."""
    share = candidate.micro_batch * candidate.gradient_accumulation
    return _useful_micro_batches(share, candidate.seq_len, candidate.device)[-1]


def _base(
    recipe: Recipe, model: ModelShape, site: Site, tuning: Tuning, layout: Layout, sharding: Sharding
) -> Candidate:
    device, train = gpu(site.gpu), recipe.train
    precision = _precision(recipe, device)
    nvme = "nvme" in (sharding.offload_optimizer, sharding.offload_param)
    prompts = tuning.method in PROMPT_METHODS
    return Candidate(
        method=tuning.method,
        gpu=device.name,
        device="cpu" if device.is_cpu else "cuda",
        nodes=layout.nodes,
        gpus_per_node=layout.gpus_per_node,
        zero_stage=sharding.stage,
        offload_optimizer=sharding.offload_optimizer,
        offload_param=sharding.offload_param,
        nvme_path=site.nvme_path if nvme else None,
        micro_batch=1,
        gradient_accumulation=1,
        gradient_checkpointing=False,
        checkpointing_reentrant=False,
        precision=precision,
        attn_implementation=_attention(recipe, model),
        seq_len=recipe.data.max_seq_length,
        packing=recipe.data.packing and not prompts,
        optim=_optimizer(recipe, device, sharding),
        learning_rate=tuning.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_ratio=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        lora=tuning.lora,
        num_virtual_tokens=recipe.prompt.num_virtual_tokens if prompts else None,
        quant=_quant(recipe, precision, sharding) if tuning.method == "qlora" else None,
        buckets=buckets(model),
        hpz_partition=layout.gpus_per_node if sharding.hpz else 1,
    )


def _attention(recipe: Recipe, model: ModelShape) -> str:
    """SDPA, unless scores are capped inside attention, which its kernels cannot do (transformers then refuses it)."""
    if recipe.model.attn_implementation != AUTO:
        return recipe.model.attn_implementation
    return "eager" if model.attention_softcap else "sdpa"


def _precision(recipe: Recipe, device: Gpu) -> str:
    if recipe.train.precision != AUTO:
        return recipe.train.precision
    if device.is_cpu:
        return "fp32"
    return "bf16" if device.bf16 else "fp16"


def _optimizer(recipe: Recipe, device: Gpu, sharding: Sharding) -> str:
    """Fused AdamW on a GPU: the plain one holds another list of the size of the weights while it steps."""
    if recipe.train.optim != AUTO:
        return recipe.train.optim
    return "adamw_torch" if device.is_cpu or sharding.offload_optimizer != "none" else "adamw_torch_fused"


def _quant(recipe: Recipe, precision: str, sharding: Sharding) -> QuantNumbers:
    """ZeRO-3 partitions only weights stored in a floating-point type."""
    asked = recipe.quantization
    compute = precision if asked.bnb_4bit_compute_dtype == AUTO else asked.bnb_4bit_compute_dtype
    return QuantNumbers(
        quant_type=asked.bnb_4bit_quant_type,
        double_quant=asked.bnb_4bit_use_double_quant,
        compute_dtype=compute,
        storage_dtype=compute if sharding.stage == 3 else "uint8",
    )


def buckets(model: ModelShape) -> Buckets:
    """DeepSpeed's buffers, sized from the model as transformers does: h*h, 0.9 h*h and 10 h elements.

    Live parameters may span two layers (one in use, one kept for its backward), at most DeepSpeed's default of
    1e9 and never less than the largest unit, which is gathered whole whatever the limit.
    """
    square = model.hidden * model.hidden
    live = max(min(2 * model.layer_params, 1_000_000_000), model.largest_unit_params)
    return Buckets(
        reduce_elements=square,
        allgather_elements=square,
        prefetch_elements=int(0.9 * square),
        persistence_elements=10 * model.hidden,
        max_live_elements=live,
        max_reuse_elements=live,
        sub_group_elements=1_000_000_000,
    )


def misaligned_for_nvme(model: ModelShape, candidate: Candidate) -> str | None:
    """Why NVMe optimizer offload would silently corrupt updates, or None.

    DeepSpeed 0.19 swaps gradients at their offset in a flat fp32 buffer; with offsets off the 512 bytes of direct
    I/O the bytes read back are others. Shards of every parameter must therefore be multiples of 512 bytes.
    """
    if candidate.offload_optimizer != "nvme":
        return None
    sizes = {"norms": model.hidden, "embedding": model.vocab * model.hidden}
    sizes |= {linear.name: linear.in_features * linear.out_features for linear in model.linears}
    if candidate.lora is not None:
        ins = {f"lora_A of {linear.name}": candidate.lora.r * linear.in_features for linear in model.linears}
        outs = {f"lora_B of {linear.name}": candidate.lora.r * linear.out_features for linear in model.linears}
        sizes = ins | outs
    for name, elements in sizes.items():
        if elements * 4 % (candidate.world_size * _DIRECT_IO_BYTES):
            return (
                f"NVMe optimizer offload would corrupt updates: a shard of {name} ({elements:,} elements over "
                f"{candidate.world_size} ranks) is no multiple of {_DIRECT_IO_BYTES} bytes; "
                "use offload_optimizer: cpu, or another number of GPUs"
            )
    return None
