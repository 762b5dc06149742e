"""LLaMA-Factory: Hugging Face's arguments with its own names for adapters and data."""

from __future__ import annotations

import json
from typing import Any

from launcher.recipe.foreign.draft import Draft, LeftOut, module_names, optimizer, schedule

_SAME = {
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "use_rslora": "lora.use_rslora",
    "double_quantization": "quantization.bnb_4bit_use_double_quant",
    "quantization_type": "quantization.bnb_4bit_quant_type",
    "cutoff_len": "data.max_seq_length",
    "num_train_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "learning_rate": "train.learning_rate",
    "warmup_ratio": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "seed": "train.seed",
    "logging_steps": "train.logging_steps",
    "eval_steps": "train.eval_steps",
    "save_steps": "checkpoint.save_steps",
    "save_total_limit": "checkpoint.save_total_limit",
    "run_name": "name",
}
_ATTENTION = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
WHY = {
    "stage": "supervised fine-tuning is what is done here",
    "do_train": "a recipe is for training",
    "template": "the tokenizer's own chat template is used (data.chat_template takes a .jinja file)",
    "overwrite_cache": "the token cache is named by content",
    "preprocessing_num_workers": "tokenizing uses all cores",
    "dataloader_num_workers": "token tables are memory-mapped; no loader processes are needed",
    "output_dir": "every run gets a folder of its own; output_dir names the parent",
    "overwrite_output_dir": "every run gets a folder of its own",
    "plot_loss": "losses are in metrics.jsonl",
    "ddp_timeout": "rank 0 tokenizes before ranks meet",
    "eval_strategy": "train.eval_steps says it",
    "per_device_eval_batch_size": "evaluation uses the training micro-batch",
    "resume_from_checkpoint": "a run resumes by itself; launcher resume RUN",
    "report_to": "metrics.jsonl is always written; W&B is the wandb section",
    "max_samples": "all rows are used; write a smaller file",
}


def detect(source: dict[str, Any]) -> bool:
    """Whether the keys are LLaMA-Factory's."""
    return "finetuning_type" in source or ("cutoff_len" in source and "template" in source)


def convert(draft: Draft) -> None:
    """Fill `draft`."""
    _method(draft)
    draft.same(_SAME)
    draft.put("lora.target_modules", module_names(draft.take("lora_target")))
    _datasets(draft)
    draft.put("data.validation", draft.take("val_size"))
    draft.put("data.packing", bool(draft.take("packing", False) or draft.take("neat_packing", False)))
    if draft.take("train_on_prompt"):
        draft.put("data.loss_on", "all")
    elif draft.take("mask_history"):
        draft.put("data.loss_on", "completion")
    draft.batch("per_device_train_batch_size", "gradient_accumulation_steps")
    draft.precision()
    draft.warmup("warmup_steps", draft.get("train.max_steps"))
    schedule(draft, "lr_scheduler_type")
    optimizer(draft, "optim")
    draft.choose("flash_attn", "model.attn_implementation", _ATTENTION)
    if draft.take("disable_gradient_checkpointing"):
        draft.put("train.gradient_checkpointing", False)
    draft.deepspeed("deepspeed")
    draft.settle(WHY)


def _method(draft: Draft) -> None:
    kind, bits = draft.take("finetuning_type", "lora"), draft.take("quantization_bit")
    draft.take("quantization_method")
    if kind not in ("lora", "full"):
        draft.left_out.append(LeftOut(key="finetuning_type", value=kind, why="is not offered; method: auto decides"))
    elif kind == "full":
        draft.put("method", "full")
    elif draft.take("use_dora"):
        draft.put("method", "dora")
    else:
        draft.put("method", "qlora" if bits == 4 else "lora")
    if bits not in (None, 4):
        draft.left_out.append(LeftOut(key="quantization_bit", value=bits, why="only 4-bit bases are offered"))
    if draft.look("stage", "sft") not in ("sft", "pt"):
        draft.left_out.append(
            LeftOut(key="stage", value=draft.take("stage"), why="only supervised fine-tuning and pre-training are")
        )


def _datasets(draft: Draft) -> None:
    """Names are looked up in dataset_info.json, which lies in dataset_dir."""
    folder = draft.folder / str(draft.take("dataset_dir", "data"))
    try:
        known = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    names = draft.take("dataset", "")
    names = names if isinstance(names, list) else [name.strip() for name in str(names).split(",") if name.strip()]
    draft.put("data.train", [_dataset(draft, name, known, folder) for name in names])
    held = draft.take("eval_dataset")
    if held:
        draft.put("data.validation", _dataset(draft, str(held).split(",")[0].strip(), known, folder))


def _dataset(draft: Draft, name: str, known: dict[str, Any], folder: Any) -> dict[str, Any]:
    facts = dict(known[name]) if isinstance(known.get(name), dict) else None
    if facts is None:
        why = "is a name of dataset_info.json, which does not have it here; set data.train[].path to its file or id"
        draft.left_out.append(LeftOut(key="dataset", value=name, why=why))
        return {"path": f"{name}.json"}
    file = facts.get("file_name")
    source: dict[str, Any] = {"path": str(folder / file) if file else facts.get("hf_hub_url", name)}
    formatting = facts.get("formatting", "alpaca")
    source["format"] = formatting if formatting in ("alpaca", "sharegpt") else "auto"
    if facts.get("split"):
        source["split"] = facts["split"]
    if facts.get("subset") and not file:
        source["config"] = facts.pop("subset")
    for key in ("columns", "tags", "subset", "num_samples", "ranking"):
        if facts.get(key):
            draft.left_out.append(
                LeftOut(key=f"dataset_info.{name}.{key}", value=facts[key], why="columns are found by data format")
            )
    return source
