"""remedies: one command that helps after each cause, for when nothing happens by itself.

`launcher resume` goes on with the same training only (changes.py); what would change it is a new run: `submit`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from launcher.runs.state import Evidence
from launcher.runs.symptoms import Cause

_UNITS = {"K": "K", "M": "M", "G": "G", "T": "T", "": "M"}


def command_for(cause: Cause, evidence: Evidence, *, rank: int | None) -> str | None:
    """The command to type; None where there is nothing to be done."""
    run = shlex.quote(evidence.run.run_id)
    resume = f"launcher resume {run}"
    anew = f"launcher submit {shlex.quote(str(evidence.run.recipe))}"
    match cause:
        case Cause.FINISHED:
            return f"launcher status {run}"
        case Cause.NEVER_STARTED if evidence.job_id is None:
            return anew
        case Cause.GPU_OUT_OF_MEMORY:
            return _smaller(resume, anew, evidence)
        case Cause.HOST_OUT_OF_MEMORY:
            return f"{resume} slurm.mem={_more_memory(evidence)}"
        case Cause.DISK_FULL:
            return "launcher gc"
        case Cause.NAN_LOSS:
            return f"{anew} train.learning_rate={_half_rate(evidence):g}"
        case Cause.RECIPE_ERROR | Cause.MODEL_ERROR:
            return f"launcher plan {shlex.quote(str(evidence.run.recipe))}"
        case Cause.DATA_ERROR | Cause.OUR_BUG | Cause.LAUNCH_FAILED:
            return f"launcher logs {run} --rank {max(rank or 0, 0)}"
        case Cause.DAMAGED_CHECKPOINTS:
            return f"mv {shlex.quote(str(evidence.run.checkpoints))}/step-* {shlex.quote(str(evidence.run.path))}"
        case _:
            return resume


def micro_batch(plan: Mapping[str, Any] | None) -> int | None:
    """Micro-batch of a plan.json; None where it does not say."""
    chosen = (plan or {}).get("chosen")
    value = chosen.get("micro_batch") if isinstance(chosen, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def smaller_micro_batch(micro: int, accumulation: int) -> int | None:
    """The largest micro-batch, at most half as big, that gives the same global batch; None at 1."""
    rows = micro * accumulation
    return next((size for size in range(micro // 2, 0, -1) if rows % size == 0), None)


def _plan(evidence: Evidence) -> Mapping[str, Any]:
    import json

    try:
        plan = json.loads(evidence.run.plan.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _chosen(evidence: Evidence) -> Mapping[str, Any]:
    chosen = _plan(evidence).get("chosen")
    return chosen if isinstance(chosen, Mapping) else {}


def _smaller(resume: str, anew: str, evidence: Evidence) -> str:
    """A smaller micro-batch for the same run; at 1 a new one with checkpointing, else with shorter rows."""
    chosen = _chosen(evidence)
    micro, accumulation = chosen.get("micro_batch"), chosen.get("gradient_accumulation")
    if isinstance(micro, int) and isinstance(accumulation, int):
        smaller = smaller_micro_batch(micro, accumulation)
        if smaller is not None:
            return f"{resume} train.per_device_train_batch_size={smaller}"
    if chosen.get("gradient_checkpointing") is False:
        return f"{anew} train.gradient_checkpointing=true"
    length = chosen.get("seq_len")
    return f"{anew} data.max_seq_length={length // 2 if isinstance(length, int) else 1024}"


def _more_memory(evidence: Evidence) -> str:
    """Twice what was asked for; all of the node's where nothing was."""
    request = evidence.job.get("request")
    asked = request.get("mem") if isinstance(request, Mapping) else None
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", str(asked or "").upper())
    return f"{2 * int(match[1])}{_UNITS[match[2]]}" if match and int(match[1]) else "0"


def _half_rate(evidence: Evidence) -> float:
    rate = _chosen(evidence).get("learning_rate")
    return float(rate) / 2 if isinstance(rate, int | float) and rate > 0 else 1e-5
