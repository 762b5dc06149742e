"""TorchEngine: plain PyTorch, with DistributedDataParallel where there are several ranks (ZeRO stage 0)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from launcher.planning.plan import Candidate
from launcher.worker.engine import Batch, Hooks, StepResult, Votes, no_votes
from launcher.worker.loss import refuse_non_finite, sum_over_ranks, summed_token_loss, trained_tokens
from launcher.worker.optimizer import make_optimizer, set_learning_rate
from launcher.worker.reshape import load_into_torch
from launcher.worker.saved import TORCH_FILE, shape_of
from launcher.worker.snapshot import Writer

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """Every rank holds all weights; only gradients are shared."""

    def __init__(self, model: nn.Module, candidate: Candidate, *, device: torch.device, hooks: Hooks) -> None:
        self.module = model
        self._device = device
        self._hooks = hooks
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._full = candidate.method == "full"
        self._max_norm = candidate.max_grad_norm
        self._autocast = _AUTOCAST.get(candidate.precision)
        self._scaler = torch.amp.GradScaler(device.type, enabled=candidate.precision == "fp16")
        self._optimizer = make_optimizer(model, candidate)
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._parallel = self._in_parallel() if self._world > 1 else None

    def _in_parallel(self) -> DistributedDataParallel:
        # DDP also sends rank 0's weights to the others, so that a random adapter starts the same everywhere.
        return DistributedDataParallel(
            self.module,
            device_ids=[self._device.index] if self._device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    # --- one step ------------------------------------------------------------------------------

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        *,
        trained_tokens: int,
        learning_rate: float,
        step: int,
        votes: Votes = no_votes,
    ) -> StepResult:
        """One optimizer step; see Engine."""
        set_learning_rate(self._optimizer, learning_rate)
        # DDP averages gradients over ranks; multiplied by the world size the average becomes the sum.
        scale = self._world / trained_tokens
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, batch in enumerate(micro_batches, start=1):
            with self._sharing(number == len(micro_batches)):
                loss = self._loss(self._parallel or self.module, batch)
                self._scaler.scale(loss * scale).backward()
            total += loss.detach()
        summed, *told = sum_over_ranks([float(total), *votes()], self._device)
        refuse_non_finite("loss", summed / trained_tokens, f"step {step}")
        grad_norm, applied = self._update(step)
        return StepResult(
            loss=summed / trained_tokens, grad_norm=grad_norm, votes=tuple(int(vote) for vote in told), applied=applied
        )

    def _update(self, step: int) -> tuple[float, bool]:
        """Clip and step; returns the gradient norm and whether the update was applied."""
        self._scaler.unscale_(self._optimizer)
        self._hooks.before_clipping(self.module)
        # A limit of infinity measures the norm and leaves gradients as they are.
        norm = float(nn.utils.clip_grad_norm_(self._trainable, self._max_norm or float("inf")))
        before = self._scaler.get_scale()
        if not self._scaler.is_enabled():
            refuse_non_finite("gradient norm", norm, f"step {step}")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._hooks.after_step(self.module, step)
        self._optimizer.zero_grad(set_to_none=True)
        return norm, self._scaler.get_scale() >= before

    def _sharing(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients travel once per step, with the last micro-batch."""
        return contextlib.nullcontext() if last or self._parallel is None else self._parallel.no_sync()

    def _loss(self, forward: nn.Module, batch: Batch) -> Tensor:
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            return summed_token_loss(forward, moved)

    # --- without gradients ---------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """Summed token loss of one batch."""
        with torch.no_grad():
            return self._loss(self.module, batch)

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Summed loss and trained tokens; see Engine."""
        total, tokens = 0.0, 0
        self.module.eval()
        try:
            for batch in batches:
                total += float(self.forward(batch))
                tokens += trained_tokens(batch)
        finally:
            self.module.train()
        return total, tokens

    # --- state ---------------------------------------------------------------------------------

    def save(self, writer: Writer) -> None:
        """Trainable weights, optimizer and loss scale, by rank 0: the others hold the same."""
        if self._rank != 0:
            return
        state = {
            "weights": self._weights(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }
        writer.write(TORCH_FILE, state)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, here, on other ranks or at another stage; into a fresh engine.

        Raises:
            ConflictError: the states cannot be read into plain torch; see reshape.py.
        """
        if shape_of(folder)[0] != 0:
            saved = load_into_torch(self.module, self._optimizer, folder, device=self._device)
            if saved.loss_scale is not None and self._scaler.is_enabled():
                self._scaler.load_state_dict(self._scaler.state_dict() | {"scale": saved.loss_scale})
            return
        state = torch.load(folder / TORCH_FILE, map_location=self._device, weights_only=True)
        own = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, tensor in state["weights"].items():
                own[name].copy_(tensor)
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def full_state(self) -> dict[str, Tensor] | None:
        """Trained weights on rank 0's CPU; see Engine."""
        if self._rank != 0:
            return None
        weights = {name: tensor.detach().cpu() for name, tensor in self._weights().items()}
        return weights | (_buffers(self.module) if self._full else {})

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong into a saved model (running statistics and the like; today's decoders have none)."""
    kept = model.state_dict().keys()
    return {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in kept}
