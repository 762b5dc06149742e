"""Gpu: memory, arithmetic and bandwidths of the accelerators the planner knows, the CPU included.

Sources: vendor data sheets; measured figures where published (usable memory as torch reports it, "maximum
achievable matmul FLOP/s" and all-reduce bus bandwidth from Bekman's machine-learning engineering tables).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from launcher.errors import ClusterError

_CATALOGUE = Path(__file__).parent / "catalogue" / "gpus.jsonl"
GIB = 2**30
CPU_CORE_FLOPS = 40e9
"""fp32 FLOP/s that one CPU core sustains in torch training of small models. Measured with AVX2 and 12-16 M parameters:
85e9 per second of one core's time with one thread, 56e9 with two threads on two cores, less where others share them."""
_GENERIC = {
    "a100": "A100-80GB",
    "h100": "H100-80GB",
    "v100": "V100-16GB",
    "4090": "RTX-4090",
    "3090": "RTX-3090",
    "a100pcie": "A100-80GB-PCIe",
    "h10080gbpcie": "H100-PCIe",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One accelerator."""

    name: str
    memory_bytes: int
    """What torch reports as total; 0 for "cpu", where the host's memory counts."""
    flops: float
    """Dense 16-bit FLOP/s of the data sheet; fp32 FLOP/s of one core for "cpu"."""
    achievable_flops: float
    """Best FLOP/s a large matmul was measured to reach; data sheet x 0.85 where nobody published one."""
    fp32_flops: float
    memory_bytes_s: float
    """Bandwidth of its own memory."""
    link_bytes_s: float
    """All-reduce bus bandwidth per GPU inside a node: NVLink where there is one, else PCIe."""
    pcie_bytes_s: float
    bf16: bool
    """Whether matmul units take bf16."""
    network_bytes_s: float
    """Line rate of one GPU's share of its node's network, in the vendor's reference design (DGX/HGX: one port per
    GPU; PCIe servers 100 Gbit/s for four; desktops 10 Gbit/s)."""
    efficiency: float
    """Share of `achievable_flops` that a training step's matmuls sustain: less where the power limit binds."""
    attention: float
    """Share of `achievable_flops` that FlashAttention-2 reaches, forward and backward, causal."""

    @property
    def is_cpu(self) -> bool:
        """Whether this is the host itself."""
        return self.name == "cpu"


_CPU = Gpu(
    name="cpu",
    memory_bytes=0,
    flops=CPU_CORE_FLOPS,
    achievable_flops=CPU_CORE_FLOPS,
    fp32_flops=CPU_CORE_FLOPS,
    memory_bytes_s=10e9,
    link_bytes_s=1e9,
    pcie_bytes_s=5e9,
    bf16=False,
    network_bytes_s=1.25e9,
    efficiency=1.0,
    attention=1.0,
)


def gpu(name: str) -> Gpu:
    """Look up one accelerator; nvidia-smi's and Slurm's spellings are understood.

    Raises:
        ClusterError: nothing in the catalogue has that name; the message lists what is there.
    """
    if name.lower() == "cpu":
        return _CPU
    known = catalogue()
    key = _normal(name)
    bare = key.replace("pcie", "")
    match = (
        known.get(key)
        or known.get(_normal(_GENERIC.get(key, "")))
        or known.get(bare)
        or known.get(_normal(_GENERIC.get(bare, "")))
        or known.get(_normal(re.sub(r"\d+ ?gb", "", name.lower())))
        or _longest_inside(key, known)
    )
    if match is None:
        close = get_close_matches(key, known, n=1)
        hint = f"; did you mean {known[close[0]].name}?" if close else "."
        raise ClusterError(f"GPU {name!r} is not in the catalogue{hint} Known: {', '.join(sorted(gpu_names()))}, cpu")
    return match


def gpu_names() -> list[str]:
    """Names of every catalogued GPU, in catalogue order."""
    return [entry.name for entry in catalogue().values()]


@cache
def catalogue() -> dict[str, Gpu]:
    """Normalised name -> Gpu."""
    with _CATALOGUE.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {_normal(row["name"]): _from_row(row) for row in rows}


def _from_row(row: dict[str, float | str | bool | None]) -> Gpu:
    def number(key: str, default: float = 0.0) -> float:
        value = row[key]
        return float(value) if isinstance(value, int | float) else default

    flops = number("tflops") * 1e12
    pcie = number("pcie_gb_s") * 1e9
    return Gpu(
        name=str(row["name"]),
        memory_bytes=int(number("memory_gib") * GIB),
        flops=flops,
        achievable_flops=number("mamf_tflops", 0.85 * number("tflops")) * 1e12,
        fp32_flops=number("fp32_tflops") * 1e12,
        memory_bytes_s=number("hbm_gb_s") * 1e9,
        link_bytes_s=number("nvlink_gb_s", _pcie_link(bool(row["host_copy"])) * number("pcie_gb_s")) * 1e9,
        pcie_bytes_s=pcie,
        bf16=bool(row["bf16"]),
        network_bytes_s=number("network_gb_s") * 1e9,
        efficiency=number("efficiency"),
        attention=number("attention"),
    )


def _pcie_link(host_copy: bool) -> float:
    """Bus bandwidth of a collective over PCIe: consumer drivers allow no peer access, so data crosses it twice."""
    return 0.45 if host_copy else 0.8


def _normal(name: str) -> str:
    """Spelling without vendor, form factor and punctuation: "NVIDIA A100-SXM4-80GB" -> "a10080gb"."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    dropped = {"nvidia", "amd", "geforce", "instinct", "tesla", "sxm", "sxm2", "sxm4", "sxm5", "hbm3", "hbm3e", "rtx"}
    kept = [word for word in words if word not in dropped]
    # "A100-PCIE-40GB" and "A100 80GB PCIe" are the same kind of name.
    return "".join(word for word in kept if word != "pcie") + ("pcie" if "pcie" in kept else "")


def _longest_inside(key: str, known: dict[str, Gpu]) -> Gpu | None:
    inside = [entry for entry in known if re.search(rf"{entry}(?!\d)", key)]
    return known[max(inside, key=len)] if inside else None
