"""The optimizer of a candidate, and its learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launcher.errors import RecipeError
from launcher.planning.plan import Candidate

_BETAS, _EPS = (0.9, 0.999), 1e-8
"""transformers' defaults; written out because libraries differ in theirs."""


def make_optimizer(model: nn.Module, candidate: Candidate) -> torch.optim.Optimizer:
    """AdamW in the form the candidate names, over the trainable weights.

    With the optimizer offloaded it is DeepSpeed's CPU Adam, which ZeRO requires there.

    Raises:
        RecipeError: nothing is trainable, the name is unknown, or 8-bit states are to be offloaded.
    """
    groups = _groups(model, candidate.weight_decay)
    common: dict[str, Any] = {"lr": candidate.learning_rate, "betas": _BETAS, "eps": _EPS, "weight_decay": 0.0}
    if candidate.offload_optimizer != "none":
        if "8bit" in candidate.optim:
            raise RecipeError(
                f"train.optim: {candidate.optim} keeps its states on the GPU and cannot be offloaded; "
                "use adamw_torch, or deepspeed.offload_optimizer: none"
            )
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, **common, adamw_mode=True)
    if candidate.optim in ("adamw_torch", "adamw_torch_fused"):
        return torch.optim.AdamW(groups, **common, fused=candidate.optim == "adamw_torch_fused")
    if candidate.optim in ("adamw_8bit", "paged_adamw_8bit"):
        return _bitsandbytes(model, candidate.optim, groups, common)
    raise RecipeError(f"train.optim: unknown optimizer {candidate.optim!r}")


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Use this learning rate in the next step; `optimizer` is torch's or DeepSpeed's wrapper of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights to decay and weights not to: biases and norms are left alone, as transformers does."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise RecipeError("no weight is trainable: the method's targets match nothing in this model")
    if weight_decay == 0.0:
        return [{"params": trainable, "weight_decay": 0.0}]
    decayed = [parameter for parameter in trainable if _dimensions(parameter) > 1]
    spared = [parameter for parameter in trainable if _dimensions(parameter) <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _dimensions(parameter: nn.Parameter) -> int:
    """Dimensions of the whole weight; a weight that ZeRO-3 has partitioned is flat here and knows its shape."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _bitsandbytes(
    model: nn.Module, name: str, groups: list[dict[str, Any]], common: dict[str, Any]
) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    make = bnb.optim.PagedAdamW8bit if name == "paged_adamw_8bit" else bnb.optim.AdamW8bit
    # Embedding gradients are sparse and 8-bit states unstable on them (bitsandbytes' own advice).
    manager = bnb.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return make(groups, **common)
