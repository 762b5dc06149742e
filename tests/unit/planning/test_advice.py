"""The rules of practitioners' guides, one test each: what they decide, the reason they give, where they come from."""

import math
from dataclasses import replace

import pytest

from launcher.errors import RecipeError
from launcher.facts.model import model_shape
from launcher.facts.serving import ENGINES
from launcher.planning.estimate import Task
from launcher.planning.notes import guide_tree
from launcher.planning.plan import plan_to_json
from launcher.planning.remedies import tokens_that_fit
from launcher.planning.retreat import RETREAT
from launcher.planning.search import make_plan
from launcher.recipe.schema import (
    DataSection,
    DataSource,
    ExportSection,
    LoraSection,
    ModelSection,
    TaskSection,
    TrainSection,
)
from tests.unit.planning.examples import (
    A100,
    CPU,
    DATA,
    LLAMA_8B,
    LLAMA_70B,
    MISTRAL,
    QWEN_HALF,
    RTX4090,
    a_recipe,
    on,
    plan_of,
)

MANY, TINY, FEW = replace(DATA, rows=200_000), replace(DATA, rows=500), replace(DATA, rows=3000)


def said(plan, rule, field=None):
    """Advice of one rule, about one field."""
    return [each for each in plan.advice if each.rule == rule and (field is None or each.field == field)]


def one(plan, rule, field=None):
    found = said(plan, rule, field)
    assert found, f"{rule} says nothing: {[(each.rule, each.field) for each in plan.advice]}"
    return found[0]


@pytest.mark.parametrize(
    ("model", "goal", "rows", "method"),
    [
        (LLAMA_8B, "adaptation", 2_000, "lora"),
        (LLAMA_8B, "adaptation", 40_000, "lora"),
        (LLAMA_8B, "knowledge", 40_000, "lora"),
        (LLAMA_8B, "knowledge", 200_000, "full"),
        (QWEN_HALF, "adaptation", 2_000, "full"),
    ],
)
def test_r1_full_or_adapter(model, goal, rows, method):
    """An adapter by default; full for new knowledge from many rows, and always for models below 1B."""
    plan = plan_of(a_recipe(model, task=TaskSection(goal=goal)), data=replace(DATA, rows=rows))
    advice = one(plan, "R1", "method")
    assert (advice.value, plan.chosen.candidate.method) == (method, method)
    assert advice.source.startswith("guides G1") and advice.reason


@pytest.mark.parametrize(("goal", "rows"), [("adaptation", 200_000), ("adaptation", 60_000), ("knowledge", 60_000)])
def test_r2_an_adapter_although_there_are_many_rows(goal, rows):
    """While the goal is adaptation, or below 100,000 rows of knowledge, a low rank is enough; the reason says which."""
    advice = one(plan_of(a_recipe(task=TaskSection(goal=goal)), data=replace(DATA, rows=rows)), "R2")
    assert advice.value == "lora"
    assert f"{rows:,} rows" in advice.reason
    assert ("new knowledge" in advice.reason) == (goal == "knowledge")


@pytest.mark.parametrize(
    ("model", "site", "method"), [(MISTRAL, RTX4090, "lora"), ("Qwen/Qwen2.5-14B", RTX4090, "qlora")]
)
def test_r3_lora_if_the_base_fits_else_4_bits(model, site, method):
    """What fits is estimated for this model and these rows; the reason has the bytes."""
    plan = plan_of(a_recipe(model), site)
    assert plan.chosen.candidate.method == method
    reasons = " ".join(each.reason for each in said(plan, "R3", "method"))
    assert "GiB" in reasons
    assert ("lora needs" in reasons) == (method == "qlora")


@pytest.mark.parametrize(
    ("memory_gb", "params", "methods"),
    [(160, 7e9, ("full", "lora")), (24, 7e9, ("lora", "qlora")), (8, 3e9, ("full", "lora")), (8, 7e9, ("prompt",))],
)
def test_g4s_tree_is_kept_as_printed(memory_gb, params, methods):
    """The fixed thresholds of the decision tree that users know."""
    assert guide_tree(memory_gb, params) == methods


def test_r3_says_where_the_fixed_thresholds_are_overruled():
    """0.5B in full on one 24 GB card: the tree says LoRA or QLoRA, the estimate says it fits with room."""
    plan = plan_of(a_recipe(QWEN_HALF), RTX4090)
    assert plan.chosen.candidate.method == "full"
    assert "G4's fixed thresholds would say lora or qlora" in one(plan, "R3").reason


def test_g4s_threshold_for_full_fine_tuning_is_overruled_by_the_true_need():
    """640 GB in reach is no reason to try 70B in full: it needs more than a node, so auto takes the adapter."""
    recipe = a_recipe(LLAMA_70B, task=TaskSection(goal="knowledge"), slurm=on(1, 8))
    plan = plan_of(recipe, data=MANY)
    assert plan.chosen.candidate.method == "lora"
    assert "full needs" in one(plan, "R10", "method").reason


@pytest.mark.parametrize(
    ("kind", "rows", "rank"),
    [
        ("style", 50_000, 8),
        ("instruction", 50_000, 16),
        ("auto", 50_000, 16),
        ("domain", 50_000, 32),
        ("reasoning", 50_000, 64),
        ("reasoning", 3_000, 16),
        ("domain", 500, 8),
        ("style", 500, 8),
    ],
)
def test_r4_rank_by_the_kind_of_task(kind, rows, rank):
    """Guides' ranks by task, smaller for few rows."""
    plan = plan_of(a_recipe(LLAMA_8B, "lora", task=TaskSection(kind=kind)), data=replace(DATA, rows=rows))
    assert plan.chosen.candidate.lora.r == one(plan, "R4", "lora.r").value == rank


def test_r4_never_above_the_ceiling():
    """64 is the highest rank worth paying, also where quality is the objective."""
    recipe = a_recipe(LLAMA_8B, "lora")
    plan = make_plan(recipe, model_shape(recipe.model), DATA, A100, objective="quality")
    assert plan.chosen.candidate.lora.r == 64


@pytest.mark.parametrize(("asked", "alpha"), [(LoraSection(), 32.0), (LoraSection(r=64), 128.0)])
def test_r5_alpha_is_twice_the_rank(asked, alpha):
    """Also of a rank the user chose."""
    plan = plan_of(a_recipe(LLAMA_8B, "lora", lora=asked))
    assert plan.chosen.candidate.lora.lora_alpha == one(plan, "R5").value == alpha


def test_r6_all_linear_layers():
    """Attention and MLP, never embeddings."""
    plan = plan_of(a_recipe(LLAMA_8B, "lora"))
    assert one(plan, "R6", "lora.target_modules").value == plan.chosen.candidate.lora.target_modules == "all-linear"


@pytest.mark.parametrize(
    ("model", "method", "low", "high"),
    [
        (LLAMA_8B, "full", 5e-6, 1e-5),
        (LLAMA_70B, "full", 5e-6, 1e-5),
        (LLAMA_8B, "lora", 1e-4, 3e-4),
        (LLAMA_8B, "qlora", 1e-4, 3e-4),
        (LLAMA_70B, "dora", 1e-4, 3e-4),
        (LLAMA_8B, "prompt", 1e-3, 1e-1),
    ],
)
def test_r7_learning_rate_by_method(model, method, low, high):
    """Adapters take about ten times the rate of full fine-tuning (one guide has it backwards)."""
    plan = plan_of(a_recipe(model, method))
    assert low <= one(plan, "R7", "train.learning_rate").value <= high
    assert plan.chosen.candidate.learning_rate == one(plan, "R7").value


def test_r7_adapters_take_ten_times_the_rate():
    """Not a fraction of it."""
    rates = [plan_of(a_recipe(LLAMA_8B, method)).chosen.candidate.learning_rate for method in ("full", "lora")]
    assert 10 <= rates[1] / rates[0] <= 30


@pytest.mark.parametrize("method", ["full", "lora"])
def test_r8_few_rows(method):
    """Lower rate, dropout, and fewer epochs than asked for."""
    recipe = a_recipe(LLAMA_8B, method, train=TrainSection(global_batch_size=8, num_train_epochs=5))
    few, many = plan_of(recipe, data=FEW), plan_of(recipe)
    assert few.chosen.candidate.learning_rate < many.chosen.candidate.learning_rate
    assert one(few, "R8", "train.learning_rate").value == few.chosen.candidate.learning_rate
    assert one(few, "R8", "train.num_train_epochs").value == 3
    assert not said(many, "R8", "train.num_train_epochs")
    if method == "lora":
        assert few.chosen.candidate.lora.lora_dropout == one(few, "R8", "lora.lora_dropout").value > 0
        assert many.chosen.candidate.lora.lora_dropout == 0


def test_r9_what_the_base_may_forget():
    """Full tuning and new facts ask for a retention set; a schedule without warm-up for one."""
    assert one(plan_of(a_recipe(LLAMA_8B, "full")), "R9", "data.retention")
    assert one(plan_of(a_recipe(LLAMA_8B, "lora", task=TaskSection(goal="knowledge"))), "R9", "data.retention")
    assert not said(plan_of(a_recipe(LLAMA_8B, "lora")), "R9")
    replay = (DataSource(path="o/r"), DataSource(path="o/general", weight=0.1))
    for watched in ({"retention": DataSource(path="o/general")}, {"retention_builtin": True}):
        data = DataSection(train=replay, **watched)
        assert not said(plan_of(a_recipe(LLAMA_8B, "full", data=data)), "R9")
        alone = DataSection(train=replay[:1], **watched)
        assert "weight" in one(plan_of(a_recipe(LLAMA_8B, "full", data=alone)), "R9", "data.train").value
    cold = a_recipe(LLAMA_8B, "lora", train=TrainSection(global_batch_size=64, warmup_ratio=0.0))
    assert one(plan_of(cold), "R9", "train.warmup_ratio").value == 0.03


def test_r10_the_order_of_retreat():
    """The guides' order; more GPUs of the same site come before the method is given up."""
    assert [step.name for step in RETREAT] == [
        "gradient checkpointing",
        "smaller micro-batch with accumulation",
        "higher ZeRO stage",
        "optimizer offload",
        "parameter offload",
        "more GPUs",
        "adapter, then 4-bit base",
        "smaller rank",
        "shorter rows",
        "prompt-based tuning",
    ]


def test_r10_what_was_taken_of_it_is_said():
    """70B in full on two nodes: recomputed, sharded, and the optimizer on the host, each with its reason."""
    plan = plan_of(a_recipe(LLAMA_70B, "full", slurm=on(2, 8)))
    fields = [each.field for each in said(plan, "R10")]
    taken = ["train.gradient_checkpointing", "deepspeed.stage", "deepspeed.offload_optimizer"]
    assert [field for field in fields if field in taken] == taken
    assert plan.chosen.candidate.offload_optimizer == "cpu"


def test_r10_nothing_is_given_up_without_need():
    """A small model on a large GPU keeps its activations and shards nothing."""
    plan = plan_of(a_recipe(QWEN_HALF, "lora", slurm=on(1, 1)))
    assert {each.field for each in said(plan, "R10")} <= {"tokens_per_micro_batch", "train.per_device_train_batch_size"}


def test_r10_auto_goes_down_to_a_smaller_rank_before_it_gives_up():
    """Rows so long that a 4-bit base fits with rank 8 and not with rank 64: auto takes rank 8 and says why."""
    model = model_shape(ModelSection(name_or_path=LLAMA_70B))
    alone, reasoning = on(1, 1), TaskSection(kind="reasoning")
    task = Task(recipe=a_recipe(LLAMA_70B), model=model, data=DATA, site=A100)
    wide, narrow = (
        tokens_that_fit(
            task, plan_of(a_recipe(LLAMA_70B, "qlora", lora=LoraSection(r=r), slurm=alone)).chosen.candidate
        )
        for r in (64, 8)
    )
    between = DataSection(train=(DataSource(path="o/r"),), max_seq_length=(wide + narrow) // 2)
    plan = plan_of(a_recipe(LLAMA_70B, task=reasoning, slurm=alone, data=between))
    assert wide < narrow
    assert (plan.chosen.candidate.method, plan.chosen.candidate.lora.r, plan.chosen.fits) == ("qlora", 8, True)
    assert "rank 64, which the task asks for, does not fit" in one(plan, "R10", "lora.r").reason


@pytest.mark.parametrize("method", ["dora", "adalora", "prefix", "prompt"])
def test_r11_another_adapter_is_one_line(method):
    """Same recipe, one word changed: planned with the method's own numbers."""
    assert "dora | adalora" in one(plan_of(a_recipe()), "R11", "method").reason
    assert plan_of(a_recipe(LLAMA_8B, method)).chosen.candidate.method == method


def test_r12_and_r13_what_servers_refuse_is_said_now():
    """DoRA, prompt methods, ranks above the servers' limit and adapters on embeddings; plain LoRA gets no note."""
    assert (
        "vLLM, TGI and SGLang would refuse it: it is a DoRA" in one(plan_of(a_recipe(LLAMA_8B, "dora")), "R13").reason
    )
    assert one(plan_of(a_recipe(LLAMA_8B, "prompt")), "R13")
    high = one(plan_of(a_recipe(LLAMA_8B, "lora", lora=LoraSection(r=640))), "R12", "lora.r")
    assert high.reason.startswith("vLLM would refuse it: its rank 640 is over 512")
    embeddings = a_recipe(LLAMA_8B, "lora", lora=LoraSection(target_modules=("q_proj", "lm_head")))
    assert one(plan_of(embeddings), "R12", "lora.target_modules")
    plain = plan_of(a_recipe(LLAMA_8B, "lora"))
    assert not said(plain, "R12") and not said(plain, "R13")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("method", "lora", "field"),
    [
        ("dora", {}, "method"),
        ("adalora", {}, "method"),
        ("prompt", {}, "method"),
        ("lora", {"target_modules": ("q_proj", "embed_tokens")}, "lora.target_modules"),
        ("auto", {"target_modules": ("q_proj", "embed_tokens")}, "lora.target_modules"),
    ],
)
def test_what_the_export_would_refuse_is_refused_by_the_plan(engine, method, lora, field):
    """A recipe that names its engine learns it before the training: same words as at the export, with the field."""
    recipe = a_recipe(LLAMA_8B, method, lora=LoraSection(**lora), export=ExportSection(engine=engine))
    with pytest.raises(RecipeError, match=f"{field}: .*export.engine: {engine}.* would refuse the adapter"):
        plan_of(recipe)


def test_ranks_are_vllms_matter():
    """Above its last step the plan is refused for vLLM only; between two steps it says which one is paid for."""
    high = LoraSection(r=640)
    with pytest.raises(RecipeError, match=r"lora\.r: .*rank 640 is over 512"):
        plan_of(a_recipe(LLAMA_8B, "lora", lora=high, export=ExportSection(engine="vllm")))
    assert plan_of(a_recipe(LLAMA_8B, "lora", lora=high, export=ExportSection(engine="tgi"))).chosen
    between = plan_of(a_recipe(LLAMA_8B, "lora", lora=LoraSection(r=24), export=ExportSection(engine="vllm")))
    assert "--max-lora-rank 32" in one(between, "R12", "lora.r").reason


def test_a_merge_takes_all_but_virtual_tokens():
    """DoRA for merged is planned without a word; prompts are refused; a full run has nothing that could be refused."""
    merged = ExportSection(engine="merged")
    assert not said(plan_of(a_recipe(LLAMA_8B, "dora", export=merged)), "R13")
    with pytest.raises(RecipeError, match="virtual tokens are no weights"):
        plan_of(a_recipe(LLAMA_8B, "prompt", export=merged))
    assert plan_of(a_recipe(LLAMA_8B, "full", export=ExportSection(engine="vllm"))).chosen


def test_r14_cost_per_method_before_anything_is_spent():
    """GPU-hours of every method that fits, cheapest first."""
    plan = plan_of(a_recipe(LLAMA_8B, slurm=on(1, 8)))
    reason = one(plan, "R14", "method").reason
    assert all(f"{method} " in reason for method in ("full", "lora", "qlora"))
    hours = [float(part.rsplit(" ", 1)[1]) for part in reason.split(": ")[1].split(", ")]
    assert hours == sorted(hours)
    assert math.isclose(min(hours), plan.chosen.gpu_hours, rel_tol=0.2)


def test_r15_rules_are_where_to_start():
    """Which ranks to compare, on what; silent where the user has decided."""
    assert "lora.r=8 and lora.r=32" in one(plan_of(a_recipe()), "R15").reason
    assert not said(plan_of(a_recipe(LLAMA_8B, "lora", lora=LoraSection(r=16))), "R15")


@pytest.mark.parametrize("site", [A100, RTX4090, CPU])
def test_r16_planned_without_weights_gpu_or_job(site):
    """On what the plan rests, with the sampling error where rows were sampled."""
    sampled = replace(DATA, basis="sampled", sampling_error=0.021)
    advice = one(plan_of(a_recipe(QWEN_HALF, "lora"), site, sampled), "R16")
    assert advice.value == "sampled"
    assert "2.1% (95 %)" in advice.reason
    assert "no weights, GPU or job needed" in advice.reason


@pytest.mark.parametrize("method", ["auto", "full", "lora", "qlora", "dora", "adalora", "prefix", "prompt"])
def test_every_advice_has_reason_and_source(method):
    """In the plan and in its JSON, with plain values only."""
    document = plan_to_json(plan_of(a_recipe(LLAMA_8B, method)))
    assert document["advice"]
    for each in document["advice"]:
        assert each["rule"].startswith("R") and each["reason"] and each["source"]
        assert isinstance(each["value"], str | int | float | bool)
