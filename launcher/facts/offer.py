"""Site: what a cluster (or this machine) offers, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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
    deny_accounts: tuple[str, ...] = ()
    deny_qos: tuple[str, ...] = ()
    allow_groups: tuple[str, ...] = ()
    """Unix groups; empty = all."""
    default_time_min: int | None = None
    """Limit of a job that asks for none; None = max_time_min."""
    min_nodes: int | None = None
    """Fewest nodes of one job."""
    max_cpus_per_node: int | None = None
    """Most CPUs that its jobs may have of one node; None = all of them."""
    max_mem_bytes_per_node: int | None = None
    """Most memory that one job may have of a node; None = all of it."""
    qos: str | None = None
    """QOS whose limits hold for every job of the partition."""
    preempt_mode: str | None = None
    """What happens to its jobs when others take their nodes: OFF, CANCEL, REQUEUE or SUSPEND; None = not known."""
    preempt_grace_s: int | None = None
    """Seconds between the first signal of a preemption and the kill."""
    features: tuple[str, ...] = ()
    """Features of its nodes, which `slurm.constraint` can name."""
    nodes_up: int | None = None
    """Nodes that are neither down nor drained now; None = not known. Never in a profile."""
    nodes_silent: int = 0
    """Nodes that have not answered the controller yet and are not marked down. Never in a profile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Qos:
    """Limits of one quality of service, as `sacctmgr show qos` has them; amounts of TRES in Slurm's own words."""

    name: str
    max_time_min: int | None = None
    max_jobs: int | None = None
    """Running at once, per user."""
    max_submit_jobs: int | None = None
    """Waiting and running at once, per user."""
    max_tres: str | None = None
    """Most of one job, such as `node=8,gres/gpu=32`; facts/slurm_text.py's `tres` reads it."""
    max_tres_per_user: str | None = None
    max_tres_per_account: str | None = None
    group_tres: str | None = None
    """Most of all its jobs together."""
    min_tres: str | None = None
    """Least of one job."""
    preempt_mode: str | None = None
    """cluster (what slurm.conf says), off, cancel, requeue or suspend."""
    preempt_grace_s: int | None = None
    preempts: tuple[str, ...] = ()
    """QOS whose jobs it may take nodes from."""
    flags: tuple[str, ...] = ()
    """DenyOnLimit among them: a job over a limit is refused, not left waiting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AccountLimits:
    """What one account gives to the user who asked, as `sacctmgr show associations` has it."""

    account: str | None = None
    """None = left out because it names a person."""
    partition: str | None = None
    """None = every partition."""
    qos: tuple[str, ...] = ()
    default_qos: str | None = None
    max_time_min: int | None = None
    max_jobs: int | None = None
    max_submit_jobs: int | None = None
    max_tres: str | None = None
    max_tres_per_node: str | None = None
    group_tres: str | None = None
    """Most of all jobs of the user in this account, or of the whole account; so are the next two."""
    group_jobs: int | None = None
    group_submit_jobs: int | None = None

    def within(self, account: AccountLimits | None) -> AccountLimits:
        """These limits, and where they set none on the group, those of the account as a whole."""
        if account is None:
            return self
        own = {name: getattr(self, name) for name in ("group_tres", "group_jobs", "group_submit_jobs")}
        given = {name: getattr(account, name) if value is None else value for name, value in own.items()}
        return replace(self, **given)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSystem:
    """One place for files, as seen when the site was surveyed."""

    name: str
    """runs, home, the variable that names it, or `node` for the compute nodes' own disk."""
    path: str
    """With variables instead of a person's folders, such as $SCRATCH."""
    type: str | None = None
    """As the kernel names it: lustre, nfs4, xfs, tmpfs ..."""
    shared: bool | None = None
    """Whether every node sees the same files; from its type, or from the probe job."""
    free_bytes: int | None = None
    quota_bytes: int | None = None
    """What a quota leaves to the user who asked; None = no quota, or it could not be read."""


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
    accounting_enforce: tuple[str, ...] | None = None
    """What a job must satisfy (AccountingStorageEnforce): associations, limits, qos, wckeys ...; None = not known."""
    slurm_version: str | None = None
    enforce_part_limits: str | None = None
    """NO | ANY | ALL: whether sbatch refuses what exceeds its partition; with NO such a job waits for ever."""
    requeue_by_default: bool | None = None
    """JobRequeue: whether a job without --requeue or --no-requeue may come back."""
    max_array_size: int | None = None
    """Slurm's MaxArraySize: one more than the largest index of a job array."""
    kill_wait_s: int | None = None
    """Seconds between SIGTERM and SIGKILL at a job's time limit."""
    preempt_type: str | None = None
    """preempt/qos | preempt/partition_prio | none."""
    preempt_mode: str | None = None
    """PreemptMode of slurm.conf; partitions and QOS may say otherwise."""
    preempt_signal: bool | None = None
    """Whether a preempted job gets the signal of --signal at once (preempt_send_user_signal), not SIGTERM."""
    max_submit_jobs: int | None = None
    """Most jobs of the user at once, over all accounts that were surveyed."""
    qos_limits: tuple[Qos, ...] = ()
    account_limits: tuple[AccountLimits, ...] = ()
    containers: tuple[str, ...] = ()
    """Runtimes that were found: pyxis, enroot, apptainer; `container` says which one jobs use."""
    module_system: str | None = None
    """lmod | environment-modules."""
    scontrol_on_nodes: bool | None = None
    """Whether a job can ask the controller (and requeue itself); None = not tried."""
    internet_on_nodes: bool | None = None
    """Whether compute nodes reach the hub and W&B; None = not tried."""
    file_systems: tuple[FileSystem, ...] = ()
    learned: Learned | None = None
    """What the site's own finished runs taught (facts/learned.py); never in the profile itself."""
    source: dict[str, str] = field(default_factory=dict)
    """Field -> where its value came from."""
