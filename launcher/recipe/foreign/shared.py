"""What several tools write alike: batches, precision, warm-up, schedules, optimizers, module names, W&B."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from launcher.recipe.foreign.draft import Draft
from launcher.recipe.schema import SCHEDULES

_DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32",
    "bf16": "bf16", "fp16": "fp16", "fp32": "fp32",
}  # fmt: skip
_OPTIMS = {
    "adamw_torch": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw": "adamw_torch",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
_WARMUP = 0.03
SUPERVISED = "is for another objective; a recipe describes supervised training"
IMAGES = "is for images, sound or video; a recipe trains on text alone"
WHOLE_MODULES = "adapters with whole modules cannot be served by vLLM; train them with method: full"


def batch(draft: Draft, micro_key: str, accumulation_key: str, *, default: int = 1) -> None:
    """The global batch from one device's share, the accumulation and the number of GPUs."""
    micro, accumulation, gpus = int(draft.take(micro_key, default)), draft.take(accumulation_key, 1), draft.gpus or 1
    if not isinstance(accumulation, int):
        draft.note(
            f"{accumulation_key}: {accumulation} is taken for 1; set train.global_batch_size yourself",
            of=[accumulation_key],
        )
        accumulation = 1
    draft.put("train.per_device_train_batch_size", micro, of=[micro_key])
    draft.put("train.global_batch_size", micro * accumulation * gpus, of=[micro_key, accumulation_key])
    draft.note(
        f"train.global_batch_size is {micro} ({micro_key}) x {accumulation} ({accumulation_key}) x {gpus} GPUs"
        + ("" if draft.gpus else "; say --gpus N if it was trained on another number")
    )


def workers(draft: Draft, key: str) -> None:
    """GPUs that the file itself names, unless the user said how many."""
    count = draft.look(key)
    if isinstance(count, int) and count > 0 and draft.gpus is None:
        draft.gpus = count
        draft.note(f"{key}: {count} is taken for the number of GPUs", of=[key])


def precision(draft: Draft, *, dtype: str | None = None, off_is_fp32: bool = False) -> None:
    """bf16/fp16 switches, or a dtype's name; `off_is_fp32`: switching bf16 off trains in fp32 there."""
    said: dict[str, str] = {}
    named = str(draft.take(dtype, "auto")) if dtype else "auto"
    if dtype and named in _DTYPES:
        said[dtype] = _DTYPES[named]
    elif dtype and named != "auto":
        draft.leave(dtype, named, "is not offered; train.precision takes bf16, fp16 or fp32")
    for key, name in (("float16", "fp16"), ("fp16", "fp16"), ("bfloat16", "bf16"), ("bf16", "bf16")):
        if _on(draft.take(key)):
            said[key] = name
    if not said and off_is_fp32 and draft.look("bf16") is False:
        said["bf16"] = "fp32"
    elif not said and draft.look("bf16") == "auto":
        said["bf16"] = "auto"
    if said:
        final = list(said.values())[-1]  # the switches count before the dtype, and bf16 before fp16
        draft.put("train.precision", final, of=[key for key, name in said.items() if name == final])


def _on(value: Any) -> bool:
    return value is True or str(value).lower() in ("true", "full")


def warmup(draft: Draft, key: str, *, max_steps: Any = None) -> None:
    """Warm-up in steps, as a share where the number of steps is known; below 1 it is a share there, too."""
    steps, total = draft.take(key), max_steps or draft.get("train.max_steps")
    if isinstance(steps, int | float) and 0 < steps < 1:
        draft.put("train.warmup_ratio", steps)
    elif isinstance(steps, int | float) and steps > 0 and isinstance(total, int) and total > steps:
        draft.put("train.warmup_ratio", round(steps / total, 4))
    elif steps:
        share = draft.get("train.warmup_ratio") or _WARMUP
        if draft.get("train.warmup_ratio") is None:
            draft.put("train.warmup_ratio", share, of=())
        draft.leave(
            key, steps, f"depends on the length of the run; train.warmup_ratio: {share} of all steps is written"
        )


def whole_steps(draft: Draft, names: dict[str, str]) -> None:
    """Intervals: whole steps as they are; shares of the run (below 1) where its number of steps is known."""
    total = draft.get("train.max_steps")
    for key, path in names.items():
        value = draft.take(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 1:
            draft.put(path, int(value))
        elif isinstance(value, float) and 0 < value < 1 and isinstance(total, int):
            draft.put(path, max(1, round(value * total)))
        elif value:
            draft.leave(key, value, f"a share of the run; write {path} in steps")


def max_steps(draft: Draft, key: str = "max_steps") -> None:
    """Optimizer steps; -1 and 0 mean that epochs count."""
    value = draft.take(key)
    if isinstance(value, int) and value > 0:
        draft.put("train.max_steps", value)
    elif value is not None and not isinstance(value, int):
        raise ValueError("a whole number of steps is expected")
    else:
        draft.agree(key)


def held_out(draft: Draft, key: str) -> None:
    """A share below 1, or a number of rows; rows of their own that are named beside it count."""
    value = draft.take(key)
    if value and draft.get("data.validation") is not None:
        draft.leave(key, value, "rows of their own are named to evaluate on, and count")
    elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        draft.put("data.validation", int(value) if value >= 1 else value)


def module_names(draft: Draft, key: str) -> None:
    """LoRA's targets as others write them: "all", "q_proj,v_proj" or a list; a pattern is listed."""
    value = draft.take(key)
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value or ())
    if not names:
        return
    if names in (["all"], ["all-linear"]):
        draft.put("lora.target_modules", "all-linear")
    elif all(isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) for name in names):
        draft.put("lora.target_modules", names)
    else:
        draft.leave(key, value, "a pattern; lora.target_modules takes names, and all-linear is used")


def schedule(draft: Draft, key: str) -> None:
    """The learning-rate schedule, where it is one of ours."""
    name = draft.take(key)
    if name in SCHEDULES:
        draft.put("train.lr_scheduler_type", name)
    elif name:
        draft.put("train.lr_scheduler_type", "cosine", of=())
        draft.leave(key, name, f"is not offered; cosine is used ({', '.join(SCHEDULES)} are)")


def optimizer(draft: Draft, key: str) -> None:
    """The optimizer, where it is one of ours."""
    name = draft.take(key)
    if name in _OPTIMS:
        draft.put("train.optim", _OPTIMS[name])
    elif name:
        draft.leave(key, name, f"is not offered; AdamW is used ({', '.join(sorted(set(_OPTIMS.values())))})")


def report_to(draft: Draft, key: str = "report_to") -> None:
    """Where metrics go: W&B stays possible only where it was asked for."""
    value = draft.take(key)
    names = [str(one) for one in value] if isinstance(value, list) else [str(value)] if value else []
    if not names:
        return
    draft.put("wandb.mode", "auto" if {"wandb", "all"} & set(names) else "disabled")
    others = [name for name in names if name not in ("wandb", "all", "none")]
    if others:
        draft.leave(f"{key}[{', '.join(others)}]", others, "is not offered; metrics.jsonl is always written")


def split(draft: Draft, key: str, text: Any) -> dict[str, Any]:
    """`train[:5%]`: the split, and a share of its rows as their weight; other slices are listed."""
    found = re.fullmatch(r"(\w+)(?:\[:(\d+(?:\.\d+)?)%\])?", str(text))
    if found is None:
        draft.leave(key, text, "a slice; the whole split is used, write a smaller file")
        named = re.match(r"\w+", str(text))
        return {"split": named[0]} if named else {}
    if found[2] is None:
        return {"split": found[1]}
    draft.note(f"{key}: {text} becomes a weight; which rows are taken follows from the seed, not from their place")
    return {"split": found[1], "weight": float(found[2]) / 100}


def refuse_other_objectives(draft: Draft, keys: Sequence[str], why: str = SUPERVISED) -> None:
    """Switches of preference training, rewards and the like: their files never become supervised runs in silence."""
    for key in keys:
        value = draft.look(key)
        if value is not None and value is not False and value != "":
            draft.refuse(key, why)
