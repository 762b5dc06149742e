"""What the planner decides, what it refuses, and how it says so."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import RecipeError
from launcher.facts.model import model_shape
from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.objective import OBJECTIVES, THRIFT
from launcher.planning.search import make_plan, resolve
from launcher.recipe.schema import (
    AUTO,
    BudgetSection,
    DataSection,
    DataSource,
    DeepSpeedSection,
    LoraSection,
    SlurmSection,
    TaskSection,
    TrainSection,
)
from tests.unit.planning.examples import (
    A100,
    CPU,
    DATA,
    GIB,
    LLAMA_8B,
    LLAMA_70B,
    MISTRAL,
    QWEN_HALF,
    RTX4090,
    a_recipe,
    on,
    plan_of,
    refused,
)

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
    assert "a GPU with at least" in str(error)
    assert "no number of tokens per micro-batch fits" in str(error)


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
        (QWEN_HALF, RTX4090, "full", 0),
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


@pytest.mark.parametrize(("model", "method"), [(LLAMA_8B, "lora"), (LLAMA_70B, "full"), (LLAMA_70B, "auto")])
def test_the_earliest_result_within_a_quarter_more_than_the_cheapest(model, method):
    """Without a budget GPUs are added as long as they are used: no faster alternative costs at most that much."""
    plan = plan_of(a_recipe(model, method))
    same = [each for each in plan.alternatives if each.fits and each.candidate.method == plan.chosen.candidate.method]
    cheapest = min(each.gpu_hours for each in (plan.chosen, *same))
    assert plan.chosen.gpu_hours <= THRIFT * cheapest
    faster = [each for each in same if each.wall_s < 0.97 * plan.chosen.wall_s]
    assert all(each.gpu_hours > THRIFT * cheapest for each in faster)


def test_cost_takes_the_fewest_gpu_hours():
    """No alternative of the preferred methods is cheaper by more than what counts as equal."""
    recipe = a_recipe(LLAMA_70B, "full")
    plan = make_plan(recipe, model_shape(recipe.model), DATA, A100, objective="cost")
    fitting = [each for each in plan.alternatives if each.fits and each.candidate.method == "full"]
    assert fitting
    assert all(plan.chosen.gpu_hours <= 1.03 * each.gpu_hours for each in fitting)
    assert plan.chosen.gpu_hours < make_plan(recipe, model_shape(recipe.model), DATA, A100).chosen.gpu_hours


def test_quality_takes_the_best_method_the_budget_allows():
    """Guides' order: full, then LoRA with the highest rank worth its cost; a budget turns the first into the second."""
    recipe = a_recipe(LLAMA_70B)
    model = model_shape(recipe.model)
    free = make_plan(recipe, model, DATA, A100, objective="quality")
    assert free.chosen.candidate.method == "full"
    fewer = replace(recipe, slurm=on(1, 8))
    adapter = make_plan(fewer, model, DATA, A100, objective="quality").chosen.candidate
    assert (adapter.method, adapter.lora.r) == ("lora", 64)
    tight = replace(fewer, budget=BudgetSection(max_gpu_hours=0.95 * free.chosen.gpu_hours))
    assert make_plan(tight, model, DATA, A100, objective="quality").chosen.candidate.method == "lora"


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


# ---------------------------------------------------------------- many nodes


@pytest.mark.parametrize(("gigabytes_s", "partition"), [(2, 8), (100, 1)])
def test_slow_links_between_nodes_ask_for_weights_held_per_node(gigabytes_s, partition):
    """Bandwidth decides, not habit: hpZ where a step waits for gathers between nodes, plain ZeRO-3 elsewhere."""
    site = replace(A100, inter_node_bw_bytes_s=gigabytes_s * 1e9)
    recipe = a_recipe(LLAMA_70B, "full", slurm=on(8, 8))
    plan = plan_of(recipe, site)
    assert (plan.chosen.candidate.zero_stage, plan.chosen.candidate.hpz_partition) == (3, partition)
    assert plan_of(resolve(recipe, plan), site).chosen == plan.chosen


def test_slow_links_make_one_node_the_better_choice():
    """With a tenth of a gigabyte per second between nodes, sixteen of them finish later than one."""
    slow = plan_of(a_recipe(LLAMA_8B, "full"), replace(A100, inter_node_bw_bytes_s=1e8))
    fast = plan_of(a_recipe(LLAMA_8B, "full"), replace(A100, inter_node_bw_bytes_s=1e11))
    assert slow.chosen.candidate.nodes == 1 < fast.chosen.candidate.nodes


# ---------------------------------------------------------------- around the choice


def test_alternatives_are_estimated_or_rejected_with_a_reason():
    """Other methods, stages and node counts; each fits, or says why it does not and what would change that."""
    plan = plan_of(a_recipe(LLAMA_70B, "full", slurm=on(8, 8)))
    assert {"lora", "qlora"} <= {each.candidate.method for each in plan.alternatives}
    assert {each.candidate.nodes for each in plan.alternatives} >= {4, 8, 16}
    assert plan.chosen.candidate not in {each.candidate for each in plan.alternatives}
    for each in plan.alternatives:
        assert each.fits == (each.rejected_because is None)
        assert each.fits or each.would_fit


def test_every_change_that_is_named_does_make_it_fit():
    """The recipe that is refused, with what the refusal proposes, plans and fits."""
    error = refused(a_recipe(LLAMA_70B, "full", slurm=on(1, 8)))
    assert error.plan.chosen.would_fit in str(error)
    assert plan_of(a_recipe(LLAMA_70B, "full", slurm=on(2, 8))).chosen.fits
    for method in ("lora", "qlora"):
        assert f"method: {method}" in str(error)
        assert plan_of(a_recipe(LLAMA_70B, method, slurm=on(1, 8))).chosen.fits


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train": TrainSection(global_batch_size=16, gradient_checkpointing=False, per_device_train_batch_size=1)},
         "train.gradient_checkpointing: true"),
        ({"train": TrainSection(global_batch_size=32, gradient_checkpointing=True, per_device_train_batch_size=32)},
         "train.per_device_train_batch_size: 1 with accumulation 32"),
        ({"train": TrainSection(global_batch_size=32), "deepspeed": DeepSpeedSection(stage=0), "model": LLAMA_70B,
          "slurm": on(1, 8)}, "deepspeed.stage: 3"),
    ],
)  # fmt: skip
def test_the_smallest_change_comes_first(fields, said):
    """One step of the retreat where one is enough, in its order: recompute, smaller micro-batch, shard."""
    fields = dict(fields)
    model = fields.pop("model", LLAMA_8B)
    fields.setdefault("slurm", on(1, 1))
    fields.setdefault("data", DataSection(train=(DataSource(path="o/r"),), max_seq_length=8192))
    error = refused(a_recipe(model, "lora", **fields))
    assert error.plan.chosen.would_fit.startswith(said)


CARD = replace(RTX4090, name="card", gpu="V100-16GB")


def of_length(tokens, model="meta-llama/Llama-2-7b-hf", method="lora", **fields):
    """A recipe whose rows have so many tokens."""
    return a_recipe(model, method, data=DataSection(train=(DataSource(path="o/r"),), max_seq_length=tokens), **fields)


@pytest.mark.parametrize(("length", "fits"), [(512, True), (16_384, False)])
def test_7b_lora_on_16_gb_says_on_how_many_tokens_it_depends(length, fits):
    """The same card takes short rows and not long ones; the plan says where the border is, fitting or refused."""
    recipe = of_length(length)
    plan = plan_of(recipe, CARD)
    border = next(advice for advice in plan.advice if advice.field == "tokens_per_micro_batch")
    assert plan.chosen.fits == fits == (border.value >= length)
    assert f"fits up to {border.value:,} tokens per micro-batch" in border.reason
    if not fits:
        assert f"up to {border.value:,} tokens per micro-batch" in str(refused(recipe, CARD))


def test_the_border_in_tokens_is_the_border():
    """The row that is named fits, one of 128 tokens more does not."""
    written = TrainSection(global_batch_size=16, per_device_train_batch_size=1, gradient_checkpointing=True)
    plan = plan_of(of_length(512, train=written), CARD)
    (border,) = (advice.value for advice in plan.advice if advice.field == "tokens_per_micro_batch")
    assert plan_of(of_length(border, train=written), CARD).chosen.fits
    assert not plan_of(of_length(border + 128, train=written), CARD).chosen.fits


def test_rows_too_long_for_every_method_are_shortened_with_a_cheaper_one():
    """LoRA's base alone fills the card and QLoRA's rows are too long: both changes together are the way out."""
    error = refused(of_length(65_536, MISTRAL), CARD)
    assert error.plan.chosen.would_fit.startswith("method: qlora, data.max_seq_length: ")
    length = int(error.plan.chosen.would_fit.rsplit(" ", 1)[1])
    assert plan_of(of_length(length, MISTRAL, "qlora"), CARD).chosen.fits
    assert not plan_of(of_length(2 * length, MISTRAL, "qlora"), CARD).chosen.fits


def test_resolve_leaves_no_decision_open():
    """The resolved recipe plans to the same candidate: nothing of it was auto."""
    recipe = a_recipe(LLAMA_8B)
    plan = plan_of(recipe)
    resolved = resolve(recipe, plan)
    assert AUTO not in (resolved.method, resolved.lora.r, resolved.lora.lora_alpha, resolved.lora.lora_dropout)
    assert AUTO not in (getattr(resolved.train, name) for name in resolved.train.__dataclass_fields__)
    assert AUTO not in (resolved.deepspeed.stage, resolved.deepspeed.offload_optimizer, resolved.slurm.time)
    assert plan_of(resolved).chosen == plan.chosen


def test_money_is_hours_times_the_price():
    """The user's price per GPU-hour, in the user's currency."""
    plan = plan_of(a_recipe(budget=BudgetSection(gpu_hour_price=2.0)))
    assert plan.chosen.cost.amount == pytest.approx(2.0 * plan.chosen.gpu_hours)


def test_common_mistakes_become_warnings():
    """Stable codes: a rate copied from the other method, alpha far from 2r, rank too high, adapters on embeddings."""
    recipe = a_recipe(
        LLAMA_8B,
        "lora",
        lora=LoraSection(r=128, lora_alpha=8.0, lora_dropout=0.0, target_modules=("q_proj", "lm_head")),
        train=TrainSection(global_batch_size=128, learning_rate=1e-5),
    )
    codes = {warning.code for warning in plan_of(recipe, data=replace(DATA, rows=2000, validation_rows=0)).warnings}
    expected = {"lr-from-other-method", "alpha-far-from-2r", "rank-too-high-for-data", "adapters-on-embeddings"}
    assert expected <= codes


def test_planning_70b_takes_less_than_a_second():
    """Every layout of 16 nodes, the alternatives included."""
    started = time.perf_counter()
    plan_of(a_recipe(LLAMA_70B))
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("method", ["auto", "full", "qlora"])
def test_a_refused_70b_takes_less_than_a_second_too(method):
    """What would fit is searched for as well, over all of 16 nodes and every step of the retreat."""
    started = time.perf_counter()
    plan_of(a_recipe(LLAMA_70B, method, slurm=on(1, 1) if method == "full" else SlurmSection()), A100)
    plan_of(a_recipe(LLAMA_70B, method), RTX4090)
    assert time.perf_counter() - started < 2.0


@settings(max_examples=25, deadline=None)
@given(
    model=st.sampled_from([LLAMA_8B, QWEN_HALF, MISTRAL]),
    method=st.sampled_from(["auto", "full", "lora", "qlora", "dora"]),
    batch=st.sampled_from([8, 24, 64, 96]),
    length=st.sampled_from([512, 4096, 16_384]),
    objective=st.sampled_from(OBJECTIVES),
    hours=st.none() | st.floats(0.1, 200),
)
def test_any_plan_keeps_its_promises(model, method, batch, length, objective, hours):
    """Batch arithmetic, budget, an order of alternatives, a way out of every refusal, and the same bytes every time."""
    recipe = a_recipe(
        model,
        method,
        data=DataSection(train=(DataSource(path="o/r"),), max_seq_length=length),
        train=TrainSection(global_batch_size=batch),
        budget=BudgetSection(max_gpu_hours=hours),
    )
    try:
        plan = make_plan(recipe, model_shape(recipe.model), DATA, A100, objective=objective)
    except RecipeError as error:
        assert hours is not None and "the cheapest that fits" in str(error)
        return
    everything = (plan.chosen, *plan.alternatives)
    assert all(each.candidate.global_batch == batch for each in everything)
    assert hours is None or plan.chosen.gpu_hours <= hours
    fits = [each.fits for each in plan.alternatives]
    assert fits == sorted(fits, reverse=True)
    assert plan == make_plan(recipe, model_shape(recipe.model), DATA, A100, objective=objective)


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
