"""sbatch: JobRequest -> script text, through submitit and without it.

Both scripts carry the same `#SBATCH` lines, the same set-up, the same srun and the same lines around it. What follows
srun is the aftermath, which is given srun's exit status and whose own status is the job's: any other command there
would hide a failure.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

from launcher.runs.remains import MARKER
from launcher.runs.request import JobRequest
from launcher.runs.train_job import task_words

Directives = dict[str, str | int | bool]
_MODULES = (
    "for file in /etc/profile.d/lmod.sh /etc/profile.d/modules.sh /etc/profile.d/z00_lmod.sh"
    ' "${LMOD_PKG:-}/init/bash" "${MODULESHOME:-}/init/bash"; do'
    ' type module >/dev/null 2>&1 && break; [ -r "$file" ] && . "$file"; done'
)
"""`module` is a shell function: it does not come along with variables that are passed on by name."""


def directives(request: JobRequest) -> Directives:
    """The sbatch long options of the job; True stands for an option without a value."""
    wanted: dict[str, str | int | bool | None] = {
        "job_name": request.name,
        "array": request.array,
        **_size(request),
        "cpus_per_task": request.cpus_per_task,
        "gpus_per_node": _gpus(request),
        "mem": request.mem,
        "time": request.time_min,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "exclusive": request.exclusive or None,
        "requeue" if request.requeue else "no_requeue": True,
        "signal": f"USR2@{request.signal_lead_s}",
        "open-mode": "append",
        # The batch script shares rank 0's log: they run on the same node, and srun's complaints belong there.
        "output": request.log.replace("%t", "0"),
        "chdir": request.chdir,
        # Slurm keeps the variables that sbatch hands on: only those named here, and no secret (see variables.py).
        "export": ",".join(request.export) or "NONE",
    }
    ours: Directives = {key: value for key, value in wanted.items() if value is not None}
    return ours | {
        key.removeprefix("--").replace("_", "-"): True if value is None else value
        for key, value in request.extra.items()
        if value is not False
    }


def _size(request: JobRequest) -> dict[str, str | int]:
    """How many nodes, and what of each.

    A range of nodes must not say tasks: with them Slurm gives the fewest nodes, however many are free. So it asks for
    the CPUs of a node's tasks, and srun is told of the tasks in the script.
    """
    if not request.node_counts:
        return {"nodes": request.nodes, "ntasks_per_node": request.tasks_per_node}
    return {
        "nodes": f"{request.node_counts[0]}-{request.nodes}",
        "mincpus": request.tasks_per_node * request.cpus_per_task,
    }


def _gpus(request: JobRequest) -> str | int | None:
    """GPUs per node, all visible to every task: a GPU per task breaks NCCL's peer-to-peer."""
    if request.gpus_per_node is None or request.gpu_type is None:
        return request.gpus_per_node
    return f"{request.gpu_type}:{request.gpus_per_node}"


def setup_lines(request: JobRequest) -> list[str]:
    """Shell lines before srun: the site profile's own lines and its environment, values quoted.

    srun would hand on no more variables than sbatch did, if it were not told to take what the script has set up.
    """
    modules = [_MODULES] if any(line.startswith("module ") for line in request.setup) else []
    first = ["umask 077", "export SLURM_EXPORT_ENV=ALL", *modules]
    return [*first, *request.setup, *(f"export {key}={shlex.quote(value)}" for key, value in request.env.items())]


def srun_arguments(request: JobRequest) -> list[str]:
    """Arguments of srun after --output.

    `--cpus-per-task` is repeated because srun stopped taking it from the job in Slurm 22.05; without
    `--kill-on-bad-exit` the other ranks train on after one has died.
    """
    arguments = ["--open-mode=append", "--kill-on-bad-exit=1", f"--cpus-per-task={request.cpus_per_task}"]
    if request.container.runtime == "pyxis":
        arguments.append(f"--container-image={request.container.image}")
        if request.container.mounts:
            arguments.append(f"--container-mounts={','.join(request.container.mounts)}")
    return [*arguments, *request.srun_args]


def python_words(request: JobRequest) -> list[str]:
    """How a task starts Python: as it is, or inside apptainer."""
    if request.container.runtime != "apptainer":
        return [request.python]
    words = ["apptainer", "exec"]
    if request.gpus_per_node:
        words.append("--nv")
    for mount in request.container.mounts:
        words += ["--bind", mount]
    return [*words, str(request.container.image), request.python]


def submitit_parameters(request: JobRequest) -> dict[str, Any]:
    """Parameters for submitit's SlurmExecutor; `wckey=None` because a site that tracks wckeys refuses submitit's."""
    return {
        "job_name": request.name,
        "nodes": request.nodes,
        "time": request.time_min,
        "signal_delay_s": request.signal_lead_s,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": [*setup_lines(request), *lines_before(request)],
        "teardown": lines_after(request),
        "srun_args": ["--output", request.log, *srun_arguments(request)],
        "additional_parameters": directives(request),
    }


def lines_before(request: JobRequest) -> list[str]:
    """Shell lines between the set-up and srun; nothing of the recipe is in them but the path of the run folder.

    The traps keep a signal that is meant for the ranks from ending this script before its last words; bash runs them
    when srun has ended. Beside srun stands a watch for the case that it never ends. The mark tells one start of the job
    from another in the log that they share.
    """
    return [
        *_nodes_to_use(request),
        "trap : TERM USR2",
        f'echo "{MARKER} ${{SLURM_JOB_ID}}.${{SLURM_RESTART_COUNT:-0}}"',
        f"{_ours(request, 'aftermath')} before",
        "case $? in 92) exit 0 ;; 93) exit 93 ;; esac",
        f'{_ours(request, "lost_srun")} "${{SLURM_JOB_ID}}.${{SLURM_RESTART_COUNT:-0}}" $$ &',
        "watch=$!",
    ]


def _nodes_to_use(request: JobRequest) -> list[str]:
    """A job that got a number of nodes on which the global batch does not divide uses the next smaller one.

    srun takes the number from these variables, which Slurm sets to all of the job's nodes.
    """
    if not request.node_counts:
        return []
    counts = " ".join(str(count) for count in (request.nodes, *request.node_counts[::-1]))
    return [
        f'for nodes in {counts}; do [ "$nodes" -le "$SLURM_JOB_NUM_NODES" ] && break; done',
        f"export SLURM_JOB_NUM_NODES=$nodes SLURM_NNODES=$nodes SLURM_NTASKS=$((nodes * {request.tasks_per_node}))",
        f"export SLURM_NPROCS=$SLURM_NTASKS SLURM_NTASKS_PER_NODE={request.tasks_per_node}",
    ]


def lines_after(request: JobRequest) -> list[str]:
    """Shell lines after srun: the last words, and the exit status of the job."""
    return ["rc=$?", 'kill "$watch" 2>/dev/null', f"{_ours(request, 'aftermath')} $rc", "exit $?"]


def _ours(request: JobRequest, module: str) -> str:
    """One of our modules, on the node itself and not in a container: Slurm's commands are often missing there."""
    python = request.python if request.container.runtime == "none" else sys.executable
    return shlex.join([python, "-u", "-m", f"launcher.runs.{module}", request.run_dir])


def submitit_script(request: JobRequest) -> str:
    """The script `submit` sends, rendered where there is no Slurm too.

    submitit's executor refuses to exist without srun, so its private renderer is called here; a test holds the two
    texts together.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    command = shlex.join(task_words(python_words(request), request.run_dir))
    parameters = submitit_parameters(request)
    return str(_make_sbatch_string(command=command, folder=f"{request.run_dir}/submission", **parameters))


def plain_script(request: JobRequest) -> str:
    """A script that `sbatch` accepts by hand and that trains the same way, without submitit."""
    task = task_words(python_words(request), request.run_dir)
    srun = ["srun", "--unbuffered", f"--output={request.log}", *srun_arguments(request), *task]
    lines = ["#!/bin/bash", *(_directive(key, value) for key, value in sorted(directives(request).items()))]
    lines += ["", "# The site's set-up", *setup_lines(request)]
    lines += lines_before(request)
    lines += ["", "# One task per rank", shlex.join(srun), "", "# What follows the run, and the job's exit status"]
    lines += lines_after(request)
    return "\n".join(lines) + "\n"


def _directive(key: str, value: str | int | bool) -> str:
    option = key.replace("_", "-")
    return f"#SBATCH --{option}" if value is True else f"#SBATCH --{option}={shlex.quote(str(value))}"
