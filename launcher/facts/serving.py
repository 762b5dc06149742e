"""Serving: which adapters the serving engines load, as tables; asked at plan time and again at export.

Sources: vLLM's documentation of LoRA adapters and its peft_helper checks (rank steps, no DoRA, no bias, no
modules_to_save), TGI's of LoRA, SGLang's of LoRA serving. Nothing of these engines is run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank takes."""
_SERVED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj",
           "c_attn", "c_proj", "c_fc", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2",
           "out_proj", "in_proj")  # fmt: skip
"""Linear modules of attention and MLP that the engines give adapters to."""
METHODS = ("lora", "qlora")
ENGINES = ("vllm", "tgi", "sglang")


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """The part of an adapter that serving engines look at."""

    method: str
    """lora | qlora | dora | adalora | prefix | prompt."""
    rank: int | None
    target_modules: Sequence[str] | str = "all-linear"
    bias: str = "none"
    modules_to_save: Sequence[str] = ()
    fused_experts: bool = False


def refusals(engine: str, adapter: Served) -> list[str]:
    """Why an engine would not load the adapter, one sentence each; empty when it does."""
    found = []
    if adapter.method == "dora":
        found.append("it is a DoRA adapter, which has magnitudes beside its factors; train method: lora, or merge it")
    elif adapter.method not in METHODS:
        found.append(f"it is a {adapter.method} adapter, and only LoRA is loaded; train method: lora, or merge it")
    if adapter.bias != "none":
        found.append(f"it trained biases (bias: {adapter.bias}); merge it")
    if adapter.modules_to_save:
        found.append(f"it replaces whole modules ({', '.join(adapter.modules_to_save)}); merge it")
    if adapter.fused_experts:
        found.append("it changes fused experts; merge it")
    if not isinstance(adapter.target_modules, str):
        odd = sorted({name.rpartition(".")[2] for name in adapter.target_modules} - set(_SERVED))
        if odd:
            found.append(f"it changes {', '.join(odd)}, which get no adapter there; leave them out, or merge it")
    if engine == "vllm" and adapter.rank is not None and adapter.rank > VLLM_RANKS[-1]:
        found.append(
            f"its rank {adapter.rank} is over {VLLM_RANKS[-1]}; reduce it (launcher adapters reduce), or merge it"
        )
    return found


def max_lora_rank(rank: int) -> int:
    """The smallest step that vLLM takes and that holds `rank`.

    Raises:
        ValueError: none does.
    """
    return next(step for step in VLLM_RANKS if step >= rank) if rank <= VLLM_RANKS[-1] else _too_high(rank)


def _too_high(rank: int) -> int:
    raise ValueError(f"no step of --max-lora-rank holds rank {rank}")


def serve_command(engine: str, *, base: str, name: str, folder: str, rank: int | None) -> list[str]:
    """The command line that serves base and adapter; merged: the folder alone."""
    if engine == "merged":
        return ["vllm", "serve", folder, "--served-model-name", name]
    if engine == "vllm":
        step = max_lora_rank(rank or 8)
        return [
            "vllm",
            "serve",
            base,
            "--enable-lora",
            "--max-lora-rank",
            str(step),
            "--lora-modules",
            f"{name}={folder}",
        ]
    if engine == "tgi":
        return ["text-generation-launcher", "--model-id", base, "--lora-adapters", f"{name}={folder}"]
    return ["python", "-m", "sglang.launch_server", "--model-path", base, "--max-lora-rank", str(rank or 8),
            "--lora-paths", f"{name}={folder}"]  # fmt: skip
