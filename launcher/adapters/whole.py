"""Whole: a merge with the model in memory, for adapters that are more than low-rank factors of plain matrices.

AdaLoRA, fused experts, biases and replaced modules go through PEFT's own merge. Needs the model in fp32, twice while it
is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from launcher.adapters.lineage import Adapter
from launcher.adapters.proof import TOLERANCE, probe, with_adapter, written_dtype
from launcher.adapters.shards import held_in_4_bits, round_to_4_bits
from launcher.errors import JobFailedError, RecipeError

_SHARD = "5GB"


def merge_whole(adapter: Adapter, base: Path, target: Path, dtype: torch.dtype | None) -> tuple[int, dict[str, Any]]:
    """Merge in memory and write into `target`; how many layers were merged, and the proof.

    Raises:
        RecipeError: virtual tokens, which are no weights.
        JobFailedError: the merged model answers otherwise than base and adapter together.
    """
    kind = str(adapter.config.get("peft_type"))
    if kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
        raise RecipeError(f"{adapter.folder}: virtual tokens are no weights and cannot be merged; serve the adapter")
    rounded = held_in_4_bits(adapter, base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    for name, module in model.named_modules():
        if name in rounded and isinstance(module, nn.Linear):
            module.weight.data = round_to_4_bits(adapter, module.weight.data)
    together = with_adapter(model, adapter.folder)
    expected = probe(together)
    layers = sum(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in together.modules())
    merged = _merged(together, adapter)
    written = dtype or written_dtype(base)
    found = probe(merged.to(written).float())
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    limit = TOLERANCE[written]
    if not difference <= limit:
        raise JobFailedError(
            f"{target}: logits of the merged model differ by {difference:.2e} of the largest one from base and adapter "
            f"together (limit {limit:g}); it was not kept"
        )
    merged.to(written).save_pretrained(target, max_shard_size=_SHARD)
    name = str(written).removeprefix("torch.")
    return layers, {"compared": "logits", "difference": difference, "limit": limit, "dtype": name}


def _merged(together: Any, adapter: Adapter) -> Any:
    """PEFT's merge.

    Raises:
        RecipeError: it has none for this adapter, by what PEFT says. Anything else (too little memory, a bug) is not
            the adapter's fault and is raised as it is.
    """
    if not isinstance(together.base_model, peft.tuners.tuners_utils.BaseTuner):
        kind = adapter.config.get("peft_type")
        raise RecipeError(f"{adapter.folder}: {kind}: virtual tokens are no weights; serve the adapter on its base")
    try:
        return together.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        if not (isinstance(error, NotImplementedError | ValueError) or _raises_runtime_errors(adapter)):
            raise
        reason = " ".join(str(error).split())
        raise RecipeError(f"{adapter.folder}: PEFT does not merge it ({reason}); serve it on its base") from error


def _raises_runtime_errors(adapter: Adapter) -> bool:
    """Kinds that PEFT refuses with a plain RuntimeError, as torch does when memory ends: a bias of the factors where
    the layer has none, and routers of several adapters.
    """
    return bool(adapter.config.get("lora_bias") or adapter.config.get("arrow_config"))
