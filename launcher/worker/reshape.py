"""Reshape: a ZeRO checkpoint written by other ranks, or at another stage, read into these.

Every trained weight has some flat fp32 vectors: its master copy and what Adam remembers (exp_avg, exp_avg_sq). A
checkpoint holds each vector cut into pieces, one per rank that wrote it; these ranks hold spans of the same vectors,
cut elsewhere. So every rank maps the saved files into memory, and copies the spans that are its own. Nothing is
written, the checkpoint stays as it is, and no rank reads or holds more than its share (plus the pages of one span).

DeepSpeed's universal checkpoints do part of this by writing a second checkpoint of many small files. They need the
same stage on both sides, unpickle without limits, and keep no account of what they copied; here the masters are
compared with the files, bit by bit, after they arrived.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.errors import ConflictError, JobFailedError

MASTER = "master"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """What the files of a checkpoint hold; tensors are maps of the files and cost no memory until they are read."""

    stage: int
    world_size: int
    vectors: dict[str, dict[str, list[Tensor]]] = field(repr=False)
    """Weight -> vector (master, exp_avg, exp_avg_sq) -> its flat fp32 pieces, in order."""
    adam_steps: int | None
    """Updates Adam has made; None where it made none yet (fp16 overflowed so far)."""
    loss_scaler: Any
    counters: dict[str, int]
    """DeepSpeed's own counts of steps and samples."""
    buffers: dict[str, Tensor] = field(repr=False)

    def elements(self, name: str) -> int:
        """How many elements a weight has; ZeRO-3's padding at the end of the last piece not counted."""
        return sum(piece.numel() for piece in self.vectors[name][MASTER])

    def read(self, name: str, key: str, start: int, out: Tensor) -> None:
        """Copy elements `start` to `start + out.numel()` of a vector into `out`."""
        done = 0
        for offset, piece in _placed(self.vectors[name][key]):
            first = max(start, offset)
            last = min(start + out.numel(), offset + piece.numel())
            if first < last:
                out[first - start : last - start].copy_(piece[first - offset : last - offset])
                done += last - first
        if done != out.numel():
            raise JobFailedError(f"{name}: {key} has {done} of the {out.numel()} elements from {start}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A part of a weight that this rank keeps, and where."""

    name: str
    start: int
    """First element, counted in the whole weight."""
    elements: int
    flat: Tensor = field(repr=False)
    """The flat master vector the part lies in; the optimizer's parameter."""
    offset: int
    """Where in `flat` it begins."""

    def of(self, vector: Tensor) -> Tensor:
        """This part of a vector laid out like `flat`."""
        return vector[self.offset : self.offset + self.elements]


# --- reading -----------------------------------------------------------------------------------


def shape_of(folder: Path) -> tuple[int, int]:
    """(stage, number of ranks) that wrote the DeepSpeed files in `folder`.

    Raises:
        JobFailedError: there are none, or some ranks' are missing.
    """
    shards = _shards(folder)
    return int(_open(shards[0])["optimizer_state_dict"]["zero_stage"]), len(shards)


def open_saved(folder: Path) -> Saved:
    """Map the DeepSpeed files in `folder`; the caller has verified them against the run's manifest.

    Raises:
        JobFailedError: shards are missing or disagree.
        ConflictError: the states cannot be cut elsewhere (8-bit optimizers, NVMe offload).
    """
    shards = [_open(path)["optimizer_state_dict"] for path in _shards(folder)]
    model = _open(_first(folder, "*mp_rank_00_model_states.pt"))
    stage = int(shards[0]["zero_stage"])
    read = _partitioned_weights if stage == 3 else _partitioned_optimizer
    vectors, states = read(shards, model)
    return Saved(
        stage=stage,
        world_size=len(shards),
        vectors=vectors,
        adam_steps=_adam_steps(states),
        loss_scaler=shards[0]["loss_scaler"],
        counters={name: int(model.get(name) or 0) for name in ("global_steps", "global_samples", "skipped_steps")},
        buffers={name: model["module"][name] for name in model.get("buffer_names") or () if name in model["module"]},
    )


def _shards(folder: Path) -> list[Path]:
    found = {int(match[1]): path for path in folder.glob("*.pt") if (match := _SHARD.search(path.name))}
    if not found or sorted(found) != list(range(len(found))):
        raise JobFailedError(f"{folder} has optimizer states of ranks {sorted(found)}, and not of all")
    return [found[rank] for rank in range(len(found))]


def _first(folder: Path, pattern: str) -> Path:
    """Rank 0's file: DeepSpeed writes what is equal everywhere there."""
    found = sorted(folder.glob(pattern), key=lambda path: (len(path.name), path.name))
    if not found:
        raise JobFailedError(f"{folder} has no {pattern}")
    return found[0]


def _open(path: Path) -> dict[str, Any]:
    """A file's tensors as maps of it. Of classes it may hold only the few that DeepSpeed puts there."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        opened: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return opened


Vectors = dict[str, dict[str, list[Tensor]]]
States = list[Mapping[str, Any]]


def _partitioned_optimizer(shards: list[dict[str, Any]], _model: Mapping[str, Any]) -> tuple[Vectors, States]:
    """Stages 1 and 2: a group's weights end to end in one vector, cut into equal parts, one per rank.

    Each rank says itself which weight lies where in its part (`param_slice_mappings`).
    """
    vectors: Vectors = {}
    states: States = []
    for shard in shards:
        groups = zip(shard["single_partition_of_fp32_groups"], shard["param_slice_mappings"], strict=True)
        for number, (master, mapping) in enumerate(groups):
            state = _state_of(shard["base_optimizer_state"], number)
            states.append(state)
            for name, at in mapping.items():
                _add(vectors, name, master, state, at.start, at.numel)
    return vectors, states


def _partitioned_weights(shards: list[dict[str, Any]], model: Mapping[str, Any]) -> tuple[Vectors, States]:
    """Stage 3: every weight cut into equal parts, one per rank, the last one padded.

    A rank's parts lie end to end, sub-group by sub-group, in the order of `param_shapes`.
    """
    vectors: Vectors = {}
    states: States = []
    for rank, shard in enumerate(shards):
        groups = zip(shard["fp32_flat_groups"], model["param_shapes"], strict=True)
        for number, (master, shapes) in enumerate(groups):
            state = _state_of(shard["optimizer_state_dict"], number)
            states.append(state)
            offset = 0
            for name, shape in shapes.items():
                part = math.ceil(shape.numel() / len(shards))
                _add(vectors, name, master, state, offset, min(part, shape.numel() - rank * part))
                offset += part
            if offset != master.numel():
                raise JobFailedError(f"rank {rank} saved {master.numel()} elements where the weights have {offset}")
    return vectors, states


def _state_of(optimizer: Any, number: int) -> Mapping[str, Any]:
    """What the optimizer remembers of the n-th flat vector."""
    if not isinstance(optimizer, dict):
        raise ConflictError("the checkpoint is an elastic one of DeepSpeed; set elastic_checkpoint: false and resume")
    state: Mapping[str, Any] = optimizer["state"].get(number, {})
    if state and not state.keys() >= set(_MOMENTS):
        raise ConflictError(
            f"the optimizer keeps {sorted(state)}: states of 8-bit optimizers are quantised per rank under ZeRO and "
            "cannot be cut elsewhere; resume on the old number of ranks and stage, or use optim: adamw_torch"
        )
    return state


def _add(vectors: Vectors, name: str, master: Tensor, state: Mapping[str, Any], offset: int, elements: int) -> None:
    """Append one rank's piece of a weight; ranks come in order."""
    of_weight = vectors.setdefault(name, {})
    for key, flat in {MASTER: master, **{key: state[key] for key in _MOMENTS if key in state}}.items():
        if elements > 0:
            of_weight.setdefault(key, []).append(flat.detach()[offset : offset + elements])


def _adam_steps(states: States) -> int | None:
    """The one number of updates that all flat vectors had."""
    counts = {int(state["step"]) for state in states if state}
    if len(counts) > 1 or (counts and not all(states)):
        raise JobFailedError(f"the saved optimizer states disagree about their step: {sorted(counts)}")
    return counts.pop() if counts else None


# --- filling -----------------------------------------------------------------------------------


def load_reshaped(engine: Any, folder: Path, *, device: torch.device) -> Saved:
    """Fill a fresh DeepSpeed engine from `folder`, whoever wrote it; collective.

    Raises:
        ConflictError: other weights were trained, or the optimizer's states cannot be cut elsewhere.
        JobFailedError: after filling, the masters are not those of the files.
    """
    optimizer = engine.optimizer
    _refuse_what_cannot_move(optimizer)
    saved = open_saved(folder)
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    spans = list(_spans(optimizer))
    _refuse_other_weights(saved, _trained(optimizer))
    with torch.no_grad():
        _fill(optimizer.optimizer, saved, spans)
        _hand_over(optimizer, saved)
        _fill_buffers(engine.module, saved)
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()
    for name, value in saved.counters.items():
        setattr(engine, name, value)
    prove(saved, spans, device=device)
    return saved


def _refuse_what_cannot_move(optimizer: Any) -> None:
    if not isinstance(optimizer.optimizer, torch.optim.AdamW) and type(optimizer.optimizer).__name__ != (
        "DeepSpeedCPUAdam"
    ):
        raise ConflictError(
            f"states of {type(optimizer.optimizer).__name__} are quantised per rank under ZeRO and cannot be cut "
            "elsewhere; resume on the old number of ranks and stage, or use optim: adamw_torch"
        )
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise ConflictError("states on NVMe stay with their ranks; resume on the old ones, or offload to the CPU")
    if getattr(optimizer, "round_robin_gradients", False):
        raise ConflictError("round_robin_gradients deals weights in another order; set it to false and resume")


def _trained(optimizer: Any) -> dict[str, int]:
    """Weight -> elements of all that this engine trains."""
    groups = optimizer.fp16_groups if hasattr(optimizer, "fp16_groups") else optimizer.bit16_groups
    names = optimizer.param_names
    return {names[weight]: getattr(weight, "ds_numel", weight.numel()) for group in groups for weight in group}


def _spans(optimizer: Any) -> Iterator[Span]:
    """What this rank keeps of every trained weight."""
    names = optimizer.param_names
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        rank = dist.get_rank(optimizer.dp_process_group)
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for weight in group:
                part = weight.partition_numel()
                elements = max(0, min(part, weight.ds_numel - rank * part))
                yield Span(name=names[weight], start=rank * part, elements=elements, flat=flat, offset=offset)
                offset += part
        return
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for weight in group:
            if (mapping := weight._hp_mapping) is not None:
                at = mapping.hp_fragment_address
                start = mapping.lp_fragment_address.start
                yield Span(name=names[weight], start=start, elements=at.numel, flat=flat, offset=at.start)


def _refuse_other_weights(saved: Saved, trained: Mapping[str, int]) -> None:
    """The same weights with the same sizes, on both sides."""
    there = {name: saved.elements(name) for name in saved.vectors}
    if there == trained:
        return
    names = sorted(name for name in there.keys() | trained.keys() if there.get(name) != trained.get(name))
    raise ConflictError(
        f"the checkpoint holds {len(there)} trained weights and this run trains {len(trained)}; {len(names)} differ, "
        f"first {names[0]}: {there.get(names[0], 0)} elements saved, {trained.get(names[0], 0)} here"
    )


def _fill(optimizer: torch.optim.Optimizer, saved: Saved, spans: list[Span]) -> None:
    """Masters in place, Adam's states beside them; padding stays zero."""
    for span in spans:
        saved.read(span.name, MASTER, span.start, span.of(span.flat.data))
    if saved.adam_steps is None:
        return
    flats = {id(span.flat): span.flat for span in spans} | _empty_flats(optimizer)
    for flat in flats.values():
        optimizer.state[flat] = {"step": _step_as(optimizer, flat, saved.adam_steps)}
        optimizer.state[flat] |= {key: torch.zeros_like(flat.data) for key in _MOMENTS}
    for span in spans:
        for key in _MOMENTS:
            saved.read(span.name, key, span.start, span.of(optimizer.state[span.flat][key]))


def _empty_flats(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    """Vectors that hold nothing but padding on this rank have a state all the same."""
    return {id(flat): flat for group in optimizer.param_groups for flat in group["params"]}


def _step_as(optimizer: torch.optim.Optimizer, flat: Tensor, steps: int) -> Any:
    """Adam's step as this optimizer keeps it: torch's as a tensor, DeepSpeed's as a number."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return steps
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return torch.tensor(float(steps), device=flat.device if on_device else "cpu")


def _hand_over(optimizer: Any, saved: Saved) -> None:
    """Let DeepSpeed load what already lies in place, so that it does all else a load does (weights from masters)."""
    own = optimizer.state_dict() | {"loss_scaler": saved.loss_scaler}
    everyone: list[Any] = [None] * dist.get_world_size(optimizer.dp_process_group)
    everyone[dist.get_rank(optimizer.dp_process_group)] = own
    optimizer.load_state_dict(everyone, load_optimizer_states=True, load_from_fp32_weights=True)
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def _fill_buffers(module: nn.Module, saved: Saved) -> None:
    own = dict(module.named_buffers())
    for name, tensor in saved.buffers.items():
        if name in own:
            own[name].copy_(tensor)


# --- proof -------------------------------------------------------------------------------------


def prove(saved: Saved, spans: list[Span], *, device: torch.device) -> None:
    """Compare the masters these ranks now hold with those of the files, weight by weight; collective.

    The ranks divide the reading of the files. Sums are of bit patterns, weighted by place, in integers: equal sums
    mean equal bits at equal places, and may be added in any order.
    """
    names = sorted(saved.vectors)
    number = {name: index for index, name in enumerate(names)}
    sums = torch.zeros((3, len(names)), dtype=torch.int64)
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        for offset, piece in _placed(saved.vectors[name][MASTER]):
            sums[0, number[name]] += checksum(piece, offset)
    for span in spans:
        sums[1, number[span.name]] += checksum(span.of(span.flat.data), span.start)
        sums[2, number[span.name]] += span.elements
    sums = sums.to(device)
    dist.all_reduce(sums)
    there, here, elements = sums.tolist()
    wrong = [
        name for index, name in enumerate(names)
        if there[index] != here[index] or elements[index] != saved.elements(name)
    ]  # fmt: skip
    if wrong:
        raise JobFailedError(
            f"{len(wrong)} of {len(names)} weights differ from the checkpoint after it was read into "
            f"{dist.get_world_size()} ranks, first {wrong[0]}; the checkpoint is untouched"
        )


def checksum(vector: Tensor, first: int) -> int:
    """Sum over a flat fp32 vector of bit pattern times (2 * place + 1), modulo 2^64; `first` is its first place."""
    total = 0
    for start in range(0, vector.numel(), _CHUNK_ELEMENTS):
        bits = vector[start : start + _CHUNK_ELEMENTS].detach().view(torch.int32).to(torch.int64)
        places = torch.arange(first + start, first + start + bits.numel(), device=bits.device)
        total += int((bits * (2 * places + 1)).sum())
    return (total + 2**63) % 2**64 - 2**63


def _placed(pieces: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Pieces with the place of their first element."""
    offset = 0
    for piece in pieces:
        yield offset, piece
        offset += piece.numel()
