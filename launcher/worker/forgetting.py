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
WORSE = "worse-than-base"
_VALIDATION = "validation"
_MOST_NATS = 50.0
"""Beyond it a number says no more, and one day it would not be finite."""


def rise(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Relative rise of the retention perplexity (0.2 = 20 %); None where it was not measured."""
    first, now = before.get(NAME), after.get(NAME)
    return None if first is None or now is None else math.expm1(min(now - first, _MOST_NATS))


def warning(
    step: int, before: Mapping[str, float], after: Mapping[str, float], limit: float, *, method: str = "full"
) -> dict[str, Any] | None:
    """What to say where the rise is past `limit`, as {"code", "message", "step", "rise", "limit"}; else None."""
    found = rise(before, after)
    if found is None or not found > limit:
        return None
    adapter = "train an adapter instead of all weights, " if method == "full" else ""
    message = (
        f"by step {step} the loss on the retention set rose from {before[NAME]:.4f} to {after[NAME]:.4f}, its "
        f"perplexity by {found:.0%} (the limit is {limit:.0%}): the base is being forgotten; "
        f"lower train.learning_rate, {adapter}or mix general text into data.train with a weight below 1"
    )
    return {"code": CODE, "message": message, "step": step, "rise": found, "limit": limit}


def worse_than_base(step: int, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any] | None:
    """What to say where the validation loss ended above that of the untrained base, on the same rows; else None."""
    first, now = before.get(_VALIDATION), after.get(_VALIDATION)
    if first is None or now is None or now <= first:
        return None
    message = (
        f"after step {step} the validation loss is {now:.4f}, and the base before training had {first:.4f}: the result "
        "is worse than the base on held-out rows; lower train.learning_rate, or look at the rows (launcher data show)"
    )
    return {"code": WORSE, "message": message, "step": step}
