"""forgetting: how far the loss on the retention set has risen, and when that is worth a warning. Pure functions.

On text that the base wrote itself (data.retention: builtin) the rise is an estimate of the Kullback-Leibler
divergence from the base to the trained model, in nats per token: the mean over the base's own samples of
-log q - (-log p). It is zero before training and cannot stay below zero for long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAME = "retention"
CODE = "retention"
"""Code of the warning, in metrics.jsonl and result.json; scripts read it."""


def rise(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Relative rise of the retention loss (0.1 = 10 %); None where it was not measured."""
    first, now = before.get(NAME), after.get(NAME)
    return None if first is None or now is None or first <= 0 else now / first - 1


def warning(step: int, before: Mapping[str, float], after: Mapping[str, float], limit: float) -> dict[str, Any] | None:
    """What to say where the rise is past `limit`, as {"code", "message", "step", "rise", "limit"}; else None."""
    found = rise(before, after)
    if found is None or not found > limit:
        return None
    message = (
        f"the loss on the retention set rose from {before[NAME]:.4f} to {after[NAME]:.4f} ({found:+.0%}, the limit is "
        f"{limit:+.0%}) by step {step}: the base is being forgotten; lower train.learning_rate, train an adapter "
        "instead of all weights, or mix general text into data.train with a weight below 1"
    )
    return {"code": CODE, "message": message, "step": step, "rise": found, "limit": limit}
