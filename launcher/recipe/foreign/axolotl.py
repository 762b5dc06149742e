"""Axolotl: one YAML with everything at the top level."""

from __future__ import annotations

from typing import Any

from launcher.recipe.foreign import shared
from launcher.recipe.foreign.draft import Draft
from launcher.recipe.foreign.named_files import deepspeed

SAME = {
    "base_model": "model.name_or_path",
    "revision_of_model": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "peft_use_rslora": "lora.use_rslora",
    "bnb_config_kwargs.bnb_4bit_use_double_quant": "quantization.bnb_4bit_use_double_quant",
    "bnb_config_kwargs.bnb_4bit_quant_type": "quantization.bnb_4bit_quant_type",
    "sequence_len": "data.max_seq_length",
    "num_epochs": "train.num_train_epochs",
    "learning_rate": "train.learning_rate",
    "warmup_ratio": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "seed": "train.seed",
    "save_total_limit": "checkpoint.save_total_limit",
    "wandb_name": "name",
    "wandb_entity": "wandb.entity",
    "wandb_mode": "wandb.mode",
}
READ = {
    "adapter, load_in_4bit, peft_use_dora": "method",
    "lora_target_linear, lora_target_modules": "lora.target_modules",
    "datasets, pretraining_dataset": "data.train",
    "val_set_size, test_datasets": "data.validation",
    "sample_packing": "data.packing",
    "train_on_inputs": "data.loss_on",
    "chat_template, chat_template_jinja": "data.chat_template",
    "micro_batch_size, gradient_accumulation_steps, batch_size, ray_num_workers": "train.global_batch_size",
    "max_steps": "train.max_steps",
    "bf16, fp16, bfloat16, float16, torch_dtype": "train.precision",
    "warmup_steps": "train.warmup_ratio",
    "lr_scheduler": "train.lr_scheduler_type",
    "optimizer": "train.optim",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "attn_implementation, flash_attention, sdp_attention, eager_attention": "model.attn_implementation",
    "logging_steps": "train.logging_steps",
    "eval_steps": "train.eval_steps",
    "save_steps": "checkpoint.save_steps",
    "deepspeed": "deepspeed.stage",
    "wandb_project": "wandb.project",
    "use_wandb": "wandb.mode",
}
DEFAULTS = {"data.validation": 0, "data.max_seq_length": 512}
_ATTENTION = {"flash_attention_2": "flash_attention_2", "sdpa": "sdpa", "eager": "eager"}
_SWITCHES = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": "messages"}
OBJECTIVES = ("rl", "reward_model", "process_reward_model", "diffusion", "kd_trainer", "num_labels", "use_ebft")
_TURNS = (("from", "value"), ("role", "content"), ("from", None), ("role", None), (None, "value"), (None, "content"))
"""Names of a turn's two parts that the formats `sharegpt` and `messages` know."""
_BUILDERS = ("json", "csv", "parquet", "text")
_GLOBAL_BATCH = "is not offered; GPUs that share one sequence are one for the global batch: say --gpus without them"
_KERNELS = "a kernel of its own; results do not depend on it"
WHY = {
    "tokenizer_type": "the tokenizer is the model's own",
    "tokenizer_config": "the tokenizer is the model's own",
    "model_type": "the model class follows from config.json",
    "dataset_prepared_path": "the token cache is named by content (launcher data prepare)",
    "pad_to_sequence_len": "rows are packed, or padded to the longest of a batch",
    "eval_sample_packing": "evaluation is packed as training is",
    "eval_batch_size": "evaluation uses the training micro-batch",
    "group_by_length": "rows are packed instead",
    "tf32": "matrix products use TF32 where the GPU has it",
    "saves_per_epoch": "checkpoint.save_minutes saves by time",
    "evals_per_epoch": "train.eval_steps is planned",
    "save_strategy": "checkpoint.save_steps and save_minutes say it",
    "output_dir": "every run gets a folder of its own; output_dir names the parent",
    "fsdp": "weights are sharded by ZeRO here",
    "fsdp_version": "weights are sharded by ZeRO here",
    "fsdp_config.*": "weights are sharded by ZeRO here",
    "special_tokens": "the tokenizer's own special tokens are kept",
    "tokens": "the tokenizer's own tokens are kept",
    "eot_tokens": "the chat template's own end of turn is trained on",
    "lora_modules_to_save": shared.WHOLE_MODULES,
    "lora_target_parameters": "only whole linear layers get adapters",
    "unfrozen_parameters": "method: full trains everything, an adapter only itself",
    "resume_from_checkpoint": "a run resumes by itself; launcher resume RUN",
    "auto_resume_from_checkpoints": "a run resumes by itself",
    "gradient_checkpointing_kwargs": "the form that works with the method is chosen",
    "activation_offloading": "is not offered; gradient checkpointing is",
    "plugins": "no code of other tools is loaded",
    "qat.*": "quantization-aware training is not offered",
    "load_in_8bit": "8-bit bases are not offered; the base is loaded in bf16, or in 4 bits by method: qlora",
    "lora_model_dir": "a run starts from a base; merge the adapter first (launcher merge)",
    "tensor_parallel_size": _GLOBAL_BATCH,
    "context_parallel_size": _GLOBAL_BATCH,
    "sequence_parallel_degree": _GLOBAL_BATCH,
    "ray_num_workers": "--gpus N was given and counts",
    "hub_model_id": "nothing is uploaded by a run",
    "wandb_watch": "gradients are not uploaded",
    "wandb_log_model": "wandb.log_model uploads the result",
    "streaming": "rows are tokenized once, before training",
    **{f"lora_{part}_kernel": _KERNELS for part in ("mlp", "qkv", "o")},
    **{f"liger_{part}": _KERNELS for part in ("rope", "rms_norm", "layer_norm", "glu_activation", "rms_norm_gated")},
    **dict.fromkeys(("liger_fused_linear_cross_entropy", "cut_cross_entropy", "use_kernels"), _KERNELS),
}


def detect(source: dict[str, Any]) -> bool:
    """Whether the keys are Axolotl's."""
    return "base_model" in source and bool({"micro_batch_size", "sequence_len", "datasets"} & source.keys())


def convert(draft: Draft) -> None:
    """Fill `draft`."""
    shared.refuse_other_objectives(draft, OBJECTIVES)
    shared.refuse_other_objectives(draft, ("processor_type",), shared.IMAGES)
    _method(draft)
    draft.same(SAME)
    shared.max_steps(draft)
    _targets(draft)
    _rows(draft)
    draft.put("data.packing", bool(draft.take("sample_packing", False)))
    _template(draft)
    shared.workers(draft, "ray_num_workers")
    _accumulation(draft)
    shared.precision(draft, dtype="torch_dtype", off_is_fp32=True)
    shared.warmup(draft, "warmup_steps")
    shared.schedule(draft, "lr_scheduler")
    shared.optimizer(draft, "optimizer")
    _checkpointing(draft)
    _attention(draft)
    intervals = {"eval_steps": "train.eval_steps", "save_steps": "checkpoint.save_steps"}
    shared.whole_steps(draft, intervals | {"logging_steps": "train.logging_steps"})
    deepspeed(draft, "deepspeed")
    _wandb(draft)
    adapter = {"lora.lora_dropout": 0.0} if draft.get("method") in ("lora", "qlora", "dora") else {}
    draft.defaults("Axolotl", DEFAULTS | adapter)
    draft.settle(WHY)


def _method(draft: Draft) -> None:
    adapter, four_bit, dora = draft.take("adapter"), draft.take("load_in_4bit"), draft.take("peft_use_dora")
    keys = ["adapter", "load_in_4bit", "peft_use_dora"]
    if not adapter:
        draft.put("method", "full", of=[])
        draft.drop("load_in_4bit", "method: full trains 16-bit weights")
    elif adapter not in ("lora", "qlora"):
        draft.leave("adapter", adapter, "is not offered; method: auto decides")
    elif dora:
        draft.put("method", "dora", of=["adapter", "peft_use_dora"])
        draft.drop("load_in_4bit", "method: dora keeps its base in 16 bits")
    else:
        draft.put("method", "qlora" if adapter == "qlora" or four_bit else "lora", of=keys)


def _targets(draft: Draft) -> None:
    if not draft.take("lora_target_linear"):
        shared.module_names(draft, "lora_target_modules")
        return
    draft.put("lora.target_modules", "all-linear")
    draft.drop("lora_target_modules", "lora_target_linear: all linear layers are targets")


def _rows(draft: Draft) -> None:
    """Data sets to train on and to hold out; pre-training sets are plain text, trained on whole."""
    entries = [
        source for index, one in enumerate(_list(draft.take("datasets"))) for source in _entry(draft, index, one)
    ]
    plain = _list(draft.take("pretraining_dataset"))
    for index, one in enumerate(plain):
        entries += [source | {"format": "text"} for source in _entry(draft, index, one, "pretraining_dataset")]
    draft.put("data.train", entries or None, of=["datasets", "pretraining_dataset"])
    if plain:
        draft.note("pretraining_dataset: text, trained on as a whole (data.loss_on: all); it is not streamed")
    if draft.take("train_on_inputs") or (plain and not draft.look("datasets")):
        draft.put("data.loss_on", "all")
    tests = [
        source
        for i, one in enumerate(_list(draft.take("test_datasets")))
        for source in _entry(draft, i, one, "test_datasets")
    ]
    if tests:
        draft.put("data.validation", {key: tests[0][key] for key in tests[0] if key != "weight"})
        if len(tests) > 1:
            draft.leave("test_datasets[1:]", tests[1:], "one set is evaluated on; write them into one file")
    shared.held_out(draft, "val_set_size")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _entry(draft: Draft, index: int, one: Any, section: str = "datasets") -> list[dict[str, Any]]:
    """One data set; one of several files makes several sources."""
    entry = dict(one) if isinstance(one, dict) else {"path": one}
    here = f"{section}[{index}]"
    path, files = str(entry.pop("path", "")), [str(name) for name in _list(entry.pop("data_files", None))]
    source = _format(entry)
    if entry.get("split"):
        source |= shared.split(draft, f"{here}.split", entry.pop("split"))
    if path in _BUILDERS and files:
        made = [{"path": name} | source for name in files]
    else:
        named = {"revision": entry.pop("revision", None), "config": entry.pop("name", None)}
        made = [{"path": path} | {key: value for key, value in named.items() if value} | source]
        if files:
            draft.leave(f"{here}.data_files", files, "files of a data set are not chosen; stage it and name the file")
    for key, value in entry.items():
        if value not in (None, False, "", [], {}) and not (key == "ds_type" and path.endswith(str(value))):
            draft.leave(f"{here}.{key}", value, _WHY_ENTRY.get(key, "columns and roles are found by data format"))
    return made


_WHY_ENTRY = {
    "type": "no format of that name; columns are found (data.train[].format: auto)",
    "trust_remote_code": "no code that comes with data is run",
    "ds_type": "the kind of a file follows from its name",
}


def _format(entry: dict[str, Any]) -> dict[str, Any]:
    """Takes what the format says out of `entry`."""
    kind = entry.get("type")
    ours = _FORMATS.get(kind.split(".")[0]) if isinstance(kind, str) else None
    if ours is None:
        return {}
    entry.pop("type")
    mapped = entry.get("message_property_mappings")
    names = mapped if isinstance(mapped, dict) else {}
    role = names.get("role", entry.get("message_field_role"))
    content = names.get("content", entry.get("message_field_content"))
    if ours == "messages" and (role == "from" or entry.get("field_messages") == "conversations"):
        ours = "sharegpt"
    usual = {"field_messages": ("conversations", "messages"), "field": ("text",), "text_column": ("text",)}
    for key, known in usual.items():
        if entry.get(key) in known:
            entry.pop(key)
    if (role, content) in _TURNS and set(names) <= {"role", "content"}:
        for key in ("message_field_role", "message_field_content", "message_property_mappings"):
            entry.pop(key, None)
    return {"format": ours}


def _template(draft: Draft) -> None:
    name, file = draft.take("chat_template"), draft.look("chat_template_jinja")
    if str(file).endswith(".jinja") or str(name).endswith(".jinja"):
        key = "chat_template_jinja" if str(file).endswith(".jinja") else "chat_template"
        draft.put("data.chat_template", draft.take(key))
    elif name == "tokenizer_default":
        draft.put("data.chat_template", "tokenizer")
    elif name:
        draft.leave("chat_template", name, "the tokenizer's own is used (data.chat_template takes a .jinja file)")


def _accumulation(draft: Draft) -> None:
    """`batch_size` is one GPU's share of a step there, and says the accumulation where nothing else does."""
    share, micro = draft.look("batch_size"), draft.look("micro_batch_size", 1)
    shared.batch(draft, "micro_batch_size", "gradient_accumulation_steps")
    if not isinstance(share, int) or draft.look("gradient_accumulation_steps") or share % micro:
        return
    draft.take("batch_size")
    draft.put("train.global_batch_size", share * (draft.gpus or 1))
    draft.notes.pop()
    draft.note(f"train.global_batch_size is {share} (batch_size, of one GPU) x {draft.gpus or 1} GPUs")


def _checkpointing(draft: Draft) -> None:
    value = draft.take("gradient_checkpointing")
    if value is None:
        return
    draft.put("train.gradient_checkpointing", bool(value))
    if value not in (True, False):
        draft.leave("gradient_checkpointing", value, "is not offered; plain gradient checkpointing is used")


def _attention(draft: Draft) -> None:
    draft.choose("attn_implementation", "model.attn_implementation", _ATTENTION)
    for key, name in _SWITCHES.items():
        if draft.take(key) and draft.get("model.attn_implementation") is None:
            draft.put("model.attn_implementation", name)


def _wandb(draft: Draft) -> None:
    """Axolotl logs to W&B where a project is named, and nowhere else."""
    project, used = draft.take("wandb_project"), draft.take("use_wandb")
    draft.put("wandb.project", project or None, of=["wandb_project"])
    if draft.get("wandb.mode") is None and (used is False or not project):
        draft.put("wandb.mode", "disabled", of=["use_wandb"])
