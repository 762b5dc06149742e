"""Probing: what Slurm's commands and this machine say about themselves, as field values of Site."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, LauncherError, TemporaryError
from launcher.facts.command import run_command, run_slurm
from launcher.facts.gpu import gpu
from launcher.facts.offer import Partition
from launcher.recipe.scalars import UnreadableError, read_minutes

_GPU_GRES = re.compile(r"gpu(?::([^:(,\s]+))?:(\d+)")
_MIB = 2**20


def slurm_answers() -> bool:
    """Whether sinfo is here and its controller answers (a few seconds at most)."""
    try:
        run_slurm(["sinfo", "--version"], timeout_s=5)
        run_slurm(["sinfo", "--noheader", "--format=%R"], timeout_s=15)
    except LauncherError:
        return False
    return True


def cluster_name() -> str:
    """ClusterName of slurm.conf; "slurm" where it cannot be read."""
    with contextlib.suppress(LauncherError):
        match = re.search(r"^ClusterName\s*=\s*(\S+)", run_slurm(["scontrol", "show", "config"]), re.MULTILINE)
        if match:
            return match[1]
    return "slurm"


def partitions() -> tuple[Partition, ...]:
    """Every partition this user can see, with limits and the best of its nodes.

    Raises:
        TemporaryError: Slurm is not here or does not answer.
        ClusterError: Slurm's answer cannot be used.
    """
    listing = run_slurm(["scontrol", "--oneliner", "show", "partition"])
    nodes = _nodes_of_partitions(run_slurm(["sinfo", "--noheader", "--exact", "--format=%R|%c|%m|%G"]))
    return tuple(_partition(line, nodes) for line in listing.splitlines() if line.startswith("PartitionName="))


def _partition(line: str, nodes: dict[str, dict[str, Any]]) -> Partition:
    fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
    return Partition(
        name=fields["PartitionName"],
        default=fields.get("Default") == "YES",
        max_time_min=parse_limit(fields.get("MaxTime", "UNLIMITED")),
        nodes=_whole(fields.get("TotalNodes")) or 0,
        max_nodes=_whole(fields.get("MaxNodes")),
        up=fields.get("State", "UP") == "UP",
        allow_accounts=_names(fields.get("AllowAccounts")),
        allow_qos=_names(fields.get("AllowQos")),
        **nodes.get(fields["PartitionName"], {}),
    )


def _nodes_of_partitions(listing: str) -> dict[str, dict[str, Any]]:
    """Partition -> best CPUs, memory and GPUs of one of its nodes, from `sinfo %R|%c|%m|%G`."""
    found: dict[str, dict[str, Any]] = {}
    for line in listing.splitlines():
        words = line.split("|", 3)
        if len(words) != 4:
            continue
        best = found.setdefault(
            words[0], {"gpus_per_node": 0, "gpu_types": (), "cpus_per_node": 0, "mem_bytes_per_node": 0}
        )
        gpus = [(kind, int(count)) for kind, count in _GPU_GRES.findall(words[3])]
        best["gpus_per_node"] = max(best["gpus_per_node"], sum(count for _, count in gpus))
        best["gpu_types"] = tuple(dict.fromkeys([*best["gpu_types"], *(kind for kind, _ in gpus if kind)]))
        best["cpus_per_node"] = max(best["cpus_per_node"], _whole(words[1].rstrip("+")) or 0)
        best["mem_bytes_per_node"] = max(best["mem_bytes_per_node"], (_whole(words[2].rstrip("+")) or 0) * _MIB)
    return found


def parse_limit(text: str) -> int | None:
    """Minutes of Slurm's time limit; None for UNLIMITED."""
    with contextlib.suppress(UnreadableError):
        return read_minutes(text)
    return None


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _names(text: str | None) -> tuple[str, ...]:
    return () if text in (None, "", "ALL", "N/A") else tuple(str(text).split(","))


def user_name() -> str:
    """Who submits: the account of this process, not what $USER claims."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def associations() -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Accounts and QOS this user may use; None where accounting is off or does not say."""
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "associations"]
    try:
        text = run_slurm([*command, f"user={user_name()}", "format=Account,QOS"], timeout_s=15)
    except (ClusterError, TemporaryError):
        return None
    rows = [line.split("|", 1) for line in text.splitlines() if "|" in line]
    accounts = _unique(row[0] for row in rows)
    return (accounts, _unique(name for row in rows for name in row[1].split(","))) if accounts else None


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({name for name in names if name}))


def probe_slurm() -> dict[str, Any]:
    """Site fields as Slurm tells them: the best node of the default partition stands for all.

    Where the default partition has no GPUs, the one with most GPUs is taken instead.

    Raises:
        TemporaryError, ClusterError: Slurm is not here, does not answer, or shows no partition.
    """
    found = partitions()
    if not found:
        raise ClusterError("Slurm shows no partition to this user; ask the administrators which one to use")
    chosen = max(found, key=lambda partition: (bool(partition.gpus_per_node), partition.default, _gpus_of(partition)))
    gpus = chosen.gpus_per_node or 0
    kind = chosen.gpu_types[0] if chosen.gpu_types else None
    return {
        "name": cluster_name(),
        "executor": "slurm",
        "gpu": _known_gpu(kind) if gpus else "cpu",
        "gpus_per_node": gpus or 1,
        "gpu_type": kind,
        "request_gpus": gpus > 0,
        "max_nodes": chosen.max_nodes or chosen.nodes,
        "cpus_per_node": chosen.cpus_per_node or 1,
        "mem_bytes_per_node": chosen.mem_bytes_per_node or 0,
        "partitions": found,
        "default_partition": chosen.name,
        "max_time_min": chosen.max_time_min,
    }


def _gpus_of(partition: Partition) -> int:
    return (partition.gpus_per_node or 0) * partition.nodes


def _known_gpu(gres_type: str | None) -> str:
    """Catalogue name of a GRES type such as a100.

    Raises:
        ClusterError: the type says nothing; a site profile has to.
    """
    try:
        return gpu(gres_type or "").name
    except ClusterError as error:
        what = f"GPUs of type {gres_type!r}" if gres_type else "GPUs without a type"
        raise ClusterError(
            f"Slurm offers {what}, which does not say what they are; write slurm/<site>.yaml with `gpu:` "
            f"(slurm/dev-cluster.yaml is an example). {error}"
        ) from error


def probe_machine() -> dict[str, Any]:
    """Site fields of this machine: its GPUs by nvidia-smi, or its CPU."""
    cpus = len(os.sched_getaffinity(0))
    gpus = _nvidia_gpus()
    return {
        "name": "local",
        "executor": "local",
        "gpu": gpu(gpus[0]).name if gpus else "cpu",
        "gpus_per_node": len(gpus) or 1,
        "max_nodes": 1,
        "cpus_per_node": cpus,
        "mem_bytes_per_node": _memory_bytes(),
        "request_gpus": bool(gpus),
    }


def _nvidia_gpus() -> list[str]:
    """Names of this machine's GPUs; empty where there is none or no driver."""
    try:
        ran = run_command(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], timeout_s=20)
    except TemporaryError:
        return []
    names = [line.strip() for line in ran.stdout.splitlines() if line.strip()] if ran.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names if visible is None else names[: len([one for one in visible.split(",") if one.strip()])]


def _memory_bytes() -> int:
    """RAM of this machine, or of the control group it is held in where that is less."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    total = int(match[1]) * 1024 if match else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
