"""How many optimizer steps there are, and the learning rate of each: pure functions of the step number.

The formulas are those of `transformers.get_scheduler`; only its lambdas are taken, never its state, so a
resumed run needs nothing but the step number to be on the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from launcher.errors import DataError


def total_steps(max_steps: int | None, epochs: float, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: `max_steps`, else `epochs` passes over the rows.

    Raises:
        DataError: there is not one full global batch.
    """
    if max_steps is not None:
        return max_steps
    if steps_per_epoch < 1:
        raise DataError(
            "the training rows do not fill one global batch; lower train.global_batch_size, add rows, "
            "or set train.max_steps to train on repeated rows"
        )
    return max(1, math.ceil(epochs * steps_per_epoch))


def warmup_steps(warmup_ratio: float, steps: int) -> int:
    """Steps of linear warm-up, rounded up as transformers does."""
    return math.ceil(warmup_ratio * steps)


def learning_rates(name: str, peak: float, warmup_ratio: float, steps: int) -> Callable[[int], float]:
    """Learning rate of optimizer step 0, 1, 2, ... for one of the recipe's schedules."""
    import torch
    from transformers import get_scheduler

    # transformers wants an optimizer to attach to; this one is never stepped.
    holder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(
        name, holder, num_warmup_steps=warmup_steps(warmup_ratio, steps), num_training_steps=steps
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: peak * float(factor(step))
