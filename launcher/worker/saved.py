"""What a checkpoint holds, weight by weight, whichever ranks and ZeRO stage wrote it.

Every trained weight has some flat fp32 vectors: its master copy and what Adam remembers (exp_avg, exp_avg_sq). A
checkpoint holds each vector cut into pieces, in one of three ways: whole (plain torch), a group's weights end to end
and cut into equal parts (ZeRO-1 and 2), or every weight cut by itself (ZeRO-3). Files are mapped, not read: a tensor
costs no memory until someone copies from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.errors import ConflictError, JobFailedError

TORCH_FILE = "engine.pt"
"""The file of plain torch inside a checkpoint."""
ZERO_FOLDER = "zero"
"""The folder of DeepSpeed's files inside a checkpoint."""
MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")

Vectors = dict[str, dict[str, list[Tensor]]]
"""Weight -> vector -> its pieces, in order."""
States = list[Mapping[str, Any]]
"""What the optimizer remembers, per flat vector it steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """The contents of one checkpoint's engine files."""

    stage: int
    world_size: int
    """Ranks that wrote pieces; of plain torch 1, because rank 0 writes for all."""
    vectors: Vectors = field(repr=False)
    adam_steps: int | None
    """Updates Adam has made; None where it made none yet (fp16 overflowed so far)."""
    loss_scale: float | None
    """What fp16 multiplies the loss by; None without fp16."""
    counters: dict[str, int]
    """DeepSpeed's own counts of steps and samples."""
    buffers: dict[str, Tensor] = field(repr=False)

    def elements(self, name: str) -> int:
        """How many elements a weight has; ZeRO-3's padding is not among its pieces."""
        return sum(piece.numel() for piece in self.vectors[name][MASTER])

    def read(self, name: str, key: str, start: int, out: Tensor) -> None:
        """Copy elements `start` to `start + out.numel()` of a vector into the flat `out`.

        Raises:
            JobFailedError: the pieces do not reach that far.
        """
        done = 0
        for offset, piece in placed(self.vectors[name].get(key, [])):
            first = max(start, offset)
            last = min(start + out.numel(), offset + piece.numel())
            if first < last:
                out[first - start : last - start].copy_(piece[first - offset : last - offset])
                done += last - first
        if done != out.numel():
            raise JobFailedError(f"{name}: {key} has {done} of the {out.numel()} elements from {start}")


def placed(pieces: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Pieces with the place of their first element."""
    offset = 0
    for piece in pieces:
        yield offset, piece
        offset += piece.numel()


def shape_of(checkpoint: Path) -> tuple[int, int]:
    """(stage, ranks that wrote pieces) of a checkpoint.

    Raises:
        JobFailedError: there are no engine files, or some ranks' are missing.
    """
    if (checkpoint / TORCH_FILE).exists():
        return 0, 1
    shards = _shards(checkpoint / ZERO_FOLDER)
    return int(_map(shards[0])["optimizer_state_dict"]["zero_stage"]), len(shards)


def open_saved(checkpoint: Path) -> Saved:
    """Map the engine files of a checkpoint; the caller has verified them against the manifest.

    Raises:
        JobFailedError: shards are missing or disagree.
        ConflictError: the states cannot be cut elsewhere (8-bit optimizers, NVMe).
    """
    return _whole(checkpoint / TORCH_FILE) if (checkpoint / TORCH_FILE).exists() else _zero(checkpoint / ZERO_FOLDER)


# --- plain torch -------------------------------------------------------------------------------


def _whole(path: Path) -> Saved:
    """Stage 0: one file, every vector in one piece."""
    file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    weights, groups = file["weights"], file["optimizer"]["param_groups"]
    names = list(weights)
    if len(groups) > 1:  # optimizer.py puts the weights to decay first, each group in the model's order
        names.sort(key=lambda name: weights[name].dim() <= 1)
    vectors: Vectors = {}
    states: States = []
    for name, number in zip(names, [index for group in groups for index in group["params"]], strict=True):
        states.append(_state_of(file["optimizer"], number))
        flat = {key: tensor.reshape(-1) for key, tensor in states[-1].items() if key in MOMENTS}
        _add(vectors, name, weights[name].reshape(-1), flat, 0, weights[name].numel())
    return Saved(
        stage=0,
        world_size=1,
        vectors=vectors,
        adam_steps=_adam_steps(states),
        loss_scale=file["scaler"].get("scale"),
        counters={},
        buffers={},
    )


# --- ZeRO --------------------------------------------------------------------------------------


def _zero(folder: Path) -> Saved:
    if (folder / "offloaded_tensors").exists():
        raise ConflictError("states on NVMe stay with the ranks that wrote them; resume on those, at the same stage")
    shards = [_map(path)["optimizer_state_dict"] for path in _shards(folder)]
    model = _map(_first(folder, "*mp_rank_00_model_states.pt"))
    stage = int(shards[0]["zero_stage"])
    cut = _cut_weights if stage == 3 else _cut_groups
    vectors, states = cut(shards, model)
    counters = {name: int(model.get(name) or 0) for name in ("global_steps", "global_samples", "skipped_steps")}
    return Saved(
        stage=stage,
        world_size=len(shards),
        vectors=vectors,
        adam_steps=_adam_steps(states),
        loss_scale=float(shards[0]["loss_scaler"].cur_scale) if shards[0]["dynamic_loss_scale"] else None,
        counters=counters,
        buffers={name: model["module"][name] for name in model.get("buffer_names") or () if name in model["module"]},
    )


def _shards(folder: Path) -> list[Path]:
    found = {int(match[1]): path for path in folder.glob("*.pt") if (match := _SHARD.search(path.name))}
    if not found or sorted(found) != list(range(len(found))):
        raise JobFailedError(f"{folder} has optimizer states of ranks {sorted(found)}, and not of all")
    return [found[rank] for rank in range(len(found))]


def _first(folder: Path, pattern: str) -> Path:
    """Rank 0's file: what is equal everywhere is read from there."""
    found = sorted(folder.glob(pattern), key=lambda path: (len(path.name), path.name))
    if not found:
        raise JobFailedError(f"{folder} has no {pattern}")
    return found[0]


def _map(path: Path) -> dict[str, Any]:
    """A file's tensors as maps of it. Of classes it may hold only the few that DeepSpeed puts there."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        mapped: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return mapped


def _cut_groups(shards: list[dict[str, Any]], _model: Mapping[str, Any]) -> tuple[Vectors, States]:
    """Stages 1 and 2: each rank says itself which weight lies where in its part (`param_slice_mappings`)."""
    vectors: Vectors = {}
    states: States = []
    for shard in shards:
        groups = zip(shard["single_partition_of_fp32_groups"], shard["param_slice_mappings"], strict=True)
        for number, (master, mapping) in enumerate(groups):
            states.append(_state_of(shard["base_optimizer_state"], number))
            for name, at in mapping.items():
                _add(vectors, name, master, states[-1], at.start, at.numel)
    return vectors, states


def _cut_weights(shards: list[dict[str, Any]], model: Mapping[str, Any]) -> tuple[Vectors, States]:
    """Stage 3: a rank's parts lie end to end, sub-group by sub-group, in the order of `param_shapes`.

    Each part is ceil(elements / ranks) long; the last ones of a weight are padded.
    """
    vectors: Vectors = {}
    states: States = []
    for rank, shard in enumerate(shards):
        groups = zip(shard["fp32_flat_groups"], model["param_shapes"], strict=True)
        for number, (master, shapes) in enumerate(groups):
            states.append(_state_of(shard["optimizer_state_dict"], number))
            offset = 0
            for name, shape in shapes.items():
                part = math.ceil(shape.numel() / len(shards))
                _add(vectors, name, master, states[-1], offset, min(part, shape.numel() - rank * part))
                offset += part
            if offset != master.numel():
                raise JobFailedError(f"rank {rank} saved {master.numel()} elements where the weights have {offset}")
    return vectors, states


# --- both --------------------------------------------------------------------------------------


def _state_of(optimizer: Any, number: int) -> Mapping[str, Any]:
    """What the optimizer remembers of the n-th vector it steps."""
    if not isinstance(optimizer, dict):
        raise ConflictError("the checkpoint is an elastic one of DeepSpeed; set elastic_checkpoint: false and resume")
    state: Mapping[str, Any] = optimizer["state"].get(number, {})
    if state and not state.keys() >= set(MOMENTS):
        raise ConflictError(
            f"the saved optimizer keeps {sorted(state)}: 8-bit states are quantised in blocks of a rank's own part and "
            "cannot be cut elsewhere; resume on the old number of ranks and stage"
        )
    return state


def _add(vectors: Vectors, name: str, master: Tensor, state: Mapping[str, Any], offset: int, elements: int) -> None:
    """Append one rank's piece of a weight; ranks come in order."""
    of_weight = vectors.setdefault(name, {MASTER: []})
    for key, flat in {MASTER: master, **{key: state[key] for key in MOMENTS if key in state}}.items():
        if elements > 0:
            of_weight.setdefault(key, []).append(flat.detach()[offset : offset + elements])


def _adam_steps(states: States) -> int | None:
    """The one number of updates that all vectors had."""
    counts = {int(state["step"]) for state in states if state}
    if len(counts) > 1 or (counts and not all(states)):
        raise JobFailedError(f"the saved optimizer states disagree about their step: {sorted(counts)}")
    return counts.pop() if counts else None
