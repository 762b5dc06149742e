"""Calibration: coefficients are found again where they are known, and the next plan uses them."""

from dataclasses import replace

import pytest

from launcher.errors import ClusterError, DataError
from launcher.facts.learned import Learned, learned_path, to_yaml
from launcher.facts.model import model_shape
from launcher.facts.profile import read_learned
from launcher.facts.site import site_facts, with_learned
from launcher.planning.calibration import Sample, calibrate, outliers
from launcher.planning.candidates import buckets
from launcher.planning.memory import estimate_memory
from launcher.planning.plan import LoraNumbers
from launcher.planning.speed import step_time
from launcher.recipe.schema import ModelSection
from tests.tiny import make_candidate
from tests.unit.planning.examples import A100, LLAMA_8B, SIX, plan_of

SHAPE = model_shape(ModelSection(name_or_path=LLAMA_8B))
LORA = LoraNumbers(
    r=16, lora_alpha=32.0, lora_dropout=0.0, target_modules="all-linear", use_rslora=False, use_dora=False
)


def candidate(**fields):
    values = {
        "method": "lora",
        "lora": LORA,
        "gpu": "A100-80GB",
        "device": "cuda",
        "precision": "bf16",
        "optim": "adamw_torch_fused",
        "buckets": buckets(SHAPE),
        "seq_len": 2048,
        "gradient_checkpointing": True,
    }
    return make_candidate(**(values | fields))


def ran(site, peak_factor=1.0, **fields):
    """A run on a site whose true coefficients are `site`'s: what the formulas say there is what was measured."""
    each = candidate(**fields)
    return Sample(
        run="a run",
        model=SHAPE,
        candidate=each,
        step_s=step_time(SHAPE, each, site).total_s,
        peak_bytes=round(peak_factor * estimate_memory(SHAPE, each, replace(site, learned=None)).peak_bytes.expected),
    )


def slower(factor):
    return replace(A100, learned=Learned(runs=1, step_factor=factor))


def test_a_slow_site_is_found_out():
    """Runs that all take 1.3 times as long, and 4 % more memory, give these factors and no error."""
    samples = [ran(slower(1.3), 1.04, micro_batch=size) for size in (1, 2, 4)]
    learned = calibrate(samples, A100)
    assert learned.runs == 3
    assert learned.step_factor == pytest.approx(1.3, rel=0.01)
    assert learned.memory_factor == pytest.approx(1.04, rel=0.001)
    assert learned.step_error_pct == pytest.approx(0, abs=0.5)


def test_a_slow_network_is_told_from_slow_gpus():
    """Full fine-tuning over nodes waits for the network; one-GPU runs say how fast the GPUs are."""
    truth = replace(slower(1.1), inter_node_bw_bytes_s=4e9)
    alone = [ran(truth, micro_batch=size) for size in (1, 2)]
    full = {"method": "full", "lora": None, "zero_stage": 3, "nodes": 4, "gpus_per_node": 8}
    spread = [ran(truth, micro_batch=size, **full) for size in (1, 2)]
    learned = calibrate([*alone, *spread], A100)
    assert learned.step_factor == pytest.approx(1.1, rel=0.02)
    assert learned.inter_node_bw_bytes_s == pytest.approx(4e9, rel=0.2)


def test_links_that_nothing_waited_for_stay_unknown():
    """Without multi-GPU runs nothing is said of bandwidths."""
    learned = calibrate([ran(slower(1.2))], A100)
    assert learned.intra_node_bw_bytes_s is None
    assert learned.inter_node_bw_bytes_s is None
    assert learned.step_error_pct is None


def test_one_odd_run_moves_nothing():
    """The median of five runs ignores the one that shared its node."""
    samples = [ran(slower(1.2), micro_batch=1) for _ in range(4)]
    odd = replace(samples[0], run="odd", step_s=4 * samples[0].step_s)
    assert calibrate([*samples, odd], A100).step_factor == pytest.approx(1.2, rel=0.01)


def test_a_run_that_measured_something_else_is_left_out():
    """Twenty times as long is another machine's work, or a model too small to tell; alone it teaches nothing."""
    samples = [ran(slower(1.2), micro_batch=1), ran(slower(1.2), micro_batch=2)]
    odd = replace(samples[0], run="odd", step_s=20 * samples[0].step_s)
    assert outliers([*samples, odd], A100) == ["odd"]
    assert calibrate([*samples, odd], A100).runs == 2
    with pytest.raises(DataError, match="odd took more than 5 times"):
        calibrate([odd], A100)


def test_nothing_to_learn_from_is_an_error():
    """A site without finished runs is named."""
    with pytest.raises(DataError, match="a100"):
        calibrate([], A100)


# ---------------------------------------------------------------- what the next plan does with it


def test_the_next_plan_uses_what_was_learned():
    """Time and memory scale with the factors, and the plan says from how many runs and how far off they were."""
    learned = Learned(runs=7, step_factor=1.5, memory_factor=1.1, step_error_pct=3.0, memory_error_pct=1.0)
    before, after = (plan_of(SIX["8b-lora-1x1"], site) for site in (A100, with_learned(A100, learned)))
    assert after.chosen.step_s.expected == pytest.approx(1.5 * before.chosen.step_s.expected, rel=0.01)
    assert after.chosen.memory.peak_bytes.expected == pytest.approx(
        1.1 * before.chosen.memory.peak_bytes.expected, rel=1e-6
    )
    said = [advice.reason for advice in after.advice if advice.rule == "calibration"]
    assert said == ["learned from 7 runs, past error 3.0 % in time, 1.0 % in memory of a100"]
    assert not [advice for advice in before.advice if advice.rule == "calibration"]


def test_the_file_beside_the_profile_is_read_back(tmp_path):
    """What calibration writes is what the site then has; it is no profile of its own."""
    profile = tmp_path / "ours.yaml"
    profile.write_text(
        "executor: slurm\ngpu: A100-80GB\ngpus_per_node: 8\nmax_nodes: 2\ncpus_per_node: 64\nmem_bytes_per_node: 500G\n"
    )
    learned = Learned(runs=3, step_factor=1.25, inter_node_bw_bytes_s=4e9, step_error_pct=0.0)
    path = learned_path(profile)
    assert path == tmp_path / "ours.learned.yaml"
    path.write_text(to_yaml(learned, "ours"))
    site = site_facts(str(profile))
    assert site.learned == learned
    assert site.inter_node_bw_bytes_s == 4e9


def test_a_broken_file_names_its_line(tmp_path):
    """Unknown keys are refused with their place."""
    path = tmp_path / "ours.learned.yaml"
    path.write_text("runs: 3\nstep_factr: 2\n")
    with pytest.raises(ClusterError, match=r"ours\.learned\.yaml:2.*step_factor"):
        read_learned(path)
