"""Place: which rank this process is, read from whatever started it.

Ranks are started by submitit's local controller, by srun, or by anything that sets RANK; a process that nobody
started specially is alone. Numbers that contradict each other are refused: a wrong rank trains on wrong rows.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import ClusterError

SUPERVISOR = "LAUNCHER_SUPERVISOR"
"""Set by a rank's supervisor, its process number first: both must give an attempt of one rank the same name."""

RESTART = "LAUNCHER_RESTART"
"""Environment variable with the number of this start of a job that Slurm did not start; the first is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where this process stands among the ranks of one attempt."""

    rank: int
    world_size: int
    local_rank: int
    """Rank within the node; also the number of its GPU."""
    local_world_size: int
    """Ranks on this node."""
    node_rank: int
    nodes: int
    host: str
    job_id: str
    attempt: str
    """Job id and restart count: names this start of the job and no other."""

    @property
    def names(self) -> dict[str, str]:
        """What ledger entries and reports of this attempt carry."""
        return {"job_id": self.job_id, "attempt": self.attempt}


def place_from_environment(environ: Mapping[str, str]) -> Place:
    """Read this process's place from what started it: submitit here, Slurm, anything that sets RANK, or nothing.

    A local job started inside an allocation carries Slurm's variables too, so submitit's own word goes first.

    Raises:
        ClusterError: variables are missing, not numbers, or contradict each other.
    """
    if environ.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_GLOBALID" in environ:
        return _checked(_submitit_local(environ), environ)
    if "SLURM_PROCID" in environ and "SLURM_JOB_ID" in environ:
        return _checked(_slurm(environ), environ)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _checked(_torchrun(environ), environ)
    alone = f"local-{environ.get(SUPERVISOR, '').partition(':')[0] or os.getpid()}"
    return Place(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        node_rank=0,
        nodes=1,
        host=socket.gethostname(),
        job_id=alone,
        attempt=f"{alone}.0",
    )


def _slurm(environ: Mapping[str, str]) -> Place:
    node = _number(environ, "SLURM_NODEID", 0)
    world = _number(environ, "SLURM_NTASKS", 1)
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world)
    per_node = tasks_per_node(tasks)
    if node >= len(per_node) or sum(per_node) != world:
        raise ClusterError(
            f"Slurm's variables contradict each other: SLURM_NTASKS={world}, but {tasks!r} tasks per node "
            f"(node {node} of {len(per_node)}, {sum(per_node)} tasks in all); start ranks with srun"
        )
    job_id = environ["SLURM_JOB_ID"]
    return Place(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=per_node[node],
        node_rank=node,
        nodes=len(per_node),
        host=environ.get("SLURMD_NODENAME") or socket.gethostname(),
        job_id=job_id,
        attempt=f"{job_id}.{_number(environ, 'SLURM_RESTART_COUNT', 0)}",
    )


def _submitit_local(environ: Mapping[str, str]) -> Place:
    world = _number(environ, "SUBMITIT_LOCAL_NTASKS")
    job_id = environ.get("SUBMITIT_LOCAL_JOB_ID", "local")
    return Place(
        rank=_number(environ, "SUBMITIT_LOCAL_GLOBALID"),
        world_size=world,
        local_rank=_number(environ, "SUBMITIT_LOCAL_LOCALID"),
        local_world_size=world,
        node_rank=0,
        nodes=1,
        host=socket.gethostname(),
        job_id=job_id,
        attempt=f"{job_id}.{_number(environ, RESTART, 0)}",
    )


def _torchrun(environ: Mapping[str, str]) -> Place:
    world = _number(environ, "WORLD_SIZE")
    local_world = _number(environ, "LOCAL_WORLD_SIZE", world)
    rank = _number(environ, "RANK")
    job_id = environ.get("TORCHELASTIC_RUN_ID") or f"local-{environ.get('MASTER_PORT', '0')}"
    restart = environ.get(RESTART) or environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(
        rank=rank,
        world_size=world,
        local_rank=_number(environ, "LOCAL_RANK", rank % local_world),
        local_world_size=local_world,
        node_rank=_number(environ, "GROUP_RANK", rank // local_world),
        nodes=-(-world // local_world),
        host=socket.gethostname(),
        job_id=re.sub(r"[^A-Za-z0-9._-]", "-", job_id),
        attempt=re.sub(r"[^A-Za-z0-9._-]", "-", f"{job_id}.{restart}"),
    )


def tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's SLURM_TASKS_PER_NODE: "2(x3),1" -> [2, 2, 2, 1].

    Raises:
        ClusterError: not of that form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part.strip())
        if not match:
            raise ClusterError(f"SLURM_TASKS_PER_NODE={text!r} is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdigit():
        raise ClusterError(f"{name}={text!r} is not a rank number; start ranks with srun or `launcher submit`")
    return int(text)


def _checked(place: Place, environ: Mapping[str, str]) -> Place:
    """Refuse impossible numbers, and RANK or WORLD_SIZE that say something else than the scheduler."""
    problems = []
    if not 0 <= place.rank < place.world_size:
        problems.append(f"rank {place.rank} of {place.world_size} ranks cannot be")
    if not 0 <= place.local_rank < place.local_world_size:
        problems.append(f"local rank {place.local_rank} of {place.local_world_size} on this node cannot be")
    for name, value in (("RANK", place.rank), ("WORLD_SIZE", place.world_size)):
        if environ.get(name, str(value)) != str(value):
            problems.append(f"{name}={environ[name]} contradicts the scheduler, which says {value}; unset {name}")
    if problems:
        raise ClusterError(*problems)
    return place
