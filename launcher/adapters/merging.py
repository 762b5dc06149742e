"""Merging: base and adapter -> one safetensors model folder, complete or not there, proved before it appears."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from launcher.adapters.card import model_card
from launcher.adapters.files import appearing
from launcher.adapters.lineage import read_adapter, refuse_other_base
from launcher.adapters.proof import prove
from launcher.adapters.shards import DTYPES, copy_settings, make_merging, open_up, write_merged
from launcher.adapters.whole import merge_whole


def merge(request: dict[str, Any]) -> dict[str, Any]:
    """Merge as asked: {"adapter", "base", "target", "dtype" | None, "trust_base", "proof_bytes" | None}.

    Raises:
        ConflictError: another base, or the target exists. ClusterError: the target cannot be written.
        RecipeError, ModelError: what cannot be merged.
        JobFailedError: the merged model is not base and adapter together.
    """
    adapter, base, target = (Path(request[key]) for key in ("adapter", "base", "target"))
    opened = read_adapter(adapter)
    refuse_other_base(opened, base, trusted=bool(request.get("trust_base")))
    dtype: torch.dtype | None = DTYPES[request["dtype"]] if request.get("dtype") else None
    merging = None if request.get("whole") else make_merging(opened, base, dtype)
    with appearing(target, "-o") as temporary:
        if merging is None:
            changed, proof = merge_whole(opened, base, temporary, dtype)
            copy_settings(base, adapter, temporary, getattr(torch, proof["dtype"]))
        else:
            changed = write_merged(merging, base, temporary, _say)
            copy_settings(base, adapter, temporary, dtype)
            proof = prove(merging, base, temporary, memory_bytes=request.get("proof_bytes"))
        facts = {"merged matrices": changed, f"largest difference of {proof['compared']}": f"{proof['difference']:.1e}"}
        (temporary / "README.md").write_text(model_card(opened, facts, merged=True), encoding="utf-8")
        open_up(temporary)
    return {"path": str(target), "matrices": changed, "proof": proof, "bytes": _bytes(target)}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
