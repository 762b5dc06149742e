"""`slurm.extra`: further sbatch long options, minus those the launcher owns or that run or leak things."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_OWN_FIELD = {
    "job-name": "name",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "constraint": "slurm.constraint",
    "time": "slurm.time",
    "nodes": "slurm.nodes",
    "gpus": "slurm.gpus_per_node",
    "gpus-per-node": "slurm.gpus_per_node",
    "gpus-per-task": "slurm.gpus_per_node",
    "gpus-per-socket": "slurm.gpus_per_node",
    "cpus-per-task": "slurm.cpus_per_task",
    "mem": "slurm.mem",
    "mem-per-cpu": "slurm.mem",
    "mem-per-gpu": "slurm.mem",
    "exclusive": "slurm.exclusive",
    "requeue": "slurm.requeue",
    "no-requeue": "slurm.requeue",
}
"""sbatch option -> the recipe field that sets it."""

_REFUSED = {
    "wrap": "it is a shell command",
    "export": "the job's environment comes from the site profile",
    "export-file": "the job's environment comes from the site profile",
    "get-user-env": "the job's environment comes from the site profile",
    "output": "logs go to the run folder",
    "error": "logs go to the run folder",
    "input": "jobs read nothing",
    "open-mode": "logs are always appended to",
    "chdir": "jobs start where submit was typed",
    "ntasks": "one task per GPU is started",
    "ntasks-per-node": "one task per GPU is started",
    "ntasks-per-gpu": "one task per GPU is started",
    "ntasks-per-core": "one task per GPU is started",
    "ntasks-per-socket": "one task per GPU is started",
    "tres-per-task": "one task per GPU is started",
    "gres": "GPUs come from slurm.gpus_per_node, their type from the site profile",
    "gpu-bind": "the worker chooses its GPU by local rank",
    "signal": "the launcher sets it from the planned checkpoint time",
    "array": "one run is one job",
    "wckey": "sites that track them refuse unknown ones; set SBATCH_WCKEY where yours needs one",
    "parsable": "the launcher reads sbatch's answer",
    "quiet": "the launcher reads sbatch's answer",
    "test-only": "write launcher submit --dry-run",
    "wait": "write launcher wait",
    "uid": "jobs run as you",
    "gid": "jobs run as you",
    "clusters": "runs are followed on this cluster only",
    "kill-on-bad-exit": "always set",
    "help": "not a job option",
    "usage": "not a job option",
    "version": "not a job option",
}
"""sbatch option -> why it may not be set."""


def check_extra(extra: Mapping[str, Any], refuse: Callable[[str, str], None]) -> dict[str, Any]:
    """The options with sbatch's spelling (dashes); `refuse(path, message)` is told of every bad one."""
    found: dict[str, Any] = {}
    for written, value in extra.items():
        path, option = f"slurm.extra.{written}", written.removeprefix("--").replace("_", "-")
        problem = _problem(option, value) or (f"stands twice, as {option}" if option in found else None)
        if problem:
            refuse(path, problem)
        found[option] = value
    return found


def _problem(option: str, value: Any) -> str | None:
    if not re.fullmatch(r"[a-z][a-z0-9-]+", option):
        return "expected one of sbatch's long options, such as reservation"
    if option in _OWN_FIELD:
        return f"has a field of its own: {_OWN_FIELD[option]}"
    if option in _REFUSED:
        return f"may not be set: {_REFUSED[option]}"
    if value is not None and not isinstance(value, str | int | float | bool):
        return "expected one value; write several as sbatch takes them, with commas"
    return None
