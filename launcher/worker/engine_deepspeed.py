"""DeepSpeedEngine: ZeRO stages 1-3, configured by the run's ds_config.json and nothing else."""

from __future__ import annotations

import contextlib
import copyreg
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.errors import JobFailedError, RecipeError
from launcher.planning.plan import Candidate
from launcher.worker.engine import Batch, StepResult, Votes, no_votes
from launcher.worker.loss import refuse_non_finite, sum_over_ranks, summed_token_loss, trained_tokens
from launcher.worker.operators import forget_shared_memory, load_shared_memory_operator
from launcher.worker.optimizer import make_optimizer, set_learning_rate
from launcher.worker.reshape import load_into_zero
from launcher.worker.saved import ZERO_FOLDER, shape_of
from launcher.worker.snapshot import Writer

_NOWHERE = "checkpoint"
"""DeepSpeed names files below a folder; ours go to a writer, which knows the folder."""


def prepare_deepspeed() -> None:
    """Let DeepSpeed adopt the process group; before a model is built under ZeRO-3, which asks for it."""
    import deepspeed

    # DeepSpeed calls collectives by names that newer torch versions announce to rename; nothing to be done here.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if dist.get_backend() == "gloo":
        load_shared_memory_operator()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    _pickle_stages_by_value()
    if dist.get_backend() == "gloo":
        forget_shared_memory()


def _pickle_stages_by_value() -> None:
    """Let the stage in a checkpoint be read without running code, whichever Python wrote it.

    DeepSpeed saves the stage as an enum. Python 3.11.0 to 3.11.3 pickle a member as a call of `getattr`, which a loader
    of weights alone rightly refuses; by value every version writes the same.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


class DeepSpeedEngine:
    """Optimizer states (1), gradients (2) and weights (3) are partitioned over the ranks."""

    def __init__(
        self, model: nn.Module, candidate: Candidate, *, device: torch.device, ds_config: Mapping[str, Any]
    ) -> None:
        import deepspeed

        check_config(candidate, ds_config)
        prepare_deepspeed()
        self.module = model
        self._device = device
        self._world, self._rank = dist.get_world_size(), dist.get_rank()
        self._full = candidate.method == "full"
        self._partitioned = candidate.zero_stage == 3
        self._accumulation = candidate.gradient_accumulation
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(model, candidate), config=dict(ds_config), dist_init_required=False
        )
        self.module = self._engine.module

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
        if len(micro_batches) != self._accumulation:
            raise ValueError(f"{len(micro_batches)} micro-batches, but DeepSpeed was told {self._accumulation}")
        set_learning_rate(self._engine.optimizer, learning_rate)
        # DeepSpeed averages gradients over ranks; multiplied by the world size the average becomes the sum.
        # It would divide by the accumulation too: scale_wrt_gas=False leaves that to trained_tokens.
        scale = self._world / trained_tokens
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        told: list[float] = []
        for number, batch in enumerate(micro_batches, start=1):
            loss = self._loss(self._engine, batch)
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
            if number == len(micro_batches):  # before the update: a NaN must not reach the weights
                summed, *told = sum_over_ranks([float(total), *votes()], self._device)
                refuse_non_finite("loss", summed / trained_tokens, f"step {step}")
            self._engine.step()
        applied = bool(self._engine.was_step_applied())
        return StepResult(
            loss=summed / trained_tokens,
            grad_norm=self._grad_norm(step, applied),
            votes=tuple(int(vote) for vote in told),
            applied=applied,
        )

    def _grad_norm(self, step: int, applied: bool) -> float:
        norm = float(self._engine.get_global_grad_norm())
        if applied:
            refuse_non_finite("gradient norm", norm, f"step {step}")
        return norm

    def _loss(self, forward: Any, batch: Batch) -> Tensor:
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
        return summed_token_loss(forward, moved)

    # --- without gradients ---------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """Summed token loss of one batch; collective at stage 3, where weights are gathered."""
        with torch.no_grad():
            return self._loss(self._engine, batch)

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Summed loss and trained tokens; see Engine."""
        total, tokens = 0.0, 0
        self._engine.eval()
        try:
            for batch in batches:
                total += float(self.forward(batch))
                tokens += trained_tokens(batch)
        finally:
            self._engine.train()
        # Stage 3 prefetches weights for a backward pass that never comes; left in flight, the next gather would fail.
        self._engine.empty_partition_cache()
        return total, tokens

    # --- state ---------------------------------------------------------------------------------

    def save(self, writer: Writer) -> None:
        """DeepSpeed's own files below `zero/`; frozen weights come from the base and are left out."""
        with _handing_over(self._engine, writer):
            self._engine.save_checkpoint(
                _NOWHERE, tag=ZERO_FOLDER, save_latest=False, exclude_frozen_parameters=not self._full
            )
        if self._engine.zero_nvme_offload_optimizer():
            source = Path(self._engine.optimizer.optimizer_swapper.swap_folder)
            name = f"{ZERO_FOLDER}/offloaded_tensors/rank{self._rank:02d}"
            writer.copy_tree(name, source, wanted=lambda file: "gradient" not in file)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, here or on other ranks or at another stage; needs a fresh engine.

        DeepSpeed unpickles these files, so the caller has verified them against the run's own manifest.

        Raises:
            ConflictError: the states cannot be read into these ranks; see reshape.py.
            JobFailedError: DeepSpeed found nothing to load; it would only have warned.
        """
        if shape_of(folder) != (self._engine.zero_optimization_stage(), self._world):
            load_into_zero(self._engine, folder, device=self._device)
            return
        loaded, _ = self._engine.load_checkpoint(
            str(folder), tag=ZERO_FOLDER, load_module_strict=self._full, load_lr_scheduler_states=False
        )
        if loaded is None:
            raise JobFailedError(f"DeepSpeed found no checkpoint in {folder / ZERO_FOLDER}")

    def full_state(self) -> dict[str, Tensor] | None:
        """Trained weights on rank 0's CPU; at stage 3 gathered one by one, so that one GPU holds one at a time."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            with self._whole(parameter):
                if self._rank == 0:
                    state[name] = parameter.detach().cpu().clone()
        if self._rank != 0:
            return None
        if self._full:
            kept = self.module.state_dict().keys()
            state |= {name: b.detach().cpu() for name, b in self.module.named_buffers() if name in kept}
        return state

    def _whole(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        if not self._partitioned:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter])


class _HandOver:
    """Takes the place of DeepSpeed's checkpoint engine: what it would have written goes to our writer.

    So no file is opened inside DeepSpeed's collective save, where one rank's full disk would leave the others in its
    barrier.
    """

    def __init__(self, theirs: Any, writer: Writer) -> None:
        self._theirs = theirs
        self._writer = writer

    def save(self, state_dict: Any, path: str) -> None:
        """Hand one file's content over."""
        self._writer.write(Path(path).relative_to(_NOWHERE).as_posix(), state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: the writer makes folders."""

    def preserves_storage_sharing(self) -> bool:
        """False: the writer keeps what a view shows, so that DeepSpeed need not clone it first."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)


@contextlib.contextmanager
def _handing_over(engine: Any, writer: Writer) -> Iterator[None]:
    """While DeepSpeed saves, nothing of it touches a disk: not its files, its converter scripts, its NVMe copies."""
    theirs = engine.checkpoint_engine
    engine.checkpoint_engine = _HandOver(theirs, writer)
    engine._copy_recovery_script = lambda *_: None
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        yield
    finally:
        engine.checkpoint_engine = theirs
        del engine._copy_recovery_script, engine.zero_nvme_offload_optimizer


def check_config(candidate: Candidate, ds_config: Mapping[str, Any]) -> None:
    """Refuse a configuration that would train something else than the plan says.

    Raises:
        RecipeError: a key is missing or contradicts the candidate.
    """
    problems = []
    if "gradient_clipping" not in ds_config:
        problems.append("gradient_clipping is missing, and DeepSpeed would clip at 1.0")
    elif float(ds_config["gradient_clipping"]) != float(candidate.max_grad_norm):
        problems.append(
            f"gradient_clipping is {ds_config['gradient_clipping']}, the plan says {candidate.max_grad_norm}"
        )
    expected = {
        "train_batch_size": candidate.global_batch,
        "train_micro_batch_size_per_gpu": candidate.micro_batch,
        "gradient_accumulation_steps": candidate.gradient_accumulation,
    }
    for key, value in expected.items():
        if ds_config.get(key) != value:
            problems.append(f"{key} is {ds_config.get(key)}, the plan says {value}")
    stage = ds_config.get("zero_optimization", {}).get("stage")
    if stage != candidate.zero_stage:
        problems.append(f"zero_optimization.stage is {stage}, the plan says {candidate.zero_stage}")
    if problems:
        raise RecipeError(*(f"ds_config.json: {problem}" for problem in problems))
