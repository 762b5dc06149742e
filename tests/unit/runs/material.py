"""What the tests of `runs` share: a plan, a request, a run folder, and fake Slurm commands for the PATH."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from launcher.facts.offer import FileSystem
from launcher.facts.site import Partition, Site
from launcher.planning.plan import Cost, DataNumbers, Estimate, Interval, JobShape, MemoryEstimate, Plan, plan_to_json
from launcher.runs.folder import RunFolder, write_json
from launcher.runs.request import JobRequest
from tests.tiny import make_candidate

PARTITION = Partition(
    name="main",
    default=True,
    max_time_min=24 * 60,
    nodes=4,
    gpus_per_node=8,
    gpu_types=("a100",),
    cpus_per_node=16,
    mem_bytes_per_node=64 * 2**30,
)


def make_site(**overrides: Any) -> Site:
    """Four CPU nodes with eight GPUs to ask for, which see all files of this machine."""
    values: dict[str, Any] = {
        "name": "test",
        "executor": "slurm",
        "gpu": "cpu",
        "gpus_per_node": 8,
        "gpu_type": "a100",
        "max_nodes": 4,
        "cpus_per_node": 16,
        "mem_bytes_per_node": 64 * 2**30,
        "default_partition": "main",
        "file_systems": (FileSystem(name="all", path="/", shared=True),),
    }
    return Site(**(values | overrides))


def make_plan(*, time_limit_min: int = 60, cpus_per_task: int = 1, mem: str | None = None, **candidate: Any) -> Plan:
    """A plan for one candidate; its numbers matter only where a test says so."""
    even = Interval(low=1.0, expected=1.0, high=1.0)
    memory = MemoryEstimate(
        terms_bytes={"weights": 1}, peak_bytes=even, device_bytes=even, usable_bytes=2, binding="optimizer step"
    )
    chosen = Estimate(
        candidate=make_candidate(**candidate),
        trainable_params=1,
        fits=True,
        memory=memory,
        host_ram_bytes_per_node=1,
        checkpoint_bytes=1_000_000,
        step_s=even,
        tokens_per_s_per_gpu=1.0,
        steps=4,
        wall_s=4.0,
        gpu_hours=0.001,
        cost=Cost(amount=None, price_per_gpu_hour=None),
        rejected_because=None,
    )
    return Plan(
        recipe="tiny",
        model="tiny",
        params=1,
        chosen=chosen,
        alternatives=(),
        advice=(),
        warnings=(),
        data=DataNumbers(rows=20_000, tokens=1_000_000, basis="counted"),
        job=JobShape(time_limit_min=time_limit_min, cpus_per_task=cpus_per_task, mem=mem),
        site="test",
    )


def make_request(run_dir: Path | str = "/shared/runs/tiny-abcde", **overrides: Any) -> JobRequest:
    """Two nodes with two ranks each, for an hour."""
    values: dict[str, Any] = {
        "cluster": "slurm",
        "run_dir": str(run_dir),
        "name": "tiny-abcde",
        "nodes": 2,
        "tasks_per_node": 2,
        "gpus_per_node": 2,
        "gpu_type": "a100",
        "cpus_per_task": 4,
        "mem": None,
        "time_min": 60,
        "partition": "main",
        "account": None,
        "qos": None,
        "constraint": None,
        "exclusive": False,
        "requeue": True,
        "signal_lead_s": 120,
        "python": "/usr/bin/python3",
        "chdir": "/shared",
    }
    return JobRequest(**(values | overrides))


def make_run(parent: Path, name: str = "tiny") -> RunFolder:
    """A run folder as `create_run` leaves it, with nothing submitted."""
    run = RunFolder.create(parent, name)
    run.recipe.write_text("name: tiny\n")
    write_json(run.plan, plan_to_json(make_plan()))
    return run


def note_job(run: RunFolder, job_id: str, cluster: str = "slurm", process: Any = None) -> None:
    """Write job.json and the ledger's first line as `submit` does."""
    facts = None if process is None else dataclasses.asdict(process)
    document = {"job_id": job_id, "submitted_s": 1.0, "process": facts, "request": {"cluster": cluster}}
    write_json(run.job, document)
    run.record("submitted", job_id=job_id, cluster=cluster)


class FakeSlurm:
    """Programs in a folder for the PATH: each prints what the test says and notes how it was called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._calls = folder / "calls.jsonl"
        folder.mkdir(exist_ok=True)

    def say_when(self, program: str, word: str, stdout: str) -> None:
        """What `program` answers from now on when `word` is among its arguments."""
        answers = self.folder / f"{program}.when"
        answers.mkdir(exist_ok=True)
        (answers / word).write_text(stdout)

    def say(self, program: str, stdout: str = "", *, stderr: str = "", status: int = 0) -> None:
        """What `program` answers from now on, unless one of its arguments has an answer of its own."""
        for kind, text in (("out", stdout), ("err", stderr)):
            (self.folder / f"{program}.{kind}").write_text(text)
        script = f"""#!/bin/bash
note() {{ local IFS=$'\\x1f'; printf '%s\\x1f%s\\n' {program} "$*" >> '{self._calls}'; }}
note "$@"
[ {program} = sbatch ] && cp "${{@: -1}}" '{self.folder}/submitted.sh' && env > '{self.folder}/submitted.env'
for answer in '{self.folder}/{program}.when/'*; do
  [[ -e $answer && " $* " == *" ${{answer##*/}} "* ]] && cat "$answer" && exit 0
done
cat '{self.folder}/{program}.out'
cat '{self.folder}/{program}.err' >&2
exit {status}
"""
        path = self.folder / program
        path.write_text(script)
        path.chmod(0o755)

    def calls(self, program: str) -> list[list[str]]:
        """Arguments of every call of `program`, in order."""
        if not self._calls.exists():
            return []
        lines = [line.split("\x1f") for line in self._calls.read_text().splitlines()]
        return [words[1:] for words in lines if words[0] == program]

    @property
    def script(self) -> str:
        """The script the last sbatch was given."""
        return (self.folder / "submitted.sh").read_text()

    @property
    def environment(self) -> dict[str, str]:
        """The environment the last sbatch had."""
        lines = (self.folder / "submitted.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


def write_result(run: RunFolder, step: int = 4) -> None:
    """The worker's last word."""
    run.result.write_text(json.dumps({"schema": 1, "step": step, "train_loss": {"first": 2.0, "last": 1.0}}))


def write_adapter(folder: Path, *, rank: int = 8, **lineage: Any) -> Path:
    """A small LoRA adapter that says where it comes from; returns `folder`."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    told = {"method": "lora", "base": "org/base", "base_fingerprint": "ab" * 32, "data_key": "k"} | lineage
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": np.ones((rank, 4), np.float32),
               f"{module}.lora_B.weight": np.ones((4, rank), np.float32)}  # fmt: skip
    metadata = {"format": "pt", "launcher.lineage": json.dumps(told)}
    save_file(factors, folder / "adapter_model.safetensors", metadata=metadata)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    write_json(folder / "adapter_config.json", config)
    return folder
