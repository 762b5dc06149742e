"""Advice: what practice and papers say of method, rank and learning rate, as named rules with reason and source.

Rules decide only what the recipe leaves `auto`; the memory model overrides them where they do not fit (`search`).
"""

from __future__ import annotations

from collections.abc import Mapping

from launcher.facts.dataset import DatasetFacts
from launcher.facts.shape import ModelShape
from launcher.planning.plan import Advice, LoraNumbers, Warning_
from launcher.planning.trainable import ALL_LINEAR
from launcher.recipe.schema import AUTO, LORA_METHODS, PROMPT_METHODS, Recipe

SMALL_MODEL_PARAMS = 1_000_000_000
SMALL_DATA_ROWS = 5_000
LARGE_DATA_ROWS = 100_000
LARGE_MODEL_PARAMS = 30_000_000_000
_LORA = "LoRA, arXiv 2106.09685"
_QLORA = "QLoRA, arXiv 2305.14314"
_LEARNS_LESS = "LoRA Learns Less and Forgets Less, arXiv 2405.09673"
_RANKS: Mapping[str, tuple[int, str]] = {
    "style": (8, "style, format and tone need few directions"),
    "instruction": (16, "following instructions works from rank 8 to 16"),
    "domain": (32, "domain knowledge needs more directions"),
    "reasoning": (32, "complex reasoning gains up to rank 32-64, and little beyond"),
    AUTO: (16, "a middle rank that suits most tasks"),
}
_RANK_CEILING = 64


def advise_method(recipe: Recipe, model: ModelShape, data: DatasetFacts) -> tuple[str, Advice]:
    """The method that rules R1 and R2 prefer; whether it fits is for `search` to find out."""
    knowledge = recipe.task.goal == "knowledge"
    if model.params < SMALL_MODEL_PARAMS:
        reason = f"{model.params / 1e6:.0f} M parameters: full fine-tuning is affordable and has no rank limit"
        return "full", Advice(rule="R1", field="method", value="full", reason=reason, source=_LEARNS_LESS)
    if knowledge and data.rows > LARGE_DATA_ROWS:
        reason = f"new knowledge from {data.rows:,} rows: past about 100,000 a low rank is what limits learning"
        return "full", Advice(rule="R1", field="method", value="full", reason=reason, source=_LEARNS_LESS)
    rule = "R2" if data.rows > LARGE_DATA_ROWS else "R1"
    reason = "adapting what the model knows: an adapter is enough, forgets less and costs a fraction"
    return "lora", Advice(rule=rule, field="method", value="lora", reason=reason, source=_LORA)


def advise_lora(recipe: Recipe, data: DatasetFacts, method: str) -> tuple[LoraNumbers, list[Advice]]:
    """Rank, alpha, dropout and targets of the low-rank methods (rules R4, R5, R6, R8)."""
    asked = recipe.lora
    advice: list[Advice] = []
    rank = asked.r if isinstance(asked.r, int) else _rank(recipe, data, advice)
    alpha = asked.lora_alpha
    if isinstance(alpha, str):
        alpha = 2.0 * rank
        reason = "twice the rank keeps the update's scale when the rank changes"
        advice.append(Advice(rule="R5", field="lora.lora_alpha", value=alpha, reason=reason, source="common practice"))
    dropout = asked.lora_dropout
    if isinstance(dropout, str):
        dropout = 0.05 if data.rows < SMALL_DATA_ROWS else 0.0
        few = "few rows overfit" if dropout else "enough rows; without dropout inputs are shared, which saves memory"
        reason = f"{data.rows:,} rows: {few}"
        advice.append(Advice(rule="R8", field="lora.lora_dropout", value=dropout, reason=reason, source=_QLORA))
    if asked.target_modules == ALL_LINEAR:
        reason = "adapters on every linear layer are what matches full fine-tuning"
        advice.append(
            Advice(rule="R6", field="lora.target_modules", value=ALL_LINEAR, reason=reason, source=f"{_QLORA}, 4")
        )
    numbers = LoraNumbers(
        r=rank,
        lora_alpha=float(alpha),
        lora_dropout=float(dropout),
        target_modules=asked.target_modules,
        use_rslora=asked.use_rslora,
        use_dora=method == "dora",
    )
    return numbers, advice


def _rank(recipe: Recipe, data: DatasetFacts, advice: list[Advice]) -> int:
    rank, reason = _RANKS.get(recipe.task.kind, _RANKS[AUTO])
    if data.rows < 1_000 and rank > 8:
        rank, reason = 8, f"only {data.rows:,} rows: a smaller rank overfits less"
    advice.append(Advice(rule="R4", field="lora.r", value=rank, reason=reason, source=f"{_LORA}, section 7.2"))
    return rank


def advise_learning_rate(
    recipe: Recipe, model: ModelShape, data: DatasetFacts, method: str
) -> tuple[float, list[Advice]]:
    """Peak learning rate (rules R7 and R8): adapters learn at about ten times the rate of full fine-tuning."""
    asked = recipe.train.learning_rate
    if not isinstance(asked, str):
        return float(asked), []
    large = model.params >= LARGE_MODEL_PARAMS
    if method == "full":
        rate, reason = (5e-6, "a large model moves in small steps") if large else (1e-5, "usual for full fine-tuning")
    elif method in PROMPT_METHODS:
        rate, reason = 1e-2, "virtual tokens start from nothing and carry the whole change"
    elif large or data.rows < SMALL_DATA_ROWS:
        rate = 1e-4
        reason = "a large model moves in small steps" if large else f"{data.rows:,} rows: lower, to overfit less"
    else:
        rate, reason = 2e-4, "adapters take about ten times the rate of full fine-tuning"
    source = _QLORA if method in LORA_METHODS else "common practice"
    return rate, [Advice(rule="R7", field="train.learning_rate", value=rate, reason=reason, source=source)]


# ---------------------------------------------------------------- lint


def lint(
    recipe: Recipe, model: ModelShape, data: DatasetFacts, method: str, lora: LoraNumbers | None
) -> list[Warning_]:
    """Common mistakes in what the recipe asks for (rule R17), with stable codes."""
    found = [Warning_(code="data", message=notice) for notice in data.notices]
    found += _lint_learning_rate(recipe, method)
    if lora is not None:
        found += _lint_lora(recipe, model, data, lora)
    if data.validation_rows == 0:
        found.append(Warning_(code="no-validation", message="no held-out rows: overfitting would go unseen"))
    if data.trained_share == 0:
        found.append(Warning_(code="nothing-trained", message="no token of the rows looked at is trained on"))
    if recipe.data.max_seq_length > model.max_positions:
        message = f"max_seq_length {recipe.data.max_seq_length} is beyond the model's {model.max_positions} positions"
        found.append(Warning_(code="beyond-positions", message=message))
    return found


def _lint_learning_rate(recipe: Recipe, method: str) -> list[Warning_]:
    rate = recipe.train.learning_rate
    if isinstance(rate, str):
        return []
    if method == "full" and rate > 5e-5 and not recipe.model.name_or_path.startswith("quickstart/"):
        message = f"learning rate {rate:g} is an adapter's; full fine-tuning of a trained model takes 5e-6 to 1e-5"
        return [Warning_(code="learning-rate-high", message=message)]
    if method in LORA_METHODS and rate < 2e-5:
        message = f"learning rate {rate:g} is full fine-tuning's; adapters take 1e-4 to 3e-4"
        return [Warning_(code="learning-rate-low", message=message)]
    return []


def _lint_lora(recipe: Recipe, model: ModelShape, data: DatasetFacts, lora: LoraNumbers) -> list[Warning_]:
    found = []
    if lora.r > _RANK_CEILING or (data.rows < SMALL_DATA_ROWS and lora.r > 32):
        message = f"rank {lora.r} for {data.rows:,} rows: memory and overfitting grow, quality hardly does"
        found.append(Warning_(code="rank-high", message=message))
    if not 0.5 * lora.r <= lora.lora_alpha <= 4 * lora.r:
        message = f"lora_alpha {lora.lora_alpha:g} is far from twice the rank ({2 * lora.r})"
        found.append(Warning_(code="alpha-far", message=message))
    if data.rows < SMALL_DATA_ROWS and lora.lora_dropout == 0 and recipe.lora.lora_dropout != AUTO:
        message = f"no dropout on {data.rows:,} rows: watch the validation loss"
        found.append(Warning_(code="no-dropout", message=message))
    names = lora.target_modules if isinstance(lora.target_modules, tuple) else (lora.target_modules,)
    if any(name in ("embed_tokens", "lm_head") for name in names):
        message = "adapters on embeddings pay only where tokens were added to the vocabulary"
        found.append(Warning_(code="embedding-adapter", message=message))
    if model.experts:
        message = "expert matrices are no linear modules in transformers 5: adapters sit on attention alone"
        found.append(Warning_(code="experts-frozen", message=message))
    return found
