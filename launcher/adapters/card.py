"""Model card: what is true of a merged model or an exported adapter, and nothing of this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from launcher.adapters.lineage import Adapter
from launcher.facts.adapters import made_in_words

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(adapter: Adapter, facts: dict[str, Any], *, merged: bool) -> str:
    """README.md with the front matter the hub reads; `facts` are measured ones, shown as they are."""
    base = public_base(adapter)
    # A folder's name is no id: the hub would link the card to whatever model has it.
    linked = {"base_model": base, "base_model_relation": "finetune" if merged else "adapter"} if "/" in base else {}
    front = linked | {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
    }
    told = adapter.lineage
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {told.get('run_id') or adapter.folder.name}",
        "",
        f"{'Merged from' if merged else 'An adapter for'} `{base}`"
        + (f" at revision `{told['base_revision']}`." if told.get("base_revision") else "."),
        "",
        "| fact | value |",
        "|---|---|",
    ]
    rows = {
        "method": told.get("method") or adapter.config.get("peft_type"),
        "rank": adapter.config.get("r"),
        "alpha": adapter.config.get("lora_alpha"),
        "base weights (fingerprint)": told.get("base_fingerprint"),
        "quantization of the base in training": _words(adapter.quantization),
        "chat template (sha256)": told.get("chat_template_sha256"),
        "training data (key of the token cache)": told.get("data_key"),
        "recipe (sha256)": told.get("recipe_sha256"),
        "made by": made_in_words(told["made"]) if told.get("made") else None,
        **facts,
    }
    lines += [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(lines) + "\n"


def public_base(adapter: Adapter) -> str:
    """The base's id, or the last part of its folder's name."""
    told = adapter.lineage.get("base")
    is_id = bool(_ID.fullmatch(adapter.base)) and not Path(adapter.base).exists()
    return str(told) if told else adapter.base if is_id else Path(adapter.base).name


def _words(quantization: dict[str, Any] | None) -> str | None:
    if quantization is None:
        return None
    double = ", double" if quantization.get("bnb_4bit_use_double_quant") else ""
    return f"{quantization.get('bnb_4bit_quant_type')}{double}"
