"""What the planner decides, what it refuses, and how it says so."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from launcher.errors import ClusterError, DoesNotFitError, RecipeError
from launcher.facts.model import model_shape
from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.search import make_plan, resolve
from launcher.recipe.schema import (
    AUTO,
    BudgetSection,
    DataSection,
    DataSource,
    DeepSpeedSection,
    LoraSection,
    TaskSection,
    TrainSection,
)
from tests.unit.planning.examples import A100, CPU, DATA, GIB, LLAMA_8B, LLAMA_70B, RTX4090, a_recipe, on, plan_of

MISTRAL, QWEN_HALF = "mistralai/Mistral-7B-v0.1", "Qwen/Qwen2.5-0.5B"


def refused(recipe, site=A100, data=DATA):
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(recipe, model_shape(recipe.model), data, site)
    return caught.value


# ---------------------------------------------------------------- fits and does not


def test_70b_full_on_64_a100_fits_without_offload():
    """The job this launcher was asked for: ZeRO-3 over 8 x 8 A100-80GB, nothing offloaded, with room to spare."""
    chosen = plan_of(a_recipe(LLAMA_70B, "full", slurm=on(8, 8))).chosen
    assert chosen.fits
    assert (chosen.candidate.zero_stage, chosen.candidate.offload_optimizer) == (3, "none")
    assert chosen.memory.device_bytes.high < 79 * GIB


def test_70b_full_on_one_node_is_refused_with_what_would_fit():
    """Eight GPUs cannot hold 1.1 TB of states, nor can 1 TB of host memory; more nodes or an adapter can."""
    error = refused(a_recipe(LLAMA_70B, "full", slurm=on(1, 8)))
    assert error.exit_code == 6
    assert not error.plan.chosen.fits
    assert "Nearest that fits: slurm.nodes: 2" in str(error)
    assert "method: lora" in str(error)


def test_70b_qlora_on_one_node_fits():
    """A 4-bit base of 37 GB fits every GPU, so nothing needs to be sharded."""
    chosen = plan_of(a_recipe(LLAMA_70B, "qlora", slurm=on(1, 8))).chosen
    assert chosen.fits
    assert chosen.candidate.zero_stage == 0


def test_70b_qlora_on_a_24_gb_card_is_refused_with_the_true_figure():
    """The 4-bit base alone is larger than the card, whatever guides say."""
    error = refused(a_recipe(LLAMA_70B, "qlora"), RTX4090)
    assert error.plan.chosen.memory.terms_bytes["weights"] > 35 * GIB
    assert "GiB per GPU" in str(error)
    assert "the RTX-4090 has 23.5" in str(error)


@pytest.mark.parametrize(("length", "fits"), [(512, True), (4096, True), (32_768, False)])
def test_7b_lora_on_24_gb_depends_on_tokens(length, fits):
    """The same method fits or not by the tokens of a row."""
    recipe = a_recipe(MISTRAL, "lora", data=DataSection(train=(DataSource(path="o/r"),), max_seq_length=length))
    assert plan_of(recipe, RTX4090).chosen.fits == fits


def test_a_recipe_that_leaves_nothing_open_is_estimated_as_written():
    """No knob is turned behind the user's back, even when the plan then does not fit."""
    recipe = a_recipe(
        LLAMA_8B,
        "full",
        slurm=on(1, 2),
        train=TrainSection(global_batch_size=64, per_device_train_batch_size=16, gradient_checkpointing=False),
        deepspeed=DeepSpeedSection(stage=2, offload_optimizer="none", offload_param="none"),
    )
    error = refused(recipe)
    candidate = error.plan.chosen.candidate
    assert (candidate.micro_batch, candidate.zero_stage, candidate.gradient_checkpointing) == (16, 2, False)
    assert "deepspeed.stage" in str(error) or "per_device_train_batch_size" in str(error)


# ---------------------------------------------------------------- what auto decides


@pytest.mark.parametrize(
    ("model", "site", "method", "stage"),
    [
        (LLAMA_8B, A100, "lora", 0),
        (QWEN_HALF, A100, "full", 0),
        (MISTRAL, RTX4090, "lora", 0),
        ("Qwen/Qwen2.5-14B", RTX4090, "qlora", 0),
        (LLAMA_70B, A100, "lora", 3),
    ],
)
def test_auto_takes_the_best_method_that_fits(model, site, method, stage):
    """Small models in full, others with LoRA, and 4 bits only where 16 do not fit the GPUs at hand."""
    chosen = plan_of(a_recipe(model), site).chosen
    assert chosen.fits
    assert (chosen.candidate.method, chosen.candidate.zero_stage) == (method, stage)


def test_new_knowledge_from_many_rows_asks_for_full_fine_tuning():
    """Past about 100,000 rows of new knowledge the rank is what limits learning (rule R1)."""
    plan = plan_of(a_recipe(task=TaskSection(goal="knowledge")), data=replace(DATA, rows=200_000))
    assert plan.chosen.candidate.method == "full"
    assert any(advice.rule == "R1" and advice.value == "full" for advice in plan.advice)


def test_8b_full_on_one_node_shards_no_more_than_it_must():
    """ZeRO-2 fits, so weights are not gathered in every micro-batch."""
    assert plan_of(a_recipe(LLAMA_8B, "full", slurm=on(1, 8))).chosen.candidate.zero_stage == 2


def test_the_fewest_gpus_that_fit_are_taken():
    """With nodes and GPUs left open, an 8B adapter takes one GPU and 70B full four nodes."""
    small = plan_of(a_recipe(LLAMA_8B, "lora")).chosen.candidate
    large = plan_of(a_recipe(LLAMA_70B, "full")).chosen.candidate
    assert (small.nodes, small.gpus_per_node) == (1, 1)
    assert (large.nodes, large.gpus_per_node, large.offload_optimizer) == (4, 8, "none")


@pytest.mark.parametrize("micro", [1, 4, 16])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_batch_arithmetic_holds_in_every_estimate(micro, method):
    """With the micro-batch given, only layouts are taken whose ranks it multiplies up with."""
    train = TrainSection(global_batch_size=64, per_device_train_batch_size=micro)
    plan = plan_of(a_recipe(LLAMA_8B, method, train=train))
    for each in (plan.chosen, *plan.alternatives):
        assert each.candidate.global_batch == 64
    assert plan.chosen.candidate.micro_batch == micro


@pytest.mark.parametrize(
    ("gpu", "precision"), [("A100-80GB", "bf16"), ("V100-32GB", "fp16"), ("T4", "fp16"), ("cpu", "fp32")]
)
def test_precision_follows_the_hardware(gpu, precision):
    """bf16 where matmul units take it, fp16 on older GPUs, fp32 on the CPU."""
    site = replace(A100, gpu=gpu, mem_bytes_per_node=4000 * GIB)
    assert plan_of(a_recipe(QWEN_HALF), site).chosen.candidate.precision == precision


def test_cpu_ranks_run_plain_torch():
    """A laptop plans too: stage 0, fp32, and the un-fused optimizer."""
    candidate = plan_of(a_recipe("quickstart/base", "lora"), CPU).chosen.candidate
    assert (candidate.device, candidate.zero_stage, candidate.precision) == ("cpu", 0, "fp32")
    assert candidate.optim == "adamw_torch"


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_are_not_packed(method):
    """They stand before the first document only; prefix tuning cannot be checkpointed either."""
    plan = plan_of(a_recipe(LLAMA_8B, method))
    candidate = plan.chosen.candidate
    assert not candidate.packing
    assert candidate.num_virtual_tokens == 20
    assert method == "prompt" or not candidate.gradient_checkpointing
    assert any(advice.field == "data.packing" for advice in plan.advice)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_reentrant_checkpointing_where_zero3_meets_frozen_weights(method):
    """The non-reentrant form crashes there; full fine-tuning keeps it."""
    train = TrainSection(global_batch_size=128, gradient_checkpointing=True)
    sharded = {"slurm": on(1, 8), "train": train, "deepspeed": DeepSpeedSection(stage=3)}
    assert plan_of(a_recipe(LLAMA_8B, method, **sharded)).chosen.candidate.checkpointing_reentrant
    assert not plan_of(a_recipe(LLAMA_8B, "full", **sharded)).chosen.candidate.checkpointing_reentrant
    plain = sharded | {"deepspeed": DeepSpeedSection(stage=0)}
    assert not plan_of(a_recipe(LLAMA_8B, method, **plain)).chosen.candidate.checkpointing_reentrant


@pytest.mark.parametrize(("stage", "storage"), [(0, "uint8"), (3, "bf16")])
def test_4_bit_weights_are_stored_so_that_zero3_can_shard_them(stage, storage):
    """ZeRO-3 partitions floating-point types only."""
    plan = plan_of(a_recipe(LLAMA_8B, "qlora", slurm=on(1, 8), deepspeed=DeepSpeedSection(stage=stage)))
    assert plan.chosen.candidate.quant.storage_dtype == storage


def test_overrides_of_deepspeed_ask_for_deepspeed():
    """They would be lost at stage 0, so auto does not choose it."""
    section = DeepSpeedSection(overrides={"zero_optimization": {"overlap_comm": False}})
    candidate = plan_of(a_recipe(LLAMA_8B, "lora", slurm=on(1, 8), deepspeed=section)).chosen.candidate
    assert candidate.zero_stage > 0
    assert deepspeed_config(candidate, section.overrides)["zero_optimization"]["overlap_comm"] is False


# ---------------------------------------------------------------- what is refused


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


# ---------------------------------------------------------------- around the choice


def test_alternatives_are_estimated_or_rejected_with_a_reason():
    """Other methods, stages and node counts; each fits, or says why it does not."""
    plan = plan_of(a_recipe(LLAMA_70B, "full", slurm=on(8, 8)))
    assert {"lora", "qlora"} <= {each.candidate.method for each in plan.alternatives}
    assert {each.candidate.nodes for each in plan.alternatives} >= {4, 8, 16}
    assert plan.chosen.candidate not in {each.candidate for each in plan.alternatives}
    for each in plan.alternatives:
        assert each.fits == (each.rejected_because is None)


def test_resolve_leaves_no_decision_open():
    """The resolved recipe plans to the same candidate: nothing of it was auto."""
    recipe = a_recipe(LLAMA_8B)
    plan = plan_of(recipe)
    resolved = resolve(recipe, plan)
    assert AUTO not in (resolved.method, resolved.lora.r, resolved.lora.lora_alpha, resolved.lora.lora_dropout)
    assert AUTO not in (getattr(resolved.train, name) for name in resolved.train.__dataclass_fields__)
    assert AUTO not in (resolved.deepspeed.stage, resolved.deepspeed.offload_optimizer, resolved.slurm.time)
    assert plan_of(resolved).chosen == plan.chosen


def test_price_and_budget():
    """Money is GPU-hours times the user's price; more than the budget is a warning, not a refusal."""
    plan = plan_of(a_recipe(budget=BudgetSection(gpu_hour_price=2.0, max_gpu_hours=0.001)))
    assert plan.chosen.cost.amount == pytest.approx(2.0 * plan.chosen.gpu_hours)
    assert "over-budget" in {warning.code for warning in plan.warnings}


def test_common_mistakes_become_warnings():
    """Stable codes: a rate copied from the other method, alpha far from 2r, rank too high, adapters on embeddings."""
    recipe = a_recipe(
        LLAMA_8B,
        "lora",
        lora=LoraSection(r=128, lora_alpha=8.0, lora_dropout=0.0, target_modules=("q_proj", "lm_head")),
        train=TrainSection(global_batch_size=128, learning_rate=1e-5),
    )
    codes = {warning.code for warning in plan_of(recipe, data=replace(DATA, rows=2000, validation_rows=0)).warnings}
    expected = {"learning-rate-low", "alpha-far", "rank-high", "embedding-adapter", "no-dropout", "no-validation"}
    assert expected <= codes


def test_planning_70b_takes_less_than_a_second():
    """Every layout of 16 nodes, the alternatives included."""
    started = time.perf_counter()
    plan_of(a_recipe(LLAMA_70B))
    assert time.perf_counter() - started < 1.0


def test_planning_imports_nothing_heavy():
    """The planner runs on a laptop without the training stack."""
    code = (
        "import sys\n"
        "from tests.unit.planning.examples import *\n"
        "plan_of(a_recipe(LLAMA_70B))\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'peft', 'bitsandbytes', 'datasets', 'numpy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
