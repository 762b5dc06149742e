"""torchtune: sections with `_component_`, a Python name each."""

from __future__ import annotations

from typing import Any

from launcher.recipe.foreign.draft import Draft, LeftOut, optimizer

_SAME = {
    "tokenizer.max_seq_len": "data.max_seq_length",
    "checkpointer.checkpoint_dir": "model.name_or_path",
    "model.lora_rank": "lora.r",
    "model.lora_alpha": "lora.lora_alpha",
    "model.lora_dropout": "lora.lora_dropout",
    "epochs": "train.num_train_epochs",
    "optimizer.lr": "train.learning_rate",
    "optimizer.weight_decay": "train.weight_decay",
    "clip_grad_norm": "train.max_grad_norm",
    "enable_activation_checkpointing": "train.gradient_checkpointing",
    "seed": "train.seed",
    "log_every_n_steps": "train.logging_steps",
    "metric_logger.project": "wandb.project",
}
_DATASETS = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca"),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca"),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "sharegpt"),
    "text_completion_dataset": (None, "text"),
    "chat_dataset": (None, "auto"),
    "instruct_dataset": (None, "auto"),
}
_MODULES = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
WHY = {
    "output_dir": "every run gets a folder of its own; output_dir names the parent",
    "tokenizer": "the tokenizer is the model folder's own",
    "checkpointer": "the model folder is read and written as Hugging Face's safetensors",
    "loss": "cross-entropy over trained tokens",
    "device": "follows from the site",
    "compile": "is not offered",
    "profiler": "is not offered",
    "metric_logger": "metrics.jsonl is always written; W&B is the wandb section",
    "shuffle": "rows are shuffled every epoch by the seed",
    "resume_from_checkpoint": "a run resumes by itself; launcher resume RUN",
    "enable_activation_offloading": "is not offered; gradient checkpointing is",
    "log_peak_memory_stats": "peaks are always recorded on GPUs",
    "max_steps_per_epoch": "train.max_steps counts the whole run",
    "save_adapter_weights_only": "adapters are saved alone",
    "lr_scheduler.num_warmup_steps": "depends on the length of the run; write train.warmup_ratio, a share of all steps",
}


def detect(source: dict[str, Any]) -> bool:
    """Whether the sections are torchtune's."""
    return any(isinstance(value, dict) and "_component_" in value for value in source.values())


def convert(draft: Draft) -> None:
    """Fill `draft`."""
    component = str(draft.take("model._component_", "")).rpartition(".")[2]
    kind = next((name for name in ("qlora", "lora", "dora") if component.startswith(f"{name}_")), "full")
    draft.put("method", "dora" if draft.take("model.use_dora") else kind)
    draft.same(_SAME)
    if kind != "full":
        _targets(draft)
    _dataset(draft)
    draft.batch("batch_size", "gradient_accumulation_steps")
    draft.precision(dtype="dtype")
    _rate(draft)
    draft.note(f"the model of {component or 'model'} is taken from checkpointer.checkpoint_dir")
    if "WandB" in str(draft.take("metric_logger._component_", "")):
        draft.put("wandb.mode", "auto")
    draft.settle(WHY)


def _targets(draft: Draft) -> None:
    names = [_MODULES.get(name, name) for name in draft.take("model.lora_attn_modules", [])]
    if draft.take("model.apply_lora_to_mlp"):
        names += ["gate_proj", "up_proj", "down_proj"]
    draft.put("lora.target_modules", names or None)
    draft.drop("model.apply_lora_to_output", "adapters on the output layer are not offered")


def _dataset(draft: Draft) -> None:
    name = str(draft.take("dataset._component_", "")).rpartition(".")[2]
    path, kind = _DATASETS.get(name, (None, "auto"))
    source, files = draft.take("dataset.source"), draft.take("dataset.data_files")
    if source in ("json", "csv", "parquet", "text") and files:
        source = files
    path = source or path
    if path is None:
        draft.left_out.append(LeftOut(key="dataset._component_", value=name, why="set data.train[].path to its rows"))
        path = f"{name or 'dataset'}.jsonl"
    entry = {"path": path, "format": kind}
    split = draft.take("dataset.split")
    draft.put("data.train", [entry | ({"split": split} if split else {})])
    draft.put("data.packing", bool(draft.take("dataset.packed", False)))
    if draft.take("dataset.train_on_input", True):
        draft.put("data.loss_on", "all")


def _rate(draft: Draft) -> None:
    name = str(draft.take("lr_scheduler._component_", "")).rpartition(".")[2]
    if "cosine" in name:
        draft.put("train.lr_scheduler_type", "cosine")
    elif name:
        draft.left_out.append(LeftOut(key="lr_scheduler._component_", value=name, why="is not offered; cosine is used"))
    else:
        draft.put("train.lr_scheduler_type", "constant")
    draft.warmup("lr_scheduler.num_warmup_steps", None)
    component = str(draft.look("optimizer._component_", "")).rpartition(".")[2]
    eight_bit = {"AdamW8bit": "adamw_8bit", "PagedAdamW8bit": "paged_adamw_8bit", "AdamW": "adamw_torch"}
    if component in eight_bit:
        fused = component == "AdamW" and bool(draft.take("optimizer.fused"))
        draft.take("optimizer._component_")
        draft.put("train.optim", "adamw_torch_fused" if fused else eight_bit[component])
    else:
        optimizer(draft, "optimizer._component_")
