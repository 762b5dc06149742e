"""Export: an adapter as a serving engine loads it; what the engine refuses is refused, the logits are compared."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from launcher.adapters.card import model_card, public_base
from launcher.adapters.derived import PREFIX, A, B, Factors, read_factors
from launcher.adapters.files import appearing
from launcher.adapters.lineage import CONFIG, KEY, WEIGHTS, Adapter, read_adapter, refuse_other_base
from launcher.adapters.proof import probe, with_adapter
from launcher.adapters.shards import TOKENIZER
from launcher.errors import JobFailedError, RecipeError
from launcher.facts.adapters import AdapterFacts, read_adapter_facts
from launcher.facts.serving import refusals, serve_command, served_of

_STEP = 8
"""TGI pads ranks to a multiple of this, and takes the padded rank for the scaling of the modules that follow."""
_EVENED = 1e-5
"""Largest difference of logits, as a share of the largest, where factors were scaled and padded."""


def export(request: dict[str, Any]) -> dict[str, Any]:
    """Export as asked: {"adapter", "base" | None, "target", "engine", "name", "trust_base"}.

    Returns: path, the command that serves it here, engine, round_trip_difference (None: the base is not here), whether
    ranks or scalings were evened, notices.

    Raises:
        RecipeError: the engine would refuse it; every reason.
        ConflictError: the target exists, or another base. ClusterError: the target cannot be written.
        JobFailedError: the exported adapter does not answer as the original.
    """
    folder, target, engine = Path(request["adapter"]), Path(request["target"]), request["engine"]
    opened, facts = read_adapter(folder), read_adapter_facts(folder)
    uneven = _needs_evening(facts, engine)
    wanted = dataclasses.replace(served_of(facts), one_rank=True, one_scaling=True)
    why = refusals(engine, wanted)
    if why:
        raise RecipeError(*(f"{folder}: {engine} would refuse it: {one}" for one in why))
    base = Path(request["base"]) if request.get("base") else None
    if base is not None:
        refuse_other_base(opened, base, trusted=bool(request.get("trust_base")))
    with appearing(target, "-o") as temporary:
        rank = _write_adapter(opened, facts, temporary / "adapter", engine, evened=uneven)
        words = _write_script(opened, temporary / "serve.sh", engine, request["name"], rank)
        difference = None
        if base is not None:
            limit = _EVENED if uneven else 0.0
            difference = _round_trip(base, opened.folder, temporary / "adapter", limit)
        _open_up(temporary)
    here = [str(base) if word == _VARIABLE else word for word in words] if base is not None else words
    command = " ".join(word if word == _VARIABLE else shlex.quote(word) for word in here)
    return {"path": str(target), "command": command, "round_trip_difference": difference, "engine": engine,
            "evened": uneven, "notices": _notices(opened, engine)}  # fmt: skip


_VARIABLE = '"$BASE"'
"""Where the command needs the folder of a base that has no id."""


def _needs_evening(facts: AdapterFacts, engine: str) -> bool:
    plain = str(facts.config.get("peft_type")) == "LORA"
    padded = engine == "tgi" and facts.rank % _STEP != 0
    misread = engine == "sglang" and bool(facts.config.get("use_rslora"))  # it divides by r (its issue 40835)
    return plain and (padded or misread or not (facts.one_rank and facts.one_scaling))


def _notices(opened: Adapter, engine: str) -> list[str]:
    if opened.quantization is None or _quantized(opened, engine):
        return []
    return ["it was trained on a base in 4 bits and corrects its rounding, which this command does not repeat: "
            "launcher merge rounds the base first, and the merged model answers as the trained one"]  # fmt: skip


def _quantized(opened: Adapter, engine: str) -> list[str]:
    """vLLM quantizes to nf4 while it loads; the others are not documented to do so under an adapter."""
    nf4 = (opened.quantization or {}).get("bnb_4bit_quant_type") == "nf4"
    return ["--quantization", "bitsandbytes"] if engine == "vllm" and nf4 else []


def _write_adapter(opened: Adapter, facts: AdapterFacts, folder: Path, engine: str, *, evened: bool) -> int:
    """PEFT's files, tokenizer and card, without a path of this machine; returns the rank."""
    folder.mkdir()
    for name in TOKENIZER:
        if (opened.folder / name).is_file():
            shutil.copyfile(opened.folder / name, folder / name)
    config = opened.config | {"base_model_name_or_path": public_base(opened), "target_modules": _targets(facts)}
    rank = facts.rank
    if evened:
        rank = -(-rank // _STEP) * _STEP if engine == "tgi" else rank
        tensors = _evened(read_factors(facts), rank)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", KEY: json.dumps(opened.lineage)})
        config |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    else:
        shutil.copyfile(opened.weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = model_card(dataclasses.replace(opened, config=config), {"made for": engine}, merged=False)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return rank


def _targets(facts: AdapterFacts) -> list[str]:
    """Short names as they are; a pattern or shorthand, which not every engine reads, as the modules it stands for."""
    named = facts.config.get("target_modules")
    return sorted(named) if isinstance(named, list) else sorted(facts.ranks)


def _evened(factors: Mapping[str, Factors], rank: int) -> dict[str, torch.Tensor]:
    """The same products with one rank and the scaling 1: scalings folded in, missing directions zero."""
    found = {}
    for module, one in factors.items():
        missing = rank - one.a.shape[0]
        found[f"{PREFIX}{module}{A}"] = torch.nn.functional.pad(one.a, (0, 0, 0, missing)).contiguous()
        found[f"{PREFIX}{module}{B}"] = torch.nn.functional.pad(one.b * one.scaling, (0, missing)).contiguous()
    return found


def _write_script(opened: Adapter, script: Path, engine: str, name: str, rank: int) -> list[str]:
    """serve.sh; returns its command, in which the folder of a base without an id is a variable."""
    base, revision = public_base(opened), opened.lineage.get("base_revision")
    is_id = "/" in base
    words = serve_command(engine, base=base if is_id else _VARIABLE, name=name, folder="./adapter", rank=rank,
                          revision=revision if is_id else None)  # fmt: skip
    words += _quantized(opened, engine)
    command = " ".join(word if word == _VARIABLE else shlex.quote(word) for word in words)
    plain = re.sub(r"[^\w.-]", "_", base)  # the shell would expand what else a name may hold
    known = "" if is_id else f': "${{BASE:?must name the folder of the base model, {plain}}}"\n'
    text = f'#!/bin/sh\n{known}cd "$(dirname "$0")" && exec {command}\n'
    script.write_text(text, encoding="utf-8")
    return words


def _open_up(folder: Path) -> None:
    """Modes by the user's umask; the script can be run."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() or path.suffix == ".sh" else 0o666) & ~mask)


def _round_trip(base: Path, original: Path, exported: Path, limit: float) -> float:
    """Load both through PEFT on the base and compare logits; the largest difference, as a share of the largest.

    Raises:
        JobFailedError: it is above `limit`, which is 0 where the same numbers were copied.
    """
    found = []
    for folder in (original, exported):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
        found.append(probe(with_adapter(model, folder)))
    difference = float((found[0] - found[1]).abs().max() / found[0].abs().max().clamp_min(1e-6))
    if not difference <= limit:
        raise JobFailedError(
            f"{exported}: its logits differ by {difference:.2e} from those of {original} (limit {limit:g}); "
            "it was not kept"
        )
    return difference
