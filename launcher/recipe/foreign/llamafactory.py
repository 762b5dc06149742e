"""LLaMA-Factory: Hugging Face's arguments with its own names for adapters and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.recipe.foreign import llamafactory1, shared
from launcher.recipe.foreign.draft import Draft
from launcher.recipe.foreign.named_files import deepspeed, find, read_json

SAME = {
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
    "learning_rate": "train.learning_rate",
    "warmup_ratio": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "seed": "train.seed",
    "save_total_limit": "checkpoint.save_total_limit",
    "run_name": "name",
}
READ = {
    "finetuning_type, quantization_bit, use_dora": "method",
    "lora_target": "lora.target_modules",
    "dataset, dataset_dir": "data.train",
    "val_size, eval_dataset": "data.validation",
    "packing, neat_packing": "data.packing",
    "stage, train_on_prompt, mask_history": "data.loss_on",
    "per_device_train_batch_size, gradient_accumulation_steps, ray_num_workers": "train.global_batch_size",
    "max_steps": "train.max_steps",
    "bf16, fp16, pure_bf16": "train.precision",
    "warmup_steps": "train.warmup_ratio",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "optim": "train.optim",
    "flash_attn": "model.attn_implementation",
    "disable_gradient_checkpointing": "train.gradient_checkpointing",
    "logging_steps": "train.logging_steps",
    "eval_steps": "train.eval_steps",
    "save_steps": "checkpoint.save_steps",
    "deepspeed": "deepspeed.stage",
    "report_to": "wandb.mode",
}
DEFAULTS = {
    "data.validation": 0,
    "train.num_train_epochs": 3.0,
    "train.learning_rate": 5e-5,
    "train.lr_scheduler_type": "linear",
    "train.warmup_ratio": 0.0,
    "data.max_seq_length": 2048,
}
_ATTENTION = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
_NOT_TRAINING = ("do_predict", "export_dir", "infer_backend")
_LOSS = "another loss; cross-entropy is used"
_OPTIMIZER = "another optimizer; AdamW is used"
WHY = {
    "do_train": "a recipe is for training",
    "do_eval": "a recipe with data.validation is evaluated",
    "template": "the tokenizer's own chat template is used (data.chat_template takes a .jinja file)",
    "overwrite_cache": "the token cache is named by content",
    "preprocessing_num_workers": "tokenizing uses all cores",
    "dataloader_num_workers": "token tables are memory-mapped; no loader processes are needed",
    "output_dir": "every run gets a folder of its own; output_dir names the parent",
    "overwrite_output_dir": "every run gets a folder of its own",
    "plot_loss": "losses are in metrics.jsonl",
    "ddp_timeout": "rank 0 tokenizes before ranks meet",
    "eval_strategy": "train.eval_steps says it",
    "save_strategy": "checkpoint.save_steps and save_minutes say it",
    "save_only_model": "checkpoints hold all that resuming needs",
    "per_device_eval_batch_size": "evaluation uses the training micro-batch",
    "resume_from_checkpoint": "a run resumes by itself; launcher resume RUN",
    "adapter_name_or_path": "a run starts from a base; merge the adapter first (launcher merge)",
    "max_samples": "all rows are used; write a smaller file",
    "additional_target": shared.WHOLE_MODULES,
    "tokenized_path": "the token cache is named by content (launcher data prepare)",
    "fsdp": "weights are sharded by ZeRO here",
    "fsdp_config.*": "weights are sharded by ZeRO here",
    **{f"use_{name}_loss": _LOSS for name in ("dft", "eaft", "asft")},
    **{f"use_{name}": _OPTIMIZER for name in ("galore", "apollo", "badam", "muon", "adam_mini")},
    "ray_num_workers": "--gpus N was given and counts",
    "pure_bf16": "optimizer states stay in fp32 here",
    "mask_history": "data.loss_on: all trains on every turn",
}


def detect(source: dict[str, Any]) -> bool:
    """Whether the keys are LLaMA-Factory's."""
    older = "finetuning_type" in source or ("template" in source and bool({"cutoff_len", "dataset"} & source.keys()))
    return older or "stage" in source or llamafactory1.detect(source)


def convert(draft: Draft) -> None:
    """Fill `draft`."""
    if llamafactory1.detect(dict(draft.source)):
        llamafactory1.convert(draft)
        return
    _objective(draft)
    _method(draft)
    draft.same(SAME)
    shared.max_steps(draft)
    shared.module_names(draft, "lora_target")
    _datasets(draft)
    shared.held_out(draft, "val_size")
    _loss_and_packing(draft)
    shared.workers(draft, "ray_num_workers")
    shared.batch(draft, "per_device_train_batch_size", "gradient_accumulation_steps", default=8)
    shared.precision(draft)
    if draft.take("pure_bf16"):
        draft.put("train.precision", "bf16")
    shared.warmup(draft, "warmup_steps")
    shared.schedule(draft, "lr_scheduler_type")
    shared.optimizer(draft, "optim")
    draft.choose("flash_attn", "model.attn_implementation", _ATTENTION)
    if draft.look("disable_gradient_checkpointing") is not None:
        draft.put("train.gradient_checkpointing", not draft.take("disable_gradient_checkpointing"))
    intervals = {"eval_steps": "train.eval_steps", "save_steps": "checkpoint.save_steps"}
    shared.whole_steps(draft, intervals | {"logging_steps": "train.logging_steps"})
    deepspeed(draft, "deepspeed")
    shared.report_to(draft)
    draft.defaults("LLaMA-Factory", DEFAULTS)
    _adapter_defaults(draft)
    draft.settle(WHY)


def _objective(draft: Draft) -> None:
    if draft.take("stage", "sft") not in ("sft", "pt"):
        draft.refuse("stage", shared.SUPERVISED)
    draft.agree("stage")
    shared.refuse_other_objectives(draft, _NOT_TRAINING, "is of evaluation, export or inference, not of training")
    shared.refuse_other_objectives(draft, ("image_max_pixels", "video_max_pixels", "media_dir"), shared.IMAGES)


def _method(draft: Draft) -> None:
    kind, bits = draft.take("finetuning_type", "lora"), draft.take("quantization_bit")
    keys = ["finetuning_type", "quantization_bit", "use_dora"]
    draft.take("use_dora")
    if kind not in ("lora", "full"):
        draft.leave("finetuning_type", kind, "is not offered; method: auto decides")
    elif kind == "full":
        draft.put("method", "full", of=["finetuning_type"])
    elif draft.look("use_dora"):
        draft.put("method", "dora", of=["finetuning_type", "use_dora"])
        draft.drop("quantization_bit", "method: dora keeps its base in 16 bits")
    else:
        draft.put("method", "qlora" if bits == 4 else "lora", of=keys if bits == 4 else [keys[0]])
    if bits not in (None, 4):
        draft.leave("quantization_bit", bits, "only 4-bit bases are offered")
    if draft.take("quantization_method", "bnb") in ("bnb", "bitsandbytes"):
        draft.agree("quantization_method")
    else:
        draft.drop("quantization_method", "is not offered; bases are quantized by bitsandbytes")


def _adapter_defaults(draft: Draft) -> None:
    if draft.get("method") in ("full", None):
        return
    rank = draft.get("lora.r") or 8
    adapter = {"lora.r": rank, "lora.lora_alpha": 2 * rank, "lora.lora_dropout": 0.0}
    draft.defaults("LLaMA-Factory", adapter)


def _loss_and_packing(draft: Draft) -> None:
    """Pre-training trains on everything and packs by itself."""
    plain = draft.look("stage") == "pt"
    packed = draft.take("packing", plain) or draft.take("neat_packing", False)
    draft.put("data.packing", bool(packed), of=["packing", "neat_packing"])
    if packed and not draft.look("neat_packing"):
        draft.note("data.packing keeps rows apart (neat_packing); without that, theirs see each other")
    if plain or draft.take("train_on_prompt"):
        draft.put("data.loss_on", "all", of=["stage", "train_on_prompt"])
    elif draft.take("mask_history"):
        draft.put("data.loss_on", "completion")


def _datasets(draft: Draft) -> None:
    """Names are looked up in dataset_info.json, which lies in dataset_dir."""
    named = str(draft.take("dataset_dir", "data"))
    table = find(draft.folder, f"{named}/dataset_info.json")
    known, folder = read_json(table) or {}, table.parent if table else draft.folder / named
    sources = [_dataset(draft, name, known, folder) for name in _names(draft.take("dataset"))]
    draft.put("data.train", sources or None)
    held = _names(draft.take("eval_dataset"))
    if held:
        draft.put("data.validation", _dataset(draft, held[0], known, folder))
    if held[1:]:
        draft.leave("eval_dataset[1:]", ", ".join(held[1:]), "one set is evaluated on; write them into one file")
    if table:
        draft.agree("dataset_dir")


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value or "").split(",")
    return [str(name).strip() for name in names if str(name).strip()]


def _dataset(draft: Draft, name: str, known: dict[str, Any], folder: Path) -> dict[str, Any]:
    facts = dict(known[name]) if isinstance(known.get(name), dict) else None
    if facts is None:
        why = "is a name of dataset_info.json, which does not have it here; set data.train[].path to its file or id"
        draft.leave(f"dataset[{name}]", name, why)
        return {"path": f"{name}.json"}
    if facts.get("ranking"):
        draft.problems.append(f"dataset: {name} holds preferences, which {shared.SUPERVISED}")
    file, place = facts.pop("file_name", None), facts.pop("hf_hub_url", name)
    for other in ("ms_hub_url", "om_hub_url"):
        facts.pop(other, None)
    source: dict[str, Any] = {"path": str(folder / file) if file else place}
    formatting = facts.pop("formatting", "alpaca")
    source["format"] = formatting if formatting in ("alpaca", "sharegpt") else "auto"
    if draft.look("stage") == "pt":
        source["format"] = "text"
    if facts.get("split"):
        source |= shared.split(draft, f"dataset_info.{name}.split", facts.pop("split"))
    if facts.get("subset") and not file:
        source["config"] = facts.pop("subset")
    for key, value in facts.items():
        if value:
            draft.leave(
                f"dataset_info.{name}.{key}", value, "columns are found by data format; check data.train[].format"
            )
    return source
