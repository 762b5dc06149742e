"""shrunk: a plan's job on a few CPU ranks, with what it cannot exercise there said in words.

The shape of the work stays: method, ZeRO stage, offload, checkpointing, packing, several micro-batches per step where
there are several, several rows per micro-batch where there are several. Numbers shrink.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.planning.plan import Buckets, Candidate, Interval, JobShape, LoraNumbers, Plan
from launcher.planning.resolve import pin
from launcher.recipe.schema import BudgetSection, Recipe

STEPS = 6
"""Optimizer steps of a rehearsal: enough for two saves before the kill and one after it."""
SAVE_STEPS = 2
KILL_STEP = STEPS
"""A rank is killed before this step: the first save is complete by then, and a step after the newest is lost."""
DEFAULT_RANKS, MOST_RANKS = 2, 4
_RANK_R = 16
"""A model of hidden size 64 has no room for more."""
_HANG_MINUTES = 5.0
_MINUTES = 20
_RANK_GIB = 4
"""Memory of one rank: the libraries take one, the logits of a large vocabulary two."""
_STATE_BYTES = 16
"""Per parameter: fp32 weight and gradient, two moments of Adam."""
_SMALL_BUCKETS = Buckets(
    reduce_elements=1_000_000,
    allgather_elements=1_000_000,
    prefetch_elements=100_000,
    persistence_elements=1_000,
    max_live_elements=50_000_000,
    max_reuse_elements=50_000_000,
    sub_group_elements=1_000_000_000,
)
"""Elements; small enough that layers are really partitioned, large enough for any vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shrunk:
    """A small job like a large one."""

    recipe: Recipe
    plan: Plan
    not_exercised: tuple[str, ...]
    """What only the real job can show, one sentence each."""
    capped: tuple[str, ...]
    """Numbers that are smaller than the recipe's and say so."""


def few_ranks(candidate: Candidate, asked: int | None) -> int:
    """Ranks of the rehearsal: as asked, else two, never more than the job has."""
    return min(candidate.world_size, asked or DEFAULT_RANKS, MOST_RANKS)


def shrink_candidate(candidate: Candidate, *, ranks: int) -> Candidate:
    """The candidate on `ranks` CPU ranks of one machine; rows keep their length for now."""
    return replace(
        candidate,
        gpu="cpu",
        device="cpu",
        nodes=1,
        gpus_per_node=ranks,
        offload_optimizer=_offload(candidate.offload_optimizer),
        offload_param=_offload(candidate.offload_param),
        nvme_path=None,
        micro_batch=min(2, candidate.micro_batch),
        gradient_accumulation=min(2, candidate.gradient_accumulation),
        precision=_precision(candidate.precision),
        attn_implementation="eager" if candidate.attn_implementation == "eager" else "sdpa",
        optim="adamw_torch",
        lora=None if candidate.lora is None else _lora(candidate.lora),
        num_virtual_tokens=None if candidate.num_virtual_tokens is None else min(8, candidate.num_virtual_tokens),
        quant=None
        if candidate.quant is None
        else replace(
            candidate.quant,
            compute_dtype=_precision(candidate.quant.compute_dtype),
            storage_dtype=_precision(candidate.quant.storage_dtype),
        ),
        buckets=_SMALL_BUCKETS,
        hpz_partition=1,
    )


def _offload(where: str) -> str:
    return "cpu" if where == "nvme" else where


def _precision(asked: str) -> str:
    return "bf16" if asked == "fp16" else asked


def _lora(lora: LoraNumbers) -> LoraNumbers:
    """At most rank 16, with the same ratio of alpha to rank."""
    r = min(_RANK_R, lora.r)
    return replace(lora, r=r, lora_alpha=lora.lora_alpha * r / lora.r)


def shrink(recipe: Recipe, plan: Plan, candidate: Candidate, *, seq_len: int, params: int = 0) -> Shrunk:
    """The rehearsal's recipe and plan; model, data and output folder are still the recipe's.

    `candidate` is the small one, `seq_len` the tokens per row, `params` the small model's parameters.
    """
    small = replace(candidate, seq_len=min(seq_len, candidate.seq_len))
    pinned = pin(recipe, small)
    lora = pinned.lora if small.lora is None else replace(pinned.lora, lora_alpha=small.lora.lora_alpha)
    tokens = small.num_virtual_tokens
    slurm = pinned.slurm
    quiet = replace(
        pinned,
        data=replace(pinned.data, max_seq_length=small.seq_len),
        lora=lora,
        prompt=pinned.prompt if tokens is None else replace(pinned.prompt, num_virtual_tokens=tokens),
        train=replace(
            pinned.train,
            global_batch_size=small.global_batch,
            max_steps=STEPS,
            eval_steps=SAVE_STEPS,
            logging_steps=1,
        ),
        checkpoint=replace(pinned.checkpoint, save_minutes=None, save_steps=SAVE_STEPS),
        survival=replace(pinned.survival, hang_minutes=_HANG_MINUTES, min_nodes=None),
        slurm=replace(
            slurm,
            time=_MINUTES,
            mem=None,
            constraint=None,
            exclusive=False,
            requeue=True,
            max_restarts=2,
            extra={key: value for key, value in slurm.extra.items() if _harmless(key)},
        ),
        wandb=replace(pinned.wandb, mode="disabled", log_model=False),
        budget=BudgetSection(),
    )
    return Shrunk(
        recipe=quiet,
        plan=_plan(plan, small, params),
        not_exercised=tuple(_not_exercised(recipe, plan.chosen.candidate)),
        capped=tuple(_capped(plan.chosen.candidate, small)),
    )


def _harmless(option: str) -> bool:
    """sbatch options that say where, not which devices or after what."""
    return not any(word in option for word in ("gpu", "gres", "tres", "depend", "begin", "mem", "cpus", "array"))


def _plan(plan: Plan, small: Candidate, params: int) -> Plan:
    """The plan of the small job: its candidate, seconds instead of minutes, no alternatives."""
    short = Interval(low=0.1, expected=1.0, high=5.0)
    chosen = replace(
        plan.chosen,
        candidate=small,
        step_s=short,
        save_s=2.0,
        steps=STEPS,
        wall_s=60.0,
        # The worker looks whether the machine has them.
        host_ram_bytes_per_node=small.world_size * (2**30 + _STATE_BYTES * params),
        checkpoint_bytes=_STATE_BYTES * params,
    )
    return replace(
        plan,
        chosen=chosen,
        alternatives=(),
        elastic=(),
        job=JobShape(time_limit_min=_MINUTES, cpus_per_task=1, mem=f"{_RANK_GIB * small.world_size}G"),
    )


def _capped(large: Candidate, small: Candidate) -> list[str]:
    """What is smaller than in the recipe, apart from the model."""
    pairs = [
        ("ranks", large.world_size, small.world_size),
        ("rows per micro-batch", large.micro_batch, small.micro_batch),
        ("gradient accumulation", large.gradient_accumulation, small.gradient_accumulation),
        ("tokens per row", large.seq_len, small.seq_len),
    ]
    if large.lora is not None and small.lora is not None:
        pairs.append(("LoRA rank", large.lora.r, small.lora.r))
    return [f"{what} {before} -> {now}" for what, before, now in pairs if before != now]


def _not_exercised(recipe: Recipe, large: Candidate) -> list[str]:
    """What CPU ranks with random weights cannot show."""
    found = ["the base model's own weights: random ones stood in", "memory use, speed and quality at full size"]
    if large.device == "cuda":
        found.append("GPU kernels and their drivers")
    if large.device == "cuda" and large.world_size > 1:
        found.append("NCCL: the ranks met over Gloo")
    if large.nodes > 1:
        found.append(f"the network between {large.nodes} nodes")
    if large.attn_implementation not in ("eager", "sdpa"):
        found.append(f"{large.attn_implementation}: attention ran as sdpa")
    if large.precision == "fp16":
        found.append("fp16 and its loss scaling: the CPU trained in bf16")
    if large.optim != "adamw_torch" and large.offload_optimizer == "none":
        found.append(f"{large.optim}: the same steps were taken by adamw_torch")
    if "nvme" in (large.offload_optimizer, large.offload_param):
        found.append("offload to NVMe: it went to host memory")
    if large.hpz_partition > 1:
        found.append("ZeRO++'s second partition (hpZ)")
    if recipe.wandb.mode != "disabled":
        found.append("Weights & Biases")
    return found
