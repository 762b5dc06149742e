"""The loss: token losses summed, so that the caller may divide by the trained tokens of the whole global batch.

A mean per micro-batch, averaged over micro-batches and ranks, weighs a token by how many neighbours it has; the
loss would then change with world size and accumulation. Neither does the model compute it: through PEFT's prompt
methods, DDP and DeepSpeed a `labels` argument takes three different paths (virtual tokens, `num_items_in_batch`,
means), while logits mean the same everywhere.

Shapes: B sequences, L tokens, V vocabulary, P virtual tokens of prompt tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from launcher.errors import JobFailedError

IGNORED = -100
"""Label of a token that is not trained."""


def summed_token_loss(forward: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    """Sum of the cross-entropies of all trained tokens of a micro-batch, in fp32.

    `forward` is the model or what wraps it; `batch["labels"]` (B, L) are not shifted, `IGNORED` where not trained.
    """
    labels = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = forward(**inputs, use_cache=False).logits
    logits = logits[:, -labels.shape[1] :]  # prompt tuning puts P positions first: (B, P + L, V) -> (B, L, V)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def trained_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens of a micro-batch that have a loss: the first of a row has none, nothing stands before it."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def refuse_non_finite(name: str, value: float, hint: str) -> None:
    """Stop before a NaN reaches the weights, or at least a checkpoint.

    Raises:
        JobFailedError: `value` is NaN or infinite.
    """
    if not math.isfinite(value):
        raise JobFailedError(
            f"the {name} became {value}; {hint}. Checkpoints so far hold finite values: lower train.learning_rate, "
            "set train.max_grad_norm, or train with precision bf16 or fp32, then resume"
        )


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Add up numbers over all ranks in one collective, in float64 (integers stay exact up to 2**53)."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def mean_loss(model: Any, batches: Any, *, device: torch.device, autocast: torch.dtype | None) -> float:
    """Mean loss of a model that no engine holds, over the trained tokens of all batches, on this process alone."""
    total, tokens = 0.0, 0
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for batch in batches:
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            total += float(summed_token_loss(model, moved))
            tokens += trained_tokens(batch)
    return total / max(tokens, 1)
