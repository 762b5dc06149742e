"""serving_memory: what a server would hold in memory: an estimate from headers and the model's shape alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError
from launcher.facts.adapters import WEIGHTS, read_header
from launcher.facts.architecture import shape_from_config
from launcher.facts.shape import ModelShape

_ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_ADAPTER_ELEMENT_BYTES = 4
"""PEFT holds adapters in fp32, whatever the base is in."""


def memory(request: dict[str, Any]) -> dict[str, Any]:
    """Bytes of weights, adapters, keys and values; null where the architecture has no closed form.

    Without what one forward pass works with, which is small beside these: a batch has one new token per row.
    """
    base = request["base"]
    folder, dtype = Path(base["folder"]), base["dtype"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        shape: ModelShape | None = shape_from_config(config, name=base["name"], source=str(folder))
    except LauncherError:
        shape = None
    weights = _weight_bytes(_elements(sorted(folder.glob("*.safetensors"))), shape, base["quantization"], dtype)
    adapters = sum(_elements([Path(one["folder"]) / WEIGHTS]) for one in request["adapters"]) * _ADAPTER_ELEMENT_BYTES
    told: dict[str, Any] = {"weights_bytes": weights, "adapters_bytes": adapters}
    if shape is None:
        return told | {"kv_bytes_per_token": None, "kv_bytes_at_most": None, "total_bytes_at_most": None}
    per_token = kv_bytes_per_token(shape, dtype)
    context = request["context"] or shape.max_positions
    most = per_token * request["rows"] * context
    return told | {
        "kv_bytes_per_token": per_token,
        "kv_bytes_at_most": most,
        "context": context,
        "total_bytes_at_most": weights + adapters + most if weights is not None else None,
    }


def kv_bytes_per_token(shape: ModelShape, dtype: str) -> int:
    """A key and a value per key-value head in every layer (GQA, arXiv 2305.13245: as many as there are such heads)."""
    return 2 * shape.layers * shape.kv_width * _ELEMENT_BYTES[dtype]


def _weight_bytes(
    elements: int, shape: ModelShape | None, quantization: dict[str, Any] | None, dtype: str
) -> int | None:
    """All weights in `dtype`, or the layers' linear ones in 4 bits with a scale per 64 (QLoRA, arXiv 2305.14314, 3)."""
    each = _ELEMENT_BYTES[dtype]
    if quantization is None:
        return elements * each
    if shape is None:
        return None
    double = quantization["bnb_4bit_use_double_quant"]
    rounded = shape.layers * sum(one.in_features * one.out_features for one in shape.linears)
    return int(rounded * (0.5 + ((1 + 4 / 256) / 64 if double else 4 / 64)) + (elements - rounded) * each)


def _elements(files: list[Path]) -> int:
    """Numbers in safetensors files, from their headers."""
    headers = (read_header(path) for path in files)
    return sum(
        math.prod(facts["shape"]) for header in headers for name, facts in header.items() if name != "__metadata__"
    )
