"""Lint: common mistakes in what a recipe asks for (rule R17), as warnings with stable codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from launcher.facts.dataset import DatasetFacts
from launcher.facts.shape import ModelShape
from launcher.planning.advice import FULL_RATES, LORA_RATES, PROMPT_RATE, RANK_CEILING, SMALL_DATA_ROWS
from launcher.planning.plan import LoraNumbers, Warning_
from launcher.planning.trainable import expert_targets, lora_params
from launcher.recipe.schema import LORA_METHODS, PROMPT_METHODS, Recipe

_DESTRUCTIVE = 10
"""Times the advised rate; at 30 the retention perplexity rises past its limit (tests/train/test_retention.py)."""
_MANY_TRUNCATED = 0.1
_MANY_REPEATED = 0.05
_FEW_ROWS_RANK = 32
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Linted:
    """What the rules look at: what was asked, of what model, on which data, with which decided adapter."""

    recipe: Recipe
    model: ModelShape
    data: DatasetFacts
    method: str
    lora: LoraNumbers | None


def lint(linted: Linted) -> list[Warning_]:
    """Every warning that applies, in the order of RULES; notices about the data come first."""
    found = [Warning_(code="data", message=notice) for notice in linted.data.notices]
    return found + [Warning_(code=code, message=said) for code, rule in RULES.items() for said in rule(linted)]


def _rank(linted: Linted) -> Iterator[str]:
    lora, rows = linted.lora, linted.data.rows
    if lora is not None and (lora.r > RANK_CEILING or (rows < SMALL_DATA_ROWS and lora.r > _FEW_ROWS_RANK)):
        yield f"rank {lora.r} for {rows:,} rows: memory and overfitting grow, quality hardly does; use 8 to 32"


def _rate(linted: Linted) -> Iterator[str]:
    """Rates far inside another method's range; a base made from scratch here is trained, not fine-tuned."""
    rate, method = linted.recipe.train.learning_rate, linted.method
    if isinstance(rate, str):
        return
    low, usual = FULL_RATES
    from_scratch = linted.recipe.model.name_or_path.startswith("quickstart/")
    if method == "full" and rate > 5 * usual and not from_scratch:
        yield f"learning rate {rate:g} is an adapter's; full fine-tuning of a trained model takes {low:g} to {usual:g}"
    elif method in LORA_METHODS and rate < LORA_RATES[0] / 5:
        yield f"learning rate {rate:g} is full fine-tuning's; adapters take {LORA_RATES[0]:g} to {LORA_RATES[1]:g}"
    elif method in PROMPT_METHODS and rate < PROMPT_RATE / 20:
        yield f"learning rate {rate:g} is another method's; virtual tokens take about {PROMPT_RATE:g}"


def _forgetting(linted: Linted) -> Iterator[str]:
    """A rate far above the advised one overwrites the base; worse where nothing measures it or holds against it."""
    rate, data = linted.recipe.train.learning_rate, linted.recipe.data
    usual = FULL_RATES[1] if linted.method == "full" else LORA_RATES[1]
    from_scratch = linted.recipe.model.name_or_path.startswith("quickstart/")
    if isinstance(rate, str) or linted.method in PROMPT_METHODS or rate < _DESTRUCTIVE * usual or from_scratch:
        return
    missing = [] if data.measures_retention else ["nothing measures it (data.retention: builtin does)"]
    missing += ["no general text is mixed into data.train"] if len(data.train) == 1 else []
    said = "; " + ", and ".join(missing) if missing else ""
    yield f"learning rate {rate:g} is {rate / usual:.0f} times the advised {usual:g}: the base will be forgotten{said}"


def _embeddings(linted: Linted) -> Iterator[str]:
    targets = linted.lora.target_modules if linted.lora else ()
    names = targets if isinstance(targets, tuple) else (targets,)
    touched = [name for name in names if name.rsplit(".", 1)[-1] in _EMBEDDINGS]
    if touched:
        yield f"adapters on {', '.join(touched)} pay only where tokens were added to the vocabulary; leave them out"


def _dropout(linted: Linted) -> Iterator[str]:
    lora, rows = linted.lora, linted.data.rows
    if lora is not None and rows < SMALL_DATA_ROWS and lora.lora_dropout == 0:
        yield f"no dropout on {rows:,} rows: set lora.lora_dropout: 0.05, and watch the validation loss"


def _validation(linted: Linted) -> Iterator[str]:
    if linted.data.validation_rows == 0:
        yield "no held-out rows: overfitting would go unseen; set data.validation: 0.02"


def _alpha(linted: Linted) -> Iterator[str]:
    lora = linted.lora
    if lora is not None and not 0.5 * lora.r <= lora.lora_alpha <= 4 * lora.r:
        yield f"lora_alpha {lora.lora_alpha:g} is far from twice the rank ({2 * lora.r}): the rate's meaning changes"


def _labels(linted: Linted) -> Iterator[str]:
    if linted.data.trained_share == 0:
        loss_on = linted.recipe.data.loss_on
        yield f"no token of the rows looked at is trained on with data.loss_on: {loss_on}; check the rows' roles"


def _truncation(linted: Linted) -> Iterator[str]:
    data, limit = linted.data, linted.recipe.data.max_seq_length
    if data.truncated_share > _MANY_TRUNCATED:
        tail = f" (95 % of them have at most {data.p95_tokens:,} tokens)" if data.p95_tokens else ""
        yield f"{data.truncated_share:.0%} of the rows are longer than data.max_seq_length {limit}{tail}"


def _repeated(linted: Linted) -> Iterator[str]:
    if linted.data.repeated_share > _MANY_REPEATED:
        yield f"{linted.data.repeated_share:.0%} of the rows repeat an earlier one: they count as further epochs"


def _epochs(linted: Linted) -> Iterator[str]:
    train, rows = linted.recipe.train, linted.data.rows
    if train.max_steps is None and rows < SMALL_DATA_ROWS and train.num_train_epochs > 5:
        yield f"{train.num_train_epochs:g} epochs over {rows:,} rows will overfit; take 1 to 3, and watch validation"


def _positions(linted: Linted) -> Iterator[str]:
    limit, most = linted.recipe.data.max_seq_length, linted.model.max_positions
    if limit > most:
        yield f"max_seq_length {limit} is beyond the model's {most} positions"


def _experts(linted: Linted) -> Iterator[str]:
    model, lora = linted.model, linted.lora
    if model.experts and lora is not None:
        if expert_targets(model, lora.target_modules) - {"router"}:
            yield _on_experts(model, lora)
        else:
            yield "adapters sit on attention alone; experts and router stay as they are"
    if model.experts and linted.method == "qlora":
        yield "4-bit loading reaches linear layers only: expert weights stay in 16 bits"


def _on_experts(model: ModelShape, lora: LoraNumbers) -> str:
    whole = lora_params(model, lora)
    without = replace(lora, target_modules=tuple(linear.name for linear in model.linears))
    return (
        f"adapters sit on every expert and the router: {whole / 1e6:,.0f} M trained parameters, "
        f"{lora_params(model, without) / 1e6:,.0f} M on attention alone"
    )


RULES: dict[str, Callable[[Linted], Iterator[str]]] = {
    "rank-too-high-for-data": _rank,
    "lr-from-other-method": _rate,
    "forgetting": _forgetting,
    "adapters-on-embeddings": _embeddings,
    "no-dropout-small-data": _dropout,
    "no-validation": _validation,
    "alpha-far-from-2r": _alpha,
    "all-labels-masked": _labels,
    "truncation": _truncation,
    "duplicates": _repeated,
    "many-epochs-small-data": _epochs,
    "beyond-positions": _positions,
    "experts": _experts,
}
"""Code -> rule; the codes are stable: scripts read them."""
