"""Derived: an adapter made from other adapters, written as training would have written it, complete or not there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from launcher.adapters.card import model_card
from launcher.adapters.files import appearing, opened
from launcher.adapters.lineage import CONFIG, KEY, WEIGHTS, read_adapter
from launcher.adapters.shards import TOKENIZER, open_up
from launcher.facts.adapters import AdapterFacts, scaling

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """The product of one module's two matrices, scaled: what is added to its weight is `scaling * b @ a`."""

    a: Tensor
    """(rank, inputs)."""
    b: Tensor
    """(outputs, rank)."""
    scaling: float


def read_factors(adapter: AdapterFacts) -> dict[str, Factors]:
    """Every module's factors in fp32, in the natural order of names, which is the same on every machine."""
    found = {}
    with opened(adapter.folder / WEIGHTS) as file:
        for module in sorted(adapter.ranks, key=natural):
            a, b = (file.get_tensor(f"{PREFIX}{module}{ending}").float() for ending in (A, B))
            found[module] = Factors(a=a, b=b, scaling=scaling(adapter.config, module, a.shape[0]))
    return found


def natural(module: str) -> tuple[tuple[bool, int, str], ...]:
    """Order of names in which layer 2 comes before layer 10."""
    return tuple((not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in module.split("."))


def write_derived(
    target: Path,
    factors: Mapping[str, Factors],
    *,
    parents: list[AdapterFacts],
    made: Mapping[str, Any],
    name: str | None = None,
    base_folder: str | None = None,
    before_rename: Callable[[Path], None] | None = None,
) -> None:
    """Write `factors`, their scaling folded in, as an adapter folder; `made` says how, for lineage and card.

    Tokenizer and template are the first parent's. `before_rename` looks at the complete folder and may refuse it.
    `name`: what the adapter is called; None: as the folder. `base_folder`: of the base here; None: as the parent says.

    Raises:
        ConflictError: the target exists. ClusterError: it cannot be written.
    """
    with appearing(target, "--to") as temporary:
        _write(temporary, name or target.name, factors, parents, made)
        if base_folder is not None:
            path = temporary / CONFIG
            told = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_folder}
            path.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if before_rename is not None:
            before_rename(temporary)
        open_up(temporary)


def _write(
    folder: Path, name: str, factors: Mapping[str, Factors], parents: list[AdapterFacts], made: Mapping[str, Any]
) -> None:
    tensors = {}
    for module, one in factors.items():
        tensors[f"{PREFIX}{module}{A}"] = one.a.contiguous()
        tensors[f"{PREFIX}{module}{B}"] = (one.b * one.scaling).contiguous()
    lineage = {**_common(parents), "run_id": name, "made": made}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", KEY: json.dumps(lineage)})
    config = _config(factors, parents)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in TOKENIZER:
        if (parents[0].folder / file).is_file():
            shutil.copyfile(parents[0].folder / file, folder / file)
    card = model_card(read_adapter(folder), {}, merged=False)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _common(parents: list[AdapterFacts]) -> dict[str, Any]:
    """What all parents say alike; of data and recipe there are several, which `made` names parent by parent."""
    first = parents[0].lineage
    alone = ("data_key", "recipe_sha256", "run_id", "made")
    return {
        "schema": 1,
        **{
            key: value if all(one.lineage.get(key) == value for one in parents) else None
            for key, value in first.items()
            if key not in alone
        },
    }


def _config(factors: Mapping[str, Factors], parents: list[AdapterFacts]) -> dict[str, Any]:
    """The first parent's configuration with the new ranks; alpha = rank everywhere, since scaling is folded in."""
    ranks = {module: one.a.shape[0] for module, one in factors.items()}
    rank = max(set(ranks.values()), key=lambda one: (list(ranks.values()).count(one), one))
    odd = {module: value for module, value in ranks.items() if value != rank}
    return {
        **parents[0].config,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": odd,
        "alpha_pattern": dict(odd),
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": _targets(parents, sorted(factors, key=natural)),
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }


def _targets(parents: list[AdapterFacts], modules: list[str]) -> list[str]:
    """Short names where every parent changed the same modules by short names, else the modules in full."""
    named = [one.config.get("target_modules") for one in parents]
    narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules")
    plain = all(isinstance(names, list) for names in named)
    same = all(sorted(names or ()) == sorted(named[0] or ()) for names in named)
    if plain and same and not any(one.config.get(key) for one in parents for key in narrowed):
        return sorted(named[0] or ())
    return modules


def sha256_of(path: Path) -> str:
    """Of a whole file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
