"""Lineage: what an adapter says about itself, and whether a base is the one it was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from launcher.errors import ConflictError, ModelError, raise_all
from launcher.facts.fingerprint import model_fingerprint
from launcher.facts.weights import shard_problem, weight_problems

KEY = "launcher.lineage"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """An adapter folder: PEFT's configuration, and our lineage where it has one."""

    folder: Path
    config: dict[str, Any]
    lineage: dict[str, Any]
    """Empty for adapters of other tools."""

    @property
    def weights(self) -> Path:
        """Its safetensors file."""
        return self.folder / WEIGHTS

    @property
    def base(self) -> str:
        """The base's name as PEFT reads it: a folder or an id."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def quantization(self) -> dict[str, Any] | None:
        """bitsandbytes settings of a QLoRA base; None where the base was not quantized, or is not known to be."""
        found = self.lineage.get("quantization")
        return dict(found) if found else None


def read_adapter(folder: Path) -> Adapter:
    """Open an adapter folder.

    Raises:
        ModelError: it is none, or its files do not open.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        torn = shard_problem(folder / WEIGHTS)
        if torn:
            raise ModelError(torn)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
        told = json.loads(metadata.get(KEY, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: is no adapter that can be opened ({CONFIG}, {WEIGHTS}): {error}") from error
    if not isinstance(config, dict) or not isinstance(told, dict):
        raise ModelError(f"{folder}: {CONFIG} or the lineage in {WEIGHTS} is not an object")
    return Adapter(folder=folder, config=config, lineage=told)


def refuse_other_base(adapter: Adapter, base: Path, *, trusted: bool = False) -> None:
    """Refuse a base whose weights are not those the adapter was trained on.

    `trusted`: an adapter without lineage (of another tool) may be used all the same.

    Raises:
        ConflictError: other weights, or an adapter that does not say.
        ModelError: the base folder holds no safetensors weights, or files of them are missing or torn.
    """
    raise_all(ModelError, weight_problems(base))
    here = str(model_fingerprint(base))
    wanted = adapter.lineage.get("base_fingerprint")
    if wanted is None and not trusted:
        raise ConflictError(
            f"{adapter.folder}: does not say which weights it was trained on (it was made by another tool, or from an "
            f"id that was not on the machine); if {base} is certain to be the base, say --trust-base"
        )
    if wanted is not None and wanted != here:
        raise ConflictError(
            f"{base}: its weights are not those that {adapter.lineage.get('run_id', adapter.folder)} was trained on "
            f"(fingerprint {here[:12]}, the adapter says {wanted[:12]}: {adapter.lineage.get('base')} "
            f"{adapter.lineage.get('base_revision') or ''}); name the right folder with --base"
        )
