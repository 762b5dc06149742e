"""from_checkpoint: a ZeRO checkpoint of full fine-tuning -> a sharded safetensors model, one shard in memory at a time.

No rank gathers anything and no GPU is needed: the checkpoint's files are mapped, and every weight is copied out of the
pieces the ranks wrote (worker/saved.py).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from launcher.adapters.files import appearing
from launcher.adapters.shards import DTYPES, INDEX, copy_settings, open_up, skeleton
from launcher.errors import JobFailedError
from launcher.worker.saved import MASTER, Saved, open_saved


def export_checkpoint(request: dict[str, Any]) -> dict[str, Any]:
    """Write as asked: {"checkpoint", "base", "target", "dtype", "shard_bytes"}; the checkpoint was verified before.

    Raises:
        ConflictError: the target exists.
        JobFailedError: weights of the model are not in the checkpoint (an adapter's run, another model).
    """
    checkpoint, base, target = (Path(request[key]) for key in ("checkpoint", "base", "target"))
    dtype = DTYPES[request["dtype"]]
    saved = open_saved(checkpoint)
    shapes = _shapes(base, saved)
    with appearing(target, "-o") as temporary:
        files = _write(saved, shapes, temporary, dtype, int(request["shard_bytes"]))
        copy_settings(base, base, temporary, dtype)
        open_up(temporary)
    return {"path": str(target), "files": files, "parameters": sum(math.prod(shape) for _, shape in shapes.items())}


def _shapes(base: Path, saved: Saved) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight to write, as the model class has them."""
    model = skeleton(base)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = sorted(shapes.keys() - saved.vectors.keys())
    if missing:
        raise JobFailedError(
            f"the checkpoint holds {len(saved.vectors)} trained weights and lacks {len(missing)} of the model's, such "
            f"as {missing[0]}: was the run an adapter's, or of another model?"
        )
    wrong = [name for name, shape in shapes.items() if math.prod(shape) != saved.elements(name)]
    if wrong:
        raise JobFailedError(
            f"{wrong[0]} has {saved.elements(wrong[0])} elements in the checkpoint, not {shapes[wrong[0]]}"
        )
    return shapes


def _write(saved: Saved, shapes: dict[str, tuple[int, ...]], target: Path, dtype: torch.dtype, shard_bytes: int) -> int:
    """Fill one shard after the other; returns how many there are."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        needed = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + needed > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += needed
    placed: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        save_file({name: _weight(saved, name, shapes[name], dtype) for name in names}, target / file, {"format": "pt"})
        placed |= dict.fromkeys(names, file)
        print(f"{file}: {number} of {len(groups)}", file=sys.stderr, flush=True)
    if len(groups) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return len(groups)


def _weight(saved: Saved, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    flat = torch.empty(math.prod(shape), dtype=torch.float32)
    saved.read(name, MASTER, 0, flat)
    return flat.reshape(shape).to(dtype)
