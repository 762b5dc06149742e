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
from launcher.facts.offer import AccountLimits, Partition, Qos
from launcher.facts.slurm_text import MIB, gpus, minutes, names, records, rows, seconds, settings, tres, whole, word

_NODE_COLUMNS = "%R|%c|%m|%G|%D|%t|%f"
_LOST_STATES = frozenset({"down", "drain", "drng", "drained", "draining", "fail", "failg", "err", "inval", "n/a"})
"""Compact states of sinfo in which a node starts no job and does not come back by itself."""
_QOS_COLUMNS = (
    *("MaxWall", "MaxJobsPU", "MaxSubmitPU", "MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES", "MinTRES"),
    *("PreemptMode", "GraceTime", "Flags", "Preempt", "Name"),
)
_ACCOUNT_COLUMNS = (
    *("MaxWall", "MaxJobs", "MaxSubmitJobs", "MaxTRES", "MaxTRESPerNode", "GrpTRES", "GrpJobs", "GrpSubmitJobs"),
    *("DefaultQOS", "Partition", "User", "QOS", "Account"),
)
"""Names come last: whatever stands in one, the amounts before it are read right."""
_MOST_ACCOUNTS = 50
"""Accounts of one question."""


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
        return slurm_config().get("ClusterName", "slurm")
    return "slurm"


def slurm_config() -> dict[str, str]:
    """What `scontrol show config` says, name -> value.

    Raises:
        TemporaryError, ClusterError: Slurm is not here, does not answer, or does not tell this user.
    """
    return settings(run_slurm(["scontrol", "show", "config"]))


def partitions() -> tuple[Partition, ...]:
    """Every partition this user can see, with limits and the best of its nodes.

    Raises:
        TemporaryError: Slurm is not here or does not answer.
        ClusterError: Slurm's answer cannot be used.
    """
    listing = run_slurm(["scontrol", "--oneliner", "show", "partition"])
    nodes = _nodes_of_partitions(run_slurm(["sinfo", "--noheader", "--exact", f"--format={_NODE_COLUMNS}"]))
    return tuple(_partition(fields, nodes) for fields in records(listing, "PartitionName"))


def _partition(fields: dict[str, str], nodes: dict[str, dict[str, Any]]) -> Partition:
    most_mem = whole(fields.get("MaxMemPerNode"))
    return Partition(
        name=fields["PartitionName"],
        default=fields.get("Default") == "YES",
        max_time_min=minutes(fields.get("MaxTime")),
        default_time_min=minutes(fields.get("DefaultTime")),
        nodes=whole(fields.get("TotalNodes")) or 0,
        max_nodes=whole(fields.get("MaxNodes")),
        min_nodes=whole(fields.get("MinNodes")) or None,
        up=fields.get("State", "UP") == "UP",
        allow_accounts=names(fields.get("AllowAccounts")),
        allow_qos=names(fields.get("AllowQos")),
        allow_groups=names(fields.get("AllowGroups")),
        deny_accounts=names(fields.get("DenyAccounts")),
        deny_qos=names(fields.get("DenyQos")),
        max_cpus_per_node=whole(fields.get("MaxCPUsPerNode")),
        max_mem_bytes_per_node=most_mem * MIB if most_mem else None,
        qos=word(fields.get("QoS")),
        preempt_mode=word(fields.get("PreemptMode")),
        preempt_grace_s=seconds(fields.get("GraceTime")),
        **nodes.get(fields["PartitionName"], {}),
    )


def _nodes_of_partitions(listing: str) -> dict[str, dict[str, Any]]:
    """Partition -> what its nodes offer: CPUs, memory and GPUs of the best one, features of all, how many are up."""
    found: dict[str, dict[str, Any]] = {}
    for line in listing.splitlines():
        # From the right: a partition's name may hold a pipe.
        words = line.rsplit("|", _NODE_COLUMNS.count("|"))
        if len(words) < 4:
            continue
        name, cpus, mem, gres, *more = words
        best = found.setdefault(
            name, {"gpus_per_node": 0, "gpu_types": (), "cpus_per_node": 0, "mem_bytes_per_node": 0}
        )
        here = gpus(gres)
        best["gpus_per_node"] = max(best["gpus_per_node"], sum(count for _, count in here))
        best["gpu_types"] = tuple(dict.fromkeys([*best.get("gpu_types", ()), *(kind for kind, _ in here if kind)]))
        best["cpus_per_node"] = max(best["cpus_per_node"], whole(cpus.rstrip("+")) or 0)
        best["mem_bytes_per_node"] = max(best["mem_bytes_per_node"], (whole(mem.rstrip("+")) or 0) * MIB)
        if len(more) == 3:
            count, state, features = more
            best["nodes_up"] = best.get("nodes_up", 0) + (whole(count) or 0) * _starts_jobs(state)
            best["nodes_silent"] = best.get("nodes_silent", 0) + (whole(count) or 0) * _is_silent(state)
            best["features"] = tuple(sorted({*best.get("features", ()), *names(features)}))
    return found


_MARKS = "*~#!%$@^-+"


def _starts_jobs(state: str) -> bool:
    """Whether nodes in sinfo's compact state start jobs, now or when theirs have ended."""
    return state.rstrip(_MARKS) not in _LOST_STATES and not _is_silent(state)


def _is_silent(state: str) -> bool:
    """Whether they have not answered yet, as after a restart of the controller: they are back soon, or marked down."""
    bare = state.rstrip(_MARKS)
    return bare not in _LOST_STATES and (bare == "unk" or state.endswith("*"))


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
    found = [line.split("|", 1) for line in text.splitlines() if "|" in line]
    accounts = _unique(row[0] for row in found)
    return (accounts, _unique(name for row in found for name in row[1].split(","))) if accounts else None


def account_limits(cluster: str | None = None, *, groups: bool = True) -> tuple[AccountLimits, ...] | None:
    """What each of this user's accounts allows, by name; None where accounting is off or does not say.

    `cluster`: of a database that several clusters share, this one's. `groups`: also ask, by a second call, what holds
    for all users of an account together.
    """
    here = [f"cluster={cluster}"] if cluster else []
    text = _sacctmgr("associations", f"user={user_name()}", *here, columns=_ACCOUNT_COLUMNS)
    if text is None:
        return None
    mine = [_account(row) for row in rows(text, _ACCOUNT_COLUMNS) if row["Account"]]
    found = tuple(sorted(mine, key=lambda one: (one.account or "", one.partition or "")))
    return with_group_limits(found, cluster) if groups else found


def with_group_limits(found: tuple[AccountLimits, ...], cluster: str | None = None) -> tuple[AccountLimits, ...]:
    """The same, with the group limits of the accounts themselves where the user's own rows set none."""
    plain = sorted({one.account for one in found if one.account and re.fullmatch(r"[\w.@+-]+", one.account)})
    if not plain:
        return found
    which = [f"account={','.join(plain[:_MOST_ACCOUNTS])}", "user=", *([f"cluster={cluster}"] if cluster else [])]
    text = _sacctmgr("associations", *which, columns=_ACCOUNT_COLUMNS)
    accounts = {row["Account"]: _account(row) for row in rows(text or "", _ACCOUNT_COLUMNS) if not row["User"]}
    return tuple(one.within(accounts.get(one.account or "")) for one in found)


def _account(row: dict[str, str]) -> AccountLimits:
    return AccountLimits(
        account=row["Account"],
        partition=word(row["Partition"]),
        qos=tuple(sorted(names(row["QOS"]))),
        default_qos=word(row["DefaultQOS"]),
        max_time_min=minutes(row["MaxWall"]),
        max_jobs=whole(row["MaxJobs"]),
        max_submit_jobs=whole(row["MaxSubmitJobs"]),
        max_tres=_amounts(row["MaxTRES"]),
        max_tres_per_node=_amounts(row["MaxTRESPerNode"]),
        group_tres=_amounts(row["GrpTRES"]),
        group_jobs=whole(row["GrpJobs"]),
        group_submit_jobs=whole(row["GrpSubmitJobs"]),
    )


def qos_limits() -> tuple[Qos, ...] | None:
    """Every QOS this user may see, by name; None where accounting is off or does not say."""
    text = _sacctmgr("qos", columns=_QOS_COLUMNS)
    if text is None:
        return None
    return tuple(sorted((_qos(row) for row in rows(text, _QOS_COLUMNS) if row["Name"]), key=lambda one: one.name))


def _qos(row: dict[str, str]) -> Qos:
    return Qos(
        name=row["Name"],
        max_time_min=minutes(row["MaxWall"]),
        max_jobs=whole(row["MaxJobsPU"]),
        max_submit_jobs=whole(row["MaxSubmitPU"]),
        max_tres=_amounts(row["MaxTRES"]),
        max_tres_per_user=_amounts(row["MaxTRESPU"]),
        max_tres_per_account=_amounts(row["MaxTRESPA"]),
        group_tres=_amounts(row["GrpTRES"]),
        min_tres=_amounts(row["MinTRES"]),
        preempt_mode=word(row["PreemptMode"]),
        preempt_grace_s=seconds(row["GraceTime"]),
        preempts=tuple(sorted(names(row["Preempt"]))),
        flags=names(row["Flags"]),
    )


def _amounts(text: str) -> str | None:
    """Slurm's own words, where they name an amount."""
    return text if tres(text) else None


def _sacctmgr(what: str, *which: str, columns: tuple[str, ...]) -> str | None:
    """One table of the accounting database; None where there is none, or it refuses or does not answer."""
    command = ["sacctmgr", "--noheader", "--parsable2", "show", what, *which, f"format={','.join(columns)}"]
    try:
        return run_slurm(command, timeout_s=15)
    except (ClusterError, TemporaryError):
        return None


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({name for name in names if name}))


def probe_slurm() -> dict[str, Any]:
    """Site fields as Slurm tells them: the best node of the default partition stands for all.

    Where the default partition has no GPUs, the one with most GPUs is taken instead.

    Raises:
        TemporaryError, ClusterError: Slurm is not here, does not answer, or shows no partition.
    """
    found = partitions()
    chosen = best_partition(found)
    count = chosen.gpus_per_node or 0
    kind = chosen.gpu_types[0] if chosen.gpu_types else None
    return {
        "name": cluster_name(),
        "executor": "slurm",
        "gpu": known_gpu(kind) if count else "cpu",
        "gpus_per_node": count or 1,
        "gpu_type": kind,
        "request_gpus": count > 0,
        "max_nodes": chosen.max_nodes or chosen.nodes,
        "cpus_per_node": chosen.cpus_per_node or 1,
        "mem_bytes_per_node": chosen.mem_bytes_per_node or 0,
        "partitions": found,
        "default_partition": chosen.name,
        "max_time_min": chosen.max_time_min,
    }


def best_partition(found: tuple[Partition, ...]) -> Partition:
    """The default partition; where it has no GPUs, the one with most of them.

    Raises:
        ClusterError: there is none.
    """
    if not found:
        raise ClusterError("Slurm shows no partition to this user; ask the administrators which one to use")
    return max(found, key=lambda partition: (bool(partition.gpus_per_node), partition.default, _gpus_of(partition)))


def _gpus_of(partition: Partition) -> int:
    return (partition.gpus_per_node or 0) * partition.nodes


def known_gpu(gres_type: str | None) -> str:
    """Catalogue name of a GRES type such as a100.

    Raises:
        ClusterError: the type says nothing; a site profile has to.
    """
    try:
        return gpu(gres_type or "").name
    except ClusterError as error:
        what = f"GPUs of type {gres_type!r}" if gres_type else "GPUs without a type"
        raise ClusterError(
            f"Slurm offers {what}, which does not say what they are; `launcher init --probe-job` asks a node and "
            f"writes slurm/<site>.yaml, or write it with `gpu:` yourself. {error}"
        ) from error


def probe_machine() -> dict[str, Any]:
    """Site fields of this machine: its GPUs by nvidia-smi, or its CPU."""
    cpus = len(os.sched_getaffinity(0))
    found = _nvidia_gpus()
    return {
        "name": "local",
        "executor": "local",
        "gpu": gpu(found[0]).name if found else "cpu",
        "gpus_per_node": len(found) or 1,
        "max_nodes": 1,
        "cpus_per_node": cpus,
        "mem_bytes_per_node": _memory_bytes(),
        "request_gpus": bool(found),
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
