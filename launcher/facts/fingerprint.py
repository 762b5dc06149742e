"""Fingerprint: which weights a model folder holds, told in seconds for 140 GB.

Hashing all of it would take minutes of every run's end. The headers name every tensor with its shape and place; parts
of each file spread over its length tell weights of the same shapes apart. Two revisions of one model differ in every
matrix, so a sample sees it. What a sample cannot see is a change of a few bytes by hand: `launcher stage` keeps whole
sha256 sums for that.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLES = 64
SAMPLE_BYTES = 1 << 14


def model_fingerprint(folder: Path) -> str | None:
    """64 hex digits over names, sizes, headers and samples of the safetensors files; None where there are none.

    Raises:
        OSError: a file cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            start = file.read(8)
            length = min(int.from_bytes(start, "little"), size)
            digest.update(start + file.read(length))
            for number in range(SAMPLES):
                file.seek(8 + length + (size - 8 - length) * number // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
