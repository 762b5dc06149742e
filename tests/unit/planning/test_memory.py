"""Properties the memory model must have whatever the model, and JSON that loses nothing."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import ConflictError
from launcher.facts.model import model_shape
from launcher.planning.candidates import buckets
from launcher.planning.memory import estimate_memory
from launcher.planning.plan import LoraNumbers, QuantNumbers, plan_from_json, plan_to_json
from launcher.planning.states import states, weight_bytes
from launcher.planning.trainable import lora_params
from launcher.recipe.schema import ModelSection
from tests.tiny import make_candidate
from tests.unit.planning.examples import A100, GIB, LLAMA_8B, LLAMA_70B, SIX, a_recipe, plan_of

SHAPES = {
    name: model_shape(ModelSection(name_or_path=name))
    for name in (
        LLAMA_8B,
        LLAMA_70B,
        "Qwen/Qwen3-4B",
        "google/gemma-2-9b",
        "EleutherAI/pythia-1.4b",
        "Qwen/Qwen2.5-0.5B",
    )
}
LORA = LoraNumbers(
    r=16, lora_alpha=32.0, lora_dropout=0.0, target_modules="all-linear", use_rslora=False, use_dora=False
)
NF4 = QuantNumbers(quant_type="nf4", double_quant=True, compute_dtype="bf16", storage_dtype="uint8")

# Machines that share their cores are slow at times; these tests are about numbers, not about time.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

shapes = st.sampled_from(sorted(SHAPES)).map(SHAPES.get)
methods = st.sampled_from(["full", "lora", "qlora"])
stages = st.sampled_from([1, 2, 3])


def candidate(shape, method="full", **fields):
    values = {
        "gpu": "A100-80GB",
        "device": "cuda",
        "precision": "bf16",
        "optim": "adamw_torch_fused",
        "lora": None if method == "full" else LORA,
        "quant": NF4 if method == "qlora" else None,
        "buckets": buckets(shape),
        "gpus_per_node": 8,
        "seq_len": 2048,
    }
    return make_candidate(method=method, **(values | fields))


def peak(shape, each):
    return estimate_memory(shape, each, A100).peak_bytes.expected


@given(shapes, methods, st.sampled_from([0, 1, 2, 3]), st.integers(1, 6), st.integers(1, 6))
def test_more_gpus_never_hold_more_state_each(shape, method, stage, few, more):
    """Weights, gradients and optimizer states per GPU never grow with the number of GPUs."""
    one, two = sorted((few, more))
    small = candidate(shape, method, zero_stage=stage, gpus_per_node=8, nodes=one)
    large = replace(small, nodes=two)
    assert states(shape, large).total_bytes <= states(shape, small).total_bytes


@given(shapes, methods, st.integers(1, 8))
def test_a_higher_stage_never_holds_more_state(shape, method, nodes):
    """From ZeRO-1 to ZeRO-3 each stage shards what the one before holds whole (with at least two ranks)."""
    totals = [states(shape, candidate(shape, method, zero_stage=stage, nodes=nodes)).total_bytes for stage in (1, 2, 3)]
    assert totals == sorted(totals, reverse=True)


@given(shapes, methods, st.sampled_from([0, 1, 2, 3]), st.sampled_from([1, 2, 4]), st.sampled_from([512, 2048, 8192]))
def test_checkpointing_never_needs_more(shape, method, stage, micro, length):
    """Recomputing activations never raises the peak."""
    kept = candidate(shape, method, zero_stage=stage, micro_batch=micro, seq_len=length)
    assert peak(shape, replace(kept, gradient_checkpointing=True)) <= peak(shape, kept)


@given(shapes, methods, st.booleans(), st.integers(1, 64), st.integers(1, 64), st.sampled_from(["sdpa", "eager"]))
def test_longer_rows_never_need_less(shape, method, checkpointing, one, other, attention):
    """The peak grows with the tokens of a row."""
    short, long = sorted((one * 128, other * 128))
    first = candidate(shape, method, gradient_checkpointing=checkpointing, seq_len=short, attn_implementation=attention)
    assert peak(shape, first) <= peak(shape, replace(first, seq_len=long))


@given(shapes, stages, st.sampled_from(["cpu", "nvme"]))
def test_offload_never_needs_more_on_the_gpu(shape, stage, where):
    """What leaves the GPU is not counted there."""
    plain = candidate(shape, zero_stage=stage)
    assert peak(shape, replace(plain, offload_optimizer=where)) <= peak(shape, plain)


@given(shapes, methods, st.sampled_from([0, 1, 2, 3]))
def test_terms_add_up_to_the_peak(shape, method, stage):
    """The bar of the plan is the number of the plan: all terms but the runtime are the expected peak."""
    memory = estimate_memory(shape, candidate(shape, method, zero_stage=stage), A100)
    terms = dict(memory.terms_bytes)
    assert terms.pop("runtime") > 0
    assert sum(terms.values()) == memory.peak_bytes.expected
    assert memory.peak_bytes.low <= memory.peak_bytes.expected <= memory.peak_bytes.high
    assert memory.device_bytes.low <= memory.device_bytes.expected <= memory.device_bytes.high


@pytest.mark.parametrize(
    ("model", "expected"),
    [("meta-llama/Llama-2-7b-hf", 39_976_960), (LLAMA_8B, 41_943_040), (LLAMA_70B, 207_093_760)],
)
def test_adapter_sizes_are_the_published_ones(model, expected):
    """Rank 16 on all linear layers: 40.0 M, 41.9 M and 207 M."""
    assert lora_params(model_shape(ModelSection(name_or_path=model)), LORA) == expected


def test_nf4_bytes_are_those_measured():
    """Llama-2-70B in NF4 with double quantization, embeddings and head in 16 bits: 33.9 GiB before adapters."""
    shape = model_shape(ModelSection(name_or_path="meta-llama/Llama-2-70b-hf"))
    assert weight_bytes(shape, candidate(shape, "qlora")) / GIB == pytest.approx(33.86, abs=0.1)


@pytest.mark.parametrize(
    ("fields", "bytes_per_parameter"),
    [
        ({"zero_stage": 0, "precision": "fp32", "gpus_per_node": 1}, 16),
        ({"zero_stage": 0, "precision": "bf16", "gpus_per_node": 1}, 16),
        ({"zero_stage": 1, "gpus_per_node": 1}, 16),
        ({"zero_stage": 2, "gpus_per_node": 1}, 18),
        ({"zero_stage": 2, "gpus_per_node": 8}, 2 + 16 / 8),
        ({"zero_stage": 3, "gpus_per_node": 8}, 18 / 8),
        ({"zero_stage": 2, "offload_optimizer": "cpu"}, 2),
        ({"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}, 0),
    ],
)
def test_states_in_bytes_per_parameter(fields, bytes_per_parameter):
    """The textbook sums for full fine-tuning, within the norms that ZeRO-3 keeps whole."""
    shape = SHAPES[LLAMA_8B]
    total = states(shape, candidate(shape, **fields)).total_bytes
    assert total / shape.params == pytest.approx(bytes_per_parameter, abs=0.002)


@pytest.mark.parametrize(
    ("fields", "tensors"),
    [
        ({"zero_stage": 0, "gpus_per_node": 1, "optim": "adamw_torch_fused"}, 0),
        ({"zero_stage": 0, "gpus_per_node": 1, "optim": "adamw_torch"}, 2),
        ({"zero_stage": 0, "gpus_per_node": 1, "optim": "adamw_8bit"}, 0),
    ],
)
def test_plain_adamw_makes_its_denominator_one_tensor_at_a_time(fields, tensors):
    """Two temporaries of the largest tensor (Llama-3-8B: the embedding), where fused and 8-bit updates have none."""
    shape = SHAPES[LLAMA_8B]
    state = states(shape, candidate(shape, precision="fp32", **fields))
    assert state.step_temporary == tensors * 4 * shape.vocab * shape.hidden


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_plain_adamw_on_a_flat_shard_makes_it_whole(stage):
    """DeepSpeed's master is one flat tensor: fp32 gradients and two temporaries of the shard stand at once.

    Stages 1 and 2 have let go of the gradients that were flattened.
    """
    shape = SHAPES["Qwen/Qwen2.5-0.5B"]
    each = candidate(shape, zero_stage=stage, gpus_per_node=8, optim="adamw_torch")
    state = states(shape, each)
    shard = shape.params / 8
    gone = 0 if stage == 3 else state.gradients
    assert state.step_temporary == max(4 * shard, 12 * shard - gone)


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", SIX)
def test_plans_survive_json(name):
    """What is written to plan.json is read back equal, through text."""
    plan = plan_of(SIX[name])
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


@settings(max_examples=20)
@given(st.sampled_from(["full", "lora", "qlora", "dora", "adalora", "prefix", "prompt"]), st.sampled_from([16, 32, 64]))
def test_any_method_survives_json(method, batch):
    """All methods, adapters and quantization included."""
    recipe = a_recipe(LLAMA_8B, method)
    plan = plan_of(replace(recipe, train=replace(recipe.train, global_batch_size=batch)))
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


def test_the_document_has_the_promised_keys():
    """Schema 1 as the interface page lists it: scripts read these names."""
    document = plan_to_json(plan_of(SIX["70b-qlora-1x8"]))
    assert {"schema", "recipe", "model", "chosen", "alternatives", "advice", "warnings"} <= set(document)
    assert set(document["model"]) == {"name", "params", "trainable_params"}
    chosen = document["chosen"]
    promised = (
        "method nodes gpus_per_node gpu zero_stage offload_optimizer offload_param micro_batch gradient_accumulation "
        "gradient_checkpointing precision lora_r fits memory host_ram_bytes_per_node checkpoint_bytes step_s "
        "tokens_per_s_per_gpu steps wall_s gpu_hours cost rejected_because"
    )
    assert set(promised.split()) <= set(chosen)
    assert set(chosen["memory"]) == {"terms_bytes", "peak_bytes", "device_bytes", "usable_bytes", "binding"}
    terms = "weights gradients optimizer activations logits gathered buffers runtime"
    assert list(chosen["memory"]["terms_bytes"]) == terms.split()
    assert set(chosen["cost"]) == {"amount", "price_per_gpu_hour"}
    assert chosen["lora_r"] == 16
    assert all(set(entry) == {"rule", "field", "value", "reason", "source"} for entry in document["advice"])


def test_the_same_input_gives_the_same_bytes():
    """Plans are deterministic."""
    first, second = (json.dumps(plan_to_json(plan_of(SIX["70b-full-8x8"]))) for _ in range(2))
    assert first == second


def test_a_plan_of_another_schema_is_refused():
    """An older or newer launcher's plan.json is not half-read."""
    with pytest.raises(ConflictError, match="plan again"):
        plan_from_json({"schema": 99})
