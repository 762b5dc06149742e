"""What a method trains: parameter counts and the modules low-rank adapters sit on."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from launcher.errors import RecipeError
from launcher.facts.shape import Linear, ModelShape
from launcher.planning.plan import Candidate, LoraNumbers

ALL_LINEAR = "all-linear"
_EXPERT_TARGETS = {
    "mixtral": {"w1": "gate_up", "w3": "gate_up", "w2": "down", "gate": "router"},
    "qwen3_moe": {"gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down", "gate": "router"},
}
"""Family -> names of the modules that fused experts were before transformers 5, and the fused part each is in now.
PEFT still takes these names, and `all-linear` includes them (peft 0.21, utils/transformers_weight_conversion.py)."""


def trainable_params(model: ModelShape, candidate: Candidate) -> int:
    """Elements that receive gradients.

    Raises:
        RecipeError: LoRA targets that match no module.
    """
    if candidate.method == "full":
        return model.params
    if candidate.lora is not None:
        return lora_params(model, candidate.lora, allocation=candidate.method == "adalora")
    tokens = candidate.num_virtual_tokens or 0
    if candidate.method == "prefix":
        # PEFT stores one key and one value vector per virtual token and layer.
        return tokens * model.layers * 2 * model.kv_width
    return tokens * model.hidden


def lora_params(model: ModelShape, lora: LoraNumbers, *, allocation: bool = False) -> int:
    """Elements of the low-rank matrices: r * (in + out) per target (LoRA, arXiv 2106.09685, section 4.1).

    DoRA adds one magnitude per output (arXiv 2402.09353), AdaLoRA one singular value per rank (2303.10512).
    """
    layered, single = targeted(model, lora.target_modules)

    def per_module(linear: Linear) -> int:
        pair = lora.r * (linear.in_features + linear.out_features)
        return pair + (linear.out_features if lora.use_dora else 0) + (lora.r if allocation else 0)

    experts = sum(_expert_part_params(model, lora.r, part) for part in expert_targets(model, lora.target_modules))
    return model.layers * (sum(map(per_module, layered)) + experts) + sum(map(per_module, single))


def expert_targets(model: ModelShape, targets: str | Sequence[str]) -> frozenset[str]:
    """Fused parts of a mixture-of-experts layer that adapters sit on: gate_up, down, router; empty elsewhere."""
    names = _EXPERT_TARGETS.get(model.family, {}) if model.experts else {}
    if targets == ALL_LINEAR:
        return frozenset(names.values())
    wanted = (targets,) if isinstance(targets, str) else targets
    return frozenset(names[last] for target in wanted if (last := target.rpartition(".")[2]) in names)


def expert_problem(model: ModelShape, lora: LoraNumbers) -> str | None:
    """Why PEFT cannot put this adapter on fused experts, or None: neither DoRA nor dropout works there."""
    if not expert_targets(model, lora.target_modules) - {"router"} or not (lora.use_dora or lora.lora_dropout > 0):
        return None
    why = "method: dora" if lora.use_dora else f"lora.lora_dropout: {lora.lora_dropout:g}"
    attention = ", ".join(linear.name for linear in model.linears)
    return (
        f"lora.target_modules: {why} does not work on the fused experts of {model.name}; set lora.lora_dropout: 0 and "
        f"method: lora, or name attention layers only: [{attention}]"
    )


def _expert_part_params(model: ModelShape, rank: int, part: str) -> int:
    """Adapter elements of one layer: a pair of matrices per expert; the fused gate and up share one of twice the rank.

    Measured on Mixtral, Qwen3-MoE and OLMoE shapes with peft 0.21 (tests/train/test_model_shapes.py).
    """
    hidden, width = model.hidden, model.intermediate
    if part == "gate_up":
        return 2 * rank * model.experts * (hidden + 2 * width)
    if part == "down":
        return rank * model.experts * (width + hidden)
    return rank * (hidden + model.experts)


def targeted(model: ModelShape, targets: str | Sequence[str]) -> tuple[tuple[Linear, ...], tuple[Linear, ...]]:
    """Linear modules that `target_modules` selects: (once per layer, once per model); experts: `expert_targets`.

    Raises:
        RecipeError: a name that matches nothing; the message lists the model's own names.
    """
    if targets == ALL_LINEAR:
        return model.linears, ()
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    outer = _outside_layers(model)
    lost = [name for name in names if not any(_matches(linear, name) for linear in (*model.linears, *outer))]
    lost = [name for name in lost if not expert_targets(model, (name,))]
    if lost or not names:
        raise RecipeError(_no_match(model, lost))
    layered = tuple(linear for linear in model.linears if any(_matches(linear, name) for name in names))
    single = tuple(linear for linear in outer if any(_matches(linear, name) for name in names))
    return layered, single


def _outside_layers(model: ModelShape) -> tuple[Linear, ...]:
    head = Linear(name="lm_head", block="", in_features=model.hidden, out_features=model.vocab)
    embedding = Linear(name="embed_tokens", block="model", in_features=model.vocab, out_features=model.hidden)
    return head, embedding


def _matches(linear: Linear, name: str) -> bool:
    """PEFT's rule: the module's dotted path is `name` or ends with ".name"."""
    path = f"{linear.block}.{linear.name}" if linear.block else linear.name
    return path == name or path.endswith(f".{name}")


def _no_match(model: ModelShape, lost: Sequence[str]) -> str:
    names = sorted({linear.name for linear in model.linears})
    close = {match for name in lost for match in get_close_matches(name, names, n=1)}
    hint = f"; did you mean {', '.join(sorted(close))}?" if close else "."
    what = ", ".join(lost) if lost else "the empty list"
    return f"lora.target_modules: {what} matches no module of {model.name}{hint} It has {', '.join(names)}, lm_head"
