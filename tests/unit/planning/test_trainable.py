"""Adapters on mixtures of experts: what all-linear trains, what cannot be put there, and that the plan says so."""

from dataclasses import replace

import pytest

from launcher.errors import RecipeError
from launcher.facts.model import model_shape
from launcher.planning.memory import estimate_memory
from launcher.planning.plan import LoraNumbers
from launcher.planning.trainable import expert_targets, lora_params, targeted
from launcher.recipe.schema import LoraSection, ModelSection
from tests.unit.planning.examples import A100, DATA, LLAMA_8B, MIXTRAL, a_recipe, on, plan_of

SHAPE = model_shape(ModelSection(name_or_path=MIXTRAL))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def lora(targets, r=16):
    return LoraNumbers(r=r, lora_alpha=32.0, lora_dropout=0.0, target_modules=targets, use_rslora=False, use_dora=False)


def test_all_linear_reaches_experts_and_router():
    """Per layer and rank: gate and up fused at twice the rank, down, and the router, for each of eight experts."""
    hidden, width, experts = 4096, 14336, 8
    per_rank = 2 * experts * (hidden + 2 * width) + experts * (width + hidden) + (hidden + experts)
    both = lora_params(SHAPE, lora("all-linear")), lora_params(SHAPE, lora(ATTENTION))
    assert both[0] - both[1] == 32 * 16 * per_rank


def test_experts_have_the_names_they_had_before_they_were_fused():
    """PEFT takes w1, w2, w3 and gate for Mixtral, as older configurations name them."""
    assert expert_targets(SHAPE, ("w1", "w2", "w3")) == {"gate_up", "down"}
    assert targeted(SHAPE, ("q_proj", "w2"))[0][0].name == "q_proj"
    with pytest.raises(RecipeError, match="gate_proj matches no module"):
        targeted(SHAPE, ("gate_proj",))
    assert expert_targets(model_shape(ModelSection(name_or_path=LLAMA_8B)), "all-linear") == frozenset()


@pytest.mark.parametrize(("method", "section"), [("dora", LoraSection()), ("lora", LoraSection(lora_dropout=0.05))])
def test_what_experts_cannot_take_is_refused_before_the_queue(method, section):
    """PEFT would refuse it on the compute node; the message names what works."""
    with pytest.raises(RecipeError, match="name attention layers only: \\[q_proj"):
        plan_of(a_recipe(MIXTRAL, method, lora=section))


def test_advice_gives_experts_no_dropout():
    """Few rows would get dropout, were it not for the experts."""
    few = replace(DATA, rows=900)
    wide, narrow = (
        plan_of(a_recipe(MIXTRAL, "lora", lora=LoraSection(target_modules=targets), slurm=on(1, 8)), data=few)
        for targets in ("all-linear", ATTENTION)
    )
    assert wide.chosen.candidate.lora.lora_dropout == 0
    assert narrow.chosen.candidate.lora.lora_dropout > 0
    assert "every expert and the router" in next(each.message for each in wide.warnings if each.code == "experts")
    assert "attention alone" in next(each.message for each in narrow.warnings if each.code == "experts")


def test_merged_experts_take_memory():
    """Adapted experts are used merged: one layer's update and sum on top, and every sum without checkpointing."""
    chosen = plan_of(a_recipe(MIXTRAL, "lora", lora=LoraSection(target_modules=ATTENTION), slurm=on(1, 8))).chosen
    base = replace(chosen.candidate, gradient_checkpointing=True)

    def gathered(targets, **fields):
        each = replace(base, lora=lora(targets), **fields)
        return estimate_memory(SHAPE, each, A100).terms_bytes["gathered"]

    assert gathered("all-linear") > gathered(ATTENTION)
    kept = gathered("all-linear", gradient_checkpointing=False) - gathered(ATTENTION, gradient_checkpointing=False)
    assert kept >= 2 * SHAPE.layers * SHAPE.expert_params_per_layer
