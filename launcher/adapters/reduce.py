"""Reduce: an adapter of a lower rank, the nearest one there is, with what it loses said module by module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from launcher.adapters.derived import Factors, read_factors, sha256_of, write_derived
from launcher.adapters.lineage import WEIGHTS, read_adapter, refuse_other_base
from launcher.adapters.proof import probe, with_adapter
from launcher.adapters.shards import held_in_4_bits, round_to_4_bits
from launcher.errors import RecipeError, raise_all
from launcher.facts.adapters import made_in_words, not_plain_lora, read_adapter_facts


def reduce(request: dict[str, Any]) -> dict[str, Any]:
    """Reduce as asked: {"adapter", "rank", "target", "base" | None, "trust_base"}; `base` asks for the logits, too.

    Returns the relative error (Frobenius norm) of each module's product and of all together, and with a base the
    largest difference of logits, as it is and as a share of the largest logit.

    Raises:
        RecipeError: no plain LoRA adapter, or one whose rank is not above the one asked for.
        ConflictError: the target exists, or another base.
    """
    parent, rank = read_adapter_facts(Path(request["adapter"])), int(request["rank"])
    raise_all(RecipeError, not_plain_lora(parent) or _too_high(parent.rank, rank, parent.folder))
    base = Path(request["base"]) if request.get("base") else None
    if base is not None:
        refuse_other_base(read_adapter(parent.folder), base, trusted=bool(request.get("trust_base")))
    cuts = {module: cut(factors, rank) for module, factors in read_factors(parent).items()}
    origin = {key: parent.lineage.get(key) for key in ("data_key", "recipe_sha256")}
    made = {
        "how": "reduce",
        "from_rank": parent.rank,
        "rank": rank,
        "parents": [{"name": parent.name, "weight": 1.0, "sha256": sha256_of(parent.folder / WEIGHTS), **origin}],
    }
    proof: dict[str, float] = {}

    def compare(folder: Path) -> None:
        if base is not None:
            proof.update(_logits(base, parent.folder, folder))

    target = Path(request["target"])
    write_derived(target, {module: one for module, (one, *_) in cuts.items()}, parents=[parent], made=made,
                  name=request.get("name"), base_folder=request.get("base_folder"), before_rename=compare)  # fmt: skip
    lost = {module: (error / whole) ** 0.5 if whole else 0.0 for module, (_, error, whole) in cuts.items()}
    total = sum(whole for *_, whole in cuts.values())
    overall = (sum(error for _, error, _ in cuts.values()) / total) ** 0.5 if total else 0.0
    return {"path": str(target), "made": made_in_words(made), "from_rank": parent.rank, "rank": rank,
            "relative_error": overall, "modules": lost, "proof": proof or None}  # fmt: skip


def _too_high(has: int, wanted: int, folder: Path) -> list[str]:
    return [f"{folder}: has rank {has}, and {wanted} is no reduction of it; ask for less"] if wanted >= has else []


def cut(one: Factors, rank: int) -> tuple[Factors, float, float]:
    """The best approximation of a module's product by `rank` (Eckart and Young 1936).

    Returns the factors, scaling 1 and each with half of every singular value, the squared Frobenius norm of what is
    lost, and that of the whole product. Two QR decompositions leave a matrix as small as the present rank to decompose,
    instead of one as large as the layer. In fp64, as the error is a difference of nearly equal numbers.
    """
    left, upper = torch.linalg.qr(one.b.double() * one.scaling)
    right, lower = torch.linalg.qr(one.a.double().T)
    u, values, v = torch.linalg.svd(upper @ lower.T)
    kept = min(rank, len(values))
    half = values[:kept].sqrt()
    a = half[:, None] * (v[:kept] @ right.T)
    b = (left @ u[:, :kept]) * half
    squares = values.square()
    factors = Factors(a=a.float().contiguous(), b=b.float().contiguous(), scaling=1.0)
    return factors, float(squares[kept:].sum()), float(squares.sum())


def _logits(base: Path, original: Path, reduced: Path) -> dict[str, float]:
    """Largest difference of logits on the base as trained, fp32, and its share of the largest logit."""
    adapter = read_adapter(original)
    rounded = held_in_4_bits(adapter, base)
    found = []
    for folder in (original, reduced):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
        for name, module in model.named_modules():
            if name in rounded:
                module.weight.data = round_to_4_bits(adapter, module.weight.data)
        found.append(probe(with_adapter(model, folder)))
    worst = float((found[1] - found[0]).abs().max())
    return {"logits_difference": worst, "share_of_largest": worst / max(float(found[0].abs().max()), 1e-6)}
