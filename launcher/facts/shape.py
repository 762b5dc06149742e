"""ModelShape: everything about a base model that planning needs, in elements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One linear module, present once in every layer; what LoRA can adapt and bitsandbytes can quantize."""

    name: str
    """Module name's last part, such as "q_proj"."""
    block: str
    """Parent module, such as "self_attn": tells apart two modules of the same name."""
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def params(self) -> int:
        """Weight and bias elements."""
        return self.in_features * self.out_features + (self.out_features if self.bias else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Shape of a decoder-only model, in elements (never bytes)."""

    name: str
    family: str
    """transformers' model_type."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the MLP of one dense layer, or of one expert."""
    vocab: int
    """Rows of the embedding matrix (the tokenizer's size, padded)."""
    gated_mlp: bool
    norm: str
    """RMSNorm | LayerNorm."""
    norms_per_layer: int
    norm_params: int
    """Elements of one layer's norms, query and key norms included."""
    final_norm_params: int
    qk_norm: bool
    norm_in_fp32: bool = False
    """Whether norms multiply by their weight before they cast back (Gemma, OLMo 2), so that fp32 values are kept."""
    ends_in_norm: bool = False
    """Whether attention's and the MLP's outputs are normed once more before they join the residual."""
    attention_softcap: bool = False
    """Whether attention scores pass a tanh (Gemma 2)."""
    logits_softcap: bool = False
    """The same for the logits."""
    linears: tuple[Linear, ...]
    tied_embeddings: bool
    head_bias: bool
    position_params: int
    """Learned absolute positions; 0 with rotary or ALiBi."""
    experts: int = 0
    experts_per_token: int = 0
    shared_params: int = 0
    """Router and gates of one MoE layer: in no Linear."""
    max_positions: int
    sliding_window: int | None = None
    source: str
    """Where the shape comes from, in words."""

    @property
    def q_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads together."""
        return self.kv_heads * self.head_dim

    @property
    def linear_params(self) -> int:
        """Elements of the targetable linear modules of all layers, biases included."""
        return self.layers * sum(linear.params for linear in self.linears)

    @property
    def expert_params_per_layer(self) -> int:
        """Elements of the fused expert matrices of one layer (transformers 5 keeps them in 3-D parameters)."""
        return self.experts * (3 if self.gated_mlp else 2) * self.hidden * self.intermediate

    @property
    def layer_params(self) -> int:
        """Elements of one layer."""
        linears = sum(linear.params for linear in self.linears)
        return linears + self.norm_params + self.expert_params_per_layer + self.shared_params

    @property
    def head_params(self) -> int:
        """Elements of an output head of its own; 0 when tied to the embedding, apart from a bias."""
        matrix = 0 if self.tied_embeddings else self.vocab * self.hidden
        return matrix + (self.vocab if self.head_bias else 0)

    @property
    def embedding_params(self) -> int:
        """Input embedding, learned positions and output head."""
        return self.vocab * self.hidden + self.position_params + self.head_params

    @property
    def params(self) -> int:
        """All parameters."""
        return self.layers * self.layer_params + self.embedding_params + self.final_norm_params

    @property
    def active_params(self) -> int:
        """Parameters one token passes through (all, unless experts are routed)."""
        if not self.experts:
            return self.params
        idle = self.expert_params_per_layer * (self.experts - self.experts_per_token) // self.experts
        return self.params - self.layers * idle

    @property
    def matmul_params(self) -> int:
        """Parameters one token is multiplied with: active ones without the embedding look-up, with the head."""
        lookup = self.vocab * self.hidden + self.position_params
        head_when_tied = self.vocab * self.hidden if self.tied_embeddings else 0
        return self.active_params - lookup + head_when_tied

    @property
    def largest_unit_params(self) -> int:
        """Largest single tensor group ZeRO-3 gathers at once: one layer, or the embedding."""
        return max(self.layer_params, self.vocab * self.hidden)
