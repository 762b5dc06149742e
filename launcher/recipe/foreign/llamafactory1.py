"""LLaMA-Factory's second kind of configuration (v1): plugins in sections of their own."""

from __future__ import annotations

from typing import Any

from launcher.recipe.foreign import shared
from launcher.recipe.foreign.draft import Draft
from launcher.recipe.foreign.named_files import deepspeed

SAME = {
    "model": "model.name_or_path",
    "trust_remote_code": "model.trust_remote_code",
    "peft_config.r": "lora.r",
    "peft_config.lora_alpha": "lora.lora_alpha",
    "peft_config.lora_dropout": "lora.lora_dropout",
    "cutoff_len": "data.max_seq_length",
    "num_train_epochs": "train.num_train_epochs",
    "learning_rate": "train.learning_rate",
    "max_grad_norm": "train.max_grad_norm",
    "enable_activation_checkpointing": "train.gradient_checkpointing",
    "seed": "train.seed",
    "save_total_limit": "checkpoint.save_total_limit",
}
READ = {
    "peft_config.name, quant_config.quantization_bit": "method",
    "peft_config.target_modules": "lora.target_modules",
    "train_dataset": "data.train",
    "batching_strategy": "data.packing",
    "micro_batch_size, global_batch_size": "train.global_batch_size",
    "max_steps": "train.max_steps",
    "bf16": "train.precision",
    "logging_steps": "train.logging_steps",
    "save_steps": "checkpoint.save_steps",
    "dist_config.config_file": "deepspeed.stage",
}
DEFAULTS = {
    "data.validation": 0,
    "train.num_train_epochs": 3,
    "train.learning_rate": 1e-4,
    "train.lr_scheduler_type": "constant",
    "train.warmup_ratio": 0.0,
    "train.weight_decay": 0.01,
    "data.max_seq_length": 2048,
}
"""Its optimizer is torch's AdamW as it comes."""
WHY = {
    "model_class": "the model class follows from config.json",
    "template": "the tokenizer's own chat template is used (data.chat_template takes a .jinja file)",
    "kernel_config.*": "kernels are chosen by the hardware",
    "dist_config": "weights are sharded by ZeRO here",
    "init_config": "ranks read their own part of the weights",
    "output_dir": "every run gets a folder of its own; output_dir names the parent",
    "sample_backend": "is of sampling, not of training",
    "max_new_tokens": "is of sampling, not of training",
    "resume_from_checkpoint": "a run resumes by itself; launcher resume RUN",
}


def detect(source: dict[str, Any]) -> bool:
    """Whether the sections are those of v1."""
    return isinstance(source.get("model"), str) and bool({"train_dataset", "peft_config"} & source.keys())


def convert(draft: Draft) -> None:
    """Fill `draft`."""
    shared.refuse_other_objectives(draft, ("peft_config.export_dir",), "is of export, not of training")
    _method(draft)
    draft.same(SAME)
    shared.max_steps(draft)
    shared.module_names(draft, "peft_config.target_modules")
    path = draft.take("train_dataset")
    if path:
        draft.put("data.train", [{"path": str(path)}])
        if str(path).endswith((".yaml", ".yml")):
            draft.note(
                f"data.train: {path} lists data sets in LLaMA-Factory's way; set the path to the rows themselves"
            )
    draft.put("data.packing", "padding_free" in str(draft.take("batching_strategy", "")), of=["batching_strategy"])
    _batch(draft)
    shared.precision(draft)
    shared.whole_steps(draft, {"save_steps": "checkpoint.save_steps", "logging_steps": "train.logging_steps"})
    deepspeed(draft, "dist_config.config_file")
    draft.defaults("LLaMA-Factory", DEFAULTS)
    draft.settle(WHY)


def _method(draft: Draft) -> None:
    kind, bits = draft.take("peft_config.name"), draft.take("quant_config.quantization_bit")
    if kind not in (None, "lora"):
        draft.leave("peft_config.name", kind, "is not offered; method: auto decides")
        return
    keys = ["peft_config.name", "quant_config.quantization_bit"]
    draft.put("method", "full" if kind is None else "qlora" if bits == 4 else "lora", of=keys)


def _batch(draft: Draft) -> None:
    micro, gpus = int(draft.take("micro_batch_size", 1)), draft.gpus or 1
    whole = draft.take("global_batch_size")
    draft.put("train.per_device_train_batch_size", micro, of=["micro_batch_size"])
    draft.put("train.global_batch_size", whole or micro * gpus, of=["micro_batch_size", "global_batch_size"])
    if not whole:
        draft.note(
            f"train.global_batch_size is {micro} (micro_batch_size) x {gpus} GPUs; say --gpus N if that is wrong"
        )
