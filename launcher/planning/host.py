"""Bytes of host memory per node, and of one checkpoint on disk."""

from __future__ import annotations

from launcher.facts.shape import ModelShape
from launcher.planning.memory import moments
from launcher.planning.plan import DTYPE_BYTES, Candidate
from launcher.planning.stack import OUR_STACK, StackProfile
from launcher.planning.states import optimizer_moment_bytes, weight_bytes
from launcher.planning.trainable import trainable_params

_LOADING_SHARD_BYTES = 5 * 2**30
"""One weight file on its way to the device, per rank."""
_PINNED = 1.1
"""Pinned host buffers round up; transfer buffers come on top."""


def host_ram_bytes_per_node(model: ModelShape, candidate: Candidate, stack: StackProfile = OUR_STACK) -> int:
    """Host memory of the fullest node: processes, weights on their way to the device, offloaded states.

    Offloaded optimizer: fp32 master, two moments and fp32 gradients, 16 bytes per trained element over all nodes
    (DeepSpeed's own estimator counts 16 as well, times 1.5); offloaded parameters: the compute dtype once more.
    """
    trained = trainable_params(model, candidate)
    offloaded = 0.0
    if candidate.offload_optimizer == "cpu":
        offloaded += 16 * trained / candidate.nodes * _PINNED
    if candidate.offload_param == "cpu":
        offloaded += weight_bytes(model, candidate, stack) / candidate.nodes * _PINNED
    processes = candidate.gpus_per_node * stack.process_bytes
    if candidate.device == "cpu":
        peak = max(moment.total_bytes for moment in moments(model, candidate, stack))
        return int(processes + candidate.gpus_per_node * peak + offloaded)
    return int(processes + max(offloaded, _loading_host_bytes(model, candidate, stack)))


def _loading_host_bytes(model: ModelShape, candidate: Candidate, stack: StackProfile) -> float:
    """What weights pass through the host.

    ZeRO-3: the first rank reads the model and the others take their shards; 4-bit: file by file to the device;
    else every rank reads the whole model and moves it.
    """
    if candidate.quant is not None:
        return candidate.gpus_per_node * _LOADING_SHARD_BYTES
    whole = weight_bytes(model, candidate, stack)
    return whole if candidate.zero_stage == 3 else candidate.gpus_per_node * whole


def checkpoint_bytes(model: ModelShape, candidate: Candidate) -> int:
    """One checkpoint on disk: trained weights and what the optimizer needs to go on exactly."""
    trained = trainable_params(model, candidate)
    if candidate.zero_stage == 0:
        return int(trained * (4 + optimizer_moment_bytes(candidate)))
    return int(trained * (DTYPE_BYTES[candidate.precision] + 4 + optimizer_moment_bytes(candidate)))


def snapshot_bytes_per_node(model: ModelShape, candidate: Candidate) -> int:
    """Host memory of the fullest node for the copy that a save in the background writes from.

    Plain torch: rank 0 copies everything. ZeRO-1 and 2: every rank its share of masters and moments, rank 0 the
    weights too. ZeRO-3: every rank its share of all. Frozen weights are in no checkpoint.
    """
    whole = checkpoint_bytes(model, candidate)
    if candidate.zero_stage == 0:
        return whole
    weights = int(trainable_params(model, candidate) * DTYPE_BYTES[candidate.precision])
    on_rank_0 = 0 if candidate.zero_stage == 3 else weights
    return on_rank_0 + (whole - on_rank_0) // candidate.nodes


def background_saves_fit(model: ModelShape, candidate: Candidate, mem_bytes_per_node: int) -> bool:
    """Whether a node holds that copy beside everything else it holds."""
    needed = host_ram_bytes_per_node(model, candidate) + snapshot_bytes_per_node(model, candidate)
    return needed <= mem_bytes_per_node
