"""The arrays of a trial without Slurm: the scripts that sbatch was given are run, one task after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from launcher.recipe.load import recipe_to_yaml
from launcher.runs import trial
from launcher.runs.folder import read_json_lines
from launcher.runs.trial_candidates import parse_specs
from launcher.runs.trial_folder import Trial
from launcher.runs.trial_standing import stand
from launcher.runs.trial_table import rows
from tests.tiny import make_recipe
from tests.unit.runs.material import FakeSlurm

LIMIT_S = 1200.0
LINES = tuple(f"{name}: lora.r=4 train.learning_rate={rate}" for name, rate in (("a", 1e-4), ("b", 1e-2), ("c", 1e-6)))
SITE = """
executor: slurm
gpu: cpu
gpus_per_node: 1
request_gpus: false
max_nodes: 1
cpus_per_node: 1
mem_bytes_per_node: 8G
default_partition: main
file_systems: [{name: all, path: /, shared: true}]
"""
SRUN = """#!/bin/bash
while [ $# -gt 0 ] && [ "$1" != "{python}" ]; do shift; done
exec "$@"
"""
pytestmark = pytest.mark.timeout(LIMIT_S)


class FakeCluster:
    """sbatch that keeps scripts, srun that runs what it is given, and a queue in which nothing ever is."""

    def __init__(self, folder: Path) -> None:
        self.slurm = FakeSlurm(folder)
        for program in ("squeue", "scancel", "sinfo", "sacctmgr"):
            self.slurm.say(program)
        self.slurm.say("sacct", stderr="Slurm accounting storage is disabled", status=1)
        self.slurm.say("scontrol", stderr="slurm_load_jobs error: Invalid job id specified", status=1)
        self.slurm.say_when("scontrol", "partition", "PartitionName=main State=UP TotalNodes=1 MaxTime=UNLIMITED\n")
        self.slurm.say_when("sbatch", "--parsable", "7\n")
        srun = folder / "srun"
        srun.write_text(SRUN.format(python=sys.executable))
        srun.chmod(0o755)
        self._jobs = 100

    def will_be(self, job: int) -> None:
        """The number of the next array."""
        self.slurm.say("sbatch", f"Submitted batch job {job}\n")

    def run_array(self, made: Trial, job: int, **environ: str) -> list[int]:
        """Run every task of the newest array as slurmd would; their exit codes."""
        array = sorted((made.path / "arrays").iterdir())[-1]
        script = [Path(words[-1]) for words in self.slurm.calls("sbatch") if "--parsable" not in words][-1]
        return [self._task(script, job, index, environ) for index in range(len(list(array.glob("[0-9]*"))))]

    def _task(self, script: Path, job: int, index: int, environ: dict[str, str]) -> int:
        self._jobs += 1
        slurm = {
            "JOB_ID": self._jobs, "ARRAY_JOB_ID": job, "ARRAY_TASK_ID": index, "PROCID": 0, "NTASKS": 1, "LOCALID": 0,
            "NODEID": 0, "NNODES": 1, "JOB_NUM_NODES": 1, "NTASKS_PER_NODE": 1, "TASKS_PER_NODE": 1,
            "JOB_NODELIST": "localhost", "STEP_NODELIST": "localhost", "STEP_ID": 0,
        }  # fmt: skip
        names = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        ran = subprocess.run(
            ["/bin/bash", str(script)], env=os.environ | names | environ, capture_output=True, text=True, check=False
        )
        print(ran.stdout, ran.stderr)
        return ran.returncode


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    """A cluster in front of PATH, and a working folder with its profile."""
    found = FakeCluster(tmp_path / "fake-slurm")
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "small.yaml").write_text(SITE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{found.slurm.folder}:{os.environ['PATH']}")
    monkeypatch.setenv("LAUNCHER_AFTERMATH_PATIENCE_S", "0")
    for name in ("LAUNCHER_SITE", "LAUNCHER_VENV", "LAUNCHER_FAULT", "LAUNCHER_CACHE", "SLURM_CONF"):
        monkeypatch.delenv(name, raising=False)
    return found


def make_trial(folder: Path, site: str) -> Trial:
    """Three candidates of four steps, of which the worst stops in the middle."""
    recipe = make_recipe(
        folder,
        slurm={"site": site, "nodes": 1, "gpus_per_node": 1, "cpus_per_task": 1, "time": 60},
        wandb={"mode": "disabled"},
    )
    path = folder / f"{site}.yaml"
    path.write_text(recipe_to_yaml(recipe))
    specs = tuple(parse_specs(LINES, "test"))
    asked = trial.Asked(recipe=path, specs=specs, shares=(Fraction(1, 2), Fraction(1)))
    return trial.create(asked, trial.plan(asked))


def quality(made: Trial) -> dict[str, dict[str, Any]]:
    standing = stand(made)
    assert standing.finished
    return {row.candidate: row.quality() for row in rows(made, standing)}


def test_the_arrays_of_a_trial_train_what_its_runs_here_train(tmp_path: Path, cluster: FakeCluster) -> None:
    """Each task finds its run, pauses and ends well; the job after an array sends the next; the table is the same."""
    made = make_trial(tmp_path, "small")
    cluster.will_be(42)
    trial.advance(made, print, wait=False)
    assert cluster.run_array(made, 42) == [0, 0, 0]
    cluster.will_be(50)
    goes_on = [sys.executable, "-m", "launcher.runs.trial_job", str(made.path)]
    subprocess.run(goes_on, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, check=True)
    assert cluster.run_array(made, 50) == [0, 0]
    subprocess.run(goes_on, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, check=True)

    here = make_trial(tmp_path, "local")
    trial.advance(here, print)
    assert quality(made) == quality(here)
    decisions = [line for run in made.runs.glob("tiny-*") for line in read_json_lines(run / "attempts.jsonl")]
    assert {line["action"] for line in decisions if line["event"] == "decided"} == {"stop", "finish"}
