"""Preflight of the partition: what its limits and the best of its nodes can never give to a job."""

from __future__ import annotations

import grp
import os
import re
from collections.abc import Iterator, Sequence

from launcher.facts.offer import Partition
from launcher.recipe.problems import nearest
from launcher.recipe.scalars import format_minutes
from launcher.runs.asked import Asked

_FEATURE = re.compile(r"[A-Za-z_][\w.:=-]*")


def asked_partitions(job: Asked, known: Sequence[Partition]) -> list[str]:
    """Names of the partitions asked for; the cluster's default where none is; empty where it has none."""
    default = next((partition.name for partition in known if partition.default), None)
    wanted = job.partition or default
    return wanted.split(",") if wanted else []


def partition_problems(
    job: Asked, known: Sequence[Partition], notices: list[str], *, ignored: Sequence[str] = ()
) -> list[str]:
    """Problems of each partition asked for; none when at least one of several can take the job.

    `ignored`: flags of the job's QOS, such as PartitionTimeLimit, that lift limits of the partition.
    """
    names = asked_partitions(job, known)
    if not names:
        return ["slurm.partition: this cluster has no default; choose one of " + ", ".join(one.name for one in known)]
    by_name = {partition.name: partition for partition in known}
    found: list[list[str]] = []
    for name in names:
        if name not in by_name:
            close = nearest(name, by_name)
            hint = f"did you mean {close[0]}? " if close else ""
            return [f"slurm.partition: {name!r} does not exist; {hint}there are: {', '.join(by_name)}"]
        found.append([*_who(by_name[name], job), *_limits(by_name[name], job, ignored), *_nodes(by_name[name], job)])
    fitting = [by_name[name] for name, problems in zip(names, found, strict=True) if not problems]
    if not fitting:
        return found[0]
    nodes, up = job.plan.chosen.candidate.nodes, max((one.nodes_up or 0 for one in fitting), default=0)
    if all(one.nodes_up is not None for one in fitting) and up < nodes:
        notices.append(
            f"cluster: {nodes} nodes asked, and {up} of partition {fitting[0].name} are up now; the job waits until "
            f"others come back (sinfo -R says why they are down), or ask for slurm.nodes={up}"
        )
    return []


def _who(partition: Partition, job: Asked) -> Iterator[str]:
    """Whom the partition takes, and whether it starts anybody's jobs."""
    name = partition.name
    if not partition.up:
        yield f"slurm.partition: {name} does not start jobs now (it is not UP); {_another(job)}"
    elif partition.nodes_up == 0 and not partition.nodes_silent and partition.nodes:
        yield (
            f"slurm.partition: all {partition.nodes} nodes of {name} are down or drained, so no job can start there; "
            f"sinfo -R says why; {_another(job)}"
        )
    if job.account and partition.allow_accounts and job.account not in partition.allow_accounts:
        yield f"slurm.account: partition {name} is for {', '.join(partition.allow_accounts)}, not {job.account}"
    if job.account and job.account in partition.deny_accounts:
        yield f"slurm.account: partition {name} does not take {job.account}; use another account or partition"
    if job.qos and partition.allow_qos and job.qos not in partition.allow_qos:
        yield f"slurm.qos: partition {name} takes {', '.join(partition.allow_qos)}, not {job.qos}"
    if job.qos and job.qos in partition.deny_qos:
        yield f"slurm.qos: partition {name} does not take {job.qos}; use another QOS or partition"
    if partition.allow_groups and os.getuid() != 0 and not set(partition.allow_groups) & _own_groups():
        groups = ", ".join(partition.allow_groups)
        yield f"slurm.partition: {name} is for members of the groups {groups}, and you are in none; {_another(job)}"


def _another(job: Asked) -> str:
    return "choose another slurm.partition" if job.recipe.slurm.partition else "name another one: slurm.partition=..."


def _own_groups() -> set[str]:
    found = set()
    for number in {os.getgid(), *os.getgroups()}:
        try:
            found.add(grp.getgrgid(number).gr_name)
        except KeyError:
            continue
    return found


def _limits(partition: Partition, job: Asked, ignored: Sequence[str]) -> Iterator[str]:
    """Nodes and time."""
    nodes, name = job.plan.chosen.candidate.nodes, partition.name
    given = partition.nodes if "PartitionMaxNodes" in ignored else partition.max_nodes or partition.nodes
    most = min(partition.nodes, given)
    if nodes > most:
        yield f"slurm.nodes: {nodes} nodes asked of partition {name}, which gives at most {most}"
    if partition.min_nodes and nodes < partition.min_nodes and "PartitionMinNodes" not in ignored:
        yield f"slurm.nodes: {nodes} asked of partition {name}, which takes jobs of {partition.min_nodes} nodes or more"
    limit, wanted = partition.max_time_min, job.plan.job.time_limit_min
    if limit is not None and wanted > limit and "PartitionTimeLimit" not in ignored:
        asked = format_minutes(wanted)
        yield f"slurm.time: {asked} asked of partition {name}, which allows {format_minutes(limit)}; set slurm.time"


def _nodes(partition: Partition, job: Asked) -> Iterator[str]:
    """GPUs, CPUs, memory and features of its nodes."""
    candidate, name, site = job.plan.chosen.candidate, partition.name, job.site
    if site.request_gpus and partition.gpus_per_node is not None:
        if candidate.gpus_per_node > partition.gpus_per_node:
            yield (
                f"slurm.gpus_per_node: {candidate.gpus_per_node} asked, but a node of partition {name} has "
                f"{partition.gpus_per_node}"
            )
        elif site.gpu_type and partition.gpu_types and site.gpu_type not in partition.gpu_types:
            has = ", ".join(partition.gpu_types)
            yield f"gpu_type: the site profile says {site.gpu_type!r}; partition {name} has {has}"
    yield from _cpus(partition, job)
    yield from _memory(partition, job)
    constraint = job.recipe.slurm.constraint
    if constraint and partition.nodes_up is not None:
        for feature in dict.fromkeys(_FEATURE.findall(constraint)):
            if feature not in partition.features:
                close = nearest(feature, partition.features)
                hint = f"did you mean {close[0]}? " if close else ""
                has = ", ".join(partition.features) or "none"
                yield f"slurm.constraint: no node of partition {name} has {feature!r}; {hint}features there: {has}"


def _cpus(partition: Partition, job: Asked) -> Iterator[str]:
    candidate, each = job.plan.chosen.candidate, job.plan.job.cpus_per_task
    known = [count for count in (partition.cpus_per_node, partition.max_cpus_per_node) if count]
    cpus, most = candidate.gpus_per_node * each, min(known, default=None)
    if most and cpus > most:
        fits = max(1, most // candidate.gpus_per_node)
        verb = "has" if most == partition.cpus_per_node else "gives a job"
        yield (
            f"slurm.cpus_per_task: {candidate.gpus_per_node} tasks x {each} CPUs asked, but a node of partition "
            f"{partition.name} {verb} {most}; set slurm.cpus_per_task={fits}"
        )


def _memory(partition: Partition, job: Asked) -> Iterator[str]:
    asked = job.mem_bytes
    known = [size for size in (partition.mem_bytes_per_node, partition.max_mem_bytes_per_node) if size]
    most = min(known, default=None)
    if asked and most and asked > most:
        verb = "has" if most == partition.mem_bytes_per_node else "gives a job"
        yield f"slurm.mem: {job.mem} asked, but a node of partition {partition.name} {verb} {most // 2**30}G"
