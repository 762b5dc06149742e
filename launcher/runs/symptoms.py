"""symptoms: from the words of an error to what it means; one table, first match wins.

Libraries report the same trouble under many names (a full disk is OSError, RuntimeError of PyTorch's zip writer or our
JobFailedError), so the words count before the class.
"""

from __future__ import annotations

import contextlib
import re
import signal
from enum import StrEnum


class Cause(StrEnum):
    """Why an attempt ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    """Somebody sent the stop signal; the ranks saved and left."""
    PREEMPTED = "preempted"
    TIME_LIMIT = "time_limit"
    OPERATOR_REQUEUE = "operator_requeue"
    CANCELLED = "cancelled"
    NODE_LOST = "node_lost"
    RANK_KILLED = "rank_killed"
    RANK_EXITED = "rank_exited"
    """A rank left without error and without result."""
    CRASHED = "crashed"
    """Segmentation fault, abort, bus error."""
    HUNG = "hung"
    PEER_LOST = "peer_lost"
    """Ranks lost another one, and what became of that one is not known."""
    RENDEZVOUS = "rendezvous"
    GPU_OUT_OF_MEMORY = "gpu_out_of_memory"
    HOST_OUT_OF_MEMORY = "host_out_of_memory"
    DISK_FULL = "disk_full"
    BAD_NODE = "bad_node"
    NAN_LOSS = "nan_loss"
    DATA_ERROR = "data_error"
    MODEL_ERROR = "model_error"
    RECIPE_ERROR = "recipe_error"
    OUR_BUG = "our_bug"
    """An exception that is none of the launcher's own errors."""
    DAMAGED_CHECKPOINTS = "damaged_checkpoints"
    SUPERSEDED = "superseded"
    """A newer attempt of the run is at work; this one was told so and left."""
    LAUNCH_FAILED = "launch_failed"
    NEVER_STARTED = "never_started"
    UNKNOWN = "unknown"


AGAIN = frozenset(
    {
        Cause.PREEMPTED,
        Cause.TIME_LIMIT,
        Cause.OPERATOR_REQUEUE,
        Cause.NODE_LOST,
        Cause.RANK_KILLED,
        Cause.RANK_EXITED,
        Cause.CRASHED,
        Cause.HUNG,
        Cause.PEER_LOST,
        Cause.RENDEZVOUS,
        Cause.BAD_NODE,
        Cause.LAUNCH_FAILED,
        Cause.UNKNOWN,
    }
)
"""Causes that lie in the cluster: the same job may do better next time."""
OF_THE_NODE = frozenset({Cause.BAD_NODE, Cause.NODE_LOST, Cause.RANK_KILLED, Cause.CRASHED, Cause.HUNG})
"""Causes that count against the node on which they happened."""
CONSEQUENCES = frozenset({Cause.PEER_LOST, Cause.RENDEZVOUS})
"""What a rank sees when another one is gone: never the cause while something else is known."""

_WORDS: tuple[tuple[Cause, str], ...] = (
    (
        Cause.GPU_OUT_OF_MEMORY,
        r"torch\.OutOfMemoryError|cuda\.OutOfMemoryError|\b(CUDA|HIP|XPU) out of memory|CUBLAS_STATUS_ALLOC_FAILED"
        r"|CUDA error: out of memory|cuda runtime error \(2\)",
    ),
    (
        Cause.DISK_FULL,
        r"No space left on device|Disk quota exceeded|\bENOSPC\b|\bEDQUOT\b|\bErrno (28|122|27|30)\b|File too large"
        r"|Read-only file system|PytorchStreamWriter failed writing|inline_container\.cc.*(write|unexpected pos)",
    ),
    (
        Cause.HOST_OUT_OF_MEMORY,
        r"\bMemoryError\b|DefaultCPUAllocator: (can't|not enough)|Cannot allocate memory|\bENOMEM\b|std::bad_alloc"
        r"|cudaErrorMemoryAllocation.*host|ArrayMemoryError",
    ),
    (Cause.NAN_LOSS, r"the (loss|gradient norm) became (nan|-?inf)"),
    (Cause.DAMAGED_CHECKPOINTS, r"holds \d+ checkpoints? and none (is whole|verifies)"),
    (
        Cause.BAD_NODE,
        r"is not fit to train: (?!No space left)"
        r"|uncorrectable ECC|ECC error|CUDA-capable device\(s\) is/are busy or unavailable|no CUDA-capable device"
        r"|all CUDA-capable devices are busy|CUDA driver initialization failed|CUDA error: hardware stack error"
        r"|CUDA error: unspecified launch failure|CUDA error: an illegal instruction|fallen off the bus|\bNVRM: Xid\b"
        r"|system not yet initialized|sees \d+ GPUs? \(CUDA_VISIBLE_DEVICES|no network interface '"
        r"|Transport endpoint is not connected|Stale file handle|Input/output error|Remote I/O error",
    ),
    (
        Cause.RENDEZVOUS,
        r"ranks? [\d, ]+ of \d+ did not come within|not all ranks came within|could not reach rank 0"
        r"|Address already in use|EADDRINUSE",
    ),
    (
        Cause.PEER_LOST,
        r"leaves because others cannot start"
        r"|Connection reset by peer|Connection closed by peer|Connection refused|Broken pipe|Socket closed|socket.*EOF"
        r"|unexpected EOF|Timed out waiting|Timed out after \d+ ?m?s|[Cc]ollective operation timeout|wait timeout"
        r"|ncclRemoteError|ncclSystemError|ncclInternalError|NCCL.*(timeout|timed out|unhandled system error)"
        r"|remote process (has )?(exited|terminated)|recvValue failed|Application timeout caused pair closure"
        r"|[Gg]loo.*(timed out|timeout|connectFullMesh failed)|DistNetworkError|DistStoreError"
        r"|rank 0 (did not|could not) finish|ProcessGroup.*aborted|Cleaning up.*communicator",
    ),
)
_TABLE = tuple((cause, re.compile(pattern)) for cause, pattern in _WORDS)
_CLASSES = {
    "OutOfMemoryError": Cause.GPU_OUT_OF_MEMORY,
    "MemoryError": Cause.HOST_OUT_OF_MEMORY,
    "DataError": Cause.DATA_ERROR,
    "ModelError": Cause.MODEL_ERROR,
    "RecipeError": Cause.RECIPE_ERROR,
    "DoesNotFitError": Cause.RECIPE_ERROR,
    "FencedError": Cause.SUPERSEDED,
    "ConflictError": Cause.RECIPE_ERROR,
    "ClusterError": Cause.RECIPE_ERROR,
    "TemporaryError": Cause.UNKNOWN,
    "ConnectionResetError": Cause.PEER_LOST,
    "BrokenPipeError": Cause.PEER_LOST,
    "ConnectionRefusedError": Cause.PEER_LOST,
    "DistBackendError": Cause.PEER_LOST,
    "DistNetworkError": Cause.PEER_LOST,
    "DistStoreError": Cause.PEER_LOST,
}
"""Error classes whose name says enough where the words do not."""
_OWN = frozenset({"DataError", "ModelError", "RecipeError", "DoesNotFitError", "FencedError"})
"""Our own errors about the user's files: their words quote those files, and must not be searched for symptoms."""
_CODES = {
    1: Cause.OUR_BUG,
    2: Cause.RECIPE_ERROR,
    3: Cause.DATA_ERROR,
    4: Cause.MODEL_ERROR,
    5: Cause.RECIPE_ERROR,
    6: Cause.RECIPE_ERROR,
    7: Cause.RECIPE_ERROR,
    94: Cause.HUNG,
    95: Cause.RANK_EXITED,
}
"""Exit codes of launcher.errors, and the supervisor's own."""
_CRASHES = frozenset({"SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSYS", "SIGTRAP"})


def cause_of_error(kind: str, message: str) -> Cause:
    """What an exception of class `kind` that said `message` means."""
    if kind in _OWN:
        return _CLASSES[kind]
    for cause, words in _TABLE:
        if words.search(message) or words.search(kind):
            return cause
    return _CLASSES.get(kind, Cause.OUR_BUG)


def cause_of_signal(name: str) -> Cause:
    """What it means that a rank was ended by a signal."""
    return Cause.CRASHED if name in _CRASHES else Cause.RANK_KILLED


def cause_of_exit(code: int) -> Cause:
    """What an exit code of our own worker or supervisor means, where no report says more; above 128 a signal."""
    if 128 < code < 128 + signal.NSIG:
        with contextlib.suppress(ValueError):
            return cause_of_signal(signal.Signals(code - 128).name)
    return _CODES.get(code, Cause.UNKNOWN)
