"""site_probe_job: `launcher init --probe-job` asks a compute node what only a compute node knows.

One task, two minutes at most, submitted with plain sbatch; its answer is a file. The wait is bounded, and a job that
has not answered is cancelled.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, LauncherError, TemporaryError
from launcher.facts.command import run_slurm
from launcher.facts.gpu import gpu
from launcher.facts.offer import FileSystem
from launcher.facts.survey import Survey
from launcher.facts.train_environment import train_python
from launcher.runs.folder import write_atomic, write_json
from launcher.runs.request import bad_characters
from launcher.runs.sending import clean_environment
from launcher.runs.site_probe import ANSWER, REQUEST
from launcher.runs.slurm import cancel_job, find_jobs

TIME_MIN = 2
WAIT_S = 600.0
"""For the job to start and answer; LAUNCHER_PROBE_WAIT_S overrules it."""
_ASK_SLURM_EVERY_S = 15.0
URLS = {"huggingface.co": "https://huggingface.co", "api.wandb.ai": "https://api.wandb.ai"}
_SOURCE = "probe job"


def ask_node(found: Survey, runs: Path, *, say: Callable[[str], None]) -> None:
    """Run the job and add its answer to `found`.

    `runs` is the folder of the runs: the job's files lie in it while it lives, which also shows whether nodes see it.

    Raises:
        ClusterError: Slurm refuses the job, or it ended without an answer.
        TemporaryError: Slurm does not answer, or the job did not start in time.
    """
    with _folder(runs) as folder, _marks(found) as marks:
        write_json(folder / REQUEST, {"urls": URLS, "marks": {"runs": str(folder / REQUEST), **marks}})
        job_id = _submit(found, folder)
        say(f"submitted job {job_id} to partition {found.values['default_partition']}; waiting for its answer")
        try:
            answer = _wait(job_id, folder)
        except BaseException:
            with suppress(LauncherError):
                cancel_job(job_id)
            raise
    add_answer(found, answer)


@contextmanager
def _folder(runs: Path) -> Iterator[Path]:
    """A private folder in the runs folder; nothing of it stays."""
    made = not runs.exists()
    folder = (runs / f".site-probe-{secrets.token_hex(4)}").resolve()
    if bad_characters(str(folder), frozenset("'\"\\`$%")):
        raise ClusterError(f"LAUNCHER_RUNS: {str(folder)!r} must not stand in a script; choose a plain path")
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise ClusterError(f"{runs} cannot be written ({error.strerror}); set LAUNCHER_RUNS") from error
    try:
        yield folder
    finally:
        for file in folder.iterdir():
            file.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()
            if made:
                runs.rmdir()


@contextmanager
def _marks(found: Survey) -> Iterator[dict[str, str]]:
    """A file in every other file system that was found, for the node to look for: name -> path."""
    marks: dict[str, str] = {}
    try:
        for system in found.values.get("file_systems", ()):
            folder = os.environ.get(system.path.removeprefix("$"), "")
            if system.name == "runs" or not folder.startswith("/"):
                continue
            path = Path(folder) / f".launcher-probe-{secrets.token_hex(4)}"
            with suppress(OSError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                marks[system.name] = str(path)
        yield marks
    finally:
        for mark in marks.values():
            Path(mark).unlink(missing_ok=True)


def _submit(found: Survey, folder: Path) -> str:
    """Id of the submitted job; it asks for one GPU where the partition has any, as many sites insist."""
    package = str(Path(__file__).parents[2])
    script = (
        "#!/bin/bash",
        f"export PYTHONPATH={shlex.quote(package)}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"exec {shlex.quote(train_python())} -m launcher.runs.site_probe {shlex.quote(str(folder))}",
    )
    write_atomic(folder / "job.sh", "\n".join(script) + "\n")
    kind = found.values.get("gpu_type")
    options = {
        "job-name": "launcher-site-probe",
        "ntasks": "1",
        "nodes": "1",
        "time": str(TIME_MIN),
        "output": str(folder / "job.out"),
        "chdir": str(folder),
        "partition": found.values["default_partition"],
        "account": found.values.get("account"),
        "export": ",".join(_exported(os.environ)),
        "gpus-per-node": (f"{kind}:1" if kind else "1") if found.values.get("request_gpus") else None,
    }
    named = [f"--{key}={value}" for key, value in options.items() if value]
    with clean_environment():
        answer = run_slurm(["sbatch", "--parsable", "--no-requeue", *named, str(folder / "job.sh")])
    return answer.strip().split(";")[0]


def _exported(environ: Mapping[str, str]) -> list[str]:
    """Variables that the job needs: Slurm keeps a job's environment, so no secret may be in it."""
    plain = [name for name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "SLURM_CONF") if environ.get(name)]
    proxies = [name for name in environ if name.lower() in ("http_proxy", "https_proxy", "no_proxy")]
    return plain + sorted(name for name in proxies if "@" not in environ[name])


def _wait(job_id: str, folder: Path) -> dict[str, Any]:
    """The answer, polled for; Slurm itself is asked rarely.

    Raises:
        TemporaryError: none in time. ClusterError: the job ended without one.
    """
    limit_s = _limit_s()
    began = asked = time.monotonic()
    while True:
        answer = _read(folder)
        if answer is not None:
            return answer
        now = time.monotonic()
        if now - asked >= _ASK_SLURM_EVERY_S or now - began > limit_s:
            asked, job = now, _job(job_id)
            if job is not None and not job.active and _read(folder) is None:
                raise ClusterError(f"probe job {job_id} ended as {job.state} without an answer: {_last_words(folder)}")
            if now - began > limit_s:
                why = f"{job.state}, {job.reason}" if job is not None else "Slurm does not know it"
                raise TemporaryError(
                    f"probe job {job_id} did not answer within {limit_s:.0f} s ({why}) and was cancelled; try again "
                    "later, choose another partition with -p, or leave --probe-job out"
                )
        time.sleep(0.5)


def _limit_s() -> float:
    try:
        return max(1.0, float(os.environ.get("LAUNCHER_PROBE_WAIT_S", WAIT_S)))
    except ValueError:
        return WAIT_S


def _job(job_id: str) -> Any:
    try:
        return find_jobs([job_id]).get(job_id)
    except TemporaryError:
        return None


def _read(folder: Path) -> dict[str, Any] | None:
    """The answer, if it is there; listing the folder makes network file systems look again."""
    if ANSWER not in os.listdir(folder):  # noqa: PTH208 - one call, which is the point
        return None
    document = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
    return document if isinstance(document, dict) else None


def _last_words(folder: Path) -> str:
    """The end of what the job printed, on one line."""
    try:
        text = (folder / "job.out").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "it wrote no log; the nodes may not see this folder: set LAUNCHER_RUNS to a shared one"
    lines = ["".join(letter for letter in line if letter.isprintable()) for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-400:] or "its log is empty"


def add_answer(found: Survey, answer: Mapping[str, Any]) -> None:
    """Add what the job saw on its node."""
    found.note("scontrol_on_nodes", answer["scontrol"], f"{_SOURCE}, scontrol show job")
    reached = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in sorted(answer["reached"].items()))
    found.note("internet_on_nodes", any(answer["reached"].values()), f"{_SOURCE}: {reached}")
    runtimes = (*found.values.get("containers", ()), *answer["containers"])
    found.note("containers", tuple(dict.fromkeys(runtimes)), f"srun --help (pyxis), PATH of this machine and {_SOURCE}")
    _add_gpu(found, answer["gpus"])
    _add_places(found, answer["seen"], answer["local"])


def _add_places(found: Survey, seen: Mapping[str, bool], local: list[dict[str, Any]]) -> None:
    """Whether nodes see what this machine sees, and what only they have."""
    here = (
        replace(one, shared=seen[one.name]) if one.name in seen else one for one in found.values.get("file_systems", ())
    )
    disks = (
        FileSystem(name="node", path=one["path"], type=one["type"], shared=False, free_bytes=one["free_bytes"])
        for one in local
    )
    found.note("file_systems", (*here, *disks), f"this machine (statvfs, quota); shared, and the nodes' own: {_SOURCE}")
    fast = next((one["path"] for one in local if one["fast"]), None)
    found.note("nvme_path", fast, f"{_SOURCE}: a solid-state disk of the node")
    if fast is None:
        found.unknown["nvme_path"] = f"the {_SOURCE} found no solid-state disk of the node at a path of its own"


def _add_gpu(found: Survey, seen: list[str]) -> None:
    """The driver's name of the GPUs is better than Slurm's type."""
    if not found.values.get("request_gpus"):
        return
    if not seen:
        if "gpu" in found.sources:
            found.sources["gpu"] += f"; the {_SOURCE} saw no GPU with nvidia-smi, so check it"
        return
    try:
        found.note("gpu", gpu(seen[0]).name, f"{_SOURCE}, nvidia-smi")
    except ClusterError:
        found.miss("gpu", f"nvidia-smi says {seen[0]!r}, which is not in the catalogue; write the nearest name")
