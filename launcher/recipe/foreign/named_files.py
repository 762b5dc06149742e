"""Files that a configuration names: DeepSpeed's JSON, a table of data sets. Looked up beside it and above it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.recipe.foreign.draft import Draft, is_off

_FOLDERS_UP = 4
_FROM_THE_PLAN = {
    "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "bf16", "bfloat16", "fp16", "steps_per_print", "wall_clock_breakdown", "dump_state",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients",
}  # fmt: skip
"""What the plan decides, or what says nothing about the result."""


def find(folder: Path, name: str) -> Path | None:
    """`name` from the configuration's folder, the folders above it (tools start at their root), or as it stands."""
    above = [folder, *folder.resolve().parents[:_FOLDERS_UP], Path()]
    return next((path for path in (each / name for each in above) if path.is_file()), None)


def read_json(path: Path | None) -> dict[str, Any] | None:
    """The mapping in a JSON file; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def deepspeed(draft: Draft, key: str) -> None:
    """Stage and offload out of a DeepSpeed file, or out of its name where the file is not here."""
    named = draft.take(key)
    if not named:
        return
    config = named if isinstance(named, dict) else read_json(find(draft.folder, str(named)))
    if config is None:
        _by_name(draft, key, str(named))
        return
    zero = config.get("zero_optimization", {})
    draft.put("deepspeed.stage", zero.get("stage", 0), of=[key])
    for ours in ("offload_optimizer", "offload_param"):
        device = zero.get(ours, {}).get("device")
        draft.put(f"deepspeed.{ours}", device if device in ("cpu", "nvme", "none") else None, of=[key])
    draft.note(f"{key}: stage and offload are carried; bucket sizes and the like are planned for the hardware")
    for name, value in config.items():
        if name not in _FROM_THE_PLAN and not is_off(value):
            draft.leave(f"{key}[{name}]", value, "of the DeepSpeed file; deepspeed.overrides takes what is needed")


def _by_name(draft: Draft, key: str, name: str) -> None:
    stage = next((digit for digit in "3210" if f"zero{digit}" in name or f"z{digit}" in name), None)
    if stage is None:
        draft.leave(key, name, "is not here, so its stage is not known")
        return
    draft.put("deepspeed.stage", int(stage), of=[key])
    offload = "; it seems to offload, which is left to the plan" if "offload" in name else ""
    draft.note(f"{key}: {name} is not here; deepspeed.stage is read from its name, the rest is planned{offload}")
