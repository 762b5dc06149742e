"""Submission: Plan + RunFolder -> JobRequest -> submitit, to Slurm or to this machine."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import launcher
from launcher.errors import ClusterError, LauncherError, RecipeError, raise_all
from launcher.facts.site import Site
from launcher.facts.staged import needs_no_hub
from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.job import signal_lead_s
from launcher.planning.plan import Plan, plan_to_json
from launcher.recipe.load import recipe_to_yaml
from launcher.recipe.schema import Recipe
from launcher.runs.adoption import ledger
from launcher.runs.drift import input_facts
from launcher.runs.environment import environment_facts
from launcher.runs.folder import RunFolder, write_atomic, write_json
from launcher.runs.lock import hold
from launcher.runs.plan_files import write_elastic
from launcher.runs.process import identify
from launcher.runs.request import JobRequest, request_to_json
from launcher.runs.sbatch import plain_script, submitit_script
from launcher.runs.sending import MaybeSubmittedError, Say, clean_environment, send_to_slurm, silent
from launcher.runs.slurm import cancel_job
from launcher.runs.variables import exported_names, leave_secrets, private_files

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
"""What keeps the libraries of a job from the hub."""

__all__ = ["JobRequest", "create_run", "describe", "job_request", "print_sbatch", "submit", "submit_held"]


def create_run(
    recipe_text: str, recipe: Recipe, plan: Plan, site: Site, parent: Path, *, origin: Path | None = None
) -> RunFolder:
    """Make the run folder and write what was asked, decided and found; `recipe` is the resolved one.

    `origin` is the file the recipe was read from; it and the files of data and model are remembered by size and time,
    so that a resume can tell what changed.

    Raises:
        ClusterError: the folder cannot be made or written.
    """
    try:
        with private_files():
            # Hidden until it is whole: whoever is killed in between leaves no half of a run.
            run = RunFolder.create(parent.resolve(), f".{recipe.name}", group=recipe.output_group)
        write_atomic(run.recipe, recipe_text)
        write_atomic(run.resolved, recipe_to_yaml(recipe))
        write_json(run.plan, plan_to_json(plan))
        candidate = plan.chosen.candidate
        if candidate.zero_stage > 0:
            write_json(run.ds_config, deepspeed_config(candidate, recipe.deepspeed.overrides))
        write_elastic(run, recipe, plan)
        around = {"recipe_file": None if origin is None else str(origin.resolve()), "inputs": input_facts(recipe)}
        write_json(run.environment, environment_facts(python_of(site)) | around)
        return RunFolder(run.path.rename(run.path.with_name(run.run_id.removeprefix("."))))
    except KeyError as error:
        raise ClusterError(f"output_group: there is no group {recipe.output_group} here") from error
    except OSError as error:
        raise ClusterError(f"output_dir: cannot write the run folder in {parent}: {error}") from error


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
        node_counts=() if local else tuple(sorted(each.nodes for each in plan.elastic)),
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
        extra={"comment": f"launcher:{run.run_id}"} | slurm.extra,
        env=_environment(plan, recipe, site),
        setup=(*(f"module load {module} || exit 1" for module in site.modules), *site.setup),
        container=site.container,
        python=python_of(site),
        srun_args=site.srun_args,
        chdir=str(Path.cwd()),
        export=() if local else exported_names(os.environ),
    )
    raise_all(RecipeError, request.problems())
    return request


def _threads(plan: Plan, site: Site) -> int:
    """Threads of one rank: its CPUs, or on this machine its share of them."""
    if site.executor == "slurm":
        return plan.job.cpus_per_task
    return max(1, min(plan.job.cpus_per_task, site.cpus_per_node // plan.chosen.candidate.gpus_per_node))


def _environment(plan: Plan, recipe: Recipe, site: Site) -> dict[str, str]:
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
        # With everything on disk nothing may ask the hub: where there is no route a job would wait for time-outs.
        **(dict.fromkeys(OFFLINE, "1") if needs_no_hub(recipe) else {}),
    } | site.env
    package = Path(launcher.__file__).resolve().parents[1]
    if package != Path(sysconfig.get_paths()["purelib"]).resolve():
        further = env.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), further]))
    return env


def python_of(site: Site) -> str:
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
    remember(request, RunFolder(Path(request.run_dir)), job_id=None)
    leave_secrets(Path(request.run_dir))
    return plain_script(request)


def submit(request: JobRequest, *, purpose: str = "submit", say: Say = silent) -> str:
    """Send the job and return its id; the run folder then holds job.json and the ledger a line about it.

    When the job is refused nothing stays queued, and a run folder without results is removed. An answer that got lost
    is no second job: one of this run's name that the ledger does not know is the one that was sent.

    Raises:
        RecipeError: a value that must not reach sbatch.
        TemporaryError: Slurm's controller does not answer, within PATIENCE_S.
        ClusterError: no sbatch here, or Slurm refuses the job; its words are quoted, with what exists instead.
        ConflictError: somebody else is submitting this run.
    """
    run = RunFolder(Path(request.run_dir))
    try:
        raise_all(RecipeError, request.problems())
    except LauncherError:
        _discard(run)
        raise
    with hold(run, purpose):
        return submit_held(request, purpose=purpose, say=say)


def submit_held(request: JobRequest, *, purpose: str, say: Say = silent) -> str:
    """Like `submit`, for a caller that holds the run's lock and has checked the request."""
    run, token = RunFolder(Path(request.run_dir)), secrets.token_hex(8)
    try:
        # job.json first: who finds a lost job later knows what was asked for.
        before = _job_document(run)
        remember(request, run, job_id=None)
        run.record("submitting", token=token, purpose=purpose, cluster=request.cluster, job_name=request.name)
        if request.cluster == "slurm":
            leave_secrets(run.path)
        with clean_environment(), private_files():
            job_id = send_to_slurm(request, run, say) if request.cluster == "slurm" else _start_here(request)
    except MaybeSubmittedError:
        raise
    except (LauncherError, OSError) as error:
        why = error.problems[0] if isinstance(error, LauncherError) else str(error)
        _nothing_was_sent(run, token, why, before, discard=purpose == "submit")
        if isinstance(error, OSError):
            raise ClusterError(f"cannot write the run folder {run.path}: {error}") from error
        raise
    try:
        remember(request, run, job_id=job_id)
        run.record("submitted", job_id=job_id, cluster=request.cluster, purpose=purpose, token=token)
    except OSError as error:
        if request.cluster == "slurm":
            cancel_job(job_id)
        raise ClusterError(f"cannot write {run.job}: {error}; job {job_id} was cancelled") from error
    return job_id


def _nothing_was_sent(run: RunFolder, token: str, why: str, before: Mapping[str, Any] | None, *, discard: bool) -> None:
    """No job exists: close the ledger's open line, or remove a folder in which nothing ever ran."""
    with contextlib.suppress(OSError):
        run.record("not_submitted", token=token, why=why)
        if before is None:
            run.job.unlink(missing_ok=True)
        else:
            write_json(run.job, before)
    if discard:
        _discard(run)


def _job_document(run: RunFolder) -> Mapping[str, Any] | None:
    """What job.json holds; None where there is none, or none that could be put back."""
    try:
        document = json.loads(run.job.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def remember(request: JobRequest, run: RunFolder, *, job_id: str | None) -> None:
    """Write job.json: what was asked for, and the job's id once it has one."""
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


def _discard(run: RunFolder) -> None:
    """Remove a run folder that nothing has run in; leave anything else alone."""
    ours = run.recipe.is_file() and run.plan.is_file() and not run.path.is_symlink()
    used = any(path.exists() for path in (run.metrics, run.heartbeat, run.result, run.adapter, run.model))
    with contextlib.suppress(OSError):
        used = used or any(event.get("event") not in ("submitting", "not_submitted") for event in ledger(run))
        if ours and not used and not any(run.checkpoints.iterdir()):
            shutil.rmtree(run.path)
