"""The recipe: what the user asked for, as frozen values.

Field names are those of the library that owns the concept (PEFT, Hugging Face, sbatch, wandb.init).
"auto" means: the planner decides, and stores the decision. Values here are already checked and
normalised by `launcher.recipe.load`; nothing in this module does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Auto = Literal["auto"]
AUTO: Auto = "auto"

METHODS = ("full", "lora", "qlora", "dora", "adalora", "prefix", "prompt")
LORA_METHODS = ("lora", "qlora", "dora", "adalora")
"""Methods that add low-rank matrices and read the `lora` section."""
PROMPT_METHODS = ("prefix", "prompt")
"""Methods that learn virtual tokens."""
FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text")
EXPORT_ENGINES = ("vllm", "tgi", "sglang", "merged")
"""What an adapter can be exported for."""
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which base model."""

    name_or_path: str
    """Local folder with config.json, or a hub id."""
    revision: str | None = None
    """Hub revision; a commit hash once staged."""
    attn_implementation: str = AUTO
    """auto | eager | sdpa | flash_attention_2."""
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSection:
    """What the tuning is for; read by the advice rules only."""

    kind: str = AUTO
    """auto | style | instruction | domain | reasoning."""
    goal: str = "adaptation"
    """adaptation | knowledge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSection:
    """PEFT LoraConfig's own names; used by lora, qlora, dora and adalora."""

    r: int | Auto = AUTO
    lora_alpha: float | Auto = AUTO
    lora_dropout: float | Auto = AUTO
    target_modules: str | tuple[str, ...] = "all-linear"
    """"all-linear", or module-name suffixes such as ("q_proj", "v_proj")."""
    use_rslora: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSection:
    """Virtual tokens of prefix and prompt tuning (PEFT's own name)."""

    num_virtual_tokens: int = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationSection:
    """bitsandbytes 4-bit settings of qlora."""

    bnb_4bit_quant_type: str = "nf4"
    """nf4 | fp4."""
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: str = AUTO
    """auto | bf16 | fp16 | fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """One place rows come from."""

    path: str
    """File (jsonl, json, parquet, csv, txt), folder of such files, or a data-set id."""
    split: str = "train"
    """Split of a data-set id; files have none."""
    revision: str | None = None
    """Branch, tag or commit of a data-set id; a commit hash once staged."""
    config: str | None = None
    """Configuration of a data-set id, as its card names it (`name` of datasets.load_dataset)."""
    format: str = AUTO
    """One of FORMATS."""
    weight: float = 1.0
    """How often its rows appear in an epoch, relative to once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationSpec:
    """Held-out rows: exactly one of the three is set, or none (no validation)."""

    share: float | None = None
    """Share of the training rows, in (0, 1)."""
    count: int | None = None
    """Number of training rows."""
    source: DataSource | None = None
    """Rows of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """What to train on, and how rows become tokens."""

    train: tuple[DataSource, ...]
    validation: ValidationSpec = ValidationSpec(share=0.02)
    retention: DataSource | None = None
    """Second evaluation set: what the base must not forget; the word `builtin` sets retention_builtin instead."""
    retention_builtin: bool = False
    """Take text that the untrained base writes itself; written as `retention: builtin`."""
    retention_max_rise: float = 0.2
    """Relative rise of the retention perplexity past which the run warns (0.2 = 20 %, 0.18 nats per token)."""
    max_seq_length: int = 4096
    """Tokens per row; longer rows are truncated."""
    packing: bool = True
    """Several rows share one sequence, isolated by position_ids."""
    loss_on: str = "assistant"
    """assistant | completion | all."""
    split_seed: int | None = None
    """Which rows are held out, and which a fractional weight repeats; None = train.seed."""
    chat_template: str = "tokenizer"
    """"tokenizer", or the path of a .jinja file."""

    @property
    def measures_retention(self) -> bool:
        """Whether there is a second evaluation set of either kind."""
        return self.retention is not None or self.retention_builtin


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    """Optimisation."""

    global_batch_size: int = 32
    """Sequences per optimizer step over all ranks; accumulation is derived from it."""
    per_device_train_batch_size: int | Auto = AUTO
    """Micro-batch: sequences per forward pass of one rank."""
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    """Optimizer steps; overrides num_train_epochs."""
    learning_rate: float | Auto = AUTO
    lr_scheduler_type: str = "cosine"
    """One of SCHEDULES."""
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm; 0 switches it off."""
    precision: str = AUTO
    """auto | bf16 | fp16 | fp32."""
    gradient_checkpointing: bool | Auto = AUTO
    optim: str = AUTO
    """auto | adamw_torch | adamw_torch_fused | adamw_8bit | paged_adamw_8bit."""
    seed: int = 42
    eval_steps: int | Auto = AUTO
    logging_steps: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedSection:
    """ZeRO; stage 0 runs plain torch (DDP)."""

    stage: int | Auto = AUTO
    offload_optimizer: str = AUTO
    """auto | none | cpu | nvme."""
    offload_param: str = AUTO
    """auto | none | cpu | nvme."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Merged over the generated DeepSpeed JSON; unknown keys are refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSection:
    """When to save."""

    save_minutes: float | None = 30.0
    save_steps: int | None = None
    save_total_limit: int = 2
    background: bool | Auto = AUTO
    """Copy the state to host memory and write it while training goes on; auto = where the node's memory allows it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SurvivalSection:
    """What happens after an interruption; the restart budget is slurm.max_restarts."""

    hang_minutes: float | Auto = AUTO
    """A rank without progress for so long counts as hung; auto = ten slow steps, at least ten minutes."""
    attempts_without_progress: int = 3
    """So many attempts in a row without a new checkpoint end the run."""
    node_strikes: int = 2
    """A node on which so many attempts failed is excluded."""
    strike_hours: float = 24.0
    """Strikes older than this are forgotten."""
    on_out_of_memory: str = "smaller_micro_batch"
    """smaller_micro_batch (same global batch, more accumulation) | stop."""
    min_nodes: int | None = None
    """Fewest nodes the run may go on with, where fewer than slurm.nodes are free; None = slurm.nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmSection:
    """What to ask of Slurm (sbatch's long names)."""

    site: str = AUTO
    """Site profile name (slurm/<site>.yaml) or path; auto = the only profile, else probed."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: int | Auto = AUTO
    """Time limit in whole minutes (the loader accepts 24:00:00, 1-12, 90m, 2h, 24h, 2d)."""
    nodes: int | Auto = AUTO
    gpus_per_node: int | Auto = AUTO
    """GPUs (CPU ranks where there is no GPU) per node."""
    cpus_per_task: int | Auto = AUTO
    mem: str | None = None
    """Memory per node in sbatch's form, such as 500G."""
    exclusive: bool = False
    requeue: bool = True
    max_restarts: int = 10
    extra: dict[str, Any] = field(default_factory=dict)
    """Further sbatch long options."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbSection:
    """wandb.init's own names."""

    mode: str = AUTO
    """auto | online | offline | disabled."""
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    log_model: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetSection:
    """Money and its limit."""

    gpu_hour_price: float | None = None
    """The user's currency per GPU-hour."""
    max_gpu_hours: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSection:
    """What the adapter is for; a plan refuses what cannot be exported for it."""

    engine: str | None = None
    """vllm | tgi | sglang | merged; None = not known yet: `plan` says what servers would refuse."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One recipe: everything the user asked for."""

    name: str
    model: ModelSection
    data: DataSection
    method: str = AUTO
    """auto, or one of METHODS."""
    task: TaskSection = TaskSection()
    lora: LoraSection = LoraSection()
    prompt: PromptSection = PromptSection()
    quantization: QuantizationSection = QuantizationSection()
    train: TrainSection = TrainSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    checkpoint: CheckpointSection = CheckpointSection()
    survival: SurvivalSection = SurvivalSection()
    slurm: SlurmSection = SlurmSection()
    wandb: WandbSection = WandbSection()
    budget: BudgetSection = BudgetSection()
    export: ExportSection = ExportSection()
    output_dir: str = AUTO
    """Folder that receives run folders; auto = $LAUNCHER_RUNS or ./runs."""
    output_group: str | None = None
    """Unix group that may read this run: plan, logs, metrics and results, not checkpoints; None = nobody but you."""
