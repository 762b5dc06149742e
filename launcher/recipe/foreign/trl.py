"""TRL: SFTConfig, ModelConfig and ScriptArguments in one YAML; the alignment handbook's recipes, too."""

from __future__ import annotations

from typing import Any

from launcher.recipe.foreign import shared
from launcher.recipe.foreign.draft import Draft
from launcher.recipe.foreign.named_files import deepspeed
from launcher.recipe.schema import DataSection

SAME = {
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
    "save_total_limit": "checkpoint.save_total_limit",
    "run_name": "name",
}
READ = {
    "use_peft, load_in_4bit, use_dora": "method",
    "lora_target_modules": "lora.target_modules",
    "dataset_name, dataset_config, dataset_configs, dataset_train_split, datasets, dataset_mixture, dataset_mixer, "
    "dataset_splits": "data.train",
    "dataset_test_split, test_split_size": "data.validation",
    "dataset_mixture.seed": "data.split_seed",
    "max_length, max_seq_length": "data.max_seq_length",
    "packing": "data.packing",
    "assistant_only_loss, completion_only_loss": "data.loss_on",
    "chat_template_path": "data.chat_template",
    "per_device_train_batch_size, gradient_accumulation_steps": "train.global_batch_size",
    "max_steps": "train.max_steps",
    "bf16, fp16, dtype, torch_dtype": "train.precision",
    "warmup_steps": "train.warmup_ratio",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "optim": "train.optim",
    "attn_implementation": "model.attn_implementation",
    "logging_steps": "train.logging_steps",
    "eval_steps": "train.eval_steps",
    "save_steps": "checkpoint.save_steps",
    "deepspeed": "deepspeed.stage",
    "report_to": "wandb.mode",
}
DEFAULTS = {
    "data.validation": 0,
    "train.num_train_epochs": 3.0,
    "train.learning_rate": 2e-5,
    "train.lr_scheduler_type": "linear",
    "train.warmup_ratio": 0.0,
    "data.max_seq_length": 1024,
}
_ADAPTER = {"lora.r": 16, "lora.lora_alpha": 32, "lora.lora_dropout": 0.05}
_ATTENTION = {"flash_attention_2": "flash_attention_2", "sdpa": "sdpa", "eager": "eager"}
OBJECTIVES = (
    "beta", "max_prompt_length", "max_completion_length", "num_generations", "reward_funcs", "reward_model_path",
    "reward_model_name_or_path", "rpo_alpha", "desirable_weight", "undesirable_weight", "precompute_ref_log_probs",
    "use_vllm", "center_rewards_coefficient", "sync_ref_model", "num_ppo_epochs", "kl_coef",
)  # fmt: skip
_CROSS_ENTROPY = (None, "nll", "chunked_nll")
_UPLOADS = "nothing is uploaded by a run"
WHY = {
    "output_dir": "every run gets a folder of its own; output_dir names the parent",
    "overwrite_output_dir": "every run gets a folder of its own",
    "do_eval": "a recipe with data.validation is evaluated",
    "do_train": "a recipe is for training",
    "eval_strategy": "train.eval_steps says it",
    "evaluation_strategy": "train.eval_steps says it",
    "save_strategy": "checkpoint.save_steps and save_minutes say it",
    "logging_strategy": "train.logging_steps says it",
    "per_device_eval_batch_size": "evaluation uses the training micro-batch",
    "gradient_checkpointing_kwargs": "the form that works with the method is chosen",
    "dataset_num_proc": "tokenizing uses all cores",
    "preprocessing_num_workers": "tokenizing uses all cores",
    "push_to_hub": _UPLOADS,
    "hub_model_id": _UPLOADS,
    "hub_strategy": _UPLOADS,
    "load_in_8bit": "8-bit bases are not offered; the base is loaded in bf16, or in 4 bits by method: qlora",
    "lora_task_type": "is always CAUSAL_LM",
    "lora_modules_to_save": shared.WHOLE_MODULES,
    "dataset_text_field": "columns are found by data format",
    "packing_strategy": "documents are packed whole and kept apart",
    "padding_free": "packed rows hold no padding",
    "chat_template": "data.chat_template takes a .jinja file; write the template into one",
    "chat_template_path": "data.chat_template takes a .jinja file",
    "eos_token": "the tokenizer's own is used",
    "log_level": "messages are the launcher's own",
    "ddp_timeout": "rank 0 tokenizes before ranks meet",
    "remove_unused_columns": "columns are found by data format",
    "lr_scheduler_kwargs": "the schedule has no further settings here",
    "use_liger_kernel": "a kernel of its own; results do not depend on it",
    "average_tokens_across_devices": "the loss is always averaged over the tokens of all ranks",
    "load_best_model_at_end": "the last adapter is kept; checkpoints are kept by number",
    "resume_from_checkpoint": "a run resumes by itself; launcher resume RUN",
    "env.*": "environment variables belong to the site's profile",
}


def detect(source: dict[str, Any]) -> bool:
    """Whether the keys are TRL's."""
    own = {"dataset_name", "dataset_mixture", "dataset_mixer", "use_peft", "datasets"}
    return "model_name_or_path" in source and bool(own & source.keys())


def convert(draft: Draft) -> None:
    """Fill `draft`."""
    shared.refuse_other_objectives(draft, OBJECTIVES)
    if draft.take("loss_type") not in _CROSS_ENTROPY:
        _other_loss(draft)
    _method(draft)
    draft.same(SAME)
    shared.max_steps(draft)
    shared.module_names(draft, "lora_target_modules")
    _length(draft)
    _datasets(draft)
    draft.put("data.packing", bool(draft.take("packing", False)))
    _loss(draft)
    if str(draft.look("chat_template_path")).endswith(".jinja"):
        draft.put("data.chat_template", draft.take("chat_template_path"))
    shared.batch(draft, "per_device_train_batch_size", "gradient_accumulation_steps", default=8)
    shared.precision(draft, dtype="dtype" if draft.look("dtype") else "torch_dtype", off_is_fp32=True)
    shared.warmup(draft, "warmup_steps")
    shared.schedule(draft, "lr_scheduler_type")
    shared.optimizer(draft, "optim")
    draft.choose("attn_implementation", "model.attn_implementation", _ATTENTION)
    intervals = {"eval_steps": "train.eval_steps", "save_steps": "checkpoint.save_steps"}
    shared.whole_steps(draft, intervals | {"logging_steps": "train.logging_steps"})
    deepspeed(draft, "deepspeed")
    shared.report_to(draft)
    draft.defaults("TRL", DEFAULTS)
    _adapter_defaults(draft)
    draft.note("read as a file of `trl sft`: a file of another trainer need not say so")
    draft.settle(WHY)


def _other_loss(draft: Draft) -> None:
    value = draft.look("loss_type")
    if value in ("dft", "chunked_dft"):
        draft.leave("loss_type", value, "another loss; cross-entropy is used")
    else:
        draft.refuse("loss_type", shared.SUPERVISED)


def _method(draft: Draft) -> None:
    peft, four_bit, dora = draft.take("use_peft"), draft.take("load_in_4bit"), draft.take("use_dora")
    if not peft:
        draft.put("method", "full", of=["use_peft"])
        draft.drop("load_in_4bit", "method: full trains 16-bit weights")
    elif dora:
        draft.put("method", "dora", of=["use_peft", "use_dora"])
        draft.drop("load_in_4bit", "method: dora keeps its base in 16 bits")
    else:
        draft.put("method", "qlora" if four_bit else "lora", of=["use_peft", "load_in_4bit"])


def _adapter_defaults(draft: Draft) -> None:
    if draft.get("method") == "full":
        return
    nested = {"quantization.bnb_4bit_use_double_quant": False} if draft.get("method") == "qlora" else {}
    draft.defaults("TRL", _ADAPTER | nested)
    if draft.get("lora.target_modules") is None:
        draft.note(
            "lora_target_modules is not in the file: PEFT then takes its list for the model (q_proj and v_proj for "
            "most), here all linear layers are targets; write lora.target_modules for the same"
        )


def _datasets(draft: Draft) -> None:
    """One data set with its splits, a list of them, or one of the handbook's two mixtures."""
    listed, key = draft.take("datasets"), "datasets"
    if not listed and draft.look("dataset_mixture"):
        key = "dataset_mixture.datasets"
        listed = draft.take(key)
        if draft.look("dataset_mixture.seed") is not None:
            draft.put("data.split_seed", draft.take("dataset_mixture.seed"))
        shared.held_out(draft, "dataset_mixture.test_split_size")
    if listed:
        sources = [one for index, entry in enumerate(listed) for one in _entry(draft, f"{key}[{index}]", entry)]
        draft.put("data.train", sources, of=[key])
        shared.held_out(draft, "test_split_size")
        draft.drop("dataset_name", f"{key} stands beside it and counts")
    elif draft.look("dataset_mixer"):
        _mixer(draft)
    else:
        _named(draft)


def _named(draft: Draft) -> None:
    name = draft.take("dataset_name")
    if not name:
        return
    configs = draft.take("dataset_configs") or [None]
    config = draft.take("dataset_config") or configs[0]
    if configs[1:]:
        draft.leave(
            "dataset_configs[1:]", configs[1:], "one configuration of a data set is taken; name it once for each"
        )
    source = {"path": name} | ({"config": config} if config else {})
    wanted = draft.take("dataset_train_split")
    chosen = shared.split(draft, "dataset_train_split", wanted) if wanted else {}
    used = ["dataset_name", "dataset_config", "dataset_train_split", *(["dataset_configs"] if config else [])]
    draft.put("data.train", [source | chosen], of=used)
    held = draft.look("dataset_test_split", "test")
    if _evaluates(draft):
        draft.take("dataset_test_split")
        draft.put("data.validation", source | shared.split(draft, "dataset_test_split", held))


def _length(draft: Draft) -> None:
    key = "max_length" if "max_length" in draft.source else "max_seq_length"
    if key in draft.source and draft.look(key) is None:
        cut = DataSection(train=()).max_seq_length
        draft.put("data.max_seq_length", cut, of=())
        draft.leave(key, None, f"rows are never cut there; data.max_seq_length: {cut} is written")
    draft.put("data.max_seq_length", draft.take(key))


def _evaluates(draft: Draft) -> bool:
    return (draft.look("eval_strategy") or draft.look("evaluation_strategy") or "no") != "no"


def _mixer(draft: Draft) -> None:
    """The handbook's older form: shares by data-set id, and a list of splits for all."""
    names = draft.take("dataset_mixer")
    splits, configs = draft.take("dataset_splits") or ["train"], draft.take("dataset_configs") or []
    trained = [str(one) for one in splits if "train" in str(one)] or [str(splits[0])]
    train = []
    for index, (name, weight) in enumerate(names.items()):
        config = {"config": configs[index]} if index < len(configs) else {}
        share = {"weight": weight} if weight != 1 else {}
        train += [{"path": name} | config | shared.split(draft, "dataset_splits", one) | share for one in trained]
    draft.put("data.train", train, of=["dataset_mixer", "dataset_splits", "dataset_configs"])
    held = [str(one) for one in splits if str(one) not in trained]
    if held and not _evaluates(draft):
        draft.leave("dataset_splits[held]", held, "is for evaluation, which is switched off")
    elif held:
        first = {key: value for key, value in train[0].items() if key != "weight"}
        draft.put("data.validation", first | {"split": held[0]}, of=["dataset_splits"])
        if len(names) > 1 or held[1:]:
            rest = [*list(names)[1:], *held[1:]]
            draft.leave("dataset_mixer[validation]", rest, "one set is evaluated on; write them into one file")


def _entry(draft: Draft, here: str, one: Any) -> list[dict[str, Any]]:
    """One entry of a mixture; `name` is the configuration there, the handbook says `id` and `config`."""
    entry = dict(one) if isinstance(one, dict) else {"path": one}
    path, files = entry.pop("path", None) or entry.pop("id", ""), entry.pop("data_files", None)
    config, share = entry.pop("name", None) or entry.pop("config", None), entry.pop("weight", None)
    source: dict[str, Any] = {"config": config} if config else {}
    if entry.get("split"):
        source |= shared.split(draft, f"{here}.split", entry.pop("split"))
    if share not in (None, 1):
        source["weight"] = share * source.get("weight", 1)
    paths = [path]
    if files and path in ("json", "csv", "parquet", "text"):
        paths = files if isinstance(files, list) else [files]
    elif files:
        draft.leave(f"{here}.data_files", files, "files of a data set are not chosen; stage it and name the file")
    if {"chosen", "rejected"} & set(entry.get("columns") or ()):
        draft.problems.append(f"{here}.columns: holds preferences, which {shared.SUPERVISED}")
    why = {"fraction": "shares of a mixture; data.train[].weight counts each set for itself"}
    for key, value in entry.items():
        if value:
            draft.leave(f"{here}.{key}", value, why.get(key, "columns are found by data format"))
    return [{"path": each} | source for each in paths]


def _loss(draft: Draft) -> None:
    """TRL's default depends on the rows: answers of prompt-completion pairs, and the whole of chats and texts."""
    assistant, completion = draft.take("assistant_only_loss"), draft.take("completion_only_loss")
    if assistant:
        draft.put("data.loss_on", "assistant", of=["assistant_only_loss"])
    elif completion:
        draft.put("data.loss_on", "completion", of=["completion_only_loss"])
    else:
        draft.put("data.loss_on", "all", of=["completion_only_loss", "assistant_only_loss"])
        draft.note(
            "data.loss_on: all, TRL's default for chats and texts; write completion if rows have a prompt column"
        )
