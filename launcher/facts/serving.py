"""Serving: which adapters the serving engines load, as tables; asked at plan time and again at export.

Sources: vLLM's documentation of LoRA adapters, its peft_helper checks (no DoRA, no bias, no modules_to_save; one
scaling for all modules) and its LoRAConfig (rank steps); TGI's documentation of LoRA and its adapter utilities (which
modules, on all layers or on none, one rank); SGLang's documentation of LoRA serving and its LoRA utilities (which
modules). Nothing of these engines is run here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.facts.adapters import AdapterFacts

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank takes."""
_APART = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SERVED = {
    "vllm": (*_APART, "qkv_proj", "gate_up_proj", "c_attn", "c_proj", "c_fc", "query_key_value", "dense",
             "dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2", "out_proj", "in_proj"),
    "tgi": _APART,
    "sglang": (*_APART, "qkv_proj", "gate_up_proj", "out_proj", "in_proj"),
}  # fmt: skip
"""Linear modules of attention and MLP that an engine gives adapters to."""
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
    one_rank: bool = True
    one_scaling: bool = True
    """Whether all modules have the rank, and the scaling, that r and lora_alpha say."""
    partly: Sequence[str] = ()
    """Kinds of modules that have factors on some layers only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """One reason, and the recipe's field that it is about."""

    field: str
    """method | lora.r | lora.target_modules, or empty for what no recipe sets."""
    sentence: str


def served_of(facts: AdapterFacts) -> Served:
    """An adapter on disk: its modules are those of its file, whatever shorthand its configuration has for them."""
    config = facts.config
    kind = str(config.get("peft_type", "")).lower()
    method = {"prefix_tuning": "prefix", "prompt_tuning": "prompt"}.get(kind, kind)
    bias = "lora_bias" if config.get("lora_bias") else str(config.get("bias", "none"))
    return Served(
        method="dora" if method == "lora" and config.get("use_dora") else method,
        rank=facts.rank or None,
        target_modules=tuple(facts.ranks) or tuple(name for name in facts.shapes if "lora_embedding" in name),
        bias=bias,
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        fused_experts=bool(config.get("target_parameters")),
        one_rank=method != "lora" or facts.one_rank,
        one_scaling=method != "lora" or facts.one_scaling,
        partly=facts.partly,
    )


def refusals(engine: str, adapter: Served) -> list[str]:
    """Why an engine would not load the adapter, one sentence each; empty when it does."""
    return [one.sentence for one in reasons(engine, adapter)]


def reasons(engine: str, adapter: Served) -> list[Refusal]:
    """The same with the fields they are about; `merged` and whole models have no adapter to load."""
    if adapter.method == "full":
        return []
    if engine == "merged":
        virtual = adapter.method in ("prefix", "prompt")
        sentence = "its virtual tokens are no weights and cannot be merged; train method: lora"
        return [Refusal(field="method", sentence=sentence)] if virtual else []
    return [*_of_kind(adapter), *_of_places(engine, adapter), *_of_rank(engine, adapter)]


def _of_kind(adapter: Served) -> Iterator[Refusal]:
    if adapter.method == "dora":
        said = "it is a DoRA adapter, which has magnitudes beside its factors; train method: lora, or merge it"
        yield Refusal(field="method", sentence=said)
    elif adapter.method not in METHODS:
        way = "train method: lora" if adapter.method in ("prefix", "prompt") else "train method: lora, or merge it"
        said = f"it is {_article(adapter.method)} {adapter.method} adapter, and only LoRA is loaded; {way}"
        yield Refusal(field="method", sentence=said)
    if adapter.bias != "none":
        yield Refusal(field="", sentence=f"it trained biases (bias: {adapter.bias}); merge it")
    if adapter.modules_to_save:
        said = f"it replaces whole modules ({', '.join(adapter.modules_to_save)}); merge it"
        yield Refusal(field="", sentence=said)


def _article(word: str) -> str:
    return "an" if word[:1] in "aeiou" else "a"


def _of_places(engine: str, adapter: Served) -> Iterator[Refusal]:
    field = "lora.target_modules"
    if adapter.fused_experts:
        yield Refusal(field=field, sentence="it changes fused experts; name attention layers only, or merge it")
    if not isinstance(adapter.target_modules, str):
        odd = sorted({name.rpartition(".")[2] for name in adapter.target_modules} - set(_SERVED[engine]))
        if odd:
            said = f"it changes {', '.join(odd)}, which get no adapter there; leave them out, or merge it"
            yield Refusal(field=field, sentence=said)
    if engine == "tgi" and adapter.partly:
        said = f"it changes {', '.join(adapter.partly)} on some layers only, which are left out there; merge it"
        yield Refusal(field=field, sentence=said)


def _of_rank(engine: str, adapter: Served) -> Iterator[Refusal]:
    own = [name for name, one in (("scalings", adapter.one_scaling), ("ranks", adapter.one_rank)) if not one]
    if engine == "vllm":
        own = own[:1] if not adapter.one_scaling else []
    if own:
        said = f"its modules have {' and '.join(own)} of their own, and one is read for all; launcher export evens them"
        yield Refusal(field="", sentence=said)
    if engine == "vllm" and adapter.rank is not None and adapter.rank > VLLM_RANKS[-1]:
        said = f"its rank {adapter.rank} is over {VLLM_RANKS[-1]}; reduce it (launcher adapters reduce), or merge it"
        yield Refusal(field="lora.r", sentence=said)


def max_lora_rank(rank: int) -> int:
    """The smallest step that vLLM takes and that holds `rank`.

    Raises:
        ValueError: none does.
    """
    return next(step for step in VLLM_RANKS if step >= rank) if rank <= VLLM_RANKS[-1] else _too_high(rank)


def _too_high(rank: int) -> int:
    raise ValueError(f"no step of --max-lora-rank holds rank {rank}")


def serve_command(
    engine: str, *, base: str, name: str, folder: str, rank: int | None, revision: str | None = None
) -> list[str]:
    """The command line that serves base and adapter; merged: the folder alone. `revision`: of a base on the hub."""
    words = _command(engine, base, name, folder, rank)
    return [*words, "--revision", revision] if revision and engine != "merged" else words


def _command(engine: str, base: str, name: str, folder: str, rank: int | None) -> list[str]:
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
