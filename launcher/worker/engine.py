"""Engine: forward, backward, step and state behind the same few calls, whatever shards the weights.

Stage 0 is plain torch (`engine_torch`), stages 1-3 are DeepSpeed (`engine_deepspeed`). Stage 0 never runs through
DeepSpeed: its bf16 optimizer there is one Adam step off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from launcher.errors import RecipeError
from launcher.planning.plan import Candidate
from launcher.worker.snapshot import Writer

Batch = dict[str, Tensor]
"""What `collate` returns: input_ids, labels, and position_ids or attention_mask."""
Votes = Callable[[], Sequence[int]]
"""Asked once per step, as late as possible, so that a signal during a long step still counts for it."""


def no_votes() -> Sequence[int]:
    """Nothing to agree on."""
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimizer step showed, the same on every rank."""

    loss: float
    """Mean over the trained tokens of the global batch, before the update."""
    grad_norm: float
    """Global norm before clipping."""
    votes: tuple[int, ...]
    """The ranks' votes, added up."""
    applied: bool
    """False where fp16 overflowed and the update was skipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What a method wants done around an update; see `adalora_*` in model.py."""

    before_clipping: Callable[[nn.Module], None] = lambda _model: None
    after_step: Callable[[nn.Module, int], None] = lambda _model, _step: None


class Engine(Protocol):
    """One rank's share of the training. Every call but `forward` is collective."""

    module: nn.Module
    """The unwrapped model (the PEFT model for adapters)."""

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss of the trained tokens of one batch, without gradients; collective under ZeRO-3."""

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        *,
        trained_tokens: int,
        learning_rate: float,
        step: int,
        votes: Votes = no_votes,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        `trained_tokens` counts the whole global batch; `step` is the number of this step, from 1; what `votes`
        returns is added up over the ranks in the same collective as the loss, before the update.

        Raises:
            JobFailedError: the loss or the gradient norm is not finite; weights are untouched by the former.
        """

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Summed loss and trained tokens of this rank's batches; all ranks must bring equally many."""

    def save(self, writer: Writer) -> None:
        """Hand this rank's state to `writer`, which keeps errors to itself; no file is opened here."""

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote with the same ranks and stage."""

    def full_state(self) -> dict[str, Tensor] | None:
        """Trainable weights (all weights for full fine-tuning) whole, on rank 0's CPU; None elsewhere."""


def make_engine(
    model: nn.Module,
    candidate: Candidate,
    *,
    device: torch.device,
    ds_config: Mapping[str, Any] | None,
    hooks: Hooks | None = None,
) -> Engine:
    """The engine of the candidate's ZeRO stage; the process group exists already.

    Raises:
        RecipeError: the method does not work at that stage, or DeepSpeed's configuration is missing.
    """
    hooks = hooks or Hooks()
    if candidate.zero_stage == 0:
        from launcher.worker.engine_torch import TorchEngine

        return TorchEngine(model, candidate, device=device, hooks=hooks)
    if candidate.method == "adalora":
        raise RecipeError(
            f"method adalora needs whole gradients on every rank and ZeRO stage {candidate.zero_stage} has none; "
            "set deepspeed.stage: 0"
        )
    if ds_config is None:
        raise RecipeError(f"ZeRO stage {candidate.zero_stage} without ds_config.json in the run folder")
    from launcher.worker.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, candidate, device=device, ds_config=ds_config)
