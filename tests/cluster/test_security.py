"""A job on a real Slurm that keeps scripts and environments in its database, and a second user on the same machine."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.runs.folder import RunFolder
from tests.cluster.bed import Answer, Bed, slurm

CANARY = "canary5f3a9c1e7b"
SECRETS = {
    "WANDB_API_KEY": f"{CANARY}{CANARY}wandbapi",  # 40 characters, as wandb insists
    "HF_TOKEN": f"hf_{CANARY}hub",
    "AWS_ACCESS_KEY_ID": f"{CANARY}-aws-id",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}-aws",
    "AWS_SESSION_TOKEN": f"{CANARY}-session",
    "DB_PASSWORD": f"{CANARY}-password",
    "https_proxy": f"http://me:{CANARY}@127.0.0.1:9",
}
STRANGER = "launcherstranger"
SLURM_FILES = Path(os.environ.get("ROOT", "/var/lib/launcher-dev-cluster"))


@pytest.fixture(scope="module")
def runs(bed: Bed) -> dict[str, RunFolder]:
    """One run that succeeds and one that fails in training, both with the submitter's keys around them."""
    succeeds = bed.recipe("secrets", wandb={"mode": "offline"})
    fails = bed.recipe("secrets-fails", wandb={"mode": "offline"})
    before = dict(bed.environ)
    bed.environ |= SECRETS
    submitted = {"succeeds": bed.submit(succeeds)}
    bed.environ["LAUNCHER_FAULT"] = "at=step,rank=0,step=2,do=raise"
    submitted["fails"] = bed.submit(fails)
    bed.environ.clear()
    bed.environ |= before
    return submitted


@pytest.fixture(scope="module")
def shown(bed: Bed, runs: dict[str, RunFolder]) -> dict[str, str]:
    """What anybody could ask Slurm and the machine while a job waits or runs, and after its end."""
    job_id = bed.status(runs["succeeds"])["job_id"]
    bed.until(lambda: runs["succeeds"].heartbeat.exists(), "the first sign of life", runs["succeeds"], limit_s=300)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path)]
    seen = {
        "commands of all processes": b"\n".join(commands).decode(errors="replace"),
        "scontrol show job": slurm("scontrol", "show", "job", "-d", job_id),
        "batch script": slurm("scontrol", "write", "batch_script", job_id, "-"),
        "state of the controller, and spool folders": _files(SLURM_FILES),
    }
    bed.finished(runs["succeeds"])
    assert bed.wait(runs["fails"]).code == 8
    columns = slurm("sacct", "--helpformat").split()
    return seen | {
        "sacct, every column": slurm("sacct", "-P", "-j", job_id, "--format", ",".join(columns)),
        "environment kept by sacct": slurm("sacct", "-j", job_id, "--env-vars"),
        "script kept by sacct": slurm("sacct", "-j", job_id, "--batch-script"),
    }


def _readable(path: Path) -> bool:
    return os.access(path, os.R_OK)


def _files(folder: Path) -> str:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    texts = []
    for path in found:
        try:
            texts.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue  # gone in between
    return "\n".join(texts)


def test_s09_s10_slurm_knows_no_secret(shown: dict[str, str], runs: dict[str, RunFolder]) -> None:
    """Neither the controller nor the database, which keeps scripts and environments here, nor any command line."""
    assert "HF_HUB_OFFLINE" in shown["environment kept by sacct"], (
        "it keeps environments, so the search means something"
    )
    assert runs["succeeds"].run_id in shown["script kept by sacct"]
    assert [where for where, text in shown.items() if CANARY in text] == []


def test_s09_s11_runs_hold_no_secret(bed: Bed, shown: dict[str, str], runs: dict[str, RunFolder]) -> None:
    """Records, logs, tracebacks, W&B's files: only the private file beside the runs holds what jobs need."""
    holding = [path for path in bed.home.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert holding == [bed.home / "runs" / ".secrets" / "environment.json"]
    assert holding[0].stat().st_mode & 0o777 == 0o600 and holding[0].stat().st_uid != os.geteuid()


def test_s12_what_a_job_writes_is_for_its_owner_only(shown: dict[str, str], runs: dict[str, RunFolder]) -> None:
    """Every file and folder of both runs, logs and checkpoints included."""
    for run in runs.values():
        open_ones = [path for path in [run.path, *run.path.rglob("*")] if path.lstat().st_mode & 0o077]
        assert [str(path) for path in open_ones if not path.is_symlink()] == []


# --- a second user ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stranger() -> Iterator[str]:
    """Another unix user, removed afterwards."""
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", STRANGER], check=True)
    yield STRANGER
    subprocess.run(["userdel", "--remove", "--force", STRANGER], check=True, capture_output=True)


def as_stranger(bed: Bed, *command: str) -> Answer:
    """What the other user gets."""
    home = pwd.getpwnam(STRANGER).pw_dir
    words = [str(shutil.which("setpriv")), f"--reuid={STRANGER}", f"--regid={STRANGER}", "--init-groups", *command]
    environ = {"HOME": home, "USER": STRANGER, "PATH": f"{Path(bed.python).parent}:/usr/bin:/bin", "LANG": "C.UTF-8"}
    ran = subprocess.run(words, env=environ, cwd=home, capture_output=True, text=True, timeout=120, check=False)
    return Answer(command=command, code=ran.returncode, out=ran.stdout, err=ran.stderr)


def test_s21_another_user_can_neither_read_nor_cancel_nor_plant(bed: Bed, stranger: str) -> None:
    """Of a job that waits: its files, its script, its life, and what it will read when it starts."""
    bed.home.chmod(0o755)  # the runs folder must do without a private home above it
    run = bed.submit(bed.recipe("coveted"))
    job_id = bed.status(run)["job_id"]
    for path in (run.recipe, run.job, run.path.parent / ".secrets" / "environment.json"):
        assert as_stranger(bed, "cat", str(path)).code != 0
    assert as_stranger(bed, "ls", str(run.path)).code != 0
    script = as_stranger(bed, "scontrol", "write", "batch_script", job_id, "-")
    assert run.run_id not in script.out
    assert "denied" in as_stranger(bed, "scancel", job_id).err.lower()
    for place in (run.path, run.submission, run.rendezvous, run.path.parent, run.path.parent / ".secrets"):
        assert as_stranger(bed, "touch", str(place / "planted")).code != 0
    for verb in ("cancel", "status", "resume", "why"):
        assert as_stranger(bed, bed.python, "-m", "launcher.cli", verb, str(run.path)).code != 0
    assert bed.finished(run)["step"] == 6


def test_s21_a_run_that_somebody_else_offers_is_not_started(bed: Bed, stranger: str) -> None:
    """Readable by all and complete: its job would run in the name of whoever resumes it."""
    run = next(RunFolder(path) for path in (bed.home / "runs").glob("coveted-*"))
    offered = Path(pwd.getpwnam(STRANGER).pw_dir) / "runs" / run.run_id
    shutil.copytree(run.path, offered)
    subprocess.run(["chown", "-R", f"{STRANGER}:", str(offered.parent)], check=True)
    subprocess.run(["chmod", "-R", "a+rX", str(offered.parent.parent)], check=True)
    (offered / "result.json").unlink()
    answer = bed.launcher("resume", str(offered))
    assert answer.code == 5 and "belongs to user" in answer.err
