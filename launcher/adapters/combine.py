"""Combine: several adapters of one base become one, by PEFT's own arithmetic and without the base.

PEFT combines adapters inside a loaded model. Its arithmetic reads factors only, so the model here is a tree of layers
of the right names and shapes whose weights are one number repeated (no memory): a 70B base need not be on the machine.
What is held is the adapters in fp32, and for the ways that cut a product back to a rank one whole matrix at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraModel
from torch import nn

from launcher.adapters.derived import Factors, natural, read_factors, sha256_of, write_derived
from launcher.adapters.reduce import cut
from launcher.errors import RecipeError, raise_all
from launcher.facts.adapters import WEIGHTS, AdapterFacts, made_in_words, not_combinable, read_adapter_facts

_RESULT = "combined"


def combine(request: dict[str, Any]) -> dict[str, Any]:
    """Combine as asked: {"adapters", "weights", "how", "density", "majority", "rank", "seed", "target", "trust_base"}.

    Raises:
        RecipeError: adapters that cannot be combined in this way; every reason, with what works.
        ConflictError: the target exists.
    """
    parents = [read_adapter_facts(Path(folder)) for folder in request["adapters"]]
    raise_all(RecipeError, not_combinable(parents, request["how"], trust_base=bool(request.get("trust_base"))))
    target = Path(request["target"])
    factors = combined(parents, request)
    made = {
        "how": request["how"],
        "density": request.get("density"),
        "majority": request.get("majority") if "ties" in request["how"] else None,
        "seed": request.get("seed") if "dare" in request["how"] else None,
        "parents": [
            {
                "name": one.name,
                "weight": weight,
                "sha256": sha256_of(one.folder / WEIGHTS),
                "data_key": one.lineage.get("data_key"),
                "recipe_sha256": one.lineage.get("recipe_sha256"),
            }
            for one, weight in zip(parents, request["weights"], strict=True)
        ],
    }
    write_derived(
        target, factors, parents=parents, made=made, name=request.get("name"), base_folder=request.get("base_folder")
    )
    ranks = {one.a.shape[0] for one in factors.values()}
    return {"path": str(target), "made": made_in_words(made), "modules": len(factors), "rank": max(ranks),
            "notices": _notices(parents)}  # fmt: skip


def _notices(parents: Sequence[AdapterFacts]) -> list[str]:
    """What a person should know of the result."""
    templates = {one.lineage.get("chat_template_sha256") for one in parents}
    if len(templates) == 1:
        return []
    return [f"the adapters were trained with different chat templates; the result carries that of {parents[0].name}"]


def combined(parents: Sequence[AdapterFacts], request: Mapping[str, Any]) -> dict[str, Factors]:
    """The factors that `request` makes of `parents`, their scaling 1.

    `svd` is done as `cat`, which is exact, and a cut of its factors: the same product as PEFT's way, which decomposes
    the whole matrix (8192 x 28672 in a 70B model: a quarter of an hour each), to rounding.
    """
    read = [read_factors(one) for one in parents]
    how, rank = request["how"], request.get("rank") or max(one.rank for one in parents)
    tree = _tree(read)
    for number, factors in enumerate(read):
        _fill(tree, str(number), factors)
    torch.manual_seed(int(request.get("seed") or 0))
    tree.add_weighted_adapter(
        [str(number) for number in range(len(read))],
        list(request["weights"]),
        _RESULT,
        combination_type="cat" if how == "svd" else how,
        svd_rank=rank,
        svd_full_matrices=False,
        density=request.get("density"),
        majority_sign_method=request.get("majority") or "total",
    )
    made = _taken(tree, [set(one) for one in read])
    if how == "svd":
        return {module: cut(one, rank)[0] for module, one in made.items()}
    return made


def _tree(read: Sequence[Mapping[str, Factors]]) -> LoraModel:
    """PEFT's model around layers without memory, with every adapter's places in it."""
    root = nn.Module()
    shapes = {name: (one.b.shape[0], one.a.shape[1]) for factors in read for name, one in factors.items()}
    for module in sorted(shapes, key=natural):
        parent = root
        *way, last = module.split(".")
        for part in way:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, _without_memory(*shapes[module]))
    configs = {str(number): _config(factors) for number, factors in enumerate(read)}
    tree = LoraModel(root, configs["0"], "0")
    for name, config in list(configs.items())[1:]:
        tree.peft_config[name] = config
        tree.inject_adapter(root, name)
    return tree


def _without_memory(out_features: int, in_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(1).expand(out_features, in_features), requires_grad=False)
    return layer


def _config(factors: Mapping[str, Factors]) -> peft.LoraConfig:
    ranks = {module: one.a.shape[0] for module, one in factors.items()}
    rank = max(ranks.values())
    pattern = {module: value for module, value in ranks.items() if value != rank}
    return peft.LoraConfig(r=rank, lora_alpha=rank, rank_pattern=pattern, target_modules=list(factors))


def _fill(tree: LoraModel, name: str, factors: Mapping[str, Factors]) -> None:
    """The adapter's numbers in its places; scaling is set, not derived, since each parent has its own rule for it."""
    for module, one in factors.items():
        layer: Any = tree.model.get_submodule(module)
        layer.lora_A[name].weight.data = one.a
        layer.lora_B[name].weight.data = one.b
        layer.scaling[name] = one.scaling


def _taken(tree: LoraModel, had: Sequence[set[str]]) -> dict[str, Factors]:
    """The result's factors; `cat` pads modules that not all adapters have with rows of zeros, which are dropped."""
    found = {}
    for module in sorted(set().union(*had), key=natural):
        layer: Any = tree.model.get_submodule(module)
        a, b = (part[_RESULT].weight.data for part in (layer.lora_A, layer.lora_B))
        used = (a != 0).any(dim=1) | (b != 0).any(dim=0)
        kept = slice(None) if bool(used.all()) or not bool(used.any()) else slice(0, int(used.nonzero().max()) + 1)
        found[module] = Factors(a=a[kept].contiguous(), b=b[:, kept].contiguous(), scaling=1.0)
    return found
