"""The training the worker must equal, in plain PyTorch and nothing of the worker's engine, loop or schedule.

One process, no accumulation: the whole global batch in one forward pass per row, the textbook loss, AdamW, clipping
and the cosine schedule written out. Rows and their order come from the token cache, which has tests of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import log_softmax

from launcher.worker.data import Order


def reference_losses(model: torch.nn.Module, table: Any, *, steps: int, global_batch: int, seed: int) -> list[float]:
    """Loss of each optimizer step, at learning rate 1e-3 with a cosine schedule, clipped at norm 1."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    order = Order(rows=len(table), global_batch=global_batch, seed=seed)
    losses = []
    for step in range(steps):
        total, tokens = torch.zeros(()), 0
        for number in order.indices(step):
            nats, count = row_loss(model, table.row(int(number)))
            total, tokens = total + nats, tokens + count
        loss = total / tokens
        loss.backward()
        norm = math.sqrt(sum(float(weight.grad.square().sum()) for weight in weights))
        for weight in weights:
            weight.grad.mul_(min(1.0, 1.0 / (norm + 1e-6)))
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def row_loss(model: torch.nn.Module, row: Any) -> tuple[torch.Tensor, int]:
    """Summed negative log-likelihood of a row's trained tokens and their number; each document on its own."""
    starts = [0] if row.position_ids is None else [i for i, p in enumerate(row.position_ids) if p == 0]
    total, count = torch.zeros(()), 0
    for start, end in zip(starts, [*starts[1:], len(row.input_ids)], strict=True):
        ids = torch.tensor(row.input_ids[start:end].astype("int64"))[None]
        likelihood = log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
        for place in range(1, end - start):
            if row.labels[start + place] != -100:
                total, count = total - likelihood[place - 1, row.labels[start + place]], count + 1
    return total, count
