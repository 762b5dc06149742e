"""From config.json to ModelShape: how each transformers architecture is built, as a table.

Every row was checked against the parameter count of the real class on the meta device
(tests/train/test_model_shapes.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from launcher.errors import ModelError, UnknownArchitectureError
from launcher.facts.shape import Linear, ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """How one architecture names and builds its modules."""

    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Three separate projections, or the one fused projection."""
    out: str = "o_proj"
    mlp: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    """Two names: gate and up; one name: up, or gate and up fused when `gated`."""
    down: str = "down_proj"
    gated: bool = True
    qkv_bias: bool | str = False
    """A constant, or the config key that says so ("!" negates)."""
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    norm: str = "RMSNorm"
    norm_elements: int = 1
    """Elements per channel of one norm: 1 weight, 2 with a bias, 0 without parameters."""
    norms: int = 2
    """Norms of width `hidden` per layer."""
    qk_norm: str = ""
    """"" | head (one head wide) | full (all heads wide)."""
    norm_in_fp32: bool = False
    """Whether the norm's weight multiplies before the cast back to 16 bits."""
    ends_in_norm: bool = False
    """Whether a norm follows attention and MLP."""
    softcaps: bool = False
    """Whether attn_logit_softcapping and final_logit_softcapping of config.json are read."""
    tied: bool = False
    """tie_word_embeddings when config.json does not say."""
    head_bias: bool = False
    learned_positions: bool = False
    default_head_dim: int | None = None


_LLAMA = _Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_GEMMA = _Family(
    tied=True,
    norm_in_fp32=True,
    default_head_dim=256,
    qkv_bias="attention_bias",
    out_bias="attention_bias",
)
_GPT2 = _Family(
    attention="attn",
    qkv=("c_attn",),
    out="c_proj",
    up=("c_fc",),
    down="c_proj",
    gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    norm="LayerNorm",
    norm_elements=2,
    tied=True,
    learned_positions=True,
)
_FAMILIES: dict[str, _Family] = {
    "llama": _LLAMA,
    "mistral": _Family(),
    "mixtral": _Family(),
    "granite": replace(_LLAMA, tied=True),
    "smollm3": replace(_LLAMA, tied=True),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(qk_norm="head", default_head_dim=128, qkv_bias="attention_bias", out_bias="attention_bias"),
    "qwen3_moe": _Family(qk_norm="head", qkv_bias="attention_bias", out_bias="attention_bias"),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=4, ends_in_norm=True, softcaps=True),
    "gemma3_text": replace(_GEMMA, norms=4, ends_in_norm=True, qk_norm="head"),
    "olmo": _Family(norm="LayerNorm", norm_elements=0, qkv_bias="attention_bias", out_bias="attention_bias"),
    "olmo2": _Family(
        qk_norm="full", norm_in_fp32=True, ends_in_norm=True, qkv_bias="attention_bias", out_bias="attention_bias"
    ),
    "stablelm": _Family(norm="LayerNorm", norm_elements=2, qkv_bias="use_qkv_bias"),
    "phi3": _Family(qkv=("qkv_proj",), up=("gate_up_proj",)),
    "phi": _Family(
        out="dense",
        up=("fc1",),
        down="fc2",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        norm="LayerNorm",
        norm_elements=2,
        norms=1,
        head_bias=True,
    ),
    "starcoder2": _Family(
        up=("c_fc",),
        down="c_proj",
        gated=False,
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        norm="LayerNorm",
        norm_elements=2,
        tied=True,
    ),
    "gpt_neox": _Family(
        attention="attention",
        qkv=("query_key_value",),
        out="dense",
        up=("dense_h_to_4h",),
        down="dense_4h_to_h",
        gated=False,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=True,
        norm="LayerNorm",
        norm_elements=2,
    ),
    "falcon": _Family(
        attention="self_attention",
        qkv=("query_key_value",),
        out="dense",
        up=("dense_h_to_4h",),
        down="dense_4h_to_h",
        gated=False,
        qkv_bias="bias",
        out_bias="bias",
        mlp_bias="bias",
        norm="LayerNorm",
        norm_elements=2,
        tied=True,
    ),
    "mpt": _Family(
        attention="attn",
        qkv=("Wqkv",),
        out="out_proj",
        mlp="ffn",
        up=("up_proj",),
        gated=False,
        norm="LayerNorm",
        tied=True,
    ),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    # Architectures that live on the hub as their own code (trust_remote_code), known by their published shape.
    "qwen": _Family(attention="attn", qkv=("c_attn",), out="c_proj", up=("w1", "w2"), down="c_proj", qkv_bias=True),
    "baichuan": _Family(qkv=("W_pack",)),
    "chatglm": _Family(
        attention="self_attention",
        qkv=("query_key_value",),
        out="dense",
        up=("dense_h_to_4h",),
        down="dense_4h_to_h",
        qkv_bias=True,
    ),
}
_ALIASES = {"gemma3": "gemma3_text", "ministral": "mistral", "yi": "llama"}
_ONE_KEY_HEAD_PER_QUERY_HEAD = frozenset({"gpt_neox", "mpt", "gpt2"})
_ATTENTION_BIAS_DEFAULTS_TRUE = frozenset({"gpt_neox"})

_KEYS: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "positions": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "experts": ("num_local_experts", "num_experts"),
}


def shape_from_config(config: Mapping[str, Any], *, name: str, source: str) -> ModelShape:
    """Build the shape from the keys of a config.json; multimodal models are read for their text part.

    Raises:
        UnknownArchitectureError, ModelError: unknown architecture; keys that are missing or no positive whole numbers.
    """
    kind = str(config.get("model_type", ""))
    text = config.get("text_config")
    if isinstance(text, Mapping):
        return shape_from_config({"model_type": kind, **text}, name=name, source=f"{source}, text part")
    family = _FAMILIES.get(_ALIASES.get(kind, kind))
    if family is None:
        raise UnknownArchitectureError(f"{source}: {_unknown_family(kind, config)}")
    return _build(family, _Reader(config, source), name=name, kind=_ALIASES.get(kind, kind), source=source)


def _unknown_family(kind: str, config: Mapping[str, Any]) -> str:
    shown = kind or ", ".join(config.get("architectures") or ()) or "no model_type"
    close = get_close_matches(kind, _FAMILIES, n=1)
    hint = f"; nearest known: {close[0]}" if close else ""
    known = f"Known: {', '.join(sorted(_FAMILIES))}"
    trace = "launcher plan RECIPE --trace measures its memory with the real model class, in the train environment"
    return f"architecture {shown!r} is not known to the planner{hint}. {known}. What works without: {trace}"


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one number of config.json under any of the names architectures give it."""

    config: Mapping[str, Any]
    source: str

    def optional(self, what: str) -> int | None:
        for key in _KEYS[what]:
            value = self.config.get(key)
            if value is not None:
                return self._positive(key, value)
        return None

    def required(self, what: str) -> int:
        value = self.optional(what)
        if value is None:
            raise ModelError(f"{self.source}: missing {' or '.join(_KEYS[what])}")
        return value

    def _positive(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelError(f"{self.source}: {key} is {value!r}, expected a whole number")
        return value

    def flag(self, rule: bool | str, *, default: bool = False) -> bool:
        return bool(self.config.get(rule, default)) if isinstance(rule, str) else rule


def _kv_heads(read: _Reader, heads: int, kind: str) -> int:
    """Key/value heads; Falcon and GPT-BigCode say it by flags."""
    config = read.config
    if kind == "falcon":
        if config.get("new_decoder_architecture"):
            return read.optional("kv_heads") or heads
        return 1 if config.get("multi_query", True) else heads
    if kind in _ONE_KEY_HEAD_PER_QUERY_HEAD:
        return heads
    if kind == "gpt_bigcode":
        return 1 if config.get("multi_query", True) else heads
    return read.optional("kv_heads") or heads


def _norm_count(family: _Family, read: _Reader, kind: str) -> int:
    """Norms per layer; parallel attention shares one, except in Falcon's newer decoder."""
    if kind != "falcon" or read.config.get("new_decoder_architecture"):
        return family.norms
    return 1 if read.config.get("parallel_attn", True) else 2


def _build(family: _Family, read: _Reader, *, name: str, kind: str, source: str) -> ModelShape:
    config = read.config
    hidden, heads = read.required("hidden"), read.required("heads")
    if heads == 0 or (hidden % heads and not config.get("head_dim")):
        raise ModelError(f"{source}: hidden size {hidden} does not divide into {heads} attention heads")
    head_dim = config.get("head_dim") or family.default_head_dim or hidden // heads
    kv_heads = _kv_heads(read, heads, kind)
    experts = read.optional("experts") or 0
    width = read.optional("intermediate") or 4 * hidden
    if experts and config.get("moe_intermediate_size"):
        width = int(config["moe_intermediate_size"])
    q, kv = heads * head_dim, kv_heads * head_dim
    linears = _attention(family, read, hidden=hidden, q=q, kv=kv, kind=kind)
    if not experts:
        linears += _mlp(family, read, hidden=hidden, width=width)
    norms = _norm_count(family, read, kind)
    positions = read.optional("positions") or 2048
    return ModelShape(
        name=name,
        family=kind,
        layers=read.required("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=width,
        vocab=read.required("vocab"),
        gated_mlp=family.gated,
        norm=family.norm,
        norms_per_layer=norms,
        norm_params=norms * family.norm_elements * hidden + _qk_norm_params(family, head_dim, q, kv),
        final_norm_params=family.norm_elements * hidden,
        qk_norm=bool(family.qk_norm),
        norm_in_fp32=family.norm_in_fp32,
        ends_in_norm=family.ends_in_norm,
        attention_softcap=family.softcaps and _softcap(config, "attn_logit_softcapping"),
        logits_softcap=family.softcaps and _softcap(config, "final_logit_softcapping"),
        linears=linears,
        tied_embeddings=bool(config.get("tie_word_embeddings", family.tied)),
        head_bias=family.head_bias,
        position_params=positions * hidden if family.learned_positions else 0,
        experts=experts,
        experts_per_token=int(config.get("num_experts_per_tok", 2)) if experts else 0,
        shared_params=experts * hidden,
        max_positions=positions,
        sliding_window=config.get("sliding_window") or None,
        source=source,
    )


def _softcap(config: Mapping[str, Any], key: str) -> bool:
    """Gemma 2 caps unless config.json says null."""
    return key not in config or config[key] is not None


def _qk_norm_params(family: _Family, head_dim: int, q: int, kv: int) -> int:
    return {"": 0, "head": 2 * head_dim, "full": q + kv}[family.qk_norm]


def _attention(family: _Family, read: _Reader, *, hidden: int, q: int, kv: int, kind: str) -> tuple[Linear, ...]:
    bias = read.flag(family.qkv_bias, default=kind in _ATTENTION_BIAS_DEFAULTS_TRUE)
    out_bias = read.flag(family.out_bias, default=kind in _ATTENTION_BIAS_DEFAULTS_TRUE)
    widths = (q, kv, kv) if len(family.qkv) == 3 else (q + 2 * kv,)
    projections = tuple(
        Linear(name=name, block=family.attention, in_features=hidden, out_features=width, bias=bias)
        for name, width in zip(family.qkv, widths, strict=True)
    )
    out = Linear(name=family.out, block=family.attention, in_features=q, out_features=hidden, bias=out_bias)
    return (*projections, out)


def _mlp(family: _Family, read: _Reader, *, hidden: int, width: int) -> tuple[Linear, ...]:
    bias = read.flag(family.mlp_bias)
    fused = 2 if family.gated and len(family.up) == 1 else 1
    ups = tuple(
        Linear(name=name, block=family.mlp, in_features=hidden, out_features=fused * width, bias=bias)
        for name in family.up
    )
    return (*ups, Linear(name=family.down, block=family.mlp, in_features=width, out_features=hidden, bias=bias))
