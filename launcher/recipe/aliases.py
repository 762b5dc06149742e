"""Names that other tools use for our fields: accepted with a notice, or refused with what to write instead.

Other tools keep most settings at the top level; an alias is accepted there and inside our section.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from launcher.recipe.problems import Findings
from launcher.recipe.tree import Node, Scalar, Series, Table, Where

_BOOLEAN_LOSS = {"true": "all", "false": "assistant", "yes": "all", "no": "assistant"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Alias:
    """One foreign name."""

    name: str
    target: str
    """Dotted path of our field."""
    values: dict[str, str] = field(default_factory=dict)
    """Foreign values (lower case) and ours."""


def _aliases(target: str, names: str, values: dict[str, str] | None = None) -> tuple[Alias, ...]:
    return tuple(Alias(name=name, target=target, values=values or {}) for name in names.split())


ALIASES: Final[tuple[Alias, ...]] = (
    *_aliases("name", "run_name experiment_name"),
    *_aliases("model.name_or_path", "base_model model_name_or_path model_name pretrained_model_name_or_path"),
    *_aliases("model.revision", "model_revision revision_of_model"),
    *_aliases("model.trust_remote_code", "trust_remote_code"),
    *_aliases("model.attn_implementation", "attn_implementation"),
    *_aliases("method", "finetuning_type adapter training_type"),
    *_aliases("lora.r", "lora_r lora_rank rank"),
    *_aliases("lora.lora_alpha", "lora_alpha alpha"),
    *_aliases("lora.lora_dropout", "lora_dropout dropout"),
    *_aliases("lora.target_modules", "lora_target_modules lora_target"),
    *_aliases("lora.target_modules", "lora_target_linear", {"true": "all-linear"}),
    *_aliases("lora.use_rslora", "use_rslora peft_use_rslora"),
    *_aliases("prompt.num_virtual_tokens", "num_virtual_tokens"),
    *_aliases("quantization.bnb_4bit_quant_type", "bnb_4bit_quant_type"),
    *_aliases("quantization.bnb_4bit_use_double_quant", "bnb_4bit_use_double_quant double_quantization"),
    *_aliases("quantization.bnb_4bit_compute_dtype", "bnb_4bit_compute_dtype"),
    *_aliases("data.train", "datasets dataset dataset_name"),
    *_aliases("data.validation", "val_size val_set_size"),
    *_aliases(
        "data.max_seq_length",
        "sequence_len cutoff_len max_seq_len max_length model_max_length max_seq_length seq_length",
    ),
    *_aliases("data.packing", "sample_packing packed packing"),
    *_aliases("data.loss_on", "train_on_inputs train_on_prompt", _BOOLEAN_LOSS),
    *_aliases("data.chat_template", "chat_template chat_template_path"),
    *_aliases("train.global_batch_size", "global_batch_size"),
    *_aliases(
        "train.per_device_train_batch_size",
        "micro_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu",
    ),
    *_aliases("train.num_train_epochs", "num_epochs epochs num_train_epochs"),
    *_aliases("train.max_steps", "max_steps"),
    *_aliases("train.learning_rate", "learning_rate lr"),
    *_aliases("train.lr_scheduler_type", "lr_scheduler lr_scheduler_type"),
    *_aliases("train.warmup_ratio", "warmup_ratio"),
    *_aliases("train.weight_decay", "weight_decay"),
    *_aliases("train.max_grad_norm", "max_grad_norm gradient_clipping"),
    *_aliases("train.precision", "dtype torch_dtype torch_dtype_str"),
    *_aliases(
        "train.gradient_checkpointing",
        "gradient_checkpointing activation_checkpointing enable_activation_checkpointing enable_gradient_checkpointing",
    ),
    *_aliases("train.optim", "optim"),
    *_aliases("train.seed", "seed"),
    *_aliases("train.eval_steps", "eval_steps"),
    *_aliases("train.logging_steps", "logging_steps"),
    *_aliases("deepspeed.stage", "zero_stage"),
    *_aliases("checkpoint.save_steps", "save_steps"),
    *_aliases("checkpoint.save_total_limit", "save_total_limit"),
    *_aliases("slurm.time", "timeout_min"),
    *_aliases("wandb.project", "wandb_project"),
    *_aliases("wandb.entity", "wandb_entity"),
    *_aliases("wandb.group", "wandb_group"),
    *_aliases("wandb.mode", "wandb_mode"),
    *_aliases("export.engine", "for"),
)

VALUES: Final[dict[str, dict[str, str]]] = {
    "train.precision": {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32"},
    "quantization.bnb_4bit_compute_dtype": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
    "lora.target_modules": {"all": "all-linear"},
    "data.chat_template": {"tokenizer_default": "tokenizer"},
    "data.train.format": {"chat_template": "messages", "openai": "messages", "completion": "text"},
    "train.lr_scheduler_type": {"constant_with_warm_up": "constant_with_warmup"},
}
"""Foreign values of our own fields; dtypes by their torch names, data formats by their rivals' names."""

REFUSED: Final[dict[str, str]] = {
    "batch_size": "means the whole batch in some tools and one GPU's share in others; write train.global_batch_size "
    "(sequences per optimizer step over all GPUs) or train.per_device_train_batch_size (one forward pass of one GPU)",
    "train_batch_size": "means the whole batch in some tools and one GPU's share in others; write "
    "train.global_batch_size or train.per_device_train_batch_size",
    "gradient_accumulation_steps": "is derived, so that results survive a change of GPU count; "
    "write train.global_batch_size = micro-batch x accumulation x GPUs",
    "load_in_4bit": "is what method: qlora does; write method: qlora",
    "load_in_8bit": "is not offered; method: qlora loads the base in 4 bits",
    "use_dora": "is a method of its own here; write method: dora",
    "peft_use_dora": "is a method of its own here; write method: dora",
    "warmup_steps": "depends on the length of the run; write train.warmup_ratio (share of all steps)",
    "bf16": "write train.precision: bf16",
    "fp16": "write train.precision: fp16",
    "fp32": "write train.precision: fp32",
    "report_to": "metrics.jsonl is always written; W&B has a section of its own (wandb.mode: disabled switches it off)",
    "resume_from_checkpoint": "a run resumes by itself from its newest checkpoint; use `launcher resume RUN`",
    "job_name": "the run's name is the job's name; write name",
}
"""Foreign names that mean more than one thing here, or nothing."""

_OWN = {alias.target for alias in ALIASES}


def apply_aliases(tree: Table, findings: Findings) -> Table:
    """`tree` with every foreign name moved to our field, and shorthand forms written out."""
    mover = _Mover(findings)
    sections = {key: mover.section(key, node) if isinstance(node, Table) else node for key, node in tree.items.items()}
    moved = mover.section("", Table(sections, tree.where, tree.places))
    for path, node, place in mover.moved:
        moved = _put(moved, path.split("."), node, place)
    return _shorthand(moved, findings)


class _Mover:
    """Takes foreign names out of mappings and keeps what they mean for us."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.moved: list[tuple[str, Node, Where]] = []
        self.named: dict[str, tuple[str, Where]] = {}

    def section(self, name: str, table: Table) -> Table:
        """`table` (the section `name`, or the top level) without its foreign names."""
        kept: dict[str, Node] = {}
        for key, node in table.items.items():
            alias = _find(name, key)
            place = table.place(key)
            path = f"{name}.{key}" if name else key
            if alias is not None:
                self.move(alias, node, place, written=path)
            elif key in REFUSED:
                self.findings.refuse(place, f"{path}: {REFUSED[key]}")
            else:
                kept[key] = node
                if path in _OWN:
                    self.claim(path, path, place)
        return Table(kept, table.where, table.places)

    def move(self, alias: Alias, node: Node, place: Where, *, written: str) -> None:
        if isinstance(node, Scalar) and alias.values:
            ours = alias.values.get(node.text.lower())
            if ours is None:
                choices = ", ".join(sorted(alias.values))
                self.findings.refuse(node.where, f"{written}: expected {choices}; our field is {alias.target}")
                return
            node = Scalar(ours, node.where)
        if self.claim(alias.target, written, place):
            self.findings.note(place, f"{written} is read as {alias.target}")
            self.moved.append((alias.target, node, place))

    def claim(self, target: str, written: str, place: Where) -> bool:
        """Whether `written` is the first to set `target`; a second one is refused."""
        first = self.named.setdefault(target, (written, place))
        if first == (written, place):
            return True
        self.findings.refuse(place, f"{written} and {first[0]} ({first[1]}) both set {target}; keep one")
        return False


def _find(section: str, key: str) -> Alias | None:
    for alias in ALIASES:
        home, _, own = alias.target.rpartition(".")
        if key == alias.name and section in ("", home) and not (section == home and key == own):
            return alias
    return None


def _put(table: Table, path: list[str], node: Node, place: Where) -> Table:
    """`table` with `node` at `path`; sections that are missing are made."""
    key, rest = path[0], path[1:]
    if rest:
        below = table.items.get(key)
        if below is not None and not isinstance(below, Table):
            return table  # a section that is not a mapping is refused where it is read
        node = _put(below or Table({}, place), rest, node, place)
    return Table({**table.items, key: node}, table.where, {key: place, **table.places})


def _shorthand(tree: Table, findings: Findings) -> Table:
    """Write out `model: some/id`, `data.train: file` and plain strings where a data source is meant."""
    items = dict(tree.items)
    model = items.get("model")
    if isinstance(model, Scalar):
        findings.note(model.where, "model is read as model.name_or_path")
        items["model"] = Table({"name_or_path": model}, model.where)
    data = items.get("data")
    if isinstance(data, Table):
        below = dict(data.items)
        for key in ("train", "retention", "validation"):
            if key in below:
                below[key] = _sources(key, below[key], findings)
        items["data"] = Table(below, data.where, data.places)
    return Table(items, tree.where, tree.places)


def _sources(key: str, node: Node, findings: Findings) -> Node:
    if key == "train":
        if isinstance(node, Table) and all(index.isdecimal() for index in node.items):
            entries = {index: _source(child, findings) for index, child in node.items.items()}
            return Table(entries, node.where, node.places)
        entries_ = node.items if isinstance(node, Series) else (node,)
        return Series(tuple(_source(child, findings) for child in entries_), node.where)
    if key == "validation" and isinstance(node, Scalar):
        return node
    if isinstance(node, Scalar) and not node.quoted and node.text in ("", "null", "~"):
        return node
    if key == "retention" and isinstance(node, Scalar) and node.text == "builtin":
        return node
    return _source(node, findings)


def _source(node: Node, findings: Findings) -> Node:
    if isinstance(node, Scalar):
        return Table({"path": node}, node.where)
    if not isinstance(node, Table) or "type" not in node.items:
        return node
    place = node.place("type")
    if "format" in node.items:
        findings.refuse(place, f"type and format ({node.place('format')}) both set the format; keep one")
        return node
    findings.note(place, "type is read as format")
    items = {("format" if key == "type" else key): child for key, child in node.items.items()}
    return Table(items, node.where, {**node.places, "format": place})
