"""measured_shape: a model's shape counted in its real class, where config.json's architecture has no row of ours.

Exact for what depends on weights alone: parameters, what a method trains, what is sharded. The terms that grow with
tokens need to know how an architecture computes, which no count says: `planning.traced` measures them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import ModelError
from launcher.facts.shape import Linear, ModelShape
from launcher.planning.trace import TRACED_LAYERS, answer, layer_count, trace_cache

_MODULE = "launcher.worker.anatomy"


def measured_shape(config: Mapping[str, Any], *, name: str, python: str, cache: Path | None = None) -> ModelShape:
    """Count the real class of `config` in the train environment's `python`.

    Heads are not counted: the shape says one, and only what weights decide may be asked of it.

    Raises:
        ClusterError: the train environment cannot build the class.
        ModelError: layers that are not alike, which two and four of them do not stand for.
    """
    request = {"config": dict(config), "layers": list(TRACED_LAYERS)}
    parts = answer(request, python, cache or trace_cache(), module=_MODULE)["parts"]
    first, last = parts[0], parts[-1]
    if len(set(last["params_of_layers"])) != 1:
        raise ModelError(f"{name}: layers differ in size, so {TRACED_LAYERS[-1]} of them do not stand for all of them")
    return _shape(first, layer_count(config), name=name, config=config)


def _shape(part: Mapping[str, Any], layers: int, *, name: str, config: Mapping[str, Any]) -> ModelShape:
    linears = tuple(Linear(**each) for each in part["linears"])
    layer = part["params_of_layers"][0]
    matrix = part["vocab"] * part["hidden"]
    head = (0 if part["tied"] else matrix) + (part["vocab"] if part["head_bias"] else 0)
    outside = part["params"] - part["layers"] * layer
    return ModelShape(
        name=name,
        family=str(config.get("model_type", "")),
        layers=layers,
        hidden=part["hidden"],
        heads=1,
        kv_heads=1,
        head_dim=part["hidden"],
        intermediate=max((each.out_features for each in linears), default=part["hidden"]),
        vocab=part["vocab"],
        gated_mlp=False,
        norm="LayerNorm",
        norms_per_layer=2,
        norm_params=part["vector_params"],
        final_norm_params=0,
        qk_norm=False,
        linears=linears,
        tied_embeddings=part["tied"],
        head_bias=part["head_bias"],
        # Whatever else stands beside the layers: positions, the final norm, projections.
        position_params=outside - matrix - head,
        shared_params=layer - sum(each.params for each in linears) - part["vector_params"],
        max_positions=0,
        source="counted in the real class",
    )
