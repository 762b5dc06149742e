"""Axolotl: one YAML with everything at the top level."""

from __future__ import annotations

from typing import Any

from launcher.recipe.foreign.draft import Draft, LeftOut, module_names, optimizer, schedule

_SAME = {
    "base_model": "model.name_or_path",
    "revision_of_model": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "peft_use_rslora": "lora.use_rslora",
    "sequence_len": "data.max_seq_length",
    "num_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "learning_rate": "train.learning_rate",
    "warmup_ratio": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "seed": "train.seed",
    "logging_steps": "train.logging_steps",
    "save_total_limit": "checkpoint.save_total_limit",
    "wandb_project": "wandb.project",
    "wandb_entity": "wandb.entity",
}
_ATTENTION = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": "messages"}
WHY = {
    "tokenizer_type": "the tokenizer is the model's own",
    "model_type": "the model class follows from config.json",
    "dataset_prepared_path": "the token cache is named by content (launcher data prepare)",
    "pad_to_sequence_len": "rows are packed, or padded to the longest of a batch",
    "eval_sample_packing": "evaluation is packed as training is",
    "group_by_length": "rows are packed instead",
    "tf32": "matrix products use TF32 where the GPU has it",
    "saves_per_epoch": "checkpoint.save_minutes saves by time",
    "evals_per_epoch": "train.eval_steps is planned",
    "output_dir": "every run gets a folder of its own; output_dir names the parent",
    "fsdp": "weights are sharded by ZeRO here",
    "fsdp_config": "weights are sharded by ZeRO here",
    "special_tokens": "the tokenizer's own special tokens are kept",
    "lora_modules_to_save": "adapters with whole modules cannot be served by vLLM; train them with method: full",
    "resume_from_checkpoint": "a run resumes by itself; launcher resume RUN",
}


def detect(source: dict[str, Any]) -> bool:
    """Whether the keys are Axolotl's."""
    return "base_model" in source and bool({"micro_batch_size", "sequence_len", "datasets"} & source.keys())


def convert(draft: Draft) -> None:
    """Fill `draft`."""
    _method(draft)
    draft.same(_SAME)
    _targets(draft)
    _datasets(draft)
    draft.put("data.validation", draft.take("val_set_size"))
    draft.put("data.packing", bool(draft.take("sample_packing", False)))
    if draft.take("train_on_inputs"):
        draft.put("data.loss_on", "all")
    template = draft.take("chat_template")
    if template and template != "tokenizer_default":
        why = "a named template; the tokenizer's own is used (data.chat_template takes a .jinja file)"
        draft.left_out.append(LeftOut(key="chat_template", value=template, why=why))
    draft.batch("micro_batch_size", "gradient_accumulation_steps")
    draft.precision()
    draft.warmup("warmup_steps", draft.get("train.max_steps"))
    schedule(draft, "lr_scheduler")
    optimizer(draft, "optimizer")
    checkpointing = draft.take("gradient_checkpointing")
    draft.put("train.gradient_checkpointing", bool(checkpointing) if checkpointing is not None else None)
    draft.drop("gradient_checkpointing_kwargs", "the form that works with the method is chosen")
    for key, name in (
        ("flash_attention", "flash_attention_2"),
        ("sdp_attention", "sdpa"),
        ("eager_attention", "eager"),
    ):
        if draft.take(key):
            draft.put("model.attn_implementation", name)
    _intervals(draft)
    draft.deepspeed("deepspeed")
    draft.settle(WHY)


def _method(draft: Draft) -> None:
    adapter, four_bit = draft.take("adapter"), draft.take("load_in_4bit")
    draft.drop("load_in_8bit", "8-bit bases are not offered; the base is loaded in bf16, or in 4 bits by method: qlora")
    if not adapter:
        draft.put("method", "full")
    elif draft.take("peft_use_dora"):
        draft.put("method", "dora")
    else:
        draft.put("method", "qlora" if adapter == "qlora" or four_bit else "lora")


def _targets(draft: Draft) -> None:
    if draft.take("lora_target_linear"):
        draft.take("lora_target_modules")
        draft.put("lora.target_modules", "all-linear")
    else:
        draft.put("lora.target_modules", module_names(draft.take("lora_target_modules")))


def _datasets(draft: Draft) -> None:
    train = []
    for index, one in enumerate(draft.take("datasets", [])):
        entry = dict(one) if isinstance(one, dict) else {"path": one}
        files, kind = entry.pop("data_files", None), entry.pop("type", None)
        path = entry.pop("path", "")
        if path in ("json", "csv", "parquet", "text") and files:
            path = files[0] if isinstance(files, list) else files
        source: dict[str, Any] = {"path": path}
        if entry.get("split"):
            source["split"] = entry.pop("split")
        if not files:
            named = {"revision": entry.pop("revision", None), "config": entry.pop("name", None)}
            source |= {key: value for key, value in named.items() if value}
        if isinstance(kind, str) and kind.split(".")[0] in _FORMATS:
            source["format"] = (
                "sharegpt" if entry.get("field_messages") == "conversations" else _FORMATS[kind.split(".")[0]]
            )
            entry.pop("field_messages", None)
        elif kind:
            entry["type"] = kind
        train.append(source)
        draft.left_out += [
            LeftOut(key=f"datasets[{index}].{key}", value=value, why="columns and roles are found by data format")
            for key, value in entry.items()
            if value
        ]
    draft.put("data.train", train)


def _intervals(draft: Draft) -> None:
    """Steps as whole numbers; Axolotl also takes shares of the run."""
    for key, path in (("eval_steps", "train.eval_steps"), ("save_steps", "checkpoint.save_steps")):
        value = draft.take(key)
        if isinstance(value, int) and not isinstance(value, bool):
            draft.put(path, value)
        elif value:
            draft.left_out.append(LeftOut(key=key, value=value, why=f"a share of the run; write {path} in steps"))
