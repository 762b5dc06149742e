"""JobRequest: everything that is sent to Slurm or to this machine, and what may stand in it.

`submit --dry-run` prints the object that `submit` sends. Slurm's parser of `#SBATCH` lines honours backslashes inside
single quotes, so quoting alone cannot make a value safe: what could end a line or a quote is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.errors import ConflictError
from launcher.facts.site import Container
from launcher.recipe.slurm_extra import check_extra

_REFUSED_IN_SBATCH = frozenset("'\"\\`$")
INDEX = "%a"
"""A task's number in a job array: Slurm replaces it in the names of logs, runs/train_job.py in that of the run."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def bad_characters(text: str, refused: frozenset[str] = frozenset()) -> list[str]:
    """Name the characters of `text` that are not printable (so: could end a line) or are in `refused`."""
    bad = [letter for letter in text if not letter.isprintable() or letter in refused]
    return [f"character U+{ord(letter):04X}" for letter in dict.fromkeys(bad)]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """One job, complete: nothing is added between here and sbatch."""

    cluster: str
    """slurm | local."""
    run_dir: str
    name: str
    nodes: int
    """The most it may get."""
    tasks_per_node: int
    """Ranks per node: one per GPU, or CPU ranks."""
    gpus_per_node: int | None
    """None = ask for none."""
    gpu_type: str | None
    """GRES type of those GPUs."""
    cpus_per_task: int
    mem: str | None
    """Per node, in sbatch's form."""
    time_min: int | None
    """None = no limit (local jobs)."""
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    exclusive: bool
    requeue: bool
    signal_lead_s: int
    """USR2 is sent this many seconds before the limit (Slurm may be up to 60 s early)."""
    node_counts: tuple[int, ...] = ()
    """Fewer nodes with which it can do as well, fewest first; () = `nodes` and nothing else."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further sbatch long options, from the recipe."""
    env: dict[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    """Shell lines of the site profile; never recipe text."""
    container: Container = field(default_factory=Container)
    python: str
    srun_args: tuple[str, ...] = ()
    """Of the site profile; never recipe text."""
    chdir: str
    """Working folder of the job: where `submit` was typed, so that relative paths mean the same."""
    array: str | None = None
    """sbatch's --array, such as 0-4%2; `run_dir` then ends in INDEX, and each task finds its run there."""
    export: tuple[str, ...] = ()
    """Names of the submitter's variables that Slurm may keep with the job; no values, no secrets."""

    @property
    def log(self) -> str:
        """Log of each rank; %j is the job id and %t the rank."""
        return f"{self.run_dir}/logs/%j_%t.out"

    @property
    def tasks(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.tasks_per_node

    def problems(self) -> list[str]:
        """Everything in this request that must not reach a script; empty when it may be sent."""
        found = [*self._bad_options(), *self._bad_values(), *self._bad_shell_values()]
        if self.time_min is not None and self.signal_lead_s * 2 >= self.time_min * 60:
            found.append(
                f"slurm.time: {self.time_min} min is too short to be warned {self.signal_lead_s} s before its end "
                f"(the time one step and a checkpoint take); at least {self.signal_lead_s * 2 // 60 + 1} min is needed"
            )
        return found

    def _bad_options(self) -> list[str]:
        found: list[str] = []
        check_extra(self.extra, lambda path, message: found.append(f"{path!r}: {message}"))
        return found

    def _bad_values(self) -> Iterator[str]:
        values: dict[str, Any] = {
            "name": self.name,
            "slurm.partition": self.partition,
            "slurm.account": self.account,
            "slurm.qos": self.qos,
            "slurm.constraint": self.constraint,
            "slurm.mem": self.mem,
            "gpu_type": self.gpu_type,
            "output_dir": self.run_dir,
            "working folder": self.chdir,
            **{f"slurm.extra.{key!s}": str(value) for key, value in self.extra.items()},
        }
        for where, value in values.items():
            if value is None:
                continue
            if value == "":
                yield f"{where}: is empty; give it a value or remove it"
            for bad in bad_characters(value, _REFUSED_IN_SBATCH):
                yield f"{where!r}: {bad} is not allowed in a value bound for sbatch: {value!r}"
        for where in ("output_dir", "working folder"):
            if values[where].startswith("~"):  # submitit would expand it, Slurm would not
                yield f"{where}: ~ is not expanded in a job; write the whole path: {values[where]!r}"
        folder = self.run_dir.removesuffix(f"/{INDEX}") if self.array else self.run_dir
        if "%" in folder + self.name:
            yield f"output_dir: Slurm replaces % in file names; choose a path without it: {self.run_dir!r}"

    def _bad_shell_values(self) -> Iterator[str]:
        for name in self.export:
            if not _VARIABLE.fullmatch(name):
                yield f"export: {name!r} is not the name of an environment variable"
        for key, value in self.env.items():
            if not _VARIABLE.fullmatch(key):
                yield f"env: {key!r} is not the name of an environment variable"
            for bad in bad_characters(value):
                yield f"env.{key}: {bad} is not allowed"
        shell = {"setup": self.setup, "srun_args": self.srun_args, "container.mounts": self.container.mounts}
        for where, lines in {**shell, "python": (self.python,), "container.image": (self.container.image,)}.items():
            for line in lines:
                for bad in bad_characters(line or ""):
                    yield f"{where}: {bad} is not allowed: {line!r}"


def request_to_json(request: JobRequest) -> dict[str, Any]:
    """The request as plain values, for job.json and --dry-run."""
    return asdict(request)


def request_from_json(document: Mapping[str, Any]) -> JobRequest:
    """Read back what `request_to_json` wrote.

    Raises:
        ConflictError: a field is missing or unknown, so another version of the launcher wrote it.
    """
    values = dict(document)
    try:
        values["container"] = Container(**{**values["container"], "mounts": tuple(values["container"]["mounts"])})
        for name in ("setup", "srun_args", "node_counts", "export"):
            values[name] = tuple(values.get(name, ()))
        return JobRequest(**values)
    except (TypeError, KeyError) as error:
        raise ConflictError(
            f"job.json was written by another version of the launcher ({error}); resume by hand"
        ) from error
