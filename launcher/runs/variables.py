"""variables: which of the submitter's environment variables reach a job, and how.

By default Slurm would keep the whole environment of `sbatch` with the job, and a site may keep it in its accounting
database: with every key and password that a shell happens to hold. So variables travel by name. Open ones are named to
sbatch (`--export=PATH,HOME,...`); keys and tokens go through a file that only their owner can read,
`<runs>/.secrets/environment.json`, from which the supervisor gives them to its rank and to nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.errors import ClusterError
from launcher.runs.folder import write_json
from launcher.runs.redaction import has_secret_form, is_secret_name

# fmt: off
_OPEN = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "SCRATCH", "WORK", "XDG_CACHE_HOME",
    "LD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX",
    "PYTHONPATH", "MODULEPATH", "MODULESHOME", "LMOD_CMD", "LMOD_DIR", "LMOD_PKG", "BASH_ENV", "SLURM_CONF",
    "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT",
    "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "TORCH_HOME",
    "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "NETRC", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY",
    "WANDB_BASE_URL", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "DISABLE_TELEMETRY", "DO_NOT_TRACK",
})
# fmt: on
_OPEN_PREFIXES = ("LAUNCHER_", "NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_NCCL_", "DS_")
_NOT_FOR_JOBS = frozenset({"LAUNCHER_SUPERVISOR", "LAUNCHER_SUPERVISED_RUN", "LAUNCHER_EARLY_SIGNAL"})
_SECRET = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
FURTHER = "LAUNCHER_SECRETS"
"""Names of further variables that a job needs and nobody may see, such as AWS_SECRET_ACCESS_KEY, with commas."""


def exported_names(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the variables that sbatch may keep with a job: known to be harmless, and not looking otherwise."""
    return tuple(
        sorted(
            name
            for name, value in environ.items()
            if (name in _OPEN or name.startswith(_OPEN_PREFIXES))
            and name not in _NOT_FOR_JOBS
            and name not in _further(environ)
            and not (is_secret_name(name) or has_secret_form(value))
        )
    )


def secrets_of(environ: Mapping[str, str]) -> dict[str, str]:
    """What a job needs and nobody may see: keys of the hub and of W&B, proxies with a password, what FURTHER names."""
    found = {name: environ[name] for name in (*_SECRET, *_further(environ)) if environ.get(name)}
    return found | {name: environ[name] for name in _PROXIES if has_secret_form(environ.get(name, ""))}


def _further(environ: Mapping[str, str]) -> list[str]:
    return [name.strip() for name in environ.get(FURTHER, "").split(",") if name.strip()]


def secrets_file(run_dir: Path) -> Path:
    """Beside the run, not in it: a run folder is copied, shown and shared."""
    return run_dir.parent / ".secrets" / "environment.json"


def leave_secrets(run_dir: Path, environ: Mapping[str, str] | None = None) -> None:
    """Write what jobs of this runs folder need; what is not set now stays as an earlier submission left it.

    Raises:
        ClusterError: the folder is a link, somebody else's or open to others.
    """
    wanted = secrets_of(os.environ if environ is None else environ)
    path = secrets_file(run_dir)
    if not wanted:
        return
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(mode=0o700)
    known = read_secrets(run_dir)
    if known != known | wanted or not path.exists():
        write_json(path, known | wanted)


def read_secrets(run_dir: Path) -> dict[str, str]:
    """What `leave_secrets` left; {} where there is nothing.

    Raises:
        ClusterError: somebody else could have written or read it.
    """
    path = secrets_file(run_dir)
    for place in (path.parent, path):
        trouble = not_ours(place, private=True)
        if trouble:
            raise ClusterError(f"{place}: {trouble}; remove it, and change the keys it may have shown")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    with os.fdopen(descriptor, encoding="utf-8") as file:
        try:
            return {str(name): str(value) for name, value in dict(json.load(file)).items()}
        except (ValueError, TypeError) as error:
            raise ClusterError(f"{path}: cannot be read ({type(error).__name__}); remove it and submit again") from None


def not_ours(path: Path, *, private: bool = False) -> str | None:
    """Why a file or folder may have been put or changed by somebody else; None where it is ours, or absent.

    `private`: also nobody else may read it.
    """
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(facts.st_mode):
        return "is a symbolic link"
    if facts.st_uid != os.geteuid():
        return f"belongs to user {facts.st_uid}, not to us ({os.geteuid()})"
    others = stat.S_IMODE(facts.st_mode) & (0o077 if private else stat.S_IWGRP | stat.S_IWOTH)
    return f"is open to others (mode {stat.S_IMODE(facts.st_mode):o})" if others else None


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Whatever is written meanwhile is for its owner only; sbatch hands the mask on to the job."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
