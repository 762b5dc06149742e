"""Submission: Plan + RunFolder -> JobRequest -> submitit, to Slurm or to this machine."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launcher
from launcher.errors import ClusterError, LauncherError, RecipeError, TemporaryError, raise_all
from launcher.facts.command import is_temporary
from launcher.facts.probe import associations, partitions
from launcher.facts.site import Site
from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.job import signal_lead_s
from launcher.planning.plan import Plan, plan_to_json
from launcher.recipe.load import recipe_to_yaml
from launcher.recipe.schema import Recipe
from launcher.runs.environment import environment_facts
from launcher.runs.folder import RunFolder, write_atomic, write_json
from launcher.runs.process import identify
from launcher.runs.request import JobRequest, request_to_json
from launcher.runs.sbatch import plain_script, python_words, submitit_parameters, submitit_script
from launcher.runs.slurm import cancel_job
from launcher.runs.train_job import TrainJob

__all__ = ["JobRequest", "create_run", "describe", "job_request", "print_sbatch", "submit"]

_KEPT_SLURM_VARIABLES = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SBATCH_WCKEY"})
_FOREIGN_PREFIXES = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMIX_", "PMI_", "SUBMITIT_")
_FOREIGN_NAMES = frozenset(
    {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
)
"""Variables of a job or launcher around this process; inherited, they would contradict the new job's own."""


def create_run(recipe_text: str, recipe: Recipe, plan: Plan, site: Site, parent: Path) -> RunFolder:
    """Make the run folder and write what was asked, decided and found; `recipe` is the resolved one.

    Raises:
        ClusterError: the folder cannot be made or written.
    """
    try:
        run = RunFolder.create(parent.resolve(), recipe.name)
        write_atomic(run.recipe, recipe_text)
        write_atomic(run.resolved, recipe_to_yaml(recipe))
        write_json(run.plan, plan_to_json(plan))
        candidate = plan.chosen.candidate
        if candidate.zero_stage > 0:
            write_json(run.ds_config, deepspeed_config(candidate, recipe.deepspeed.overrides))
        write_json(run.environment, environment_facts(_python(site)))
    except OSError as error:
        raise ClusterError(f"output_dir: cannot write the run folder in {parent}: {error}") from error
    return run


def job_request(plan: Plan, recipe: Recipe, run: RunFolder, site: Site) -> JobRequest:
    """Everything the job will be, as one value; nothing is written and the run folder need not exist.

    Raises:
        RecipeError: a value that must not reach sbatch, or a time limit too short to save in.
        ClusterError: a local job on several nodes.
    """
    candidate, slurm, local = plan.chosen.candidate, recipe.slurm, site.executor == "local"
    if local and candidate.nodes > 1:
        raise ClusterError(
            f"slurm.nodes: {candidate.nodes} nodes are planned, and this machine is one; set slurm.nodes=1"
        )
    asks_gpus = candidate.device == "cuda" or (site.request_gpus and not local)
    time_min = None if local else plan.job.time_limit_min
    request = JobRequest(
        cluster=site.executor,
        run_dir=str(run.path),
        name=run.run_id,
        nodes=candidate.nodes,
        tasks_per_node=candidate.gpus_per_node,
        gpus_per_node=candidate.gpus_per_node if asks_gpus and (local or site.request_gpus) else None,
        gpu_type=None if local else site.gpu_type,
        cpus_per_task=plan.job.cpus_per_task,
        mem=None if local else slurm.mem or plan.job.mem,
        time_min=time_min,
        partition=None if local else slurm.partition or os.environ.get("SBATCH_PARTITION") or site.default_partition,
        account=None if local else slurm.account or os.environ.get("SBATCH_ACCOUNT") or site.account,
        qos=None if local else slurm.qos or os.environ.get("SBATCH_QOS") or site.qos,
        constraint=None if local else slurm.constraint,
        exclusive=slurm.exclusive,
        requeue=slurm.requeue,
        signal_lead_s=signal_lead_s(plan.chosen, time_min),
        extra=dict(slurm.extra),
        env=_environment(plan, site),
        setup=(*(f"module load {module} || exit 1" for module in site.modules), *site.setup),
        container=site.container,
        python=_python(site),
        srun_args=site.srun_args,
        chdir=str(Path.cwd()),
    )
    raise_all(RecipeError, request.problems())
    return request


def _threads(plan: Plan, site: Site) -> int:
    """Threads of one rank: its CPUs, or on this machine its share of them."""
    if site.executor == "slurm":
        return plan.job.cpus_per_task
    return max(1, min(plan.job.cpus_per_task, site.cpus_per_node // plan.chosen.candidate.gpus_per_node))


def _environment(plan: Plan, site: Site) -> dict[str, str]:
    """Variables of the job: one thread per CPU of a task, where this package lies, and the site's own."""
    env = {
        "OMP_NUM_THREADS": str(_threads(plan, site)),
        # Waiting threads spin for microseconds, then sleep. On 2 cores, 12.6 M parameters: OpenMP's long default spin
        # gives 1900 tokens/s alone but 200 beside a second job; sleeping at once 1240 alone and 1000 beside one; a spin
        # of 2000 gives 1350 to 1590 alone.
        "GOMP_SPINCOUNT": "2000",
        "PYTHONUNBUFFERED": "1",
        **({"LAUNCHER_CACHE": site.cache_dir} if site.cache_dir else {}),
        **({"LAUNCHER_INTERFACE": site.network_interface} if site.network_interface else {}),
    } | site.env
    package = Path(launcher.__file__).resolve().parents[1]
    if package != Path(sysconfig.get_paths()["purelib"]).resolve():
        further = env.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), further]))
    return env


def _python(site: Site) -> str:
    """The jobs' interpreter: the site's virtual environment, the container's, or the one that runs now."""
    if site.venv:
        return str(Path(site.venv).expanduser() / "bin" / "python")
    return sys.executable if site.container.runtime == "none" else "python3"


def describe(request: JobRequest) -> dict[str, Any]:
    """The request as `--dry-run` prints it: every field, and the script for sbatch where there is one."""
    script = submitit_script(request) if request.cluster == "slurm" else None
    return {**request_to_json(request), "log": request.log, "script": script}


def print_sbatch(request: JobRequest) -> str:
    """A self-contained script for plain sbatch; the run folder it names must exist.

    Raises:
        ClusterError: the site runs jobs on this machine, without Slurm.
    """
    if request.cluster != "slurm":
        raise ClusterError("--print-sbatch: this site has no Slurm (executor: local); name one with slurm.site=...")
    _remember(request, RunFolder(Path(request.run_dir)), job_id=None)
    return plain_script(request)


def submit(request: JobRequest) -> str:
    """Send the job and return its id; the run folder then holds job.json and the ledger its first line.

    When the job is refused nothing stays queued, and a run folder without results is removed.

    Raises:
        RecipeError: a value that must not reach sbatch.
        TemporaryError: no sbatch here, or its controller does not answer.
        ClusterError: Slurm refuses the job; its words are quoted, with what exists instead.
    """
    run = RunFolder(Path(request.run_dir))
    try:
        raise_all(RecipeError, request.problems())
        with clean_environment():
            job_id = _send_to_slurm(request, run) if request.cluster == "slurm" else _start_here(request)
    except LauncherError:
        _discard(run)
        raise
    try:
        _remember(request, run, job_id=job_id)
        run.record("submitted", job_id=job_id, cluster=request.cluster)
    except OSError as error:
        if request.cluster == "slurm":
            cancel_job(job_id)
        raise ClusterError(f"cannot write {run.job}: {error}; job {job_id} was cancelled") from error
    return job_id


def _remember(request: JobRequest, run: RunFolder, *, job_id: str | None) -> None:
    process = identify(int(job_id)) if job_id and request.cluster == "local" else None
    document = {
        "job_id": job_id,
        "submitted_s": time.time() if job_id else None,
        "process": None if process is None else {name: getattr(process, name) for name in process.__slots__},
        "request": request_to_json(request),
    }
    write_json(run.job, document)


def _start_here(request: JobRequest) -> str:
    from launcher.runs.local import start

    return start(request)


def _send_to_slurm(request: JobRequest, run: RunFolder) -> str:
    """Submit through submitit's Slurm executor."""
    for command in ("sbatch", "srun"):
        if shutil.which(command) is None:
            raise TemporaryError(
                f"{command} is not on this machine's PATH, so nothing was submitted; go to a login node of the cluster "
                "(or load its Slurm module) and try again, or run here with: launcher submit --local"
            )
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder=run.submission, python=shlex.join(python_words(request)))
    executor.update_parameters(**submitit_parameters(request))
    try:
        # submitit prints sbatch's complaint as well as raising it; the error that is raised here quotes it once.
        with contextlib.redirect_stderr(io.StringIO()):
            return str(executor.submit(TrainJob(request.run_dir)).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        raise _refusal(" / ".join(str(error).split("\n")), request) from error


def _refusal(words: str, request: JobRequest) -> LauncherError:
    """Slurm's words as an error, with what exists where that helps."""
    if is_temporary(words):
        return TemporaryError(
            f"Slurm does not answer, so nothing was submitted; try again later (sbatch said: {words})"
        )
    lowered, hints = words.lower(), []
    with contextlib.suppress(LauncherError):
        if "partition" in lowered or "node configuration" in lowered:
            hints.append(f"partitions here: {', '.join(partition.name for partition in partitions())}")
        allowed = associations() if "account" in lowered or "qos" in lowered else None
        if allowed:
            hints.append(f"your accounts: {', '.join(allowed[0])}; your QOS: {', '.join(allowed[1])}")
    asked = f"asked for partition={request.partition} account={request.account} qos={request.qos} nodes={request.nodes}"
    return ClusterError("; ".join([f"Slurm refused the job: {words}", asked, *hints]))


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Hide the variables of a surrounding job or launcher while a job is submitted.

    They would silently win over the script (SBATCH_*) or bind the new job to the old one's CPUs (SLURM_CPU_BIND).
    SLURM_CONF stays: without it sbatch may not find its cluster.
    """
    hidden = {name: value for name, value in os.environ.items() if _is_foreign(name)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_foreign(name: str) -> bool:
    if name in _KEPT_SLURM_VARIABLES:
        return False
    return name in _FOREIGN_NAMES or name.startswith(_FOREIGN_PREFIXES)


def _discard(run: RunFolder) -> None:
    """Remove a run folder that nothing has run in; leave anything else alone."""
    ours = run.recipe.is_file() and run.plan.is_file() and not run.path.is_symlink()
    used = any(path.exists() for path in (run.attempts, run.metrics, run.heartbeat, run.result, run.adapter, run.model))
    with contextlib.suppress(OSError):
        if ours and not used and not any(run.checkpoints.iterdir()):
            shutil.rmtree(run.path)
