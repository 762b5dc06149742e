"""Draft: a recipe being made of another tool's configuration, and an account of every key of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ABSENT = object()
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


SWITCHED_OFF = "empty or switched off"
"""Why a key is left out that carries nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """One key that the recipe does not carry."""

    key: str
    value: Any
    why: str


@dataclass(slots=True)
class Draft:
    """The foreign keys (dotted where nested), taken one by one, and the recipe they make."""

    source: Mapping[str, Any]
    folder: Path
    """Where the foreign file lies; its relative paths are looked up from here."""
    gpus: int
    recipe: dict[str, Any] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    last_taken: str = ""
    _taken: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a foreign key, which counts as dealt with."""
        self._taken.add(key)
        self.last_taken = key
        return self.look(key, default)

    def look(self, key: str, default: Any = None) -> Any:
        """The value of a foreign key, which stays to be dealt with."""
        value: Any = self.source.get(key, _ABSENT)
        if value is _ABSENT:
            value = self.source
            for part in key.split("."):
                value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        return default if value is _ABSENT or value is None else value

    def put(self, path: str, value: Any) -> None:
        """Set a recipe field by its dotted name; None sets nothing."""
        if value is None:
            return
        section, _, name = path.rpartition(".")
        target = self.recipe
        for part in filter(None, section.split(".")):
            target = target.setdefault(part, {})
        target[name] = value

    def get(self, path: str) -> Any:
        """A recipe field that was set, or None."""
        value: Any = self.recipe
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def drop(self, key: str, why: str) -> None:
        """Deal with a foreign key by listing it; switched-off and missing ones need no word."""
        value = self.take(key)
        if value not in (None, False, "", [], {}):
            self.left_out.append(LeftOut(key=key, value=value, why=why))

    def note(self, text: str) -> None:
        """One sentence about how something was read."""
        self.notes.append(text)

    def same(self, names: Mapping[str, str]) -> None:
        """Fields that mean the same: foreign key -> recipe field."""
        for key, path in names.items():
            self.put(path, self.take(key))

    def choose(self, key: str, path: str, ours: Mapping[str, str]) -> None:
        """A field with a few values: foreign value -> ours; another one is listed."""
        value = self.take(key)
        if str(value) in ours:
            self.put(path, ours[str(value)])
        elif value not in (None, "auto"):
            why = f"is not offered; {path} takes {', '.join(sorted(set(ours.values())))}"
            self.left_out.append(LeftOut(key=key, value=value, why=why))

    def settle(self, reasons: Mapping[str, str]) -> None:
        """Account for every key that nobody took; `reasons` say why known ones are not carried."""
        for key, value in _leaves(self.source):
            if key in self._taken or any(key.startswith(f"{taken}.") for taken in self._taken):
                continue
            if value in (None, False, "", [], {}):
                self.left_out.append(LeftOut(key=key, value=value, why=SWITCHED_OFF))
                continue
            why = reasons.get(key) or reasons.get(key.split(".")[0]) or "has no counterpart here"
            self.left_out.append(LeftOut(key=key, value=value, why=why))

    # --- what several tools share --------------------------------------------------------------

    def batch(self, micro_key: str, accumulation_key: str) -> None:
        """The global batch from one device's share, the accumulation and the number of GPUs."""
        micro, accumulation = int(self.take(micro_key, 1)), self.take(accumulation_key, 1)
        if not isinstance(accumulation, int):
            self.note(f"{accumulation_key}: {accumulation} is taken for 1; set train.global_batch_size yourself")
            accumulation = 1
        self.put("train.per_device_train_batch_size", micro)
        self.put("train.global_batch_size", micro * accumulation * self.gpus)
        self.note(
            f"train.global_batch_size is {micro} ({micro_key}) x {accumulation} ({accumulation_key}) x {self.gpus} "
            "GPUs; say --gpus N if it was trained on another number"
        )

    def precision(self, *, bf16: str = "bf16", fp16: str = "fp16", dtype: str | None = None) -> None:
        """bf16/fp16 switches, or a dtype's name."""
        named = self.take(dtype) if dtype else None
        if named and named != "auto":
            self.put("train.precision", _DTYPES.get(str(named), str(named)))
        on = {"bf16": self.take(bf16), "fp16": self.take(fp16)}
        for name, value in on.items():
            if value is True or str(value).lower() in ("true", "full"):
                self.put("train.precision", name)

    def warmup(self, key: str, max_steps: Any) -> None:
        """Warm-up in steps, as a share where the number of steps is known."""
        steps = self.take(key)
        if not steps:
            return
        if isinstance(max_steps, int) and max_steps > 0:
            self.put("train.warmup_ratio", round(steps / max_steps, 4))
        else:
            why = "depends on the length of the run; write train.warmup_ratio, a share of all steps"
            self.left_out.append(LeftOut(key=key, value=steps, why=why))

    def deepspeed(self, key: str) -> None:
        """Stage and offload out of a DeepSpeed file, or out of its name where the file is not here."""
        named = self.take(key)
        if not named:
            return
        config = named if isinstance(named, dict) else self._read_json(str(named))
        if config is None:
            stage = next((digit for digit in "3210" if f"zero{digit}" in str(named) or f"z{digit}" in str(named)), None)
            if stage is None:
                self.left_out.append(LeftOut(key=key, value=named, why="is not here, so its stage is not known"))
                return
            self.put("deepspeed.stage", int(stage))
            self.note(f"{key}: {named} is not here; deepspeed.stage is read from its name, the rest is planned")
            return
        zero = config.get("zero_optimization", {})
        self.put("deepspeed.stage", zero.get("stage"))
        for ours in ("offload_optimizer", "offload_param"):
            device = zero.get(ours, {}).get("device")
            self.put(f"deepspeed.{ours}", device if device in ("cpu", "nvme", "none") else None)
        self.note(f"{key}: stage and offload are carried; bucket sizes and the like are planned for the hardware")

    def _read_json(self, name: str) -> dict[str, Any] | None:
        for path in (self.folder / name, Path(name)):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            return found if isinstance(found, dict) else None
        return None


def _leaves(source: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Every key with its value, dotted; lists and empty mappings are values."""
    found: list[tuple[str, Any]] = []
    for key, value in source.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return found


def module_names(value: Any) -> Any:
    """LoRA's targets as others write them: "all", "q_proj,v_proj" or a list."""
    if isinstance(value, str):
        names = [name.strip() for name in value.split(",") if name.strip()]
        return "all-linear" if names in (["all"], ["all-linear"]) else names
    return list(value) if isinstance(value, list | tuple) else None


_SCHEDULES = {"one_cycle": None, "rex": None, "cosine_with_restarts": None, "cosine_with_min_lr": None}


def schedule(draft: Draft, key: str) -> None:
    """The learning-rate schedule, where it is one of ours."""
    from launcher.recipe.schema import SCHEDULES

    name = draft.take(key)
    if name in SCHEDULES:
        draft.put("train.lr_scheduler_type", name)
    elif name:
        draft.left_out.append(
            LeftOut(key=key, value=name, why=f"is not offered; cosine is used ({', '.join(SCHEDULES)} are)")
        )


_OPTIMS = {
    "adamw_torch": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw": "adamw_torch",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def optimizer(draft: Draft, key: str) -> None:
    """The optimizer, where it is one of ours."""
    name = draft.take(key)
    if name in _OPTIMS:
        draft.put("train.optim", _OPTIMS[name])
    elif name:
        why = f"is not offered; AdamW is used ({', '.join(sorted(set(_OPTIMS.values())))})"
        draft.left_out.append(LeftOut(key=key, value=name, why=why))
