"""Advice: what practitioners' guides and papers say of method, rank, targets and rates, as named rules with reasons.

These rules decide what the recipe leaves `auto` (R1, R2, R4 to R8). The memory model overrides them where they do not
fit (`search`), and `notes` adds what is worth saying about the decided plan (R3, R9 to R16); R17 is `lint`. Guides are
named G1 to G4 as in docs/advice.md, which lists every rule.
"""

from __future__ import annotations

from collections.abc import Mapping

from launcher.facts.dataset import DatasetFacts
from launcher.facts.shape import ModelShape
from launcher.planning.plan import Advice, LoraNumbers
from launcher.planning.trainable import ALL_LINEAR, expert_targets
from launcher.recipe.schema import AUTO, LORA_METHODS, Recipe

SMALL_MODEL_PARAMS = 1_000_000_000
"""Full fine-tuning is always affordable below."""
LARGE_MODEL_PARAMS = 30_000_000_000
"""Above, rates come from the low end of their range."""
SMALL_DATA_ROWS = 5_000
TINY_DATA_ROWS = 1_000
ADAPTER_DATA_ROWS = 50_000
"""From here on whether an adapter is enough depends on the goal (R2)."""
LARGE_DATA_ROWS = 100_000
RANK_CEILING = 64
FULL_RATES = (5e-6, 1e-5)
"""Low end and usual value of full fine-tuning's learning rate (R7)."""
LORA_RATES = (1e-4, 3e-4)
"""The range of low-rank adapters (R7)."""
PROMPT_RATE = 1e-2
_USUAL_LORA_RATE = 2e-4
_FEW_ROWS_DROPOUT = 0.05
_LORA = "LoRA, arXiv 2106.09685"
_QLORA = "QLoRA, arXiv 2305.14314"
_LEARNS_LESS = "LoRA Learns Less and Forgets Less, arXiv 2405.09673"
_RANKS: Mapping[str, tuple[int, str]] = {
    "style": (8, "style, format and tone need few directions"),
    "instruction": (16, "following instructions works with ranks from 8 to 16"),
    "domain": (32, "domain knowledge needs more directions"),
    "reasoning": (64, "complex reasoning gains up to rank 32-64, and little beyond"),
    AUTO: (16, "a middle rank that suits most tasks; name yours in task.kind"),
}


def advise_method(recipe: Recipe, model: ModelShape, data: DatasetFacts) -> tuple[str, Advice]:
    """The method that rules R1 and R2 prefer; whether it fits is for `search` to find out."""
    knowledge, rows = recipe.task.goal == "knowledge", data.rows
    if model.params < SMALL_MODEL_PARAMS:
        reason = f"{model.params / 1e6:.0f} M parameters: full fine-tuning is affordable and has no rank limit"
        return "full", _method("R1", "full", reason, "guides G1 G4")
    if knowledge and rows > LARGE_DATA_ROWS:
        reason = f"new knowledge from {rows:,} rows: past about 100,000 a low rank is what limits learning"
        return "full", _method("R1", "full", reason, f"guides G1 G2 G3 G4; {_LEARNS_LESS}")
    if rows > ADAPTER_DATA_ROWS:
        if knowledge:
            reason = f"new knowledge from {rows:,} rows: not yet the 100,000 from where on a low rank limits learning"
        else:
            reason = (
                f"{rows:,} rows, but to adapt (format, tone, task): a low rank holds it; see task.goal for new facts"
            )
        return "lora", _method("R2", "lora", reason, f"guides G1 G2; {_LEARNS_LESS}")
    reason = "adapting what the model knows: an adapter is enough, forgets less and costs a fraction"
    return "lora", _method("R1", "lora", reason, f"guides G1 G2 G3 G4; {_LEARNS_LESS}")


def _method(rule: str, value: str, reason: str, source: str) -> Advice:
    return Advice(rule=rule, field="method", value=value, reason=reason, source=source)


def advise_lora(
    recipe: Recipe, model: ModelShape, data: DatasetFacts, method: str, *, quality: bool = False
) -> tuple[LoraNumbers, list[Advice]]:
    """Rank, alpha, dropout and targets of the low-rank methods; the rules speak where the recipe does not."""
    asked = recipe.lora
    advice: list[Advice] = []
    rank, alpha, dropout = asked.r, asked.lora_alpha, asked.lora_dropout
    if isinstance(rank, str):
        advice.append(advise_rank(recipe, data, quality=quality))
        rank = int(advice[-1].value)
    if isinstance(alpha, str):
        advice.append(advise_alpha(rank))
        alpha = float(advice[-1].value)
    if isinstance(dropout, str):
        on_experts = bool(expert_targets(model, asked.target_modules) - {"router"})
        advice.append(advise_dropout(data, on_experts=on_experts))
        dropout = float(advice[-1].value)
    if asked.target_modules == ALL_LINEAR:
        advice.append(advise_targets())
    numbers = LoraNumbers(
        r=rank,
        lora_alpha=float(alpha),
        lora_dropout=float(dropout),
        target_modules=asked.target_modules,
        use_rslora=asked.use_rslora,
        use_dora=method == "dora",
    )
    return numbers, advice


def advise_rank(recipe: Recipe, data: DatasetFacts, *, quality: bool = False) -> Advice:
    """R4: the rank by the kind of task; less for few rows, the ceiling where quality is the objective."""
    rank, reason = _RANKS.get(recipe.task.kind, _RANKS[AUTO])
    if quality:
        rank, reason = RANK_CEILING, "the objective is quality: the highest rank worth its cost"
    if data.rows < TINY_DATA_ROWS and rank > 8:
        rank, reason = 8, f"only {data.rows:,} rows: a smaller rank overfits less"
    elif data.rows < SMALL_DATA_ROWS and rank > 16:
        rank, reason = 16, f"{data.rows:,} rows: a smaller rank overfits less"
    source = f"guides G1 G3 G4; {_LORA}, section 7.2"
    return Advice(rule="R4", field="lora.r", value=rank, reason=reason, source=source)


def advise_alpha(rank: int) -> Advice:
    """R5: alpha is twice the rank to start with."""
    reason = "twice the rank keeps the update's scale when the rank changes; tune on the validation rows"
    return Advice(rule="R5", field="lora.lora_alpha", value=2.0 * rank, reason=reason, source="guides G1 G3")


def advise_targets() -> Advice:
    """R6: adapters on all linear layers, never on embeddings."""
    reason = "attention and MLP alike: adapters on every linear layer are what matches full fine-tuning"
    source = f"guides G3 G4; {_QLORA}, section 4"
    return Advice(rule="R6", field="lora.target_modules", value=ALL_LINEAR, reason=reason, source=source)


def advise_dropout(data: DatasetFacts, *, on_experts: bool = False) -> Advice:
    """R8: dropout for few rows only; without it adapters share their inputs, which saves memory.

    PEFT has none on fused experts.
    """
    few = data.rows < SMALL_DATA_ROWS and not on_experts
    why = "few rows overfit" if few else "enough rows; without dropout inputs are shared, which saves memory"
    why = "adapters on fused experts take no dropout" if on_experts else why
    return Advice(
        rule="R8",
        field="lora.lora_dropout",
        value=_FEW_ROWS_DROPOUT if few else 0.0,
        reason=f"{data.rows:,} rows: {why}",
        source=f"guide G4; {_QLORA}",
    )


def advise_learning_rate(
    recipe: Recipe, model: ModelShape, data: DatasetFacts, method: str
) -> tuple[float, list[Advice]]:
    """R7 and R8: adapters learn at about ten times the rate of full fine-tuning; less for few rows and large models."""
    asked = recipe.train.learning_rate
    if not isinstance(asked, str):
        return float(asked), []
    few, large = data.rows < SMALL_DATA_ROWS, model.params >= LARGE_MODEL_PARAMS
    why_low = f"{data.rows:,} rows: the low end of the range overfits less" if few else "a large model in small steps"
    if method == "full":
        low, usual = FULL_RATES
        rate, reason = (low, why_low) if few or large else (usual, "usual for full fine-tuning")
        source = "guide G3"
    elif method in LORA_METHODS:
        low, usual = LORA_RATES[0], _USUAL_LORA_RATE
        reason = "adapters take about ten times the rate of full fine-tuning, not a fraction of it"
        rate, reason = (low, why_low) if few or large else (usual, reason)
        source = f"guide G3 (G4 has it backwards); {_QLORA}"
    else:
        rate, reason = PROMPT_RATE, "virtual tokens start from nothing and carry the whole change"
        source = "Prefix-Tuning, arXiv 2101.00190; PEFT's examples"
    rule = "R8" if few and method not in ("prompt", "prefix") else "R7"
    return rate, [Advice(rule=rule, field="train.learning_rate", value=rate, reason=reason, source=source)]
