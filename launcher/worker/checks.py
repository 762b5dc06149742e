"""checks: is every rank fit to train, before the first step? What a plan takes for granted, looked at on every host.

    same code and packages on every rank, and as planned     every rank sees the run folder that rank 0 writes
    free host and GPU memory, free disk                       an all-reduce of known sum, with its bandwidth
    GPU health, where nvidia-smi tells it

A rank that fails says so in its own name, and the attempt ends with cause bad_node: the job goes elsewhere. The others
leave with an error that only points at it. Takes well under a second where nothing is wrong.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import secrets
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.errors import ClusterError
from launcher.runs.environment import source_fingerprint
from launcher.runs.folder import RunFolder, write_atomic
from launcher.worker.place import Place

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes", "accelerate", "safetensors", "numpy")
"""Packages that must be the same on every rank."""
FOLDER_S = 30.0
"""How long a shared file system may take to show a new file; NFS remembers for up to a minute that it was not there,
but listing the folder asks anew."""
_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
"""Numbers of the all-reduce: 1 MiB, or 64 MiB, in fp32."""
_LEAST_MEMORY = 0.5
"""Share of the planned host memory below which nothing can go well: the plan is an upper bound."""
_SMI_S = 10.0
_SMI_FIELDS = (
    "index,ecc.errors.uncorrected.volatile.total,remapped_rows.pending,remapped_rows.failure,"
    "clocks_throttle_reasons.hw_slowdown"
)


@dataclass(kw_only=True, slots=True)
class Findings:
    """What one rank found out about its host."""

    problems: list[str] = field(default_factory=list)
    """Why this rank cannot train here."""
    notices: list[str] = field(default_factory=list)
    """What is worth a line in the log."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package -> version; `launcher source` -> fingerprint of our own files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What the plan and the submission say there must be."""

    host_ram_bytes_per_node: int = 0
    gpu_bytes: int = 0
    checkpoint_bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    """Empty where the jobs' Python is not the one that was looked at."""

    @classmethod
    def of(cls, folder: RunFolder) -> Needs:
        """From plan.json and environment.json; what cannot be read is not asked for."""
        chosen, around = _json(folder.plan).get("chosen", {}), _json(folder.environment)
        same_python = around.get("job_python") == around.get("executable")
        planned = dict(around.get("packages", {})) if same_python else {}
        if around.get("source"):
            planned["launcher source"] = around["source"]
        peak = chosen.get("memory", {}).get("peak_bytes", {})
        return cls(
            host_ram_bytes_per_node=int(chosen.get("host_ram_bytes_per_node", 0)),
            gpu_bytes=int(peak.get("expected", 0)) if isinstance(peak, Mapping) else 0,
            checkpoint_bytes=int(chosen.get("checkpoint_bytes", 0)),
            versions=planned,
        )


def check_ranks(
    folder: RunFolder, place: Place, device: torch.device, *, say: Callable[[str], None], needs: Needs | None = None
) -> dict[str, Any]:
    """Check every rank of the attempt; collective. Returns what rank 0 writes into the ledger.

    Raises:
        ClusterError: this rank failed (its host is named), another one did, or the disk is full.
    """
    began_s = time.monotonic()
    needs = Needs.of(folder) if needs is None else needs
    found = _look(folder, place, device, needs)
    sees = _sees_folder(folder, place)
    if sees:
        found.problems.append(sees)
    bandwidth, wrong = _all_reduce(place, device)
    if wrong:
        found.problems.append(wrong)
    everybody: list[Any] = [None] * place.world_size
    dist.all_gather_object(everybody, (place.host, found.problems, found.notices, found.versions))
    trouble = _judge(everybody, needs.versions)
    _leave_if_unfit(trouble, place, everybody)
    notices = _notices(everybody, needs.versions)
    for notice in notices:
        say(f"warning: {notice}")
    seconds = time.monotonic() - began_s
    return {"seconds": round(seconds, 3), "all_reduce_bytes_per_s": bandwidth, "notices": notices}


def _leave_if_unfit(trouble: Mapping[int, list[str]], place: Place, everybody: Sequence[Any]) -> None:
    if place.rank in trouble:
        raise ClusterError(f"rank {place.rank} on {place.host} is not fit to train: {'; '.join(trouble[place.rank])}")
    if trouble:
        who = ", ".join(f"rank {rank} on {everybody[rank][0]}" for rank in sorted(trouble))
        raise ClusterError(f"rank {place.rank} on {place.host} leaves because others cannot start: {who}")


# --- what a rank can see alone -----------------------------------------------------------------


def _look(folder: RunFolder, place: Place, device: torch.device, needs: Needs) -> Findings:
    found = Findings(versions=versions())
    if place.local_rank == 0:
        _look_at_memory(place, needs, found)
        if device.type == "cuda":
            problems, notices = gpu_health(_nvidia_smi())
            found.problems += problems
            found.notices += notices
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free < needs.gpu_bytes <= total:
            found.problems.append(
                f"GPU {device.index} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, the plan needs "
                f"{needs.gpu_bytes / 2**30:.1f}: somebody else's process is on it"
            )
    if place.rank == 0:
        free_bytes = shutil.disk_usage(folder.path).free
        if free_bytes < needs.checkpoint_bytes:
            found.problems.append(
                f"No space left on device: {folder.path} has {free_bytes / 2**30:.1f} GiB, one checkpoint takes "
                f"{needs.checkpoint_bytes / 2**30:.1f}"
            )
    return found


def versions() -> dict[str, str]:
    """Packages of this process's environment, and the launcher's own files as one word."""
    found = {"launcher source": source_fingerprint()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _look_at_memory(place: Place, needs: Needs, found: Findings) -> None:
    """What this node has free, with what its ranks hold already (each holds about as much as this one)."""
    import psutil

    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss * place.local_world_size
    words = (
        f"{free / 2**30:.1f} GiB of host memory are free, the plan needs {needs.host_ram_bytes_per_node / 2**30:.1f}"
    )
    if free < _LEAST_MEMORY * needs.host_ram_bytes_per_node:
        found.problems.append(words)
    elif free < needs.host_ram_bytes_per_node:
        found.notices.append(f"{place.host}: {words}")


def _nvidia_smi() -> str:
    """What nvidia-smi says of all GPUs, one line each; empty where it is missing, slow or too old to know."""
    command = ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout if ran.returncode == 0 else ""


def gpu_health(csv: str) -> tuple[list[str], list[str]]:
    """Problems and notices in nvidia-smi's lines; what a GPU does not report (`[N/A]`) is no problem."""
    problems, notices = [], []
    for line in csv.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_SMI_FIELDS.split(",")):
            continue
        index, errors, pending, failed, slow = values
        if errors.isdecimal() and int(errors) > 0:
            problems.append(f"GPU {index} has {errors} uncorrectable ECC errors since it was started")
        if failed.lower() in ("yes", "1"):
            problems.append(f"GPU {index} could not remap a bad row of its memory")
        if pending.lower() in ("yes", "1"):
            problems.append(f"GPU {index} has to be reset: a row of its memory waits to be remapped")
        if slow == "Active":
            notices.append(f"GPU {index} is slowed down by its hardware (heat or power)")
    return problems, notices


# --- what only all ranks can see -----------------------------------------------------------------


def _sees_folder(folder: RunFolder, place: Place) -> str | None:
    """Rank 0 writes a word into the run folder; whoever does not find it is looking at another folder."""
    path = folder.rendezvous / f"{place.attempt}.seen"
    told = [secrets.token_hex(8) if place.rank == 0 else None]
    trouble = None
    if place.rank == 0:
        try:
            write_atomic(path, str(told[0]))
        except OSError as error:
            trouble = f"cannot write the run folder {folder.path} ({error.strerror})"
    dist.broadcast_object_list(told, src=0)
    if place.rank > 0 and not _appears(path, str(told[0])):
        trouble = f"does not see what rank 0 writes into {folder.path}: the folder is not shared, or not mounted here"
    done: list[Any] = [None] * place.world_size
    dist.all_gather_object(done, trouble)
    if place.rank == 0:
        path.unlink(missing_ok=True)
        if any(done[1:]) and all(done[1:]):
            return f"no other rank sees what it writes into {folder.path}"
    return trouble


def _appears(path: Path, word: str) -> bool:
    deadline = time.monotonic() + FOLDER_S
    while True:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # noqa: PTH208 - refreshes what NFS remembers
            if path.read_text(encoding="utf-8") == word:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _all_reduce(place: Place, device: torch.device) -> tuple[float | None, str | None]:
    """Bytes per second over the slowest link of a ring all-reduce, and what is wrong with its sum.

    Bus bandwidth as nccl-tests define it: 2 (n - 1) / n times the bytes, over the time.
    """
    if place.world_size == 1:
        return None, None
    values = torch.full((_ELEMENTS[device.type],), float(place.rank + 1), device=device)
    dist.all_reduce(values.clone())  # connections are made by the first one
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began_s = time.monotonic()
    dist.all_reduce(values)
    expected = place.world_size * (place.world_size + 1) / 2
    wrong = int((values != expected).sum())  # waits for the GPU
    seconds = max(time.monotonic() - began_s, 1e-9)
    n = place.world_size
    bandwidth = 2 * (n - 1) / n * values.numel() * values.element_size() / seconds
    if wrong:
        return bandwidth, f"{wrong} of {values.numel()} numbers of an all-reduce came out wrong here"
    return bandwidth, None


# --- judgement -----------------------------------------------------------------------------------


def _judge(everybody: Sequence[Any], planned: Mapping[str, str]) -> dict[int, list[str]]:
    """Rank -> why it cannot train: what it found itself, and where it differs from most others."""
    trouble: dict[int, list[str]] = {rank: list(one[1]) for rank, one in enumerate(everybody) if one[1]}
    for name in _names(one[3] for one in everybody):
        have = [one[3].get(name) for one in everybody]
        usual = planned.get(name) if planned.get(name) in have else Counter(have).most_common(1)[0][0]
        for rank, value in enumerate(have):
            if value != usual:
                trouble.setdefault(rank, []).append(f"{name} is {value or 'missing'}, on the others {usual}")
    return trouble


def _notices(everybody: Sequence[Any], planned: Mapping[str, str]) -> list[str]:
    """Once each; also what is everywhere other than planned: it was changed after the submission, not by a node."""
    changed = [
        f"{name} is {value}; it was {planned[name]} when the run was submitted"
        for name, value in sorted(everybody[0][3].items())
        if name in planned and planned[name] != value
    ]
    return [*dict.fromkeys(notice for one in everybody for notice in one[2]), *changed]


def _names(documents: Iterable[Mapping[str, str]]) -> list[str]:
    return sorted({name for document in documents for name in document})


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
