"""Export: an adapter as a serving engine loads it; what the engine refuses is refused, the logits are compared."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from launcher.adapters.card import model_card, public_base
from launcher.adapters.lineage import CONFIG, Adapter, read_adapter, refuse_other_base
from launcher.adapters.proof import probe
from launcher.errors import ConflictError, JobFailedError, RecipeError
from launcher.facts.serving import Served, refusals, serve_command

_FILES = ("adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip


def served(adapter: Adapter) -> Served:
    """What an engine looks at."""
    config = adapter.config
    kind = str(config.get("peft_type", "")).lower()
    method = {"prefix_tuning": "prefix", "prompt_tuning": "prompt"}.get(kind, kind)
    if kind == "lora" and config.get("use_dora"):
        method = "dora"
    ranks = [config.get("r") or 0, *(config.get("rank_pattern") or {}).values()] if kind == "lora" else []
    return Served(
        method=method,
        rank=max(ranks, default=None),
        target_modules=tuple(config.get("target_modules") or ()),
        bias=config.get("bias", "none"),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        fused_experts=bool(config.get("target_parameters")),
    )


def export(request: dict[str, Any]) -> dict[str, Any]:
    """Export as asked: {"adapter", "base" | None, "target", "engine", "name", "trust_base"}.

    Raises:
        RecipeError: the engine would refuse it; every reason.
        ConflictError: the target exists, or another base.
        JobFailedError: the exported adapter does not answer as the original.
    """
    adapter, target, engine = Path(request["adapter"]), Path(request["target"]), request["engine"]
    if target.exists():
        raise ConflictError(f"{target} exists already; name another folder with -o, or move it away")
    opened = read_adapter(adapter)
    why = refusals(engine, served(opened))
    if why:
        raise RecipeError(*(f"{adapter}: {engine} would refuse it: {one}" for one in why))
    base = Path(request["base"]) if request.get("base") else None
    if base is not None:
        refuse_other_base(opened, base, trusted=bool(request.get("trust_base")))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        command = _write(opened, temporary, engine, request["name"])
        difference = _round_trip(base, opened.folder, temporary / "adapter") if base is not None else None
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {"path": str(target), "command": command, "round_trip_difference": difference, "engine": engine}


def _write(opened: Adapter, folder: Path, engine: str, name: str) -> str:
    """The adapter flat in `adapter/`, and the command beside it; returns the command."""
    inner = folder / "adapter"
    inner.mkdir(mode=0o755)
    for file in _FILES:
        if (opened.folder / file).is_file():
            shutil.copyfile(opened.folder / file, inner / file)
    base = public_base(opened)
    config = opened.config | {"base_model_name_or_path": base}
    (inner / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    words = serve_command(engine, base=base, name=name, folder="./adapter", rank=served(opened).rank)
    command = shlex.join(words)
    script = folder / "serve.sh"
    script.write_text(f'#!/bin/sh\n# From this folder. BASE may be its id or a local folder.\ncd "$(dirname "$0")" && '
                      f"exec {command}\n", encoding="utf-8")  # fmt: skip
    (inner / "README.md").write_text(model_card(opened, {"made for": engine}, merged=False), encoding="utf-8")
    mask = os.umask(0)
    os.umask(mask)
    for path in inner.iterdir():
        path.chmod(0o666 & ~mask)
    script.chmod(0o777 & ~mask)
    return command


def _round_trip(base: Path, original: Path, exported: Path) -> float:
    """Load both through PEFT on the base and compare logits.

    Raises:
        JobFailedError: they differ at all: the same numbers were copied.
    """
    found = []
    for folder in (original, exported):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
        found.append(probe(peft.PeftModel.from_pretrained(model, str(folder)).eval()))
    difference = float((found[0] - found[1]).abs().max())
    if difference:
        raise JobFailedError(
            f"{exported}: its logits differ by {difference:.2e} from those of {original}; it was not kept"
        )
    return difference
