"""Place and join: which rank this is, and how the ranks of one attempt find each other.

The rank comes from the scheduler's environment. The address comes from rank 0, which opens a port the
kernel chose (so it is really free) and publishes it, with a random token, in a file named after the attempt:
ranks of an earlier attempt that are still alive on a lost node look for another file and cannot get in.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError
from launcher.runs.folder import write_json

COLLECTIVE_TIMEOUT_S = 1800.0
"""How long a collective may wait for its slowest rank."""
_POLL_S = 0.1
_CONNECT_S = 5.0
"""One attempt to reach a published address; afterwards the file is read again."""


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


# --- which rank --------------------------------------------------------------------------------


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
    return Place(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        node_rank=0,
        nodes=1,
        host=socket.gethostname(),
        job_id=f"local-{os.getpid()}",
        attempt=f"local-{os.getpid()}.0",
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
        attempt=f"{job_id}.0",
    )


def _torchrun(environ: Mapping[str, str]) -> Place:
    world = _number(environ, "WORLD_SIZE")
    local_world = _number(environ, "LOCAL_WORLD_SIZE", world)
    rank = _number(environ, "RANK")
    job_id = environ.get("TORCHELASTIC_RUN_ID") or f"local-{environ.get('MASTER_PORT', '0')}"
    return Place(
        rank=rank,
        world_size=world,
        local_rank=_number(environ, "LOCAL_RANK", rank % local_world),
        local_world_size=local_world,
        node_rank=_number(environ, "GROUP_RANK", rank // local_world),
        nodes=-(-world // local_world),
        host=socket.gethostname(),
        job_id=re.sub(r"[^A-Za-z0-9._-]", "-", job_id),
        attempt=re.sub(r"[^A-Za-z0-9._-]", "-", f"{job_id}.{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"),
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


# --- how they meet -----------------------------------------------------------------------------

_store: Any = None
"""The attempt's key-value store while joined; the ranks also wait for each other through it."""


def join(place: Place, folder: Path, *, device: str, timeout_s: float) -> None:
    """Initialise torch.distributed over the ranks of this attempt and export what libraries read.

    `folder` is the run's rendezvous folder, shared by all nodes; `device` is cuda or cpu; `timeout_s` is how
    long to wait for the last rank.

    Raises:
        ClusterError: ranks are missing at the time-out (rank 0 names them).
    """
    import torch.distributed as dist

    global _store
    _export(place, device)
    address = reachable_address(place.nodes)  # on every rank: gloo and NCCL have to use the same network
    deadline = time.monotonic() + timeout_s
    published = folder / f"{place.attempt}.json"
    store, host, port = (
        _host(place, address, published, timeout_s) if place.rank == 0 else _enter(place, published, deadline)
    )
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)
    _meet(place, store, deadline, timeout_s)
    if place.rank == 0:
        published.unlink(missing_ok=True)  # everyone is in; the token need not lie about
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    _store = store


def leave() -> None:
    """Leave the process group; safe to call when never joined."""
    global _store
    import torch.distributed as dist

    _store = None
    if dist.is_initialized():
        with contextlib.suppress(Exception):  # peers may be gone already; the work is done or lost by now
            dist.destroy_process_group()


def after_rank_zero(name: str, work: Callable[[], Any], *, rank: int, timeout_s: float) -> Any:
    """Run `work` on rank 0 while the others wait, for longer than a collective may take.

    Returns rank 0's result there, None elsewhere. `name` must be new in this attempt. Waiting goes through the
    store, not through a barrier, so the process group's time-out and its watchdog do not count.

    Raises:
        ClusterError: on the other ranks, when rank 0 failed or the time is up.
    """
    if _store is None or rank == 0:
        try:
            result = work()
        except BaseException as error:
            if _store is not None:
                _store.set(name, f"failed: {error}")
            raise
        if _store is not None:
            _store.set(name, "done")
        return result
    try:
        _store.wait([name], timedelta(seconds=timeout_s))
    except Exception as error:
        raise ClusterError(f"rank 0 did not finish {name} within {timeout_s:.0f} s ({error})") from error
    answer = _store.get(name).decode()
    if answer != "done":
        raise ClusterError(f"rank 0 could not finish {name}: {answer.removeprefix('failed: ')}")
    return None


def _export(place: Place, device: str) -> None:
    """Tell DeepSpeed, accelerate and others who we are; without these every process believes to be rank 0 of 1."""
    os.environ |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "LOCAL_SIZE": str(place.local_world_size),  # DeepSpeed's CPU collectives ask by this name
    }
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def _host(place: Place, host: str, published: Path, timeout_s: float) -> tuple[Any, str, int]:
    """Open the store on a free port and publish where it is."""
    from torch.distributed import PrefixStore, TCPStore

    server = TCPStore(
        host, 0, place.world_size, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )
    token = secrets.token_hex(16)
    published.parent.mkdir(parents=True, exist_ok=True)
    write_json(published, {"host": host, "port": server.port, "token": token, "attempt": place.attempt})
    return PrefixStore(token, server), host, server.port


def _enter(place: Place, published: Path, deadline: float) -> tuple[Any, str, int]:
    """Wait for rank 0's file and connect; a file left by an earlier start is read again until it answers."""
    from torch.distributed import PrefixStore, TCPStore

    trouble = f"it never wrote {published}"
    while time.monotonic() < deadline:
        address = _read_address(published, place.attempt)
        if address is None:
            time.sleep(_POLL_S)
            continue
        host, port, token = address
        patience = timedelta(seconds=max(1.0, min(_CONNECT_S, deadline - time.monotonic())))
        try:
            client = TCPStore(host, port, place.world_size, is_master=False, timeout=patience, wait_for_workers=False)
            store = PrefixStore(token, client)
            store.wait(["open"], patience)
        except Exception as error:  # torch raises RuntimeError, DistNetworkError or DistStoreError by version
            trouble = f"{host}:{port} does not answer ({str(error).splitlines()[0]})"
            time.sleep(_POLL_S)
            continue
        store.set_timeout(timedelta(seconds=COLLECTIVE_TIMEOUT_S))
        return store, host, port
    raise ClusterError(f"rank {place.rank} on {place.host} could not reach rank 0: {trouble}")


def _read_address(published: Path, attempt: str) -> tuple[str, int, str] | None:
    """The published address, or None while there is none; lists the folder first, which refreshes NFS's cache."""
    with contextlib.suppress(OSError):
        os.listdir(published.parent)  # noqa: PTH208
    try:
        told = json.loads(published.read_text(encoding="utf-8"))
        if told["attempt"] == attempt:
            return str(told["host"]), int(told["port"]), str(told["token"])
    except (OSError, ValueError, KeyError):
        pass
    return None


def _meet(place: Place, store: Any, deadline: float, timeout_s: float) -> None:
    """Nobody goes on before everybody is here; rank 0 knows who is missing."""
    if place.rank > 0:
        store.set(f"here/{place.rank}", place.host)
        try:
            store.wait(["all"], timedelta(seconds=max(1.0, deadline - time.monotonic() + 5.0)))
        except Exception as error:
            raise ClusterError(
                f"rank {place.rank} on {place.host}: not all ranks came within {timeout_s:.0f} s"
            ) from error
        return
    store.set("open", "1")
    missing = set(range(1, place.world_size))
    while missing:
        missing = {rank for rank in missing if not store.check([f"here/{rank}"])}
        if missing and time.monotonic() > deadline:
            raise ClusterError(_who_is_missing(place, store, missing, timeout_s))
        if missing:
            time.sleep(_POLL_S)
    store.set("all", "1")


def _who_is_missing(place: Place, store: Any, missing: set[int], timeout_s: float) -> str:
    present = {rank: store.get(f"here/{rank}").decode() for rank in range(1, place.world_size) if rank not in missing}
    seen = ", ".join(f"{rank} on {host}" for rank, host in {0: place.host, **present}.items())
    names = ", ".join(str(rank) for rank in sorted(missing))
    return f"ranks {names} of {place.world_size} did not come within {timeout_s:.0f} s; present: {seen}"


# --- which address -----------------------------------------------------------------------------


def reachable_address(nodes: int) -> str:
    """The address at which other nodes reach this one.

    One node needs only the loopback. Otherwise $LAUNCHER_INTERFACE or $GLOO_SOCKET_IFNAME decides, then the
    host name if it does not resolve to the loopback (Debian writes 127.0.1.1 into /etc/hosts), then the first
    other interface. Gloo and NCCL are told the same interface unless the site told them already.

    Raises:
        ClusterError: the named interface has no address here.
    """
    if nodes == 1:
        return "127.0.0.1"
    interfaces = _interfaces()
    wanted = os.environ.get("LAUNCHER_INTERFACE") or os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if wanted:
        if wanted not in interfaces:
            raise ClusterError(
                f"no network interface {wanted!r} with an IPv4 address here; there are {', '.join(interfaces)}"
            )
        _tell_libraries(wanted)
        return interfaces[wanted]
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    outside = {name: address for name, address in interfaces.items() if not address.startswith("127.")}
    name, address = next(iter((outside or interfaces or {"lo": "127.0.0.1"}).items()))
    _tell_libraries(name)
    return address


def _interfaces() -> dict[str, str]:
    """Interface name -> IPv4 address, those that are up."""
    import psutil

    up = {name for name, facts in psutil.net_if_stats().items() if facts.isup}
    return {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and name in up
    }


def _tell_libraries(interface: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
