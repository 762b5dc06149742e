"""Adapters on disk, told from their configuration and their header alone; and which of them can be combined, and how.

What the ways of combining accept is PEFT's `add_weighted_adapter` (its names are used); what one adapter must have in
common with another for the sum to mean anything is the lineage's: the same base weights, rounded in the same way.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ModelError
from launcher.facts.weights import shard_problem

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LINEAGE = "launcher.lineage"
_PREFIX = "base_model.model."
_HEADER_LIMIT_BYTES = 100_000_000
"""What safetensors itself allows a header to be."""

FACTORWISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Work on the factors A and B, each by itself: cheap, rough, and of one rank only."""
PRODUCTWISE = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
"""Work on the product B A and cut it back to a rank: adapters of any ranks."""
WAYS = (*FACTORWISE, "cat", *PRODUCTWISE)
"""cat: factors side by side; exact, and the ranks add up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFacts:
    """One adapter folder."""

    folder: Path
    config: Mapping[str, Any]
    lineage: Mapping[str, Any]
    """Empty for adapters of other tools."""
    shapes: Mapping[str, tuple[int, ...]]
    """Tensor -> its shape, without PEFT's prefix."""

    @property
    def name(self) -> str:
        """The run it comes from, or its folder's name."""
        return str(self.lineage.get("run_id") or self.folder.name)

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> rank of its factors."""
        ending = ".lora_A.weight"
        return {name.removesuffix(ending): shape[0] for name, shape in self.shapes.items() if name.endswith(ending)}

    @property
    def rank(self) -> int:
        """The highest rank of its modules; 0 where it has no factors."""
        return max(self.ranks.values(), default=0)

    @property
    def one_rank(self) -> bool:
        """Whether all its modules have the rank that the configuration's r says."""
        return all(rank == self.config.get("r") for rank in self.ranks.values())

    @property
    def one_scaling(self) -> bool:
        """Whether all its modules have the scaling that r and lora_alpha make, without patterns."""
        rank = self.config.get("r") or self.rank
        plain = scaling({**self.config, "alpha_pattern": None}, "", rank)
        return all(math.isclose(scaling(self.config, name, own), plain) for name, own in self.ranks.items())

    @property
    def partly(self) -> tuple[str, ...]:
        """Kinds of modules, such as q_proj, that have factors on some layers and none on others."""
        layers: dict[str, set[int]] = {}
        for name in self.ranks:
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            if numbers:
                layers.setdefault(name.rpartition(".")[2], set()).add(numbers[0])
        last = max((max(found) for found in layers.values()), default=0)
        return tuple(sorted(kind for kind, found in layers.items() if len(found) <= last))


def read_adapter_facts(folder: Path) -> AdapterFacts:
    """Configuration, lineage and shapes of an adapter folder.

    Raises:
        ModelError: it is none, or its files do not open.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        torn = shard_problem(folder / WEIGHTS)
        if torn:
            raise ModelError(torn)
        header = read_header(folder / WEIGHTS)
        metadata = header.pop("__metadata__", {})
        lineage = json.loads(metadata.get(LINEAGE, "{}"))
        shapes = {name.removeprefix(_PREFIX): tuple(facts["shape"]) for name, facts in header.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: is no adapter that can be opened ({CONFIG}, {WEIGHTS}): {error}") from error
    if not isinstance(config, dict) or not isinstance(lineage, dict):
        raise ModelError(f"{folder}: {CONFIG} or the lineage in {WEIGHTS} is not an object")
    return AdapterFacts(folder=folder, config=config, lineage=lineage, shapes=shapes)


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's factor of a module: alpha / r, or alpha / sqrt(r) when rank-stabilised (rsLoRA, arXiv 2312.03732)."""
    alpha = float(of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank)))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule (get_pattern_key): the first key that, as a regular expression, is the end of the module's name."""
    named = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(named, default)


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file.

    Raises:
        OSError, ValueError: it cannot be read, or is no header.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _HEADER_LIMIT_BYTES:
            raise ValueError(f"{path.name} begins with no safetensors header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} begins with no safetensors header")
    return header


def made_in_words(made: Mapping[str, Any]) -> str:
    """One phrase: `ties (density 0.5) of run-a x 0.7 + run-b x 0.3`, or `rank 64 cut to 8 of run-a`."""
    parents = made["parents"]
    if made["how"] == "reduce":
        return f"rank {made['from_rank']} cut to {made['rank']} of {parents[0]['name']}"
    density = f" (density {made['density']:g})" if made.get("density") is not None else ""
    return f"{made['how']}{density} of " + " + ".join(f"{one['name']} x {one['weight']:g}" for one in parents)


def not_plain_lora(one: AdapterFacts) -> list[str]:
    """Why an adapter is more than factors of plain matrices, which is all that can be combined or reduced."""
    config, where = one.config, one.folder
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        return [f"{where}: a {kind} adapter is no sum of low-rank factors; lora and qlora are"]
    found = []
    if config.get("use_dora"):
        found.append("its DoRA magnitudes belong to its own factors (merge it instead)")
    if config.get("bias", "none") != "none":
        found.append(f"it trained biases ({config['bias']})")
    if config.get("modules_to_save"):
        found.append(f"it replaces whole modules ({', '.join(config['modules_to_save'])})")
    if config.get("target_parameters"):
        found.append("it changes fused experts")
    odd = sorted(name for name in one.shapes if not name.endswith((".lora_A.weight", ".lora_B.weight")))
    if odd and not found:
        found.append(f"{odd[0]} is no factor of a matrix")
    return [f"{where}: {reason}; only plain LoRA factors can be combined or reduced" for reason in found]


def not_combinable(parents: Sequence[AdapterFacts], how: str, *, trust_base: bool = False) -> list[str]:
    """Why these adapters cannot be combined in this way, one sentence each, with what works; empty when they can."""
    kinds = [problem for one in parents for problem in not_plain_lora(one)]
    return kinds or [*_other_bases(parents, trust_base=trust_base), *_other_ranks(parents, how)]


def _other_bases(parents: Sequence[AdapterFacts], *, trust_base: bool) -> Iterator[str]:
    first = parents[0]
    silent = [str(one.folder) for one in parents if not one.lineage.get("base_fingerprint")]
    if silent and not trust_base:
        yield (
            f"{', '.join(silent)}: does not say which weights it was trained on (another tool's, or of an id that was "
            "not on the machine); if the base is certain to be the same, say --trust-base"
        )
    for one in parents[1:]:
        mine, its = (each.lineage.get("base_fingerprint") for each in (first, one))
        if mine and its and mine != its:
            yield (
                f"{one.folder}: was trained on other weights ({one.lineage.get('base')}, fingerprint {its[:12]}) than "
                f"{first.name} ({first.lineage.get('base')}, {mine[:12]}); adapters of one base can be combined"
            )
        if first.lineage.get("quantization") != one.lineage.get("quantization"):
            yield (
                f"{one.folder}: its base was rounded otherwise (method {one.lineage.get('method')}) than that of "
                f"{first.name} (method {first.lineage.get('method')}), so that each corrects what the other does not "
                "have; merge each of them, or train both with one method"
            )
        yield from _other_shapes(first, one)


def _other_shapes(first: AdapterFacts, one: AdapterFacts) -> Iterator[str]:
    """The input width of A and the output width of B are the base's: where they differ, the bases do."""
    for name in sorted(set(first.shapes) & set(one.shapes)):
        side = 1 if name.endswith("lora_A.weight") else 0
        if first.shapes[name][side] != one.shapes[name][side]:
            yield (
                f"{one.folder}: {name} is {list(one.shapes[name])}, in {first.name} {list(first.shapes[name])}: "
                "they belong to bases of different sizes"
            )
            return


def _other_ranks(parents: Sequence[AdapterFacts], how: str) -> Iterator[str]:
    if how not in FACTORWISE:
        return
    first = parents[0]
    wider = "svd" if how == "linear" else f"{how}_svd"
    for one in parents[1:]:
        other = {m: r for m, r in one.ranks.items() if first.ranks.get(m, r) != r}
        if other or first.rank != one.rank:
            yield (
                f"{one.folder}: has rank {one.rank}, {first.name} {first.rank}, and {how} adds factors of one rank "
                f"only; --how {wider} takes any ranks{'' if wider == 'svd' else ', as do cat and svd'}"
            )
