"""Join: how the ranks of one attempt find each other, and nobody else.

The address comes from rank 0, which opens a port the kernel chose (so it is really free) and publishes it, with
a random token, in a file named after the attempt: ranks of an earlier attempt that are still alive on a lost
node look for another file and cannot get in.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError
from launcher.runs.folder import write_json
from launcher.worker.place import Place

COLLECTIVE_TIMEOUT_S = 1800.0
"""How long a collective may wait for its slowest rank."""
_POLL_S = 0.1
_CONNECT_S = 5.0
"""One attempt to reach a published address; afterwards the file is read again."""


_store: Any = None
"""The attempt's key-value store while joined; the ranks also wait for each other through it."""


def join(place: Place, folder: Path, *, device: str, timeout_s: float) -> None:
    """Initialise torch.distributed over the ranks of this attempt and export what libraries read.

    `folder` is the run's rendezvous folder, shared by all nodes; `device` is cuda or cpu; `timeout_s` is how
    long to wait for the last rank.

    Raises:
        ClusterError: ranks are missing at the time-out (rank 0 names them), or this rank has no GPU.
    """
    import torch.distributed as dist

    global _store
    _export(place, device)
    device_name(place, device)
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


def device_name(place: Place, device: str) -> str:
    """This rank's device, made the current one; all GPUs of the node are visible and the local rank chooses.

    Raises:
        ClusterError: there is no GPU of that number.
    """
    if device != "cuda":
        return "cpu"
    import torch

    if torch.cuda.device_count() <= place.local_rank:
        raise ClusterError(
            f"local rank {place.local_rank} on {place.host} sees {torch.cuda.device_count()} GPUs "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); "
            "request GPUs per node, not per task"
        )
    torch.cuda.set_device(place.local_rank)  # before NCCL starts: it takes the current device
    return f"cuda:{place.local_rank}"


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
