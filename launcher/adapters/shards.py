"""Shards: a base model's safetensors files, merged with an adapter one matrix at a time.

Memory: one shard of the output (as large as the base's own shards, 5 GB by custom) and a few fp32 copies of one matrix.
The arithmetic of each matrix is PEFT's own layer's, so that DoRA, rank-stabilised scaling and alpha patterns are its.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from launcher.adapters.files import opened
from launcher.adapters.lineage import Adapter
from launcher.errors import ModelError, RecipeError, raise_all
from launcher.facts.adapters import of_pattern

INDEX = "model.safetensors.index.json"
_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".lora_A.bias", ".lora_B.bias")
_NAME = "merged"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Merging:
    """One merge: how a base matrix is read, and as what it is written."""

    adapter: Adapter
    config: Any
    """PEFT's LoraConfig."""
    factors: Mapping[str, Mapping[str, Tensor]]
    """Module -> its tensors by their ending, such as lora_A.weight."""
    dtype: torch.dtype | None
    """None: as the base has it."""
    transposed: frozenset[str]
    """Modules whose class holds its matrix as (inputs, outputs): GPT-2's Conv1D."""
    rounded: frozenset[str]
    """Modules whose base weight was held in 4 bits in training, with an adapter or without; empty but for QLoRA."""

    def merged(self, module: str, weight: Tensor) -> Tensor:
        """The merged matrix of one module: fp32 inside, the base's dtype (or `dtype`) outside."""
        layer = self.layer(module, self.as_trained(module, weight).float())
        layer.merge(safe_merge=True)
        merged = self.turned(module, layer.get_base_layer().weight.data)
        return merged.to(self.dtype or weight.dtype).contiguous()

    def turned(self, module: str, weight: Tensor) -> Tensor:
        """A module's matrix as (outputs, inputs), and back."""
        return weight.T.contiguous() if module in self.transposed else weight

    def as_trained(self, module: str, weight: Tensor) -> Tensor:
        """The values the base computed with: QLoRA learned to correct the rounded ones, so they are rounded again."""
        return round_to_4_bits(self.adapter, weight) if module in self.rounded else weight

    def layer(self, module: str, weight: Tensor) -> LoraLinear:
        """PEFT's layer around one fp32 matrix as it is on disk, with the adapter's factors in it."""
        factors, weight = self.factors[module], self.turned(module, weight)
        out_features, in_features = weight.shape
        base = nn.Linear(in_features, out_features, bias=False, device="meta")
        base.weight = nn.Parameter(weight, requires_grad=False)
        rank = factors["lora_A.weight"].shape[0]
        alpha = of_pattern(self.config.alpha_pattern, module, self.config.lora_alpha)
        layer = LoraLinear(base, _NAME, self.config, r=rank, lora_alpha=alpha)
        with torch.no_grad():
            layer.lora_A[_NAME].weight.copy_(factors["lora_A.weight"].float())
            layer.lora_B[_NAME].weight.copy_(factors["lora_B.weight"].float())
            if "lora_magnitude_vector" in factors:
                layer.lora_magnitude_vector[_NAME].weight.copy_(factors["lora_magnitude_vector"].float())
        return layer.eval()


def make_merging(adapter: Adapter, base: Path, dtype: torch.dtype | None) -> Merging:
    """Read the adapter and check that every matrix it changes is in the base.

    Raises:
        RecipeError: a kind of adapter that has nothing to merge, or cannot be merged matrix by matrix.
        ModelError: matrices the base does not have.
    """
    config: Any = peft.PeftConfig.from_pretrained(str(adapter.folder))
    _refuse_kind(adapter, config)
    factors = _factors(adapter)
    held = {name for name, _ in tensors(base)}
    missing = sorted(module for module in factors if f"{module}.weight" not in held)
    if missing:
        raise ModelError(
            f"{base}: {len(missing)} of {len(factors)} matrices that the adapter changes are not in its files, such as "
            f"{missing[0]}.weight; its files may name modules otherwise than the model class (--whole merges in memory)"
        )
    turned = transposed(base)
    config.fan_in_fan_out = False  # matrices are turned before PEFT sees them
    raise_all(ModelError, _other_shapes(base, factors, turned))
    rounded = held_in_4_bits(adapter, base)
    return Merging(adapter=adapter, config=config, factors=factors, dtype=dtype, transposed=turned, rounded=rounded)


def _other_shapes(base: Path, factors: Mapping[str, Mapping[str, Tensor]], turned: frozenset[str]) -> list[str]:
    """The first matrix that is not of the size its factors were made for, and how many there are."""
    found = []
    for path in weight_files(base):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                module = name.removesuffix(".weight")
                if name.endswith(".weight") and module in factors:
                    shape = tuple(file.get_slice(name).get_shape())
                    a, b = factors[module]["lora_A.weight"], factors[module]["lora_B.weight"]
                    wanted = (b.shape[0], a.shape[1])
                    if shape != (wanted[::-1] if module in turned else wanted):
                        found.append(f"{name} is {list(shape)}, and the adapter's factors make {list(wanted)}")
    if not found:
        return []
    return [f"{base}: {found[0]} ({len(found)} of {len(factors)} matrices differ): it is a base of another size"]


def transposed(base: Path) -> frozenset[str]:
    """Modules of the model class that hold their matrix as (inputs, outputs)."""
    return frozenset(name for name, module in skeleton(base).named_modules() if isinstance(module, Conv1D))


def _refuse_kind(adapter: Adapter, config: Any) -> None:
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind not in ("LORA",):
        words = "virtual tokens are no weights" if kind in ("PROMPT_TUNING", "PREFIX_TUNING") else "use --whole"
        raise RecipeError(f"{adapter.folder}: a {kind} adapter is not merged matrix by matrix: {words}")
    problems = []
    if getattr(config, "target_parameters", None):
        problems.append("it changes fused experts")
    if config.bias != "none":
        problems.append(f"it trained biases ({config.bias})")
    if getattr(config, "lora_bias", False):
        problems.append("its factors have biases (lora_bias)")
    if config.modules_to_save:
        problems.append(f"it replaces whole modules ({', '.join(config.modules_to_save)})")
    if problems:
        raise RecipeError(
            f"{adapter.folder}: cannot be merged matrix by matrix, because {' and '.join(problems)}; use --whole"
        )


def _factors(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    with opened(adapter.weights) as file:
        for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            ending = next((one for one in _FACTORS if name.endswith(one)), None)
            if ending is None:
                raise RecipeError(f"{adapter.weights}: {name} is no factor of a low-rank adapter; use --whole")
            module = name.removeprefix(_PREFIX).removesuffix(ending)
            found.setdefault(module, {})[ending.removeprefix(".")] = file.get_tensor(name)
    half = sorted(module for module, one in found.items() if not {"lora_A.weight", "lora_B.weight"} <= set(one))
    if half or not found:
        raise ModelError(f"{adapter.weights}: {half[0] if half else 'it'} lacks a factor; the file is not whole")
    return found


def round_to_4_bits(adapter: Adapter, weight: Tensor) -> Tensor:
    """A matrix as a 4-bit base computed with it, in fp32."""
    from bitsandbytes import functional

    asked = adapter.quantization or {}
    packed, state = functional.quantize_4bit(
        weight.to(DTYPES[adapter.lineage["base_dtype"]]).contiguous(),
        quant_type=asked["bnb_4bit_quant_type"],
        compress_statistics=asked["bnb_4bit_use_double_quant"],
    )
    return functional.dequantize_4bit(packed, state).float()


def held_in_4_bits(adapter: Adapter, base: Path) -> frozenset[str]:
    """bitsandbytes packs every linear layer but the output one, whether it got an adapter or not."""
    if adapter.quantization is None:
        return frozenset()
    model = skeleton(base)
    output = model.get_output_embeddings()
    return frozenset(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output
    )


def skeleton(base: Path) -> Any:
    """The model class without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))


# ---------------------------------------------------------------- files


def weight_files(folder: Path) -> list[Path]:
    """What transformers loads: the one file, or those of the index; others, such as a second format's, are left out."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    try:
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError:
        return sorted(folder.glob("*.safetensors"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / INDEX}: cannot be read ({error}); copy it again") from error
    return [folder / name for name in sorted(set(listed.values()))]


def tensors(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of every tensor of a model folder."""
    for path in weight_files(folder):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                yield name, path


def write_merged(merging: Merging, base: Path, target: Path, say: Callable[[str], None]) -> int:
    """Write every shard of the merged model into `target`; returns how many matrices were changed."""
    changed, total_bytes, numbers = 0, 0, 0
    placed: dict[str, str] = {}
    files = weight_files(base)
    for number, path in enumerate(files, start=1):
        shard: dict[str, Tensor] = {}
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                module = name.removesuffix(".weight")
                if module in merging.factors and name.endswith(".weight"):
                    tensor = merging.merged(module, tensor)
                    changed += 1
                elif tensor.is_floating_point():
                    tensor = merging.as_trained(module, tensor).to(merging.dtype or tensor.dtype)
                shard[name] = tensor
                total_bytes += tensor.numel() * tensor.element_size()
                numbers += tensor.numel()
        placed |= dict.fromkeys(shard, path.name)
        save_file(shard, target / path.name, metadata={"format": "pt"})
        say(f"{path.name}: {number} of {len(files)} files, {changed} of {len(merging.factors)} matrices merged")
    if len(files) > 1 or (base / INDEX).exists():
        index = {"metadata": {"total_size": total_bytes, "total_parameters": numbers}, "weight_map": placed}
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return changed


_COPIED = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def copy_settings(base: Path, adapter: Path, target: Path, dtype: torch.dtype | None) -> None:
    """config.json of the base (dtype as written), tokenizer and template as trained, which lie beside the adapter."""
    for name in _COPIED:
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    for name in TOKENIZER:
        source = next((folder / name for folder in (adapter, base) if (folder / name).is_file()), None)
        if source is not None:
            shutil.copyfile(source, target / name)
    if dtype is not None:
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def open_up(folder: Path) -> None:
    """Modes by the user's umask: temporary folders and safetensors files are private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)
