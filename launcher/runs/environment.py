"""environment.json: which code and packages a run was submitted with, so that it can be repeated. No secrets."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
import sys
from pathlib import Path
from typing import Any

import launcher
from launcher import __version__
from launcher.errors import LauncherError
from launcher.facts.command import run_command
from launcher.facts.probe import user_name
from launcher.runs.redaction import redact

PACKAGES = (
    "accelerate bitsandbytes click cloudpickle datasets deepspeed finetune-launcher numpy omegaconf peft pyarrow"
    " PyYAML safetensors submitit tokenizers torch transformers wandb"
)
"""Packages whose version can change a result or a job."""
MAX_DIFF_CHARACTERS = 500_000


def environment_facts(job_python: str) -> dict[str, Any]:
    """Facts about the code, the packages and the machine that submits."""
    return {
        "launcher": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "job_python": job_python,
        "packages": _versions(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "user": user_name(),
        "working_folder": str(Path.cwd()),
        "source": source_fingerprint(),
        "code": _code(Path(__file__).resolve().parents[2]),
    }


def source_fingerprint() -> str:
    """The launcher's own Python files as one word: ranks that run other code than was planned give another one."""
    package = Path(launcher.__file__).parent
    whole = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        whole.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def _versions() -> dict[str, str]:
    """Package -> version, of those installed beside the launcher."""
    found: dict[str, str] = {}
    for name in PACKAGES.split():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _code(checkout: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the launcher's checkout; None where it was installed from a wheel."""
    if not (checkout / ".git").exists():
        return None
    commit = _git(checkout, "rev-parse", "HEAD")
    diff = redact(_git(checkout, "diff", "HEAD", "--no-color", "--no-ext-diff") or "")
    return {"commit": commit, "diff": diff[:MAX_DIFF_CHARACTERS], "diff_cut": len(diff) > MAX_DIFF_CHARACTERS}


def _git(checkout: Path, *arguments: str) -> str | None:
    """What git answers; None where it is absent or refuses (a checkout of another user, for one)."""
    try:
        ran = run_command(["git", "-C", str(checkout), *arguments], timeout_s=30)
    except LauncherError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
