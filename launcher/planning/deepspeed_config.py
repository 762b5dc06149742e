"""Candidate -> DeepSpeed's JSON, every value explicit, nothing "auto".

There is no `optimizer` section: the worker passes its own AdamW (or DeepSpeed's CPU Adam where it is offloaded),
so that stages 0 to 3 step with the same code and nothing is compiled for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from launcher.errors import RecipeError, raise_all
from launcher.planning.deepspeed_keys import KNOWN, OWNED, Tree
from launcher.planning.plan import Candidate

_NEVER = 2_000_000_000
"""Steps between DeepSpeed's own progress lines: the worker prints its own."""


def deepspeed_config(candidate: Candidate, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of ZeRO stages 1 to 3.

    Raises:
        ValueError: stage 0, which runs without DeepSpeed (its bf16 optimizer there is one Adam step off).
        RecipeError: overrides with unknown keys, keys that a recipe field decides, or "auto".
    """
    if candidate.zero_stage == 0:
        raise ValueError("ZeRO stage 0 is plain torch and has no DeepSpeed configuration")
    raise_all(RecipeError, list(override_problems(overrides or {})))
    config: dict[str, Any] = {
        "train_batch_size": candidate.global_batch,
        "train_micro_batch_size_per_gpu": candidate.micro_batch,
        "gradient_accumulation_steps": candidate.gradient_accumulation,
        # Absent, DeepSpeed would clip at 1.0; 0.0 switches clipping off.
        "gradient_clipping": float(candidate.max_grad_norm),
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": candidate.precision,
        "data_types": {"grad_accum_dtype": accumulation_dtype(candidate)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": candidate.offload_optimizer != "none",
        **_precision(candidate),
        "zero_optimization": _zero(candidate),
        # The model checkpoints its own layers; DeepSpeed's checkpointing stays off.
        "activation_checkpointing": {
            "partition_activations": False,
            "contiguous_memory_optimization": False,
            "cpu_checkpointing": False,
            "synchronize_checkpoint_boundary": False,
            "profile": False,
        },
        "checkpoint": {"tag_validation": "Fail", "load_universal": False, "use_node_local_storage": False},
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }
    if "nvme" in (candidate.offload_optimizer, candidate.offload_param):
        config["aio"] = _aio()
    return _merged(config, overrides or {})


def accumulation_dtype(candidate: Candidate) -> str:
    """Gradients add up in fp32 where partitions make that cheap; ZeRO-1 holds them whole, in the compute dtype."""
    return "fp32" if candidate.zero_stage >= 2 else candidate.precision


def _precision(candidate: Candidate) -> dict[str, Any]:
    bf16 = {"enabled": candidate.precision == "bf16", "check_grad_overflow": True}
    fp16 = {
        "enabled": candidate.precision == "fp16",
        "auto_cast": False,
        "loss_scale": 0.0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
    }
    return {"bf16": bf16, "fp16": fp16}


def _zero(candidate: Candidate) -> dict[str, Any]:
    buckets, stage = candidate.buckets, candidate.zero_stage
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": candidate.device == "cuda",
        "reduce_scatter": True,
        "reduce_bucket_size": buckets.reduce_elements,
        "allgather_partitions": True,
        "allgather_bucket_size": buckets.allgather_elements,
        "round_robin_gradients": False,
        "sub_group_size": buckets.sub_group_elements,
    }
    if stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": buckets.prefetch_elements,
            "stage3_param_persistence_threshold": buckets.persistence_elements,
            "stage3_max_live_parameters": buckets.max_live_elements,
            "stage3_max_reuse_distance": buckets.max_reuse_elements,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if stage == 3 and candidate.hpz_partition > 1:
        section["zero_hpz_partition_size"] = candidate.hpz_partition
    if candidate.offload_optimizer != "none":
        section["offload_optimizer"] = _offload(candidate, candidate.offload_optimizer, buffers=4)
    if candidate.offload_param != "none":
        section["offload_param"] = _offload(candidate, candidate.offload_param, buffers=5)
    return section


def _offload(candidate: Candidate, device: str, *, buffers: int) -> dict[str, Any]:
    """Pinned memory needs a GPU driver; on the CPU it would only be compiled."""
    section: dict[str, Any] = {"device": device, "pin_memory": candidate.device == "cuda", "buffer_count": buffers}
    if device == "nvme":
        section["nvme_path"] = candidate.nvme_path
    return section


def _aio() -> dict[str, Any]:
    return {
        "block_size": 1_048_576,
        "queue_depth": 16,
        "intra_op_parallelism": 2,
        "single_submit": False,
        "overlap_events": True,
    }


def _merged(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides laid over the configuration, section by section."""
    merged = copy.deepcopy(config)
    for key, value in overrides.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, Mapping):
            merged[key] = _merged(below, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def override_problems(overrides: Mapping[str, Any], known: Tree = KNOWN, path: str = "") -> Iterator[str]:
    """What is wrong with `deepspeed.overrides`, one sentence each."""
    for key, value in overrides.items():
        where = f"{path}{key}"
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {path}{close[0]}?" if close else f"; known here: {', '.join(sorted(known))}"
            yield f"deepspeed.overrides.{where}: DeepSpeed has no such key{hint}"
        elif where in OWNED:
            yield f"deepspeed.overrides.{where}: set {OWNED[where]} instead"
        elif value == "auto":
            yield f"deepspeed.overrides.{where}: 'auto' means nothing to DeepSpeed itself; give a value"
        else:
            yield from _below(value, known[key], where)


def _below(value: Any, known: Tree | None, where: str) -> Iterator[str]:
    if known is None:
        return
    if not isinstance(value, Mapping):
        yield f"deepspeed.overrides.{where}: is {value!r}, a section of keys is expected"
    else:
        yield from override_problems(value, known, f"{where}.")
