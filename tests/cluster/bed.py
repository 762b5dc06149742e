"""The test bed: the development cluster, its unprivileged job user, and `launcher` as that user types it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launcher.runs.folder import RunFolder, read_json_lines
from tests import tiny

REPOSITORY = Path(__file__).parents[2]
DEV_CLUSTER = REPOSITORY / "scripts" / "dev-cluster"
JOB_USER = os.environ.get("JOBUSER", "slurmuser")
JOB_LIMIT_S = 400.0
"""For one tiny job from submission to its end: imports alone take a minute when both cores are busy."""


class StillWaitingError(AssertionError):
    """Something did not happen in time."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command said."""

    command: Sequence[str]
    code: int
    out: str
    err: str

    def expect(self, code: int = 0) -> Answer:
        """Fail with everything the command said unless it exited with `code`."""
        assert self.code == code, f"{list(self.command)}\nexit {self.code}, not {code}\n{self.out}\n{self.err}"
        return self


def dev_cluster(*words: str, **settings: str) -> None:
    """Call scripts/dev-cluster as root.

    Raises:
        RuntimeError: it failed; holds what it printed.
    """
    ran = subprocess.run(
        [str(DEV_CLUSTER), *words], env=os.environ | settings, text=True, capture_output=True, timeout=180, check=False
    )
    if ran.returncode != 0:
        raise RuntimeError(f"dev-cluster {' '.join(words)}: exit {ran.returncode}\n{ran.stdout}\n{ran.stderr}")


def cluster_is_up() -> bool:
    """Whether the development cluster runs and we may use it as root."""
    return os.geteuid() == 0 and subprocess.run([str(DEV_CLUSTER), "status"], capture_output=True).returncode == 0


@dataclass
class Bed:
    """One folder of the job user, with a tiny model, data and everything its jobs write."""

    home: Path
    python: str = sys.executable
    environ: dict[str, str] = field(default_factory=dict)

    # --- commands -------------------------------------------------------------------------------

    def as_user(self, command: Sequence[str], *, input_text: str | None = None, **environ: str) -> Answer:
        """Run a command as the job user, in its folder, with a login's environment and nothing of ours."""
        words = [f"--reuid={JOB_USER}", f"--regid={JOB_USER}", "--init-groups"]
        everything = {
            "HOME": str(self.home),
            "USER": JOB_USER,
            "PATH": f"{Path(self.python).parent}:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            **self.environ,
            **environ,
        }
        ran = subprocess.run(
            [str(shutil.which("setpriv")), *words, *command],
            env=everything,
            cwd=self.home,
            input=input_text,
            stdin=subprocess.DEVNULL if input_text is None else None,
            text=True,
            capture_output=True,
            timeout=600,
            check=False,
        )
        return Answer(command=command, code=ran.returncode, out=ran.stdout, err=ran.stderr)

    def launcher(self, *words: str, **environ: str) -> Answer:
        """The installed `launcher` command."""
        return self.as_user([self.python, "-m", "launcher.cli", *words], **environ)

    # --- recipes and runs -----------------------------------------------------------------------

    def recipe(self, name: str, **changes: Any) -> str:
        """Write a tiny recipe and return its file name; `changes` are whole fields or sections' fields."""
        recipe: dict[str, Any] = {
            "name": name,
            "model": {"name_or_path": "model", "attn_implementation": "sdpa"},
            "method": "lora",
            "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
            "data": {"train": [{"path": "chats.jsonl"}], "validation": 8, "max_seq_length": 128},
            "train": {
                "global_batch_size": 8,
                "per_device_train_batch_size": 2,
                "max_steps": 6,
                "learning_rate": 5e-3,
                "precision": "fp32",
                "gradient_checkpointing": False,
                "logging_steps": 1,
                "eval_steps": 3,
            },
            "deepspeed": {"stage": 0},
            "checkpoint": {"save_minutes": None, "save_steps": 3},
            "slurm": {"nodes": 1, "gpus_per_node": 1, "cpus_per_task": 1, "time": 20, "mem": "4G"},
            "wandb": {"mode": "disabled"},
        }
        for key, value in changes.items():
            recipe[key] = recipe[key] | value if isinstance(recipe.get(key), dict) else value
        path = self.home / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path.name

    def submit(self, recipe: str, *overrides: str) -> RunFolder:
        """`launcher submit`, which must succeed; the folder of the run."""
        answer = self.launcher("submit", recipe, *overrides, "--json").expect()
        return RunFolder(Path(json.loads(answer.out)["path"]))

    def status(self, run: RunFolder) -> dict[str, Any]:
        """`launcher status RUN --json`."""
        document: dict[str, Any] = json.loads(self.launcher("status", run.run_id, "--json").expect().out)
        return document

    def wait(self, run: RunFolder) -> Answer:
        """`launcher wait RUN`, given up after a generous time (exit 75)."""
        answer = self.launcher("wait", run.run_id, "--timeout", str(JOB_LIMIT_S))
        if answer.code == 75:
            raise StillWaitingError(f"{run.run_id} has not ended\n{self.evidence(run)}")
        return answer

    def finished(self, run: RunFolder) -> dict[str, Any]:
        """Wait for a run that must succeed; its result.json."""
        answer = self.wait(run)
        assert answer.code == 0, f"exit {answer.code}: {answer.out}{answer.err}\n{self.evidence(run)}"
        result: dict[str, Any] = json.loads(run.result.read_text())
        return result

    def until(
        self, happened: Callable[[], Any], what: str, run: RunFolder | None = None, limit_s: float = 120.0
    ) -> Any:
        """Poll until `happened()` is true and return it."""
        deadline = time.monotonic() + limit_s
        while not (value := happened()):
            if time.monotonic() > deadline:
                raise StillWaitingError(f"not within {limit_s:.0f} s: {what}\n{self.evidence(run)}")
            time.sleep(0.2)
        return value

    # --- what Slurm says ------------------------------------------------------------------------

    def queue(self) -> list[str]:
        """Ids of the job user's jobs that wait or run."""
        return slurm("squeue", "--noheader", f"--user={JOB_USER}", "--format=%i").split()

    def cancel_everything(self) -> None:
        """Cancel the jobs of this bed, whatever else runs on the cluster; run names are job names."""
        for run in (self.home / "runs").glob("*-*"):
            slurm("scancel", f"--name={run.name}")

    def evidence(self, run: RunFolder | None = None) -> str:
        """Everything a person would look at after a failure."""
        parts = [
            *(slurm("squeue", "--states=all"), slurm("sinfo", "--list-reasons"), slurm("sinfo", "--Node")),
            subprocess.run([str(DEV_CLUSTER), "logs", "15"], text=True, capture_output=True).stdout,
        ]
        if run is not None:
            parts += [tail(file) for file in (run.job, run.attempts, run.heartbeat, *sorted(run.logs.glob("*")))]
        return "\n".join(parts)


def slurm(*command: str) -> str:
    """What a Slurm command prints, on either stream, as root."""
    ran = subprocess.run(command, text=True, capture_output=True, timeout=60, check=False)
    return ran.stdout + ran.stderr


def tail(file: Path, lines: int = 40) -> str:
    """The end of a file, under its name."""
    text = file.read_text(errors="replace").splitlines()[-lines:] if file.exists() else ["(absent)"]
    return "\n".join([f"== {file}", *text])


def losses(run: RunFolder) -> list[float]:
    """Training loss of every step, from metrics.jsonl."""
    return [line["loss"] for line in read_json_lines(run.metrics) if "loss" in line]


def make_bed(home: Path) -> Bed:
    """Fill `home` with a tiny model and chats, owned by the job user."""
    tiny.make_model_dir(home / "model")
    tiny.make_chat_rows(home / "chats.jsonl")
    environ = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    compiled = os.environ.get("TORCH_EXTENSIONS_DIR")
    if compiled:
        # A copy: PyTorch takes a lock in this folder when it loads an operator, and only owners can.
        shutil.copytree(compiled, home / "operators", copy_function=shutil.copy2)
        environ["TORCH_EXTENSIONS_DIR"] = str(home / "operators")
    give_to_job_user(home)
    return Bed(home=home, environ=environ)


def give_to_job_user(folder: Path) -> None:
    """Make the job user own everything below `folder`."""
    subprocess.run(["chown", "-R", f"{JOB_USER}:", str(folder)], check=True)
