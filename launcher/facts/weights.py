"""Model folder: whether it holds what training needs, told from names and headers; weights are never read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
_LFS_POINTER = b"version https://git-lfs"


def model_folder_problems(folder: Path) -> list[str]:
    """What is missing or broken in a local model folder; empty when training can start from it."""
    problems: list[str] = []
    config = _json(folder / "config.json", problems)
    if config is not None and config.get("auto_map"):
        problems.extend(_custom_code(folder, config["auto_map"]))
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        problems.append(
            f"{folder}: no tokenizer (none of {', '.join(_TOKENIZERS)}); copy the model's tokenizer files there"
        )
    return problems + weight_problems(folder)


def _json(path: Path, problems: list[str]) -> Mapping[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(
            f"{path.parent}: no {path.name}; a model folder holds config.json, a tokenizer and safetensors weights"
        )
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read: {error}")
        return None
    if not isinstance(document, Mapping):
        problems.append(f"{path}: holds a {type(document).__name__}, not an object")
        return None
    return document


def _custom_code(folder: Path, auto_map: Any) -> list[str]:
    names = (
        sorted({str(value).split(".")[0] + ".py" for value in auto_map.values()})
        if isinstance(auto_map, Mapping)
        else []
    )
    return [
        f"{folder}/config.json: wants to run its own code ({', '.join(names)}); set model.trust_remote_code: true "
        "if you have read it"
    ]


def weight_problems(folder: Path) -> list[str]:
    """What is missing or torn among the safetensors files of a model folder; empty when they are whole."""
    if (folder / _INDEX).is_file():
        return _shard_problems(folder)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        return [_no_weights(folder)]
    return [problem for shard in shards if (problem := shard_problem(shard)) is not None]


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: only pickled weights ({', '.join(pickles[:3])}), which can run code when opened; convert them "
            "once where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return f"{folder}: no *.safetensors weights"


def _shard_problems(folder: Path) -> list[str]:
    problems: list[str] = []
    index = _json(folder / _INDEX, problems)
    if index is None:
        return problems
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        return [f"{folder / _INDEX}: names no weights"]
    names = sorted(set(map(str, weight_map.values())))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        problems.append(f"{folder}: {len(missing)} of {len(names)} weight files of the index are missing: {shown}")
    present = [folder / name for name in names if name not in missing]
    torn = [problem for shard in present if (problem := shard_problem(shard)) is not None]
    if problems or torn:
        return problems + torn
    return _unlisted(folder, weight_map)


def _unlisted(folder: Path, weight_map: Mapping[str, Any]) -> list[str]:
    """Tensors that the index puts into a file which does not hold them: a shard of another revision."""
    holds = {name: tensor_names(folder / name) for name in set(map(str, weight_map.values()))}
    lost = sorted(tensor for tensor, name in weight_map.items() if tensor not in holds[str(name)])
    if not lost:
        return []
    shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
    return [
        f"{folder}: the index promises {len(lost)} tensors that its files do not hold: {shown}; the files are of "
        "different revisions, so bring all of them again"
    ]


def tensor_names(path: Path) -> frozenset[str]:
    """Tensors of a whole safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return frozenset(header) - {"__metadata__"}


def shard_problem(path: Path) -> str | None:
    """Why a file cannot be whole safetensors: its header tells how long it must be; None where nothing is wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == _LFS_POINTER[:8]:
                return f"{path}: a git-lfs pointer, not the weights; run git lfs pull"
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                return f"{path}: not a whole safetensors file ({size} bytes)"
            header = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        return f"{path}: not readable as safetensors: {type(error).__name__}: {error}"
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        return f"{path}: truncated: {size} of {expected} bytes; copy it again"
    if size > expected:
        return f"{path}: {size - expected} bytes more than its header tells ({expected}); copy it again"
    return None
