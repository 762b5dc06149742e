"""torchtune: sections with `_component_`, a Python name each."""

from __future__ import annotations

from typing import Any

from launcher.recipe.foreign import shared
from launcher.recipe.foreign.draft import Draft
from launcher.recipe.schema import DataSection

SAME = {
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
    "metric_logger.project": "wandb.project",
    "metric_logger.entity": "wandb.entity",
    "metric_logger.group": "wandb.group",
    "metric_logger.name": "name",
}
READ = {
    "model._component_, model.use_dora, model.quantize_base": "method",
    "model.lora_attn_modules, model.apply_lora_to_mlp": "lora.target_modules",
    "dataset": "data.train",
    "dataset.packed": "data.packing",
    "dataset.train_on_input": "data.loss_on",
    "batch_size, gradient_accumulation_steps": "train.global_batch_size",
    "max_steps_per_epoch": "train.max_steps",
    "dtype": "train.precision",
    "lr_scheduler._component_": "train.lr_scheduler_type",
    "lr_scheduler.num_warmup_steps": "train.warmup_ratio",
    "optimizer._component_, optimizer.fused": "train.optim",
    "log_every_n_steps": "train.logging_steps",
    "metric_logger._component_": "wandb.mode",
}
DEFAULTS = {"data.validation": 0, "train.max_grad_norm": 0, "train.warmup_ratio": 0.0}
_DATASETS: dict[str, tuple[str | None, str, bool | None]] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca", True),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca", True),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "sharegpt", False),
    "grammar_dataset": ("liweili/c4_200m", "auto", False),
    "samsum_dataset": ("Samsung/samsum", "auto", False),
    "wikitext_dataset": ("EleutherAI/wikitext_document_level", "text", None),
    "cnn_dailymail_articles_dataset": ("ccdv/cnn_dailymail", "text", None),
    "text_completion_dataset": (None, "text", None),
    "chat_dataset": (None, "auto", False),
    "instruct_dataset": (None, "auto", False),
}
"""torchtune's builders: the data set they load, our format, and whether they train on the prompt by themselves
(None: there is no prompt)."""
_FORMATS = {"sharegpt": "sharegpt", "openai": "messages", "messages": "messages"}
_MODULES = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Layers that Phi-3 and Phi-4 hold as one in Hugging Face's form."""
_OPTIMS = {"AdamW8bit": "adamw_8bit", "PagedAdamW8bit": "paged_adamw_8bit", "AdamW": "adamw_torch"}
OBJECTIVES = (
    "ref_checkpointer", "reward_checkpointer", "ref_policy_checkpointer", "policy_model", "teacher_model", "kd_loss",
    "ppo_epochs", "grpo_samples", "reward_and_value_model",
)  # fmt: skip
_NOT_TRAINING = ("tasks", "prompt", "max_new_tokens", "num_generations", "quantizer")
WHY = {
    "output_dir": "every run gets a folder of its own; output_dir names the parent",
    "tokenizer": "the tokenizer is the model folder's own",
    "checkpointer": "the model folder is read and written as Hugging Face's safetensors",
    "loss": "cross-entropy over trained tokens",
    "device": "follows from the site",
    "compile": "is not offered",
    "profiler.*": "is not offered",
    "metric_logger": "metrics.jsonl is always written; W&B is the wandb section",
    "shuffle": "rows are shuffled every epoch by the seed",
    "resume_from_checkpoint": "a run resumes by itself; launcher resume RUN",
    "enable_activation_offloading": "is not offered; gradient checkpointing is",
    "log_peak_memory_stats": "peaks are always recorded on GPUs",
    "log_level": "messages are the launcher's own",
    "save_adapter_weights_only": "adapters are saved alone",
    "optimizer_in_bwd": "is not offered; ZeRO shards what it saves",
    "fsdp_cpu_offload": "deepspeed.offload_optimizer is planned",
    "custom_sharded_layers": "weights are sharded by ZeRO here",
    "tensor_parallel_dim": "is not offered; GPUs that share a layer are one for the global batch: --gpus without them",
    "tensor_parallel_plan": "is not offered",
    "quantizer": "quantization-aware training is not offered",
    "dataset": "columns and prompts are found by data format",
}


def detect(source: dict[str, Any]) -> bool:
    """Whether the sections are torchtune's."""
    return any(isinstance(value, dict) and "_component_" in value for value in source.values())


def convert(draft: Draft) -> None:
    """Fill `draft`."""
    _objective(draft)
    component = _last(draft.take("model._component_"))
    _method(draft, component)
    draft.same(SAME)
    if draft.get("method") != "full":
        _targets(draft, component)
    _datasets(draft)
    shared.batch(draft, "batch_size", "gradient_accumulation_steps")
    shared.precision(draft, dtype="dtype")
    _length(draft)
    _rate(draft)
    shared.whole_steps(draft, {"log_every_n_steps": "train.logging_steps"})
    draft.note(f"the model of {component or 'model'} is taken from checkpointer.checkpoint_dir")
    logs = "WandB" in str(draft.take("metric_logger._component_", ""))
    draft.put("wandb.mode", "auto" if logs else "disabled")
    adapter = {} if draft.get("method") == "full" else {"lora.lora_dropout": 0.0}
    draft.defaults("torchtune", DEFAULTS | adapter)
    draft.settle(WHY)


def _last(component: Any) -> str:
    return str(component or "").rpartition(".")[2]


def _objective(draft: Draft) -> None:
    if draft.look("optimizer") is None:
        keys = [key for key in _NOT_TRAINING if key in draft.source] or ["optimizer"]
        draft.problems.append(f"{keys[0]}: this is a file for evaluation, generation or quantization, not for training")
        return
    shared.refuse_other_objectives(draft, OBJECTIVES)
    loss = _last(draft.look("loss._component_"))
    if any(part in loss for part in ("DPO", "RSO", "PPO", "SimPO", "GRPO")):
        draft.refuse("loss._component_", shared.SUPERVISED)
    for key in ("model._component_", "tokenizer._component_"):
        name = str(draft.look(key, ""))
        if any(part in name for part in ("vision", "flamingo", "clip")):
            draft.refuse(key, shared.IMAGES)


def _method(draft: Draft, component: str) -> None:
    kind = next((name for name in ("qlora", "lora", "dora") if component.startswith(f"{name}_")), "full")
    dora, quantized = draft.take("model.use_dora"), draft.take("model.quantize_base")
    keys = ["model._component_", "model.use_dora", "model.quantize_base"]
    if dora and kind != "full":
        draft.put("method", "dora", of=keys[:2])
        if quantized or kind == "qlora":
            draft.leave("model.quantize_base", True, "method: dora keeps its base in 16 bits")
        return
    draft.put("method", "qlora" if quantized and kind == "lora" else kind, of=keys)


def _targets(draft: Draft, component: str) -> None:
    attention, mlp = draft.take("model.lora_attn_modules", []), draft.take("model.apply_lora_to_mlp")
    names = [_MODULES.get(name, name) for name in attention] + (["gate_proj", "up_proj", "down_proj"] if mlp else [])
    if "phi3" in component or "phi4" in component:
        names = [_FUSED.get(name, name) for name in names]
    keys = ["model.lora_attn_modules", "model.apply_lora_to_mlp"]
    draft.put("lora.target_modules", list(dict.fromkeys(names)) or None, of=keys)
    draft.drop("model.apply_lora_to_output", "adapters on the output layer are not offered")


def _datasets(draft: Draft) -> None:
    """One `dataset` section or a list of them."""
    listed = draft.look("dataset")
    draft.take("dataset._component_")
    sections = listed if isinstance(listed, list) else [listed or {}]
    made = [
        _dataset(draft, dict(one), f"dataset[{i}]" if isinstance(listed, list) else "dataset")
        for i, one in enumerate(sections)
    ]
    draft.put("data.train", [source for source, _, _ in made], of=["dataset"])
    packed, whole = {packed for _, packed, _ in made}, {whole for _, _, whole in made}
    draft.put("data.packing", any(packed), of=["dataset"])
    draft.put("data.loss_on", "assistant" if False in whole and True not in whole else "all", of=["dataset"])
    if len(packed) > 1 or len(whole - {None}) > 1:
        draft.note("data.packing and data.loss_on hold for all data sets; theirs differ from set to set")


def _dataset(draft: Draft, entry: dict[str, Any], here: str) -> tuple[dict[str, Any], bool, bool | None]:
    """A section -> our source, whether it is packed, whether the prompt is trained on."""
    name = _last(entry.pop("_component_", ""))
    if "preference" in name or name in ("stack_exchange_paired_dataset", "hh_rlhf_helpful_dataset"):
        draft.problems.append(f"{here}._component_: {name} holds preferences, which {shared.SUPERVISED}")
    if "multimodal" in name or "cauldron" in name:
        draft.problems.append(f"{here}._component_: {name} {shared.IMAGES}")
    path, kind, whole = _DATASETS.get(name, (None, "auto", False))
    given, files = entry.pop("source", None), entry.pop("data_files", None)
    path = files if given in ("json", "csv", "parquet", "text") and files else given or path
    if files and path != files:
        draft.leave(f"{here}.data_files", files, "files of a data set are not chosen; stage it and name the file")
    if path is None:
        draft.leave(f"{here}._component_", name, "set data.train[].path to its rows")
    style = _FORMATS.get(str(entry.get("conversation_style")))
    if style:
        entry.pop("conversation_style")
    source: dict[str, Any] = {"path": path or f"{name or 'dataset'}.jsonl", "format": style or kind}
    config = entry.pop("name", None) or entry.pop("subset", None)
    if config:
        source["config"] = config
    if entry.get("split"):
        source |= shared.split(draft, f"{here}.split", entry.pop("split"))
    if entry.get("weight") not in (None, 1):
        source["weight"] = entry["weight"] * source.get("weight", 1)
    packed = bool(entry.pop("packed", False))
    whole = entry.pop("train_on_input", whole)
    for key, value in entry.items():
        if value not in (None, False, "", [], {}) and key != "weight" and (key, value) != ("column", "text"):
            draft.leave(f"{here}.{key}", value, WHY["dataset"])
    return source, packed, whole


def _length(draft: Draft) -> None:
    """`max_steps_per_epoch` cuts epochs short; with one there, the whole run has a known number of steps."""
    epochs, per_epoch = draft.get("train.num_train_epochs") or 1, draft.take("max_steps_per_epoch")
    if isinstance(per_epoch, int) and per_epoch > 0:
        draft.put("train.max_steps", int(epochs * per_epoch), of=["max_steps_per_epoch", "epochs"])
        draft.note(
            f"train.max_steps is {epochs} epochs x max_steps_per_epoch {per_epoch}; shorter data would end sooner there"
        )
    if draft.get("data.max_seq_length") is None:
        cut = DataSection(train=()).max_seq_length
        draft.put("data.max_seq_length", cut, of=())
        why = f"rows are never cut there; data.max_seq_length: {cut} is written"
        draft.leave("tokenizer.max_seq_len", None, why)


def _rate(draft: Draft) -> None:
    name = _last(draft.take("lr_scheduler._component_"))
    if "cosine" in name or not name:
        draft.put("train.lr_scheduler_type", "cosine" if name else "constant")
    else:
        draft.leave("lr_scheduler._component_", name, "is not offered; cosine is used")
    shared.warmup(draft, "lr_scheduler.num_warmup_steps")
    component = _last(draft.take("optimizer._component_"))
    fused = component == "AdamW" and bool(draft.take("optimizer.fused"))
    if component in _OPTIMS:
        named = "adamw_torch_fused" if fused else _OPTIMS[component]
        draft.put("train.optim", named, of=["optimizer._component_", "optimizer.fused"])
    else:
        offered = ", ".join(sorted({*_OPTIMS.values(), "adamw_torch_fused"}))
        draft.leave("optimizer._component_", component, f"is not offered; AdamW is used ({offered})")
    if "AdamW" in component:
        draft.defaults("torch's AdamW", {"train.weight_decay": 0.01})
