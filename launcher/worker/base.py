"""The base model on disk: is it complete, how large is it, and how is it loaded.

Shared by `model` (loads it to train) and `artifact` (loads it again to verify what was written); it knows
nothing of adapters. Only safetensors weights of causal language models are accepted: a pickle can run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from launcher.errors import ModelError
from launcher.planning.plan import Candidate, QuantNumbers
from launcher.recipe.schema import ModelSection

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NF4_BYTES_PER_PARAMETER = 0.5625
"""4 bits and one fp32 scale per 64 weights (QLoRA paper, section 3); double quantization needs less."""


def weights_dtype(candidate: Candidate) -> torch.dtype:
    """Dtype the base weights are held in.

    Full fine-tuning in plain torch (stage 0) keeps fp32 weights, which the engine autocasts: torch has no
    master copy otherwise. DeepSpeed keeps its own fp32 master, and frozen weights need none.
    """
    if candidate.method == "full" and candidate.zero_stage == 0:
        return torch.float32
    return DTYPES[candidate.precision]


def quantization_config(quant: QuantNumbers) -> BitsAndBytesConfig:
    """Settings of a 4-bit base, as transformers hands them to bitsandbytes."""
    storage = DTYPES.get(quant.storage_dtype, torch.uint8)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.quant_type,
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=DTYPES[quant.compute_dtype],
        bnb_4bit_quant_storage=storage,
    )


def load_base(model: ModelSection, candidate: Candidate, *, device: str) -> PreTrainedModel:
    """Load the base as the candidate trains it: dtype, attention, and 4-bit where it asks for it.

    Under ZeRO-3 (a live `HfDeepSpeedConfig`) un-quantized weights come back partitioned and stay where
    DeepSpeed puts them; otherwise the model is on `device`.

    Raises:
        ModelError: incomplete, pickled, already quantized, not a causal language model, or needs code of its own.
    """
    check_weights(model)
    options: dict[str, Any] = {
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": weights_dtype(candidate),
        "attn_implementation": candidate.attn_implementation,
        "use_safetensors": True,
    }
    if candidate.quant is not None:
        options |= {"quantization_config": quantization_config(candidate.quant), "device_map": {"": device}}
    with reading(model):
        check_architecture(model)
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model.name_or_path, **options)
    if candidate.quant is None and not hf_deepspeed.is_deepspeed_zero3_enabled():
        loaded.to(device)
    keep_packing(loaded)
    return loaded


def keep_packing(model: PreTrainedModel) -> None:
    """Forbid bitsandbytes to repack 4-bit weights in place the first time they are evaluated.

    It does so on CPUs with AVX512-BF16: block scales are rounded to bf16, the matrix product after it has no
    gradient (training goes on, silently wrong), and ZeRO-3 gathers the old packing under the new description.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def without_zero3() -> Iterator[None]:
    """Load whole models while training runs under ZeRO-3: transformers would partition them, collectively."""
    before = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = before


@contextmanager
def reading(model: ModelSection) -> Iterator[None]:
    """Turn the libraries' complaints about a model folder or id into a ModelError that names it."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"model.name_or_path: {model.name_or_path} cannot be loaded: {' '.join(reason[:4])}"
        ) from error


def check_weights(model: ModelSection) -> None:
    """Refuse a local folder whose weights are missing, torn or pickled; ids are checked by the hub client.

    Raises:
        ModelError: says which file is the trouble and what was found instead.
    """
    folder = Path(model.name_or_path)
    if not folder.is_dir():
        return
    found = sorted(path.name for path in folder.iterdir())
    where = f"model.name_or_path: {folder}"
    if "config.json" not in found:
        if "adapter_config.json" in found:
            raise ModelError(f"{where} is an adapter, not a base model; name the base it was trained on")
        raise ModelError(f"{where} has no config.json; found {_some(found)}")
    if "adapter_config.json" in found:
        raise ModelError(f"{where} holds an adapter beside the model (adapter_config.json); move one of them away")
    if SINGLE not in found and INDEX not in found:
        pickled = [name for name in found if name.endswith((".bin", ".pt", ".pth"))]
        if pickled:
            raise ModelError(f"{where} has only pickled weights ({_some(pickled)}); convert them to safetensors first")
        raise ModelError(f"{where} has no weights ({SINGLE} or {INDEX}); found {_some(found)}")
    _check_shards(folder, where)


def _check_shards(folder: Path, where: str) -> None:
    shards = weight_files(folder)
    missing = [path.name for path in shards if not path.exists()]
    if missing:
        raise ModelError(
            f"{where}: {INDEX} names {_some(missing)}, which the folder lacks ({len(missing)} of {len(shards)})"
        )
    for path in shards:
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except SafetensorError as error:
            raise ModelError(f"{where}: {path.name} is not a whole safetensors file: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """Safetensors files of a model folder, as the index lists them (whether they exist or not)."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def check_architecture(model: ModelSection) -> None:
    """Refuse what this launcher cannot train: encoders, encoder-decoders and already quantized weights.

    Raises:
        ModelError: names the architecture or quantization found.
    """
    config = AutoConfig.from_pretrained(
        model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    where = f"model.name_or_path: {model.name_or_path}"
    names = list(getattr(config, "architectures", None) or [])
    own_code = model.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if getattr(config, "is_encoder_decoder", False) or (names and not own_code and not known.intersection(names)):
        raise ModelError(f"{where} is a {_some(names) or config.model_type}, not a causal language model")
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        how = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized.quant_method
        raise ModelError(f"{where} is already quantized ({how}); name the unquantized model, qlora quantizes it itself")


def base_bytes(model: ModelSection, candidate: Candidate) -> int | None:
    """Bytes the base takes once loaded, from the safetensors headers; None where they are not on this machine."""
    folder = local_folder(model)
    if folder is None or not any((folder / name).exists() for name in (SINGLE, INDEX)):
        return None
    per_parameter = NF4_BYTES_PER_PARAMETER if candidate.quant is not None else weights_dtype(candidate).itemsize
    return int(sum(math.prod(shape) for shape in shapes(weight_files(folder)).values()) * per_parameter)


def local_folder(model: ModelSection) -> Path | None:
    """The model's folder, or the hub cache's for an id that was fetched before; never asks the network."""
    folder = Path(model.name_or_path)
    if folder.is_dir():
        return folder
    try:
        config = cached_file(model.name_or_path, "config.json", revision=model.revision, local_files_only=True)
    except OSError:
        return None
    return None if config is None else Path(config).parent


def shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, read from the headers only."""
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def _some(names: list[str], limit: int = 6) -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
