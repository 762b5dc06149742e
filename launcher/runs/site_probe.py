"""site_probe: what a compute node says about itself, as the one-minute job of `launcher init --probe-job`.

The job runs `python -m launcher.runs.site_probe FOLDER`: it reads FOLDER/request.json and leaves FOLDER/answer.json. It
needs no GPU, no training package and no network; what it cannot find out within seconds counts as not there.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError
from launcher.facts.command import run_command
from launcher.facts.places import MEMORY_TYPES, SHARED_TYPES, existing, mount_of, mounts
from launcher.runs.folder import write_json

REQUEST, ANSWER = "request.json", "answer.json"
_REACH_S = 12.0
"""For all addresses together: a node without a route may wait for its name server for ever."""
_DISKS = (
    *("/local_scratch", "/localscratch", "/local/scratch", "/scratch_local", "/scratch/local", "/scratch/ssd"),
    *("/mnt/nvme", "/mnt/local", "/mnt/resource_nvme", "/nvme", "/local", "/raid", "/lscratch", "/tmp"),
)
"""Where sites mount the disk of a node."""
_VARIABLES = ("SLURM_TMPDIR", "LOCAL_SCRATCH", "LOCALSCRATCH", "NVME_SCRATCH", "JOBSCRATCH", "TMPDIR")
"""What sites call it in a job's environment."""


def main(folder: Path) -> int:
    """Answer the request in `folder`."""
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    write_json(folder / ANSWER, look(request, os.environ))
    return 0


def look(request: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Everything that is asked, in the form that facts of a site are made of.

    `request`: `urls` to reach, by name; `marks`: file system -> path of a file that this node should see.
    """
    return {
        "schema": 1,
        "scontrol": _controller_answers(environ.get("SLURM_JOB_ID", "")),
        "reached": reach(request["urls"]),
        "gpus": _gpus(),
        "containers": [name for name in ("enroot", "apptainer", "singularity") if shutil.which(name)],
        "seen": {name: Path(mark).is_file() for name, mark in request["marks"].items()},
        "local": disks(environ),
    }


def _controller_answers(job_id: str) -> bool:
    """Whether a job can ask Slurm about itself, as it must to requeue itself."""
    try:
        return run_command(["scontrol", "show", "job", job_id], timeout_s=15).returncode == 0
    except LauncherError:
        return False


def _gpus() -> list[str]:
    """The driver's names of the GPUs this job was given."""
    try:
        ran = run_command(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], timeout_s=20)
    except LauncherError:
        return []
    return [line.strip() for line in ran.stdout.splitlines() if line.strip()] if ran.returncode == 0 else []


def reach(urls: Mapping[str, str], timeout_s: float = _REACH_S) -> dict[str, bool]:
    """Which of these addresses answer, all asked at once; any answer counts, a proxy of the environment is used."""
    found = dict.fromkeys(urls, False)

    def ask(name: str, url: str) -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s / 2):
                found[name] = True
        except urllib.error.HTTPError as error:
            found[name] = error.code not in _PROXY_REFUSES
        except (OSError, ValueError):
            return

    threads = [threading.Thread(target=ask, args=pair, daemon=True) for pair in urls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s / len(threads))
    return dict(found)


_PROXY_REFUSES = (407, 502, 503, 504)
"""The answer is the proxy's, not the address's."""


def disks(environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """Folders on this node's own disks in which this user can write, the most promising first.

    `path` is as a profile may say it (a variable where the folder is this job's); `fast`: a solid-state disk at a fixed
    path; `memory`: a file system in RAM.
    """
    listed = mounts()
    named = [(f"${name}", environ[name]) for name in _VARIABLES if environ.get(name, "").startswith("/")]
    found, seen = [], set()
    for written, folder in [(path, path) for path in _DISKS] + named:
        path = Path(folder)
        if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
            continue
        source, kind = mount_of(existing(path), listed)
        if kind in SHARED_TYPES or source in seen:
            continue
        seen.add(source)
        space = os.statvfs(path)
        fixed, memory = not written.startswith("$") and written != "/tmp", kind in MEMORY_TYPES
        found.append(
            {
                "path": written,
                "type": kind,
                "free_bytes": space.f_bavail * space.f_frsize,
                "memory": memory,
                "fast": fixed and not memory and _is_solid_state(path),
            }
        )
    return found


def _is_solid_state(path: Path) -> bool:
    """What the kernel says of the disk below a folder; False where it does not say."""
    device = path.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for place in (block / "queue" / "rotational", block.resolve().parent / "queue" / "rotational"):
        try:
            return place.read_text().strip() == "0"
        except OSError:
            continue
    return False


def run(words: Sequence[str]) -> int:
    """The command line."""
    return main(Path(words[0]))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
