"""Reshape: a checkpoint written by other ranks, or at another ZeRO stage, read into these.

Every rank maps the saved files (saved.py) and copies into place the spans that are its own. Nothing is written, the
checkpoint stays as it is, and no rank holds more than its share.

DeepSpeed's universal checkpoints do part of this by writing a second checkpoint of many small files. They need the
same stage on both sides, unpickle without limits, and keep no account of what they copied; here the masters are
compared with the files, bit by bit, after they arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.errors import ConflictError, JobFailedError
from launcher.worker.saved import MASTER, MOMENTS, Saved, open_saved, placed

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A part of a weight that this rank keeps, and where."""

    name: str
    start: int
    """First element, counted in the whole weight."""
    elements: int
    stepped: Tensor = field(repr=False)
    """The tensor the optimizer steps, in which the part lies: a flat vector under ZeRO, else the weight itself."""
    offset: int
    """Where in it, seen flat, the part begins."""

    def of(self, like: Tensor) -> Tensor:
        """This part of a tensor laid out as `stepped` is."""
        return like.data.view(-1)[self.offset : self.offset + self.elements]


# --- plain torch -------------------------------------------------------------------------------


def load_into_torch(
    module: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path, *, device: torch.device
) -> Saved:
    """Fill whole weights and a fresh optimizer; collective where there are several ranks.

    Raises:
        ConflictError: other weights were trained, or the optimizer's states cannot be cut elsewhere.
        JobFailedError: after filling, the weights are not those of the files.
    """
    _refuse_quantised(optimizer)
    saved = open_saved(checkpoint)
    spans = [
        Span(name=name, start=0, elements=weight.numel(), stepped=weight, offset=0)
        for name, weight in module.named_parameters()
        if weight.requires_grad
    ]
    refuse_other_weights(saved, {span.name: span.elements for span in spans})
    _refuse_half(saved, spans)
    with torch.no_grad():
        _fill(optimizer, saved, spans, [span.stepped for span in spans])
        _fill_buffers(module, saved)
    prove(saved, spans, device=device, copies=dist.get_world_size() if dist.is_initialized() else 1)
    return saved


# --- ZeRO --------------------------------------------------------------------------------------


def load_into_zero(engine: Any, checkpoint: Path, *, device: torch.device) -> Saved:
    """Fill a fresh DeepSpeed engine; collective.

    Raises:
        ConflictError: other weights were trained, or states cannot be cut elsewhere (8-bit, NVMe).
        JobFailedError: after filling, the masters are not those of the files.
    """
    optimizer = engine.optimizer
    _refuse_what_cannot_move(optimizer)
    saved = open_saved(checkpoint)
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    refuse_other_weights(saved, _trained(optimizer))
    spans = list(_spans(optimizer))
    _refuse_half(saved, spans)
    with torch.no_grad():
        _fill(optimizer.optimizer, saved, spans, _masters(optimizer))
        _hand_over(optimizer, saved)
        _fill_buffers(engine.module, saved)
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()
    for name, value in saved.counters.items():
        setattr(engine, name, value)
    prove(saved, spans, device=device)
    return saved


def _refuse_what_cannot_move(optimizer: Any) -> None:
    if not (hasattr(optimizer, "single_partition_of_fp32_groups") or _cuts_weights(optimizer)):
        raise ConflictError(
            f"{type(optimizer).__name__} of DeepSpeed keeps its states in a way that only the old number of ranks "
            "can read; resume there"
        )
    _refuse_quantised(optimizer.optimizer)
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise ConflictError("states on NVMe stay with their ranks; resume on the old ones, or offload to the CPU")
    if getattr(optimizer, "round_robin_gradients", False):
        raise ConflictError("round_robin_gradients deals weights in another order; set it to false and resume")


def _cuts_weights(optimizer: Any) -> bool:
    """Stage 3."""
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _masters(optimizer: Any) -> list[Tensor]:
    """The flat fp32 vectors that are stepped on this rank, those of padding alone too."""
    masters: list[Tensor] = (
        optimizer.fp32_partitioned_groups_flat
        if _cuts_weights(optimizer)
        else optimizer.single_partition_of_fp32_groups
    )
    return masters


def _trained(optimizer: Any) -> dict[str, int]:
    """Weight -> elements of all that this engine trains."""
    groups = optimizer.fp16_groups if _cuts_weights(optimizer) else optimizer.bit16_groups
    names = optimizer.param_names
    return {names[weight]: getattr(weight, "ds_numel", weight.numel()) for group in groups for weight in group}


def _spans(optimizer: Any) -> Iterator[Span]:
    """What this rank keeps of every trained weight."""
    names = optimizer.param_names
    if _cuts_weights(optimizer):
        rank = dist.get_rank(optimizer.dp_process_group)
        for group, master in zip(optimizer.fp16_groups, _masters(optimizer), strict=True):
            offset = 0
            for weight in group:
                part = weight.partition_numel()
                elements = max(0, min(part, weight.ds_numel - rank * part))
                yield Span(name=names[weight], start=rank * part, elements=elements, stepped=master, offset=offset)
                offset += part
        return
    for group, master in zip(optimizer.bit16_groups, _masters(optimizer), strict=True):
        for weight in group:
            if (mapping := weight._hp_mapping) is not None:
                at, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
                yield Span(name=names[weight], start=start, elements=at.numel, stepped=master, offset=at.start)


def _hand_over(optimizer: Any, saved: Saved) -> None:
    """Let DeepSpeed load what already lies in place, so that it does all else a load does (weights from masters)."""
    everyone: list[Any] = [None] * dist.get_world_size(optimizer.dp_process_group)
    everyone[dist.get_rank(optimizer.dp_process_group)] = optimizer.state_dict()
    optimizer.load_state_dict(everyone, load_optimizer_states=True, load_from_fp32_weights=True)
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    if saved.loss_scale is not None and optimizer.dynamic_loss_scale:
        optimizer.loss_scaler.cur_scale = saved.loss_scale


# --- both --------------------------------------------------------------------------------------


def _refuse_quantised(optimizer: Any) -> None:
    if isinstance(optimizer, torch.optim.AdamW) or type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return
    raise ConflictError(
        f"8-bit states of {type(optimizer).__name__} are quantised in blocks of a rank's own part and cannot be read "
        "from another number of ranks or stage; resume on the old ones"
    )


def refuse_other_weights(saved: Saved, trained: Mapping[str, int]) -> None:
    """The same weights with the same sizes (elements by name), on both sides.

    Raises:
        ConflictError: naming the first that differs.
    """
    there = {name: saved.elements(name) for name in saved.vectors}
    if there == trained:
        return
    names = sorted(name for name in there.keys() | trained.keys() if there.get(name) != trained.get(name))
    raise ConflictError(
        f"the checkpoint holds {len(there)} trained weights and this run trains {len(trained)}; {len(names)} differ, "
        f"first {names[0]}: {there.get(names[0], 0)} elements saved, {trained.get(names[0], 0)} here"
    )


def _refuse_half(saved: Saved, spans: list[Span]) -> None:
    """Master copies are fp32 everywhere; half precision on one side would lose bits in silence."""
    kinds = {piece.dtype for vectors in saved.vectors.values() for piece in vectors[MASTER]}
    kinds |= {span.stepped.dtype for span in spans}
    if kinds != {torch.float32}:
        raise ConflictError(
            f"trained weights are kept as {sorted(map(str, kinds))}; only fp32 masters can be read from another stage "
            "or number of ranks: resume on the old ones"
        )


def _fill(optimizer: torch.optim.Optimizer, saved: Saved, spans: list[Span], stepped: Iterable[Tensor]) -> None:
    """Masters in place, Adam's states beside them; padding stays zero."""
    for span in spans:
        saved.read(span.name, MASTER, span.start, span.of(span.stepped))
    if saved.adam_steps is None:
        return
    for master in stepped:
        optimizer.state[master] = {"step": _step_as(optimizer, master, saved.adam_steps)}
        optimizer.state[master] |= {key: torch.zeros_like(master.data) for key in MOMENTS}
    for span in spans:
        for key in MOMENTS:
            saved.read(span.name, key, span.start, span.of(optimizer.state[span.stepped][key]))


def _step_as(optimizer: torch.optim.Optimizer, master: Tensor, steps: int) -> Any:
    """Adam's step as this optimizer keeps it: torch's as a tensor, DeepSpeed's as a number."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return steps
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return torch.tensor(float(steps), device=master.device if on_device else "cpu")


def _fill_buffers(module: nn.Module, saved: Saved) -> None:
    own = dict(module.named_buffers())
    for name, tensor in saved.buffers.items():
        if name in own:
            own[name].copy_(tensor)


# --- proof -------------------------------------------------------------------------------------


def prove(saved: Saved, spans: list[Span], *, device: torch.device, copies: int = 1) -> None:
    """Compare the masters these ranks now hold with those of the files, weight by weight; collective.

    The ranks divide the reading of the files. Sums are of bit patterns, weighted by place, in integers: they may be
    added in any order, and a wrong bit or a wrong place changes them. `copies`: how many ranks hold each element.
    """
    names = sorted(saved.vectors)
    number = {name: index for index, name in enumerate(names)}
    sums = torch.zeros((3, len(names)), dtype=torch.int64)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for name in names[rank::world]:
        for offset, piece in placed(saved.vectors[name][MASTER]):
            sums[0, number[name]] += checksum(piece, offset)
    for span in spans:
        sums[1, number[span.name]] += checksum(span.of(span.stepped), span.start)
        sums[2, number[span.name]] += span.elements
    sums[0] *= copies
    sums = sums.to(device)
    if world > 1:
        dist.all_reduce(sums)
    there, here, elements = sums.tolist()
    expected = [copies * saved.elements(name) for name in names]
    wrong = [
        name for index, name in enumerate(names) if (there[index], expected[index]) != (here[index], elements[index])
    ]
    if wrong:
        raise JobFailedError(
            f"{len(wrong)} of {len(names)} weights differ from the checkpoint after it was read into {world} ranks, "
            f"first {wrong[0]}; the checkpoint is untouched"
        )


def checksum(vector: Tensor, first: int) -> int:
    """Sum over a flat fp32 vector of bit pattern times (2 * place + 1), modulo 2^64 (signed); `first` is its place."""
    total = torch.zeros((), dtype=torch.int64)
    for start in range(0, vector.numel(), _CHUNK_ELEMENTS):
        bits = vector[start : start + _CHUNK_ELEMENTS].detach().view(torch.int32).to(torch.int64)
        places = torch.arange(first + start, first + start + bits.numel(), device=bits.device)
        total += (bits * (2 * places + 1)).sum().cpu()
    return int(total)
