"""Generators: every random number state a process may draw from, saved and restored."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Every generator this process may draw from, as tensors and plain values (no pickled classes)."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (
            kind,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def load_random_state(folder: Path, rank: int, saved_ranks: int) -> None:
    """Restore this rank's generators; a rank that the saved run did not have gets states of its own.

    Those are seeded with the first 8 bytes of sha256(rank 0's saved torch state, then this rank's number as 8 bytes,
    little-endian): the same in every attempt from that checkpoint, and different for every rank.
    """
    if rank >= saved_ranks:
        first = torch.load(folder / "rng-00000.pt", map_location="cpu", weights_only=True)
        digest = hashlib.sha256(bytes(first["torch"].tolist()) + rank.to_bytes(8, "little")).digest()
        _seed_all(int.from_bytes(digest[:8], "little") >> 1)  # torch takes 63 bits without a sign
        return
    state = torch.load(folder / f"rng-{rank:05d}.pt", map_location="cpu", weights_only=True)
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
