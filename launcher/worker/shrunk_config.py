"""A transformers configuration made small: the same architecture and ratios, few layers and narrow ones.

What tells architectures apart stays: grouped key and value heads, heads wider than hidden / heads, query and key norms,
tied embeddings, sliding windows and the mix of layer types, experts and how many a token takes, biases, the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HIDDEN = 64
"""A multiple of 64, so that 4-bit blocks come out even."""
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_WIDTHS = (
    "intermediate_size",
    "n_inner",
    "ffn_hidden_size",
    "ffn_dim",
    "d_ff",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
"""Widths of latent attention (DeepSeek)."""
_AT_MOST = {
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 2,
    "num_nextn_predict_layers": 0,
}
_WINDOW = 64


def shrunk_config(config: PretrainedConfig, *, seq_len: int) -> dict[str, Any]:
    """The configuration as plain values, every width shrunk; parts of a multimodal one each by themselves."""
    return _shrunk(config.to_dict(), seq_len)


def _shrunk(values: dict[str, Any], seq_len: int) -> dict[str, Any]:
    small = {key: _shrunk(value, seq_len) if key.endswith("_config") and _is_part(value) else value
             for key, value in values.items()}  # fmt: skip
    if not _first(values, _HIDDEN) or not _first(values, _HEADS):
        return small
    small |= _heads(values)
    hidden = _first(values, _HIDDEN)
    small |= {key: HIDDEN for key in _HIDDEN if values.get(key)}
    small |= {key: _width(values[key] / hidden) for key in _WIDTHS if isinstance(values.get(key), int)}
    small |= {key: min(4, values[key]) for key in _EXPERTS if isinstance(values.get(key), int)}
    small |= {key: min(most, values[key]) for key, most in _AT_MOST.items() if _whole(values.get(key))}
    small |= {key: width for key, width in _LATENT.items() if _whole(values.get(key))}
    if values.get("sliding_window"):
        small["sliding_window"] = min(values["sliding_window"], max(16, min(_WINDOW, seq_len // 4)))
    small |= _layers(values)
    return small | _rotary(small, values)


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and bool(_first(value, _HIDDEN))


def _first(values: dict[str, Any], keys: tuple[str, ...]) -> int:
    return next((values[key] for key in keys if _whole(values.get(key))), 0)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _width(ratio: float) -> int:
    """A width that keeps its ratio to the hidden size, in multiples of 32, at most 4 times as wide."""
    return max(32, min(4 * HIDDEN, round(ratio * HIDDEN / 32) * 32))


def _heads(values: dict[str, Any]) -> dict[str, Any]:
    """Four heads, or two groups of up to four; heads that are wider than hidden / heads stay so."""
    heads, kv = _first(values, _HEADS), _first(values, _KV_HEADS) or _first(values, _HEADS)
    few_kv = min(kv, 2) if kv < heads else 4
    few = few_kv * max(2, min(4, heads // kv)) if kv < heads else 4
    small = {key: few for key in _HEADS if _whole(values.get(key))}
    small |= {key: few_kv for key in _KV_HEADS if _whole(values.get(key))}
    if _whole(values.get("head_dim")):
        wide = values["head_dim"] * heads != _first(values, _HIDDEN)
        small["head_dim"] = HIDDEN // few * (2 if wide else 1)
    return small


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    """Two layers, or one of each type; lists with an entry per layer follow."""
    count = _first(values, _LAYERS)
    types = values.get("layer_types")
    kept = sorted({types.index(kind) for kind in types}) if isinstance(types, list) and types else []
    kept = (kept + [index for index in range(count) if index not in kept])[: max(2, len(kept))]
    kept.sort()
    small: dict[str, Any] = {key: len(kept) for key in _LAYERS if _whole(values.get(key))}
    small |= {
        key: [value[index] for index in kept]
        for key, value in values.items()
        if isinstance(value, list) and len(value) == count and count > 2
    }
    if isinstance(values.get("mlp_only_layers"), list):
        small["mlp_only_layers"] = []
    if _whole(values.get("max_window_layers")):
        small["max_window_layers"] = min(values["max_window_layers"], len(kept) - 1)
    return small


def _rotary(small: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings with a number per frequency, for as many frequencies as are left."""
    head_dim = small.get("head_dim") or HIDDEN // _first(small, _HEADS)
    found: dict[str, Any] = {}
    if _whole(values.get("rotary_dim")):
        found["rotary_dim"] = min(values["rotary_dim"], head_dim)
    share = values.get("partial_rotary_factor") or 1.0
    frequencies = int(head_dim * share) // 2
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(small.get(key), dict):
            found[key] = {name: value[:frequencies] if name in ("short_factor", "long_factor") else value
                          for name, value in small[key].items()}  # fmt: skip
    return found
