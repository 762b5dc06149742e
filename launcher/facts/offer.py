"""Site: what a cluster (or this machine) offers, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.facts.learned import Learned


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """One Slurm partition."""

    name: str
    default: bool = False
    max_time_min: int | None = None
    """None = unlimited."""
    nodes: int = 1
    max_nodes: int | None = None
    """Most nodes of one job; None = all of them."""
    up: bool = True
    """Whether it starts jobs."""
    gpus_per_node: int | None = None
    """GPUs of its best node; None = not known."""
    gpu_types: tuple[str, ...] = ()
    """GRES types of its GPUs; empty = untyped or not known."""
    cpus_per_node: int | None = None
    """CPUs of its largest node."""
    mem_bytes_per_node: int | None = None
    """Memory of its largest node."""
    allow_accounts: tuple[str, ...] = ()
    """Empty = all."""
    allow_qos: tuple[str, ...] = ()
    """Empty = all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """How the job enters a container."""

    runtime: str = "none"
    """none | pyxis | apptainer."""
    image: str | None = None
    mounts: tuple[str, ...] = ()
    """HOST:CONTAINER[:FLAGS] pairs; models, data and run folders must be inside them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Facts about the place jobs run."""

    name: str
    executor: str
    """slurm | local."""
    gpu: str
    """Name in the GPU catalogue, or "cpu"."""
    gpus_per_node: int
    """GPUs of one node; CPU ranks it should run where gpu is "cpu"."""
    max_nodes: int
    cpus_per_node: int
    mem_bytes_per_node: int
    request_gpus: bool = True
    """Whether jobs carry --gpus-per-node."""
    gpu_type: str | None = None
    """GRES type to name in --gpus-per-node=TYPE:N."""
    intra_node_bw_bytes_s: float | None = None
    inter_node_bw_bytes_s: float | None = None
    """Per GPU; None = from the GPU catalogue."""
    write_bw_bytes_s: float | None = None
    """What one node writes to the runs' file system; None = 1 GB/s."""
    partitions: tuple[Partition, ...] = ()
    default_partition: str | None = None
    account: str | None = None
    qos: str | None = None
    max_time_min: int | None = None
    modules: tuple[str, ...] = ()
    """`module load` lines, in order."""
    venv: str | None = None
    """Virtual environment of the jobs; None = $LAUNCHER_VENV, else the interpreter that runs the launcher."""
    setup: tuple[str, ...] = ()
    """Extra shell lines of the site's own profile (never recipe text)."""
    env: dict[str, str] = field(default_factory=dict)
    container: Container = Container()
    network_interface: str | None = None
    nvme_path: str | None = None
    cache_dir: str | None = None
    """Shared token and model cache; None = <runs>/.cache."""
    srun_args: tuple[str, ...] = ()
    accounting: bool | None = None
    """Whether sacct answers; None = ask when needed."""
    learned: Learned | None = None
    """What the site's own finished runs taught (facts/learned.py); never in the profile itself."""
    source: dict[str, str] = field(default_factory=dict)
    """Field -> where its value came from."""
