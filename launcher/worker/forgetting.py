"""forgetting: how far the perplexity of the retention set has risen, and when that is worth a warning. Pure functions.

On text that the base wrote itself (data.retention: builtin) the rise of the loss is an estimate of the Kullback-Leibler
divergence from the base to the trained model, in nats per token: the mean over the base's own samples of
-log q - (-log p). The rise of the perplexity is exp of it, less one. A relative rise of the loss would depend on how
much entropy the text has: the same loss of knowledge would count half as much on a base that knows half as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NAME = "retention"
CODE = "retention"
"""Code of the warning, in metrics.jsonl and result.json; scripts read it."""
_MOST_NATS = 50.0
"""Beyond it a number says no more, and one day it would not be finite."""


def rise(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Relative rise of the retention perplexity (0.2 = 20 %); None where it was not measured."""
    first, now = before.get(NAME), after.get(NAME)
    return None if first is None or now is None else math.expm1(min(now - first, _MOST_NATS))


def warning(step: int, before: Mapping[str, float], after: Mapping[str, float], limit: float) -> dict[str, Any] | None:
    """What to say where the rise is past `limit`, as {"code", "message", "step", "rise", "limit"}; else None."""
    found = rise(before, after)
    if found is None or not found > limit:
        return None
    message = (
        f"by step {step} the loss on the retention set rose from {before[NAME]:.4f} to {after[NAME]:.4f}, its "
        f"perplexity by {found:.0%} (the limit is {limit:.0%}): the base is being forgotten; "
        "lower train.learning_rate, train an adapter instead of all weights, or mix general text into data.train "
        "with a weight below 1"
    )
    return {"code": CODE, "message": message, "step": step, "rise": found, "limit": limit}
