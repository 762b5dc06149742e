"""TRL: SFTConfig, ModelConfig and ScriptArguments in one YAML."""

from __future__ import annotations

from typing import Any

from launcher.recipe.foreign.draft import Draft, module_names, optimizer, schedule

_SAME = {
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "use_rslora": "lora.use_rslora",
    "bnb_4bit_quant_type": "quantization.bnb_4bit_quant_type",
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "num_train_epochs": "train.num_train_epochs",
    "learning_rate": "train.learning_rate",
    "warmup_ratio": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "seed": "train.seed",
    "logging_steps": "train.logging_steps",
    "eval_steps": "train.eval_steps",
    "save_steps": "checkpoint.save_steps",
    "save_total_limit": "checkpoint.save_total_limit",
    "run_name": "name",
}
_ATTENTION = {"flash_attention_2": "flash_attention_2", "sdpa": "sdpa", "eager": "eager"}
WHY = {
    "output_dir": "every run gets a folder of its own; output_dir names the parent",
    "eval_strategy": "train.eval_steps says it",
    "save_strategy": "checkpoint.save_steps and save_minutes say it",
    "report_to": "metrics.jsonl is always written; W&B is the wandb section",
    "per_device_eval_batch_size": "evaluation uses the training micro-batch",
    "gradient_checkpointing_kwargs": "the form that works with the method is chosen",
    "dataset_num_proc": "tokenizing uses all cores",
    "push_to_hub": "nothing is uploaded by a run",
    "hub_model_id": "nothing is uploaded by a run",
    "lora_task_type": "is always CAUSAL_LM",
    "lora_modules_to_save": "adapters with whole modules cannot be served by vLLM; train them with method: full",
    "dataset_text_field": "columns are found by data format",
    "packing_strategy": "documents are packed whole and kept apart",
    "padding_free": "packed rows hold no padding",
    "chat_template_path": "data.chat_template takes a .jinja file",
    "eos_token": "the tokenizer's own is used",
    "log_level": "has no counterpart here",
}


def detect(source: dict[str, Any]) -> bool:
    """Whether the keys are TRL's."""
    own = {"dataset_name", "dataset_mixture", "use_peft", "datasets"}
    return "model_name_or_path" in source and bool(own & source.keys())


def convert(draft: Draft) -> None:
    """Fill `draft`."""
    _method(draft)
    draft.same(_SAME)
    draft.put("lora.target_modules", module_names(draft.take("lora_target_modules")))
    draft.put("data.max_seq_length", draft.take("max_length", draft.take("max_seq_length")))
    steps = draft.take("max_steps")
    draft.put("train.max_steps", steps if isinstance(steps, int) and steps > 0 else None)
    _datasets(draft)
    draft.put("data.packing", bool(draft.take("packing", False)))
    _loss(draft)
    template = draft.look("chat_template_path")
    if str(template).endswith(".jinja"):
        draft.put("data.chat_template", draft.take("chat_template_path"))
    draft.batch("per_device_train_batch_size", "gradient_accumulation_steps")
    draft.precision(dtype="dtype" if draft.look("dtype") else "torch_dtype")
    draft.warmup("warmup_steps", draft.get("train.max_steps"))
    schedule(draft, "lr_scheduler_type")
    optimizer(draft, "optim")
    draft.choose("attn_implementation", "model.attn_implementation", _ATTENTION)
    draft.deepspeed("deepspeed")
    draft.settle(WHY)


def _method(draft: Draft) -> None:
    peft, four_bit = draft.take("use_peft"), draft.take("load_in_4bit")
    draft.drop("load_in_8bit", "8-bit bases are not offered; the base is loaded in bf16, or in 4 bits by method: qlora")
    if not peft:
        draft.put("method", "full")
    elif draft.take("use_dora"):
        draft.put("method", "dora")
    else:
        draft.put("method", "qlora" if four_bit else "lora")


def _datasets(draft: Draft) -> None:
    name = draft.take("dataset_name")
    if name:
        config = draft.take("dataset_config")
        source = {"path": name} | ({"config": config} if config else {})
        split = draft.take("dataset_train_split")
        draft.put("data.train", [source | ({"split": split} if split else {})])
        held = draft.take("dataset_test_split")
        if held and draft.look("eval_strategy", "no") != "no":
            draft.put("data.validation", source | {"split": held})
        return
    mixture = draft.take("datasets") or draft.look("dataset_mixture.datasets") or []
    draft.take("dataset_mixture")
    draft.put("data.train", [_of_mixture(one) for one in mixture if isinstance(one, dict)])


def _of_mixture(one: dict[str, Any]) -> dict[str, Any]:
    """One entry of `datasets`; `name` is the configuration there."""
    named = {"split": one.get("split"), "config": one.get("name")}
    return {"path": one.get("path", one.get("id", ""))} | {key: value for key, value in named.items() if value}


def _loss(draft: Draft) -> None:
    if draft.take("assistant_only_loss"):
        draft.put("data.loss_on", "assistant")
    elif draft.take("completion_only_loss"):
        draft.put("data.loss_on", "completion")
    else:
        draft.put("data.loss_on", "all")
        draft.note("data.loss_on: all, TRL's default for chats; `assistant` trains on answers only")
