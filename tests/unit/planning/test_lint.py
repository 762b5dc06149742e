"""Rule R17: each common mistake has its code, its reason, and a recipe beside it that is not warned of."""

from dataclasses import replace

import pytest

from launcher.planning.lint import RULES
from launcher.recipe.schema import DataSection, DataSource, LoraSection, TrainSection
from tests.unit.planning.examples import DATA, LLAMA_8B, MIXTRAL, a_recipe, plan_of

FEW = replace(DATA, rows=2000, tokens=1_200_000)
SHORT = DataSection(train=(DataSource(path="o/r"),), max_seq_length=2048)
LONG = DataSection(train=(DataSource(path="o/r"),), max_seq_length=32_768)


def rate(value, method):
    return a_recipe(LLAMA_8B, method, train=TrainSection(global_batch_size=64, learning_rate=value))


def lora(**numbers):
    return a_recipe(LLAMA_8B, "lora", lora=LoraSection(**numbers))


CASES = {
    "rank-too-high-for-data": [
        (lora(r=128), DATA, lora(r=64), DATA, "rank 128 for 50,000 rows"),
        (lora(r=64), FEW, lora(r=32), FEW, "rank 64 for 2,000 rows"),
    ],
    "lr-from-other-method": [
        (rate(2e-4, "full"), DATA, rate(1e-5, "full"), DATA, "0.0002 is an adapter's"),
        (rate(1e-5, "lora"), DATA, rate(2e-4, "lora"), DATA, "1e-05 is full fine-tuning's"),
        (rate(1e-4, "prompt"), DATA, rate(1e-2, "prompt"), DATA, "virtual tokens take about 0.01"),
    ],
    "forgetting": [
        (rate(3e-4, "full"), DATA, rate(1e-5, "full"), DATA, "30 times the advised 1e-05"),
        (rate(9e-3, "lora"), DATA, rate(2e-4, "lora"), DATA, "no general text is mixed into data.train"),
    ],
    "adapters-on-embeddings": [
        (lora(target_modules=("q_proj", "lm_head")), DATA, lora(target_modules=("q_proj",)), DATA, "adapters on lm_h"),
    ],
    "no-dropout-small-data": [
        (lora(lora_dropout=0.0), FEW, lora(lora_dropout=0.05), FEW, "no dropout on 2,000 rows"),
        (lora(lora_dropout=0.0), FEW, lora(), FEW, "watch the validation loss"),
    ],
    "no-validation": [(lora(), replace(DATA, validation_rows=0), lora(), DATA, "no held-out rows")],
    "alpha-far-from-2r": [
        (lora(r=64, lora_alpha=8.0), DATA, lora(r=64), DATA, "lora_alpha 8 is far from twice the rank (128)"),
    ],
    "all-labels-masked": [
        (lora(), replace(DATA, trained_share=0.0), lora(), replace(DATA, trained_share=0.4), "loss_on: assistant"),
    ],
    "truncation": [
        (lora(), replace(DATA, truncated_share=0.3, p95_tokens=9000), lora(), replace(DATA, truncated_share=0.05),
         "30% of the rows are longer than data.max_seq_length 4096 (95 % of them have at most 9,000 tokens)"),
    ],
    "duplicates": [(lora(), replace(DATA, repeated_share=0.4), lora(), DATA, "40% of the rows repeat")],
    "many-epochs-small-data": [
        (a_recipe(train=TrainSection(global_batch_size=8, num_train_epochs=20)), FEW,
         a_recipe(train=TrainSection(global_batch_size=8, num_train_epochs=2)), FEW, "20 epochs over 2,000 rows"),
    ],
    "beyond-positions": [
        (a_recipe("meta-llama/Llama-2-7b-hf", "lora", data=LONG), DATA,
         a_recipe("meta-llama/Llama-2-7b-hf", "lora", data=SHORT), DATA, "beyond the model's 4096 positions"),
    ],
    "experts": [(a_recipe(MIXTRAL, "qlora"), DATA, a_recipe(LLAMA_8B, "qlora"), DATA, "expert")],
}  # fmt: skip


def warned(recipe, data):
    return {warning.code: warning.message for warning in plan_of(recipe, data=data).warnings}


def test_every_rule_has_a_case():
    """A new code comes with a mistake that triggers it and a recipe that does not."""
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize(("code", "case"), [(code, case) for code, cases in CASES.items() for case in cases])
def test_a_mistake_is_warned_of_and_its_correction_is_not(code, case):
    """The code stands there with what was found, and only there."""
    wrong, wrong_data, right, right_data, said = case
    assert said in warned(wrong, wrong_data)[code]
    assert code not in warned(right, right_data)


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora", "adalora", "prompt", "prefix"])
@pytest.mark.parametrize("data", [DATA, FEW, replace(FEW, rows=300)])
def test_what_the_planner_decides_is_never_warned_of(method, data):
    """Advice and lint agree: nothing that auto fills in is a common mistake."""
    assert set(warned(a_recipe(LLAMA_8B, method), data)) & set(RULES) == set()
