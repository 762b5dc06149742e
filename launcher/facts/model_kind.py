"""What kind of model a folder holds: adapters, encoders and quantized weights are refused, and tokens without a row.

The worker judges the same with transformers (worker/base.py); here config.json and the tokenizer's file are enough.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ModelWithLMHead")
"""How transformers' classes that predict the next token end; encoder-decoders say so in another field."""


def model_kind_problems(folder: Path) -> list[str]:
    """Why a folder with a readable config.json is no base to train on; empty where it is one."""
    config = _json(folder / "config.json")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = _json(folder / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        return [f"{folder}: is an adapter, not a model; name the model it was trained on ({base})"]
    return [*_class_problems(folder, config), *_quantized(folder, config), *_vocabulary(folder, config)]


def _json(path: Path) -> Mapping[str, Any]:
    """The document; empty where there is none that can be read (weights.py says so)."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, Mapping) else {}


def _class_problems(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    names = [str(name) for name in config.get("architectures") or ()]
    causal = any(name.endswith(_CAUSAL) for name in names)
    if config.get("is_encoder_decoder") or (names and not causal and not config.get("auto_map")):
        what = ", ".join(names) or str(config.get("model_type"))
        yield f"{folder}/config.json: {what} is not a causal language model; name one whose class ends in ForCausalLM"


def _quantized(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    found = config.get("quantization_config")
    if isinstance(found, Mapping):
        how = found.get("quant_method", "unknown")
        yield (
            f"{folder}/config.json: is already quantized ({how}); name the unquantized model, method: qlora quantizes "
            "it itself"
        )


def _vocabulary(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """A token whose number has no row in the embeddings ends the job in its first step, deep inside a kernel."""
    rows, largest = config.get("vocab_size"), _largest_token(_json(folder / "tokenizer.json"))
    if isinstance(rows, int) and largest is not None and largest >= rows:
        yield (
            f"{folder}/tokenizer.json: has a token number {largest}, and the model's embeddings have {rows} rows "
            "(config.json: vocab_size); this tokenizer belongs to another model"
        )


def _largest_token(tokenizer: Mapping[str, Any]) -> int | None:
    """Largest number of a token, added ones included; None where the file does not say."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    numbers = [len(vocabulary) - 1] if isinstance(vocabulary, list) else []
    if isinstance(vocabulary, Mapping):
        numbers += [number for number in vocabulary.values() if isinstance(number, int)]
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping) and isinstance(token.get("id"), int):
            numbers.append(token["id"])
    return max(numbers, default=None)
