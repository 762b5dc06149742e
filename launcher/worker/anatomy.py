"""What the real model class consists of, counted on the meta device: layers, linear modules, embeddings, in elements.

Run as `python -m launcher.worker.anatomy` in the train environment: a request as JSON on stdin (`config` and two
numbers of `layers`), the answer as JSON on stdout. `launcher.planning.anatomy` writes the one and reads the other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from launcher.worker.trace import layered_config


def anatomy(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Elements of the whole, of each layer, and of what one layer holds in linear modules and vectors."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            layered_config({"config": config, "attention": "sdpa", "packing": False}, layers)
        )
    stack = max((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers), key=_elements)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    linears = list(_linears(stack[0]))
    biases = sum(each["out_features"] for each in linears if each["bias"])
    return {
        "layers": layers,
        "params": _elements(model),
        "params_of_layers": [_elements(layer) for layer in stack],
        "linears": linears,
        "vector_params": sum(each.numel() for each in stack[0].parameters() if each.dim() == 1) - biases,
        "vocab": embedding.shape[0],
        "hidden": embedding.shape[1],
        "tied": head is not None and head.weight is embedding,
        "head_bias": head is not None and getattr(head, "bias", None) is not None,
    }


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _linears(layer: nn.Module) -> Iterator[dict[str, Any]]:
    """Every module of a layer that multiplies by a matrix and that adapters can sit on."""
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            block, _, name = path.rpartition(".")
            ins, outs = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
            yield {
                "name": name,
                "block": block.rpartition(".")[2],
                "in_features": ins,
                "out_features": outs,
                "bias": module.bias is not None,
            }


def main() -> int:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    print(json.dumps({"parts": [anatomy(request["config"], layers) for layers in request["layers"]]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
