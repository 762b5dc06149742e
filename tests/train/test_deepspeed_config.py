"""What the planner writes is what the installed DeepSpeed reads."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
from deepspeed.runtime import constants
from deepspeed.runtime.activation_checkpointing import config as checkpointing
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor import aio_config
from deepspeed.runtime.swap_tensor import constants as aio
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.deepspeed_keys import KNOWN
from tests.tiny import make_candidate
from tests.unit.planning.examples import SIX, plan_of


class FakeRanks:
    """Stands in for the process group of a job that is not running: DeepSpeed asks it for the world size."""

    def __init__(self, world_size):
        self.world_size = world_size

    def get_data_parallel_world_size(self):
        return self.world_size


@pytest.fixture
def read(monkeypatch):
    """DeepSpeed's reading of a configuration, as one rank of a job of `world_size` would read it."""
    import deepspeed.comm

    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda *_: 0)
    return lambda config, world_size: DeepSpeedConfig(config, mpu=FakeRanks(world_size))


@pytest.mark.parametrize("name", SIX)
def test_the_installed_deepspeed_accepts_the_six_configurations(read, name):
    """Batch arithmetic, stage, dtypes and clipping arrive as the plan says."""
    candidate = plan_of(SIX[name]).chosen.candidate
    parsed = read(deepspeed_config(candidate), candidate.world_size)
    assert parsed.world_size == candidate.world_size
    assert parsed.train_batch_size == candidate.global_batch
    assert parsed.zero_optimization_stage == candidate.zero_stage
    assert parsed.gradient_clipping == candidate.max_grad_norm
    assert parsed.bfloat16_config.enabled == (candidate.precision == "bf16")
    offload = parsed.zero_config.offload_optimizer
    assert (offload.device if offload else "none") == candidate.offload_optimizer


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_stage_and_precision_is_accepted(read, stage, precision):
    """Configurations of all stages and precisions parse, clipping off included."""
    candidate = make_candidate(zero_stage=stage, precision=precision, max_grad_norm=0.0)
    parsed = read(deepspeed_config(candidate), 1)
    assert (parsed.zero_optimization_stage, parsed.gradient_clipping) == (stage, 0.0)


def test_a_world_size_that_does_not_multiply_up_is_refused_by_deepspeed(read):
    """The check above is real: another world size fails DeepSpeed's own arithmetic."""
    candidate = plan_of(SIX["8b-full-1x8"]).chosen.candidate
    with pytest.raises(AssertionError, match="train_batch_size"):
        read(deepspeed_config(candidate), 7)


def names(model):
    """Keys that a pydantic configuration accepts, without the deprecated ones."""
    return {
        field.alias or key
        for key, field in model.model_fields.items()
        if not (field.json_schema_extra or {}).get("deprecated")
    }


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("bf16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
        ("offload_param", DeepSpeedZeroOffloadParamConfig),
        ("offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
    ],
)
def test_known_keys_are_deepspeeds_own(section, model):
    """Our key lists equal those of the installed configuration classes."""
    tree = KNOWN[section] if section in KNOWN else KNOWN["zero_optimization"][section]
    assert set(tree) == names(model)


def test_known_zero_keys_exist_and_what_we_leave_out_is_named():
    """Every ZeRO key we accept exists; those we do not offer are listed here, so that new ones are noticed."""
    not_offered = {
        "zenflow",
        "elastic_checkpoint",
        "legacy_stage1",
        "leaf_module",
        "save_muon_momentum_buffer_in_memory",
    }
    assert set(KNOWN["zero_optimization"]) == names(DeepSpeedZeroConfig) - not_offered


def test_other_keys_are_constants_of_deepspeed():
    """Top-level, checkpointing and I/O keys are spelled as DeepSpeed's own constants."""
    spelled = {value for value in vars(constants).values() if isinstance(value, str)}
    sections = {"zero_optimization", "activation_checkpointing", "aio", "comms_logger", "flops_profiler"}
    assert set(KNOWN) - sections - spelled == set()
    written = {value for value in vars(checkpointing).values() if isinstance(value, str)}
    assert set(KNOWN["activation_checkpointing"]) <= written
    assert set(KNOWN["aio"]) <= {value for value in vars(aio).values() if isinstance(value, str)}
    assert aio_config.get_aio_config({"aio": {}}).keys() <= set(KNOWN["aio"])
