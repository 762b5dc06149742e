"""What is refused before anything is estimated: contradictions inside a recipe, and with the site."""

from dataclasses import replace

import pytest

from launcher.errors import ClusterError, RecipeError
from launcher.facts.model import model_shape
from launcher.planning.search import make_plan
from launcher.recipe.schema import AUTO, DeepSpeedSection, LoraSection, ModelSection, TrainSection
from tests.unit.planning.examples import A100, DATA, GIB, LLAMA_8B, QWEN_HALF, a_recipe, on, plan_of, refused


def raises(error, match, **fields):
    site = fields.pop("site", A100)
    recipe = a_recipe(fields.pop("model", LLAMA_8B), fields.pop("method", "lora"), **fields)
    with pytest.raises(error, match=match):
        make_plan(recipe, model_shape(recipe.model), DATA, site)


def test_a_batch_that_does_not_divide_shows_the_arithmetic():
    """The message has the product, the remainder and the nearest batches that divide."""
    raises(RecipeError, r"100 does not divide by 2 nodes x 8 GPUs per node = 16 \(100 = 6 x 16 \+ 4\).*96, 112",
           slurm=on(2, 8), train=TrainSection(global_batch_size=100))  # fmt: skip


def test_a_batch_that_fits_no_layout_is_refused_too():
    """Also where the number of GPUs follows from the site."""
    raises(RecipeError, "divides by no number of ranks", slurm=replace(on(2, 8), gpus_per_node=AUTO),
           train=TrainSection(global_batch_size=30))  # fmt: skip


def test_more_nodes_than_the_site_has():
    """The site's limit and who sets it are named; exit code 5."""
    raises(ClusterError, "64 asked for, site a100 has 16", slurm=on(64, 8), train=TrainSection(global_batch_size=512))


def test_more_gpus_than_a_node_has():
    """GPUs per node are the node's."""
    raises(ClusterError, "a node of site a100 has 8 A100-80GB", slurm=on(1, 16))


@pytest.mark.parametrize(
    ("targets", "said"),
    [(("q_prj",), r"did you mean q_proj\?.*It has down_proj, gate_proj"), (("query_key_value",), "matches no module")],
)
def test_lora_targets_that_match_nothing_list_the_real_ones(targets, said):
    """Names known from the model's shape, with the nearest one."""
    raises(RecipeError, said, lora=LoraSection(target_modules=targets))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (DeepSpeedSection(stage=0, offload_optimizer="cpu"), "needs deepspeed.stage 1, 2 or 3"),
        (DeepSpeedSection(stage=2, offload_param="cpu"), "needs deepspeed.stage: 3"),
        (DeepSpeedSection(overrides={"zero_optimisation": {}}), "did you mean zero_optimization"),
        (DeepSpeedSection(stage=0, overrides={"dump_state": True}), "stage 0 runs without DeepSpeed"),
    ],
)
def test_contradictions_in_the_deepspeed_section(section, said):
    """Each names the key and what works."""
    raises(RecipeError, said, method="full", deepspeed=section)


def test_adalora_is_refused_under_zero():
    """Its rank allocation reads whole gradients, which ZeRO frees."""
    raises(RecipeError, "adalora", method="adalora", deepspeed=DeepSpeedSection(stage=3))


def test_nvme_needs_a_path_of_the_site():
    """The recipe cannot know where a node's NVMe is mounted."""
    raises(ClusterError, "names no nvme_path", method="full", deepspeed=DeepSpeedSection(offload_optimizer="nvme"))


def test_nvme_offload_that_would_corrupt_updates_is_refused():
    """Shards off 512 bytes give wrong updates in silence: hidden 896 over 2 ranks is a known case, 4096 is not."""
    site = replace(A100, nvme_path="/scratch", gpus_per_node=2, mem_bytes_per_node=4000 * GIB)
    section = DeepSpeedSection(stage=3, offload_optimizer="nvme")
    bad = refused(a_recipe(QWEN_HALF, "full", slurm=on(1, 2), deepspeed=section), site)
    assert "no multiple of 512 bytes" in str(bad)
    assert plan_of(a_recipe(LLAMA_8B, "full", slurm=on(1, 2), deepspeed=section), site).chosen.fits


def test_capped_attention_is_not_planned_with_sdpa():
    """transformers refuses SDPA for models that cap attention scores; auto plans eager, sdpa is refused."""
    gemma = ModelSection(name_or_path="google/gemma-2-9b")
    recipe = replace(a_recipe(LLAMA_8B, "lora"), model=gemma)
    plan = make_plan(recipe, model_shape(gemma), DATA, A100)
    assert plan.chosen.candidate.attn_implementation == "eager"
    asked = replace(recipe, model=replace(gemma, attn_implementation="sdpa"))
    with pytest.raises(RecipeError, match="cannot cap attention scores"):
        make_plan(asked, model_shape(gemma), DATA, A100)
