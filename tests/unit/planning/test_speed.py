"""Speed: what a step is made of, how it scales, and what the whole run takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.facts.gpu import gpu
from launcher.facts.model import model_shape
from launcher.planning import speed
from launcher.planning.collectives import exposed_s, link_bytes_s, traffic
from launcher.planning.compute import attention_flop_per_token, compute, matmul_flop_per_token
from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.memory import estimate_memory
from launcher.planning.multinode import hpz_may_help, with_hpz, zero3_vs_alternatives
from launcher.planning.plan import Candidate, plan_from_json, plan_to_json
from launcher.planning.speed_profile import OUR_SPEED, speed_of
from launcher.recipe.schema import DeepSpeedSection, ModelSection
from tests.unit.planning.examples import A100, LLAMA_8B, LLAMA_70B, MIXTRAL, a_recipe, on, plan_of

H100 = replace(A100, name="h100", gpu="H100-80GB")
SLOW_NETWORK = replace(A100, inter_node_bw_bytes_s=1e9)


def shape(name: str = LLAMA_8B):
    """A catalogued model."""
    return model_shape(ModelSection(name_or_path=name))


def a_candidate(name: str = LLAMA_8B, method: str = "full", nodes: int = 1, gpus: int = 8, **fields) -> Candidate:
    """The planner's choice for a layout, with some numbers set."""
    section = fields.pop("deepspeed", DeepSpeedSection())
    chosen = plan_of(a_recipe(name, method, slurm=on(nodes, gpus), deepspeed=section)).chosen.candidate
    return replace(chosen, **fields)


def tokens_per_s(candidate: Candidate, name: str = LLAMA_8B, site=A100, profile=OUR_SPEED) -> float:
    """Per GPU."""
    step = speed.step_time(shape(name), candidate, site, profile).total_s
    return candidate.global_batch * candidate.seq_len / step / candidate.world_size


# ---------------------------------------------------------------- arithmetic


def test_full_fine_tuning_executes_six_flop_per_parameter_and_eight_with_checkpointing():
    """2 forward, 4 backward, 2 more for the recomputed layers; the output head is not run again."""
    model, candidate = shape(), a_candidate(gradient_checkpointing=False)
    assert matmul_flop_per_token(model, candidate) == 6 * model.matmul_params
    again = matmul_flop_per_token(model, replace(candidate, gradient_checkpointing=True))
    assert again == 8 * model.matmul_params - 2 * model.vocab * model.hidden


def test_frozen_weights_need_no_weight_gradient():
    """LoRA executes 4 FLOP per frozen parameter."""
    model, candidate = shape(), a_candidate(method="lora", gpus=1, gradient_checkpointing=False)
    assert matmul_flop_per_token(model, candidate) == 4 * model.matmul_params


def test_a_mask_costs_what_causal_kernels_skip():
    """Packed rows under SDPA carry a mask, so that every score is computed; FlashAttention computes half of them."""
    model, packed = shape(), a_candidate(packing=True, attn_implementation="sdpa")
    flash = replace(packed, attn_implementation="flash_attention_2")
    assert attention_flop_per_token(model, packed) == 2 * attention_flop_per_token(model, flash)


def test_a_window_bounds_attention_in_flash_alone():
    """Beyond the sliding window, FlashAttention's work per token grows no more."""
    model = replace(shape(), sliding_window=1024)
    short, long = (
        attention_flop_per_token(model, a_candidate(seq_len=length, attn_implementation="flash_attention_2"))
        for length in (16_384, 65_536)
    )
    assert long == pytest.approx(short, rel=0.05)


def test_mfu_of_a_published_run():
    """NVIDIA publishes 402 TFLOP/s for Llama-3-8B LoRA at 12,473 tokens/s on one H100, counting 4 per parameter."""
    candidate = a_candidate(method="lora", gpus=1, gpu="H100-80GB", seq_len=4096)
    assert speed.mfu(shape("meta-llama/Meta-Llama-3-8B"), candidate, 12_473) == pytest.approx(402 / 989, rel=0.05)


# ---------------------------------------------------------------- what a step is made of


def test_eager_kernels_cost_an_h100_a_larger_share_than_an_a100():
    """Arithmetic grew by more than bandwidth, so that element-wise kernels weigh more: why its utilization is lower."""
    model, candidate = shape(), a_candidate()
    shares = []
    for site in (A100, H100):
        each = compute(model, candidate, gpu(site.gpu), site, OUR_SPEED)
        shares.append(each.elementwise_s / each.total_s)
    assert shares[0] < shares[1]


def test_fused_kernels_are_faster_where_they_exist():
    """Hand-written kernels for RMSNorm models do nothing for one with LayerNorm and a plain MLP."""
    plain = speed_of({"stack": "hf-trainer"})
    fast = speed_of({"stack": "hf-trainer", "fast_kernels": True})
    candidate = a_candidate()
    assert tokens_per_s(candidate, profile=fast) > 1.05 * tokens_per_s(candidate, profile=plain)
    other = "bigcode/gpt_bigcode-santacoder"
    assert tokens_per_s(candidate, other, profile=fast) == tokens_per_s(candidate, other, profile=plain)


def test_adapters_in_fp32_cost_casts():
    """PEFT without autocast casts every input of every adapter, and dropout then works on fp32."""
    candidate = a_candidate(method="lora", gpus=1)
    cast = replace(OUR_SPEED, adapter_fp32=True)
    assert tokens_per_s(candidate, profile=cast) < 0.95 * tokens_per_s(candidate)


@given(micro=st.integers(1, 32), more=st.integers(1, 32), method=st.sampled_from(["full", "lora", "qlora"]))
def test_more_tokens_per_micro_batch_are_never_slower(micro, more, method):
    """Weights are read, dequantized and gathered once per micro-batch."""
    candidate = replace(CANDIDATES[method], gradient_accumulation=1)
    fewer, larger = (replace(candidate, micro_batch=size) for size in (micro, micro + more))
    assert tokens_per_s(fewer) <= tokens_per_s(larger) * 1.0001


CANDIDATES = {method: a_candidate(method=method) for method in ("full", "lora", "qlora")}


def test_checkpointing_costs_less_than_a_third():
    """Recomputing forward adds one pass to three, and not the head's."""
    kept = a_candidate(gradient_checkpointing=False)
    slower = tokens_per_s(kept) / tokens_per_s(replace(kept, gradient_checkpointing=True))
    assert 1.2 < slower < 1 + 1 / 3


def test_few_tokens_wait_for_the_host():
    """A micro-batch of a few tokens takes as long as launching its kernels."""
    candidate = a_candidate(method="lora", gpus=1, seq_len=16, micro_batch=1)
    each = compute(shape(), candidate, gpu("H100-80GB"), H100, OUR_SPEED)
    assert each.total_s == each.floor_s > 0


def test_many_experts_ramp_slowly():
    """Each expert sees a share of the tokens: its matmuls are small."""
    model, candidate = shape(MIXTRAL), a_candidate(MIXTRAL, "lora")
    few, many = (
        compute(model, replace(candidate, micro_batch=size), gpu("A100-80GB"), A100, OUR_SPEED).matmul_s / size
        for size in (1, 16)
    )
    assert many < 0.9 * few


def test_offload_pays_for_the_hosts_memory_and_pcie():
    """CPU Adam over a host's share of 70B takes seconds, and every host takes its share."""
    candidate = a_candidate(LLAMA_70B, nodes=2, deepspeed=DeepSpeedSection(stage=3, offload_optimizer="cpu"))
    step = speed.step_time(shape(LLAMA_70B), candidate, A100)
    per_host = 28 * shape(LLAMA_70B).params / 2 / 70e9
    assert step.optimizer_s > per_host > 10
    interval = speed.step_interval(step, candidate)
    assert interval.high / interval.expected > 1.5


def test_rank_costs_what_its_tiles_cost():
    """Rank 64 fills a matmul tile; rank 8 wastes most of it, so that eight times the rank is not eight times slower."""
    model, base = shape(), a_candidate(method="lora", gpus=1)
    times = [
        compute(model, replace(base, lora=replace(base.lora, r=rank)), gpu("A100-80GB"), A100, OUR_SPEED).matmul_s
        for rank in (8, 64, 128)
    ]
    assert times[0] == pytest.approx(times[1], rel=0.01)
    assert times[2] > times[1]


@pytest.mark.parametrize(
    ("setup", "low", "high"),
    [
        ({"stack": "hf-trainer"}, 1.0, 1.0),
        ({"stack": "unheard-of"}, 1.0, 1.0),
        ({"stack": "torchtune", "compile": True}, 0.3, 0.5),
        ({"stack": "Unsloth"}, 0.3, 0.5),
    ],
)
def test_stacks_differ_in_their_kernels(setup, low, high):
    """An unknown stack counts as Hugging Face models in eager PyTorch; compiled and hand-written kernels move less."""
    assert low <= speed_of(setup).elementwise <= high


def test_deepspeed_gathers_modules_and_fsdp_layers():
    """Who shards decides what waits: hooks on every module, or a wrapped layer and each adapter."""
    deepspeed, fsdp = (speed_of({"stack": "hf-trainer", "sharding": name}) for name in ("zero3", "fsdp"))
    assert deepspeed.gathers_modules and not deepspeed.wraps_adapters
    assert fsdp.wraps_adapters and not fsdp.gathers_modules


# ---------------------------------------------------------------- communication


def test_a_ring_uses_all_adapters_of_a_node():
    """Eight 400 Gbit/s ports carry a node's ring together; with one GPU per node, there is one port."""
    candidate = a_candidate(nodes=2)
    eight = link_bytes_s(candidate, gpu("H100-80GB"), H100)
    one = link_bytes_s(replace(candidate, gpus_per_node=1), gpu("H100-80GB"), H100)
    assert eight == pytest.approx(8 * one)
    assert eight <= gpu("H100-80GB").link_bytes_s


def test_zero_stages_move_what_the_paper_says():
    """Stages 0-2 move twice the gradients per step, stage 3 twice the weights and once the gradients."""
    model, candidate = shape(), a_candidate(zero_stage=3, gradient_accumulation=4)
    device = gpu("A100-80GB")

    def per_step(stage: int) -> float:
        moved = traffic(model, replace(candidate, zero_stage=stage), device, A100, OUR_SPEED)
        return moved.per_micro_batch_s + moved.per_step_s

    assert per_step(3) == pytest.approx(1.5 * per_step(1), rel=0.01)
    assert per_step(2) == pytest.approx(per_step(1))
    three, two = (traffic(model, replace(candidate, zero_stage=stage), device, A100, OUR_SPEED) for stage in (3, 2))
    assert three.per_micro_batch_s == pytest.approx(3 * two.per_micro_batch_s, rel=0.01)


def test_one_rank_says_nothing():
    """No collectives, no waiting."""
    candidate = a_candidate(method="lora", gpus=1)
    assert exposed_s(traffic(shape(), candidate, gpu("A100-80GB"), A100, OUR_SPEED), 1.0, candidate, OUR_SPEED) == 0


@given(slow=st.floats(0.1e9, 100e9), factor=st.floats(1, 100), method=st.sampled_from(["full", "lora", "qlora"]))
def test_a_faster_network_is_never_slower(slow, factor, method):
    """Step time falls, or stays where something else is the limit."""
    candidate = replace(CANDIDATES[method], nodes=4, zero_stage=3)
    model = shape()
    times = [
        speed.step_time(model, candidate, replace(A100, inter_node_bw_bytes_s=each)).total_s
        for each in (slow, slow * factor)
    ]
    assert times[1] <= times[0] * 1.0001


def test_consumer_cards_talk_through_the_host():
    """Without peer access, two cards on PCIe 4 x16 reach about half of what the bus carries."""
    assert gpu("RTX-4090").link_bytes_s < 0.5 * gpu("RTX-4090").pcie_bytes_s < gpu("L40S").link_bytes_s


# ---------------------------------------------------------------- several nodes


def test_a_second_partition_pays_on_a_slow_network_only():
    """hpZ halves what the weights' gathers send between nodes; where the network is as fast as the node, nothing."""
    candidate = a_candidate(LLAMA_70B, nodes=8, hpz_partition=1)
    ways = {way.name: way for way in zero3_vs_alternatives(shape(LLAMA_70B), candidate, SLOW_NETWORK)}
    assert ways["ZeRO-3 with hpZ"].step_s < 0.9 * ways["ZeRO-3"].step_s
    fast = replace(A100, inter_node_bw_bytes_s=100e9)
    assert not hpz_may_help(candidate, fast)
    assert "ZeRO-3 with hpZ" not in {way.name for way in zero3_vs_alternatives(shape(LLAMA_70B), candidate, fast)}


def test_one_node_wins_where_the_network_is_a_wire():
    """On 1 Gbit/s, two nodes finish later than one with twice the accumulation."""
    wire = replace(A100, inter_node_bw_bytes_s=0.125e9 / 8)
    candidate = a_candidate(nodes=2, zero_stage=3, hpz_partition=1)
    ways = zero3_vs_alternatives(shape(), candidate, wire)
    assert ways[0].name == "one node"
    assert {way.candidate.global_batch for way in ways} == {candidate.global_batch}


def test_the_planner_takes_hpz_by_bandwidth_and_says_why():
    """The same recipe on a slow and on a fast network."""
    recipe = a_recipe(LLAMA_70B, "full", slurm=on(8, 8))
    slow, fast = plan_of(recipe, SLOW_NETWORK), plan_of(recipe, replace(A100, inter_node_bw_bytes_s=100e9))
    assert slow.chosen.candidate.hpz_partition == 8
    assert fast.chosen.candidate.hpz_partition == 1
    (said,) = [each for each in slow.advice if "one node" in each.reason]
    assert said.value == "hpZ" and "(does not fit)" in said.reason


def test_a_second_partition_costs_the_weights_once_more_per_node():
    """2 P / 8 bytes in 16 bits, and DeepSpeed is told."""
    candidate = a_candidate(LLAMA_70B, nodes=8, hpz_partition=1)
    twice = with_hpz(candidate)
    more, less = (estimate_memory(shape(LLAMA_70B), each, A100).terms_bytes["weights"] for each in (twice, candidate))
    assert more - less == pytest.approx(2 * shape(LLAMA_70B).params / 8, rel=0.001)
    assert deepspeed_config(twice)["zero_optimization"]["zero_hpz_partition_size"] == 8
    assert "zero_hpz_partition_size" not in deepspeed_config(candidate)["zero_optimization"]


def test_hpz_survives_json_and_old_plans_have_none():
    """plan.json of an earlier version lacks the field."""
    plan = plan_of(a_recipe(LLAMA_70B, "full", slurm=on(8, 8)), SLOW_NETWORK)
    doc = plan_to_json(plan)
    assert plan_from_json(doc).chosen.candidate.hpz_partition == 8
    del doc["chosen"]["hpz_partition"]
    assert plan_from_json(doc).chosen.candidate.hpz_partition == 1


# ---------------------------------------------------------------- the whole run


def test_saving_takes_as_long_as_the_nodes_write():
    """Nodes write side by side, up to what one file system takes from a job; a site may say better."""
    assert speed.save_s(10e9, 1, A100) == pytest.approx(10.0)
    assert speed.save_s(10e9, 4, A100) == pytest.approx(2.5)
    assert speed.save_s(100e9, 64, A100) == pytest.approx(10.0)
    assert speed.save_s(10e9, 1, replace(A100, write_bw_bytes_s=20e9)) == pytest.approx(0.5)


def test_the_wall_clock_covers_start_steps_evaluations_and_saves():
    """The sum of the parts, nothing twice."""
    candidate = a_candidate(gradient_checkpointing=True)
    parts = {"steps": 100, "evaluations": 5, "evaluation_rows": 2 * candidate.global_batch}
    whole = speed.wall_s(shape(), candidate, step_s=8.0, saves=3, save_s=7.0, **parts)
    assert whole == pytest.approx(speed.first_step_s(shape(), candidate) + 800 + 5 * 2 * 8.0 / 4 + 21)


def test_an_estimate_tells_how_long_a_save_takes():
    """What signal lead and save intervals are checked against."""
    chosen = plan_of(a_recipe(LLAMA_70B, "full", slurm=on(8, 8))).chosen
    assert chosen.save_s == pytest.approx(chosen.checkpoint_bytes / 8e9)


def test_money_needs_a_price():
    """No price, no amount."""
    assert speed.cost(10, None).amount is None
    assert speed.cost(10, 2.5).amount == 25
