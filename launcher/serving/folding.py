"""folding: an AdaLoRA adapter written as the LoRA adapter that it is, so that PEFT mixes it with others.

AdaLoRA's change of a weight is B diag(E) A (alpha / r0), with r0 the rank that it began with (Zhang et al.,
arXiv 2303.10512, 3.1; the scale as in PEFT's SVDLinear.get_delta_weight). With E and the scale taken into A it is
LoRA's B A. Matrices that kept fewer ranks than the widest are filled up with zeros, which change nothing.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.adapters.lineage import CONFIG, WEIGHTS, Adapter
from launcher.errors import ModelError

_EPSILON = 1e-5
"""PEFT's, against a rank of zero."""
_FACTORS = ("lora_A", "lora_B", "lora_E")
_OWN = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
        "rank_pattern", "alpha_pattern", "loftq_config")  # fmt: skip


def folded(found: Adapter) -> tempfile.TemporaryDirectory[str]:
    """The same adapter as LoRA, in a folder that lasts as long as what is returned.

    Raises:
        ModelError: its tensors are not AdaLoRA's of plain matrices, or it has no scale.
    """
    modules = _modules(found)
    scale = _scale(found)
    rank = max(len(one["lora_A"]) for one in modules.values())
    tensors = {}
    for name, one in modules.items():
        a = (one["lora_A"].double() * one["lora_E"].double() * scale).to(one["lora_A"].dtype)
        tensors[f"{name}.lora_A.weight"] = _widened(a, rank, 0)
        tensors[f"{name}.lora_B.weight"] = _widened(one["lora_B"], rank, 1)
    config = {key: value for key, value in found.config.items() if key not in _OWN}
    config |= {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "use_rslora": False, "init_lora_weights": True}
    # Only read again: owned by nobody else's run, and gone with the last use.
    folder = tempfile.TemporaryDirectory(prefix="launcher-serve-")
    save_file(tensors, Path(folder.name) / WEIGHTS, metadata={"format": "pt"})
    (Path(folder.name) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder


def _modules(found: Adapter) -> dict[str, dict[str, Tensor]]:
    """Factors by module: A (r, in), B (out, r), E (r, 1)."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(found.weights).items():
        module, _, factor = name.rpartition(".")
        modules.setdefault(module, {})[factor] = tensor
    for module, one in modules.items():
        ranks = {len(one["lora_A"]), one["lora_B"].shape[-1], len(one["lora_E"])} if set(one) == set(_FACTORS) else {}
        if len(ranks) != 1 or any(tensor.dim() != 2 for tensor in one.values()):
            raise ModelError(f"{found.folder}: {module} has not AdaLoRA's three factors; merge it and serve that")
    if not modules:
        raise ModelError(f"{found.folder}: {WEIGHTS} holds no tensors")
    return modules


def _scale(found: Adapter) -> float:
    alpha: Any = found.config.get("lora_alpha")
    began: Any = found.config.get("init_r")
    if not isinstance(alpha, (int, float)) or alpha <= 0 or not isinstance(began, int):
        raise ModelError(
            f"{found.folder}: lora_alpha {alpha!r} and init_r {began!r} are no scale; merge it, serve that"
        )
    return float(alpha) / (began + _EPSILON)


def _widened(tensor: Tensor, rank: int, dim: int) -> Tensor:
    """Zeros put behind `tensor` along `dim`."""
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim).contiguous()
