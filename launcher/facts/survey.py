"""survey: everything that a login node can say about its Slurm site, each value with its source.

What cannot be told from here stays out and is named in `unknown`, with the way to find out. No name of a person and no
path below a home folder gets in: the result is written to a file that people send to each other.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from launcher.errors import ClusterError, LauncherError
from launcher.facts.command import run_command, run_slurm
from launcher.facts.offer import AccountLimits, Partition
from launcher.facts.places import places
from launcher.facts.probe import (
    account_limits,
    best_partition,
    known_gpu,
    partitions,
    qos_limits,
    slurm_config,
    user_name,
)
from launcher.facts.slurm_text import flag, names, seconds, whole, word
from launcher.recipe.problems import nearest

T = TypeVar("T")
PROBE_JOB = "launcher init --probe-job"
_MOST = 150
"""Partitions, QOS or accounts that a profile lists."""
_MOST_NAMES = 40
"""Names that one list of a partition may have; Slurm is asked again before a job is submitted anyway."""
_CONFIG, _PARTITION, _NODES = "scontrol show config", "scontrol show partition", "sinfo"


@dataclass(slots=True)
class Survey:
    """What was found: field of Site -> value, field -> where it comes from, field -> how to find out."""

    cluster: str = "slurm"
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    partition: Partition | None = None
    """The one that stands for the site: its nodes are the profile's nodes."""

    def note(self, key: str, value: Any, source: str) -> None:
        """Keep a value that was found; None means that it was not."""
        if value is not None:
            self.values[key] = value
            self.sources[key] = source
            self.unknown.pop(key, None)

    def miss(self, key: str, how: str) -> None:
        """Say how a value that is not known can be found."""
        if key not in self.values:
            self.unknown[key] = how


def survey(
    *, partition: str | None = None, account: str | None = None, runs: Path, environ: Mapping[str, str] = os.environ
) -> Survey:
    """Ask Slurm and this machine; eight short commands at most.

    Args:
        partition: the one whose nodes the profile describes [the default one, or the one with most GPUs].
        account: written into the profile as the account of its jobs.
        runs: the folder of the runs.
        environ: where this site's file systems are looked for.

    Raises:
        TemporaryError: Slurm is not here or does not answer.
        ClusterError: it shows no partition, or not the one or the account asked for.
    """
    found = Survey()
    _ask_partitions(found, partition)
    _ask_config(found)
    _ask_accounting(found, account)
    _look_around(found, runs, environ)
    found.miss("scontrol_on_nodes", PROBE_JOB)
    found.miss("internet_on_nodes", PROBE_JOB)
    found.miss("nvme_path", f"{PROBE_JOB}, or ask which folder of a compute node lies on its own disk")
    return found


def _ask_partitions(found: Survey, wanted: str | None) -> None:
    seen = tuple(one for one in partitions() if one.name.isprintable())
    chosen = _named(seen, wanted) if wanted else best_partition(seen)
    found.partition = chosen
    count, kinds = chosen.gpus_per_node or 0, chosen.gpu_types
    nodes = f"{_NODES}, largest node of partition {chosen.name}"
    found.note("executor", "slurm", "Slurm answers here")
    found.note("gpus_per_node", count or 1, nodes if count else "no GPU in this partition: ranks run on CPUs")
    found.note("gpu_type", kinds[0] if kinds else None, f"{_NODES}, GRES of partition {chosen.name}")
    found.note("request_gpus", count > 0, nodes)
    found.note("max_nodes", min(chosen.nodes, chosen.max_nodes or chosen.nodes) or None, _PARTITION)
    found.note("cpus_per_node", chosen.cpus_per_node or None, nodes)
    found.note("mem_bytes_per_node", chosen.mem_bytes_per_node or None, nodes)
    found.note("default_partition", chosen.name, "asked for" if wanted else _why_this(chosen))
    found.note("max_time_min", chosen.max_time_min, _PARTITION)
    in_order = sorted((_impersonal(one) for one in seen), key=lambda one: one.name)
    found.note(
        "partitions", _most(found, "partitions", in_order), f"{_PARTITION}; CPUs, memory, GPUs and features: {_NODES}"
    )
    _guess_gpu(found, count, kinds)


def _most(found: Survey, key: str, in_order: Sequence[T]) -> tuple[T, ...]:
    """As many as a file should hold; what is left out is said."""
    if len(in_order) <= _MOST:
        return tuple(in_order)
    found.unknown[f"{key} beyond the first {_MOST}"] = f"{len(in_order) - _MOST} more, which Slurm knows"
    return tuple(in_order[:_MOST])


def _named(seen: tuple[Partition, ...], wanted: str) -> Partition:
    by_name = {one.name: one for one in seen}
    if wanted not in by_name:
        close = nearest(wanted, by_name)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ClusterError(f"partition {wanted!r} does not exist; {hint}there are: {', '.join(sorted(by_name))}")
    return by_name[wanted]


def _why_this(chosen: Partition) -> str:
    return "Slurm's default partition" if chosen.default else "the partition with most GPUs; Slurm's default has none"


def _guess_gpu(found: Survey, count: int, kinds: tuple[str, ...]) -> None:
    """The catalogue's name of the GPUs, which Slurm's type says more or less exactly."""
    if not count:
        found.note("gpu", "cpu", "no GPU in this partition")
        return
    try:
        name = known_gpu(kinds[0] if kinds else None)
    except ClusterError:
        what = f"the type {kinds[0]}" if kinds else "GPUs without a type"
        found.miss("gpu", f"Slurm names {what}; {PROBE_JOB}, or write what `nvidia-smi -L` shows on a node")
        return
    guess = "" if re.search(r"\d+\s*gb", kinds[0].lower()) else "; a guess where that comes with several memory sizes"
    several = f"; this partition also has {', '.join(kinds[1:])}" if len(kinds) > 1 else ""
    found.note("gpu", name, f"from the GRES type {kinds[0]}{guess}{several}")


def _ask_config(found: Survey) -> None:
    try:
        config = slurm_config()
    except LauncherError as error:
        for key in ("slurm_version", "requeue_by_default", "enforce_part_limits", "max_array_size", "preempt_type"):
            found.miss(key, f"scontrol show config, which said: {error.problems[0]}")
        config = {}
    found.cluster = config.get("ClusterName", found.cluster)
    found.note("slurm_version", config.get("SLURM_VERSION") or _version(), _CONFIG if config else "sinfo --version")
    limits = config.get("EnforcePartLimits", "").upper()
    found.note("enforce_part_limits", {"YES": "ALL"}.get(limits, limits) or None, f"{_CONFIG}, EnforcePartLimits")
    found.note("requeue_by_default", flag(config.get("JobRequeue")), f"{_CONFIG}, JobRequeue")
    found.note("max_array_size", whole(config.get("MaxArraySize")) or None, f"{_CONFIG}, MaxArraySize")
    found.note("kill_wait_s", seconds(config.get("KillWait")), f"{_CONFIG}, KillWait")
    if config:
        kind = word(config.get("PreemptType"))
        found.note("preempt_type", "none" if kind in (None, "preempt/none") else kind, f"{_CONFIG}, PreemptType")
        signal = "preempt_send_user_signal" in " ".join(config.get(key, "") for key in _PREEMPT_PARAMETERS)
        found.note("preempt_signal", signal, f"{_CONFIG}, preempt_send_user_signal")
        storage = word(config.get("AccountingStorageType"))
        stored = storage is not None and not storage.endswith("/none")
        found.note("accounting", stored, f"{_CONFIG}, AccountingStorageType")
        enforced = tuple(sorted(names(config.get("AccountingStorageEnforce"))))
        found.note("accounting_enforce", enforced, f"{_CONFIG}, AccountingStorageEnforce")
    found.note("preempt_mode", word(config.get("PreemptMode")), f"{_CONFIG}, PreemptMode")


_PREEMPT_PARAMETERS = ("PreemptParameters", "SlurmctldParameters")
"""Where preempt_send_user_signal stands: the first since Slurm 23.02, the second before."""


def _version() -> str | None:
    """The version that Slurm's commands print of themselves: `slurm 23.11.4`, `slurm-wlm 22.05.8`."""
    try:
        match = re.search(r"\d+\.\d+\.\d+\S*", run_slurm(["sinfo", "--version"], timeout_s=10))
    except LauncherError:
        return None
    return match[0] if match else None


def _ask_accounting(found: Survey, account: str | None) -> None:
    """QOS and the user's own limits; nothing where there is no accounting, or no right to look."""
    qos = qos_limits() if found.values.get("accounting") is not False else None
    limits = account_limits(found.cluster) if qos is not None else None
    if qos is None or limits is None:
        why = "this cluster has no accounting" if found.values.get("accounting") is False else "sacctmgr does not tell"
        for key in ("account_limits", "qos_limits"):
            found.miss(key, f"{why}; ask the administrators for limits that hold for your jobs")
        if account:
            found.note("account", account, "asked for; not checked")
        return
    if account is not None:
        _check_account(account, limits)
        limits = tuple(one for one in limits if one.account == account)
        named = "; it carries your name, so leave it out of what you send" if _is_personal(account) else ""
        found.note("account", account, f"asked for; sacctmgr show associations{named}")
    granted = {name for one in limits for name in one.qos}
    shown = tuple(one for one in qos if (not granted or one.name in granted) and one.name.isprintable())
    found.note("qos_limits", _most(found, "qos_limits", shown) or None, "sacctmgr show qos, those you may use")
    mine = _most(found, "account_limits", _without_people(limits))
    found.note("account_limits", mine or None, "sacctmgr show associations, yours")
    most = [one.max_submit_jobs for one in limits if one.max_submit_jobs is not None]
    found.note("max_submit_jobs", max(most) if len(most) == len(limits) and most else None, "sacctmgr, MaxSubmitJobs")


def _check_account(account: str, limits: tuple[AccountLimits, ...]) -> None:
    yours = sorted({one.account for one in limits if one.account})
    if account not in yours and yours:
        close = nearest(account, yours)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ClusterError(f"account {account!r} is not yours to use; {hint}yours: {', '.join(yours)}")


def _without_people(limits: tuple[AccountLimits, ...]) -> tuple[AccountLimits, ...]:
    """Accounts that carry the user's name stay nameless; some sites give everybody one of their own."""
    return tuple(
        replace(one, account=None if _is_personal(one.account or "") else one.account)
        for one in limits
        if (one.account or "").isprintable()
    )


def _impersonal(one: Partition) -> Partition:
    """A partition as a file may say it: without the moment's state, the user's name or endless lists."""

    def plain(listed: tuple[str, ...]) -> tuple[str, ...]:
        some = () if len(listed) > _MOST_NAMES else listed
        return tuple("someone" if _is_personal(name) else name for name in some if name.isprintable())

    lists = ("allow_accounts", "deny_accounts", "allow_groups", "allow_qos", "deny_qos", "features", "gpu_types")
    values: dict[str, Any] = {name: plain(getattr(one, name)) for name in lists}
    return replace(one, nodes_up=None, nodes_silent=0, **values)


def _is_personal(name: str) -> bool:
    """Whether a name of Slurm's carries the name of the user who asks, such as def-alice for alice."""
    return user_name().lower() in re.split(r"[^a-z0-9_]+|_(?=gpu|cpu)", name.lower())


def _look_around(found: Survey, runs: Path, environ: Mapping[str, str]) -> None:
    """Containers, modules and file systems, as this machine has them."""
    runtimes = [name for name in ("enroot", "apptainer", "singularity") if shutil.which(name)]
    try:
        pyxis = "--container-image" in run_command(["srun", "--help"], timeout_s=10).stdout
    except LauncherError:
        pyxis = False
    found.note("containers", (*(["pyxis"] if pyxis else []), *runtimes), "srun --help (pyxis) and PATH of this machine")
    modules = "lmod" if environ.get("LMOD_CMD") else "environment-modules" if environ.get("MODULESHOME") else None
    found.note("module_system", modules, "LMOD_CMD and MODULESHOME of this login")
    written = "$LAUNCHER_RUNS" if environ.get("LAUNCHER_RUNS") else "runs"
    found.note("file_systems", places(runs, written, environ), "statvfs, /proc/self/mounts and quota on this machine")
