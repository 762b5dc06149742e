"""serving_job: a Slurm job that serves base and adapters with vLLM, where the train environment has it.

The job runs `python -m launcher.runs.serving_job FOLDER`; what it serves stands in FOLDER/request.json, so no name
reaches a shell. A compute node is not this machine, so clients need a token: it travels in a private file.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, LauncherError, RecipeError, raise_all
from launcher.facts.adapters import read_adapter_facts
from launcher.facts.command import run_slurm
from launcher.facts.serving import refusals, serve_command, served_of
from launcher.facts.site import Site, site_facts
from launcher.facts.train_environment import environment, train_python
from launcher.runs.folder import write_atomic, write_json
from launcher.runs.prepare_job import module_script
from launcher.runs.request import bad_characters
from launcher.runs.sending import clean_environment
from launcher.runs.status import runs_folder
from launcher.runs.variables import exported_names, private_files

TOKEN = "VLLM_API_KEY"
"""The variable in which vLLM looks for the token."""
_FIND_S = 120.0
_TIME_MIN = 8 * 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the job runs; None: as the site's profile says."""

    site: str = "auto"
    partition: str | None = None
    time_min: int | None = None
    gpus: int = 1


def vllm_command(request: Mapping[str, Any], *, gpus: int = 1) -> list[str]:
    """The command line that serves the request's base and adapters.

    Raises:
        RecipeError: vLLM would refuse one of them; every reason.
    """
    facts = [(one["name"], read_adapter_facts(Path(one["folder"]))) for one in request["adapters"]]
    problems = [
        f"{name}: vLLM would refuse it: {why}" for name, one in facts for why in refusals("vllm", served_of(one))
    ]
    if request["port"] == 0:
        problems.append("--port 0: a job cannot tell its clients beforehand; name a port")
    raise_all(RecipeError, problems)
    base = request["base"]
    options = ["--host", "0.0.0.0", "--port", str(request["port"]), *_held(base)]
    options += ["--tensor-parallel-size", str(gpus)]
    if request["context"]:
        options += ["--max-model-len", str(request["context"])]
    if not facts:
        return [
            *serve_command("merged", base=base["folder"], name=base["name"], folder=base["folder"], rank=None),
            *options,
        ]
    first, *others = request["adapters"]
    rank = max(one.rank for _, one in facts)
    words = serve_command("vllm", base=base["folder"], name=first["name"], folder=first["folder"], rank=rank)
    words += [f"{one['name']}={one['folder']}" for one in others]  # more of --lora-modules, its last option
    return [*words, "--max-loras", str(len(facts)), "--served-model-name", base["name"], *options]


def _held(base: Mapping[str, Any]) -> list[str]:
    """vLLM's options for how the base is held (its bitsandbytes support quantizes while it loads)."""
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[base["dtype"]]
    return ["--dtype", dtype, *(["--quantization", "bitsandbytes"] if base["quantization"] else [])]


def find_vllm(python: str) -> str:
    """vLLM's version in the train environment; vLLM itself is not imported.

    Raises:
        ClusterError: it is not there, with what works without it.
    """
    script = "import importlib.metadata as m; print(m.version('vllm'))"
    try:
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=_FIND_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"serve --slurm: cannot run {python}: {error}") from error
    if done.returncode:
        raise ClusterError(
            f"serve --slurm: vllm is not in the train environment ({python}); install it there, name an environment "
            "that has it in LAUNCHER_VENV, or leave --slurm out: the embedded server needs no vLLM"
        )
    return done.stdout.strip()


def describe(request: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """What would be submitted, for --dry-run.

    Raises:
        LauncherError: the same as `submit`, but for what Slurm says.
    """
    site = _site(place)
    options = _options(site, place, request, Path("FOLDER"))
    command = vllm_command(request, gpus=place.gpus)
    return {"command": command, "options": options, "vllm": find_vllm(train_python(site))}


def submit(request: Mapping[str, Any], place: Place) -> tuple[str, Path]:
    """Submit the job; its id, and the folder where its log and address.json will be.

    Raises:
        RecipeError: vLLM refuses an adapter, no token, or a folder's name. ClusterError, TemporaryError: no Slurm, no
            vLLM, or Slurm refuses.
    """
    site = _site(place)
    command = vllm_command(request, gpus=place.gpus)
    token = _token(request)
    find_vllm(train_python(site))
    folder = (runs_folder(None) / ".serve" / secrets.token_hex(4)).resolve()
    if bad_characters(str(folder), frozenset("'\"\\`$%")):
        raise RecipeError(f"LAUNCHER_RUNS: {str(folder)!r} must not stand in a script; choose a plain path")
    with private_files():
        folder.mkdir(mode=0o700, parents=True)
        write_json(folder / "request.json", {"command": command, "port": request["port"]})
        write_json(folder / "token.json", {TOKEN: token})
        write_atomic(folder / "job.sh", module_script(site, "serving_job", folder))
        named = [f"--{key}={value}" for key, value in _options(site, place, request, folder).items()]
        with clean_environment():
            answer = run_slurm(["sbatch", "--parsable", "--no-requeue", *named, str(folder / "job.sh")])
    return answer.strip().split(";")[0], folder


def _site(place: Place) -> Site:
    site = site_facts(place.site)
    if site.executor != "slurm":
        raise ClusterError("serve --slurm: this site has no Slurm; leave --slurm out")
    return site


def _token(request: Mapping[str, Any]) -> str:
    name = request["token_env"]
    if name is None:
        raise RecipeError("serve --slurm: others can reach a compute node, so a token is needed: --token-env NAME")
    token = os.environ.get(name)
    if not token:
        raise RecipeError(f"--token-env: the variable {name} is not set, or empty")
    return token


def _options(site: Site, place: Place, request: Mapping[str, Any], folder: Path) -> dict[str, str]:
    exported = [name for name in exported_names(os.environ) if name != request["token_env"]]
    wanted = {
        "job-name": "launcher-serve",
        "nodes": "1",
        "ntasks": "1",
        "time": str(min(place.time_min or _TIME_MIN, site.max_time_min or place.time_min or _TIME_MIN)),
        "output": str(folder / "job.out"),
        "chdir": str(folder),
        "partition": place.partition or site.default_partition,
        "account": site.account,
        "qos": site.qos,
        "export": ",".join(exported) or "NONE",
        "gpus-per-node": (f"{site.gpu_type}:{place.gpus}" if site.gpu_type else str(place.gpus))
        if site.request_gpus
        else None,
    }
    return {key: value for key, value in wanted.items() if value}


def main(folder: Path) -> int:
    """What the job does: say where it is, and become vLLM."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    token = json.loads((folder / "token.json").read_text(encoding="utf-8"))
    write_json(folder / "address.json", {"url": f"http://{socket.getfqdn()}:{request['port']}/v1"})
    command: Sequence[str] = request["command"]
    beside = Path(sys.executable).with_name("vllm")
    program = str(beside) if beside.is_file() else command[0]
    changing = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    try:
        os.execvpe(program, [program, *command[1:]], environment() | token | changing)
    except OSError as error:
        raise ClusterError(f"cannot run {program}: {error}") from error


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except LauncherError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
