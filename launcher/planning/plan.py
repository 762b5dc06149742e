"""The plan: frozen values that say what was decided and what it is predicted to cost.

No logic lives here beyond JSON both ways. `plan_to_json` writes the document of `launcher plan --json`
(schema 1: bytes and seconds, stable keys); `plan_from_json` reads it back, so that `plan.json` in a run
folder is the same document and a worker needs nothing else to know what it is to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.errors import ConflictError
from launcher.facts.lengths import Bin

SCHEMA = 1
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes per element of a candidate's `precision`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A prediction: low <= expected <= high, all in the unit of the field that holds it."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraNumbers:
    """Low-rank adapter, every number explicit (PEFT LoraConfig names)."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str | tuple[str, ...]
    use_rslora: bool
    use_dora: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantNumbers:
    """4-bit base of qlora (bitsandbytes names; dtypes as bf16 | fp16 | fp32)."""

    quant_type: str
    double_quant: bool
    compute_dtype: str
    storage_dtype: str
    """uint8, or the compute dtype where ZeRO-3 has to shard the packed weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """DeepSpeed buffer sizes, in elements (not bytes), sized from the model."""

    reduce_elements: int
    allgather_elements: int
    prefetch_elements: int
    persistence_elements: int
    max_live_elements: int
    max_reuse_elements: int
    sub_group_elements: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to run the recipe, every number explicit."""

    method: str
    gpu: str
    """GPU catalogue name, or "cpu"."""
    device: str
    """cuda | cpu."""
    nodes: int
    gpus_per_node: int
    """Ranks per node: GPUs, or CPU ranks where there is no GPU."""
    zero_stage: int
    """0 = plain torch (DDP), 1-3 = DeepSpeed."""
    offload_optimizer: str
    """none | cpu | nvme."""
    offload_param: str
    """none | cpu | nvme."""
    nvme_path: str | None
    micro_batch: int
    """Sequences per forward pass of one rank."""
    gradient_accumulation: int
    """Micro-batches per optimizer step and rank."""
    gradient_checkpointing: bool
    checkpointing_reentrant: bool
    """True where ZeRO-3 meets frozen weights: the non-reentrant form crashes there."""
    precision: str
    """bf16 | fp16 | fp32."""
    attn_implementation: str
    seq_len: int
    packing: bool
    optim: str
    learning_rate: float
    lr_scheduler_type: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    lora: LoraNumbers | None
    num_virtual_tokens: int | None
    quant: QuantNumbers | None
    buckets: Buckets
    hpz_partition: int = 1
    """Ranks that share a second partition of the weights for backward's gathers (ZeRO++ hpZ); 1 = none."""

    @property
    def world_size(self) -> int:
        """Data-parallel ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step over all ranks."""
        return self.micro_batch * self.gradient_accumulation * self.world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes per GPU, term by term."""

    terms_bytes: dict[str, int]
    """weights, gradients, optimizer, activations, logits, gathered, buffers, runtime."""
    peak_bytes: Interval
    """What the framework's allocator reports as peak allocated."""
    device_bytes: Interval
    """What the whole device shows: allocator reserve, context, communication buffers."""
    usable_bytes: int
    binding: str
    """The moment that sets the peak, such as "optimizer step"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Money, in the user's currency; amount is None without a price."""

    amount: float | None
    price_per_gpu_hour: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A candidate with its predictions."""

    candidate: Candidate
    trainable_params: int
    fits: bool
    """Whether it fits the memory."""
    memory: MemoryEstimate
    host_ram_bytes_per_node: int
    checkpoint_bytes: int
    step_s: Interval
    tokens_per_s_per_gpu: float
    steps: int
    """Optimizer steps of the whole run."""
    wall_s: float
    gpu_hours: float
    cost: Cost
    rejected_because: str | None
    """Why it does not fit, or, of an alternative that fits, that it is over the budget."""
    would_fit: str | None = None
    """For a rejected one: the smallest change that would make it fit (memory, or the budget): "slurm.nodes: 4"."""
    save_s: float = 0.0
    """Seconds one checkpoint takes to write."""
    background_saves: bool = True
    """Whether a node's memory holds a copy of the state, so that training goes on while a checkpoint is written."""
    start_s: float | None = None
    """Seconds in the queue before it would start, by Slurm's own word; None where Slurm was not asked."""

    @property
    def result_s(self) -> float:
        """Seconds from now to the end of the run: the wait in the queue, where known, and the run."""
        return (self.start_s or 0.0) + self.wall_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """One decision with its reason."""

    rule: str
    field: str
    value: Any
    reason: str
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Warning_:  # noqa: N801 (a plain Warning would hide the builtin)
    """Something that will run but should be looked at; `code` is stable."""

    code: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DataNumbers:
    """What was known of the data when the plan was made."""

    rows: int
    tokens: int
    """Tokens of one epoch, before packing or padding."""
    basis: str
    """How tokens were found: counted | sampled | characters | hint | assumed."""
    sampling_error: float = 0.0
    """Half the 95 % interval of `tokens` that comes from sampling, as a share; 0 where every row was counted."""
    mean_tokens: float | None = None
    """Per row, after truncation."""
    p50_tokens: int | None = None
    """Median row, before truncation; None where no row was looked at."""
    p95_tokens: int | None = None
    max_tokens: int | None = None
    """Longest row looked at, before truncation."""
    histogram: tuple[Bin, ...] = ()
    """Rows by length before truncation, in bins that double."""
    truncated_share: float = 0.0
    """Rows longer than max_seq_length."""
    trained_share: float | None = None
    """Tokens that the loss looks at; None when unknown."""
    repeated_share: float = 0.0
    """Rows equal to an earlier one."""
    validation_rows: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class JobShape:
    """What the job asks of the cluster beyond nodes and GPUs."""

    time_limit_min: int
    cpus_per_task: int
    mem: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that was decided for one recipe."""

    recipe: str
    model: str
    params: int
    chosen: Estimate
    alternatives: tuple[Estimate, ...]
    advice: tuple[Advice, ...]
    warnings: tuple[Warning_, ...]
    data: DataNumbers
    job: JobShape
    site: str
    elastic: tuple[Candidate, ...] = ()
    """The same training on fewer nodes, fewest first: where survival.min_nodes says so, the run goes on with these."""


_CANDIDATE_PARTS = {"lora": LoraNumbers, "quant": QuantNumbers, "buckets": Buckets}


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Write the document of `launcher plan --json` (schema 1): bytes, seconds, plain values only."""
    return {
        "schema": SCHEMA,
        "recipe": plan.recipe,
        "model": {"name": plan.model, "params": plan.params, "trainable_params": plan.chosen.trainable_params},
        "chosen": _estimate_to_json(plan.chosen),
        "alternatives": [_estimate_to_json(estimate) for estimate in plan.alternatives],
        "advice": [asdict(advice) for advice in plan.advice],
        "warnings": [asdict(warning) for warning in plan.warnings],
        "data": {**asdict(plan.data), "histogram": [asdict(entry) for entry in plan.data.histogram]},
        "job": asdict(plan.job),
        "site": plan.site,
        **({"elastic": [_candidate_to_json(candidate) for candidate in plan.elastic]} if plan.elastic else {}),
    }


def _estimate_to_json(estimate: Estimate) -> dict[str, Any]:
    """Candidate and predictions side by side in one object, as interface.md lists them."""
    candidate = _candidate_to_json(estimate.candidate)
    predictions = asdict(estimate)
    del predictions["candidate"]
    lora_r = estimate.candidate.lora.r if estimate.candidate.lora else None
    return {**candidate, "lora_r": lora_r, **predictions}


def _candidate_to_json(candidate: Candidate) -> dict[str, Any]:
    values = asdict(candidate)
    if candidate.lora is not None and not isinstance(candidate.lora.target_modules, str):
        values["lora"]["target_modules"] = list(candidate.lora.target_modules)
    return values


def plan_from_json(doc: Mapping[str, Any]) -> Plan:
    """Read back what `plan_to_json` wrote.

    Raises:
        ConflictError: the document has another schema, so another version of the launcher wrote it.
    """
    if doc.get("schema") != SCHEMA:
        raise ConflictError(f"plan has schema {doc.get('schema')!r}, this launcher reads {SCHEMA}; plan again")
    return Plan(
        recipe=doc["recipe"],
        model=doc["model"]["name"],
        params=doc["model"]["params"],
        chosen=_estimate_from_json(doc["chosen"]),
        alternatives=tuple(_estimate_from_json(entry) for entry in doc["alternatives"]),
        advice=tuple(Advice(**entry) for entry in doc["advice"]),
        warnings=tuple(Warning_(**entry) for entry in doc["warnings"]),
        data=_data_from_json(doc["data"]),
        job=JobShape(**doc["job"]),
        site=doc["site"],
        elastic=tuple(_candidate_from_json(entry) for entry in doc.get("elastic", ())),
    )


def _data_from_json(doc: Mapping[str, Any]) -> DataNumbers:
    return DataNumbers(**{**doc, "histogram": tuple(Bin(**entry) for entry in doc.get("histogram", ()))})


def _estimate_from_json(doc: Mapping[str, Any]) -> Estimate:
    memory = dict(doc["memory"])
    for key in ("peak_bytes", "device_bytes"):
        memory[key] = Interval(**memory[key])
    parts: dict[str, Any] = {
        "candidate": _candidate_from_json(doc),
        "memory": MemoryEstimate(**memory),
        "step_s": Interval(**doc["step_s"]),
        "cost": Cost(**doc["cost"]),
    }
    rest = {name: doc[name] for name in Estimate.__dataclass_fields__ if name not in parts and name in doc}
    return Estimate(**parts, **rest)


def _candidate_from_json(doc: Mapping[str, Any]) -> Candidate:
    values = {name: doc[name] for name in Candidate.__dataclass_fields__ if name in doc}
    for name, part in _CANDIDATE_PARTS.items():
        if values[name] is not None:
            values[name] = part(**values[name])
    lora = values["lora"]
    if lora is not None and isinstance(lora.target_modules, list):
        values["lora"] = LoraNumbers(**{**asdict(lora), "target_modules": tuple(lora.target_modules)})
    return Candidate(**values)
