"""DeepSpeed's configuration: explicit, complete, and closed to keys it does not know."""

import json
from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.planning.deepspeed_config import deepspeed_config
from tests.tiny import make_candidate
from tests.unit.planning.examples import SIX, plan_of

GOLDEN = Path(__file__).parent / "golden"


def leaves(value):
    if isinstance(value, dict):
        for below in value.values():
            yield from leaves(below)
    else:
        yield value


@pytest.mark.parametrize("name", SIX)
def test_the_six_configurations_are_the_golden_ones(name):
    """The JSON that DeepSpeed gets for the six published cases changes only on purpose.

    After a wanted change: PYTHONPATH=. python tests/unit/planning/rewrite_golden.py, and read the diff.
    """
    config = deepspeed_config(plan_of(SIX[name]).chosen.candidate)
    assert config == json.loads((GOLDEN / f"deepspeed-{name}.json").read_text())


@pytest.mark.parametrize("name", SIX)
def test_nothing_is_left_to_the_library(name):
    """No value is "auto" or missing, and the batch is micro-batch x accumulation x ranks."""
    candidate = plan_of(SIX[name]).chosen.candidate
    config = deepspeed_config(candidate)
    assert not [value for value in leaves(config) if value in ("auto", None)]
    product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * candidate.world_size
    assert config["train_batch_size"] == product == 128


@pytest.mark.parametrize("norm", [0.0, 0.3, 1.0])
def test_clipping_is_always_written(norm):
    """An absent key would clip at 1.0, so it is there even when clipping is off."""
    assert deepspeed_config(make_candidate(zero_stage=2, max_grad_norm=norm))["gradient_clipping"] == norm


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_stage_0_never_gets_a_configuration(precision):
    """DeepSpeed's bf16 optimizer at stage 0 is one Adam step off; plain torch runs instead."""
    with pytest.raises(ValueError, match="plain torch"):
        deepspeed_config(make_candidate(zero_stage=0, precision=precision))


def test_offload_names_the_device_and_the_path():
    """NVMe offload carries its path and the asynchronous I/O settings."""
    config = deepspeed_config(
        make_candidate(zero_stage=3, method="full", offload_optimizer="nvme", offload_param="cpu", nvme_path="/scratch")
    )
    zero = config["zero_optimization"]
    assert (zero["offload_optimizer"]["device"], zero["offload_optimizer"]["nvme_path"]) == ("nvme", "/scratch")
    assert zero["offload_param"]["device"] == "cpu"
    assert "aio" in config


def test_overrides_are_laid_over_single_keys():
    """An override replaces one value and leaves its neighbours."""
    before = deepspeed_config(make_candidate(zero_stage=3))
    after = deepspeed_config(make_candidate(zero_stage=3), {"zero_optimization": {"overlap_comm": True}})
    assert after["zero_optimization"] == before["zero_optimization"] | {"overlap_comm": True}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"zero_optimisation": {}}, "did you mean zero_optimization"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean zero_optimization.overlap_comm"),
        ({"gradient_clipping": 0.5}, "set train.max_grad_norm instead"),
        ({"zero_optimization": {"stage": 2}}, "set deepspeed.stage instead"),
        ({"steps_per_print": "auto"}, "'auto' means nothing"),
        ({"zero_optimization": True}, "a section of keys is expected"),
    ],
)
def test_wrong_overrides_are_refused_with_the_way_out(overrides, said):
    """Unknown keys, keys a recipe field decides and "auto" are refused by name."""
    with pytest.raises(RecipeError, match=said):
        deepspeed_config(make_candidate(zero_stage=2), overrides)
