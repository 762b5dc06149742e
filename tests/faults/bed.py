"""Where faults are injected: runs of this machine (`submit --local --detach`), and jobs of the development cluster."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.runs.folder import RunFolder, read_json_lines
from tests import tiny
from tests.cluster.bed import Answer, Bed, slurm, tail
from tests.faults.invariants import processes_of
from tests.faults.story import events, sequence, story

STEPS = 40
SAVE_STEPS = 4
"""No interruption may cost more steps than this."""
SLOW = "at=step,rank=0,do=sleep:0.4,always"
"""A clause that makes steps long enough for somebody outside to do something between two of them."""

RECIPES: dict[str, dict[str, Any]] = {
    # Dropout shows whether random numbers go on where they stopped; 40 steps are several epochs of 56 rows.
    "lora": {"lora": {"lora_dropout": 0.1}},
    "full": {"method": "full", "train": {"learning_rate": 1e-3}, "deepspeed": {"stage": 2}},
    "sharded": {"method": "full", "train": {"learning_rate": 1e-3}, "deepspeed": {"stage": 3}},
    "qlora": {"method": "qlora", "lora": {"lora_dropout": 0.1}, "deepspeed": {"stage": 1}},
    "adalora": {"method": "adalora", "lora": {"lora_dropout": 0.1}},
}


@dataclass
class FaultBed(Bed):
    """A bed whose runs may have faults injected."""

    where: str = "slurm"
    ranks: dict[str, int] | None = None
    """slurm section of every recipe: how many nodes, and ranks on each."""

    def fault_recipe(self, name: str, **changes: Any) -> str:
        """One of RECIPES as a file, with `changes` over it; returns its name."""
        kind = name.partition("-")[0]
        layers = [
            {
                "train": {"max_steps": STEPS, "eval_steps": 1000},
                # A step takes a tenth of a second here: a save in the background would last many of them, and what
                # it costs to lose one could not be held against the interval. Tests of their own turn it on.
                "checkpoint": {"save_steps": SAVE_STEPS, "background": False},
                "slurm": self.ranks or {},
            },
            RECIPES[kind],
            changes,
        ]
        merged: dict[str, Any] = {}
        for layer in layers:
            for key, value in layer.items():
                merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
        return self.recipe(name, **merged)

    def inject(self, name: str, fault: str = "", *words: str, **changes: Any) -> RunFolder:
        """Submit a recipe with LAUNCHER_FAULT set; returns at once."""
        variables = {"LAUNCHER_FAULT": fault} if fault else {}
        return self.launch(self.fault_recipe(name, **changes), *words, **variables)

    def launch(self, recipe: str, *words: str, **environ: str) -> RunFolder:
        """`launcher submit`, which must succeed."""
        answer = self.launcher("submit", recipe, *words, "--json", **environ).expect()
        return RunFolder(Path(json.loads(answer.out)["path"]))

    def finished(self, run: RunFolder) -> dict[str, Any]:
        """Wait for a run that must succeed, and for the last word about it; its result.json."""
        result = super().finished(run)
        # The result is written a moment before the last attempt is decided about.
        self.until(lambda: story(run)[-1].decision, "the last word about the run", run)
        return result

    def after_step(self, run: RunFolder, step: int, limit_s: float = 300.0) -> None:
        """Return as soon as `step` is logged."""
        self.until(lambda: max(sequence(run), default=-1) >= step or ended(run), f"step {step}", run, limit_s)
        assert max(sequence(run), default=-1) >= step, f"the run ended before step {step}\n{self.evidence(run)}"

    def after_event(self, run: RunFolder, name: str, count: int = 1, limit_s: float = 300.0) -> dict[str, Any]:
        """Return the ledger's `count`-th event of a name as soon as it is there."""
        self.until(lambda: len(events(run, name)) >= count, f"{count} x {name}", run, limit_s)
        return events(run, name)[count - 1]

    def rank_process(self, run: RunFolder, rank: int) -> int:
        """Process number of a rank of the newest attempt (needs LAUNCHER_FAULT to be set)."""
        attempt = events(run, "started")[-1]["attempt"]
        return int(json.loads((run.faults / attempt / f"rank-{rank}.json").read_text())["pid"])

    def accounting(self, run: RunFolder) -> list[str]:
        """States of the run's job in `sacct -D`, in order; "CANCELLED by 2000" without who did it."""
        job_id = str(json.loads(run.job.read_text())["job_id"])
        said = slurm("sacct", "-D", "-X", "-n", "-P", "--format=State", f"--jobs={job_id}")
        return [line.split()[0] for line in said.splitlines() if line.strip()]


class LocalBed(FaultBed):
    """Runs of this machine, as whoever runs the tests."""

    def as_user(self, command: Sequence[str], *, input_text: str | None = None, **environ: str) -> Answer:
        """Run a command in the bed's folder, with a login's environment and nothing of ours."""
        everything = {
            "HOME": str(self.home),
            "PATH": f"{Path(self.python).parent}:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
            **self.environ,
            **environ,
        }
        ran = subprocess.run(
            command, env=everything, cwd=self.home, input=input_text, text=True, capture_output=True, timeout=900,
            stdin=subprocess.DEVNULL if input_text is None else None, check=False,
        )  # fmt: skip
        return Answer(command=command, code=ran.returncode, out=ran.stdout, err=ran.stderr)

    def launch(self, recipe: str, *words: str, **environ: str) -> RunFolder:
        """`launcher submit --local --detach`."""
        return super().launch(recipe, "--local", "--detach", *words, **environ)

    def cancel_everything(self) -> None:
        """Kill what is left of this bed's runs."""
        for run in (self.home / "runs").glob("*-*"):
            for pid in processes_of(RunFolder(run)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def evidence(self, run: RunFolder | None = None) -> str:
        """Everything a person would look at after a failure."""
        if run is None:
            return ""
        files = (run.attempts, run.heartbeat, *sorted(run.logs.glob("*")), *sorted(run.errors.rglob("*.json")))
        return "\n".join([*(tail(file) for file in files), f"processes: {processes_of(run)}"])


def ended(run: RunFolder) -> bool:
    """Whether the run has its result, or its last attempt was ended for good."""
    last = [line for line in read_json_lines(run.attempts) if line["event"] in ("started", "decided", "submitted")][-1:]
    return run.result.exists() or bool(last and last[0].get("action") == "stop")


def make_local_bed(home: Path) -> LocalBed:
    """Fill `home` with a tiny model and chats."""
    tiny.make_model_dir(home / "model")
    tiny.make_chat_rows(home / "chats.jsonl")
    environ = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environ |= {name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ}
    return LocalBed(home=home, environ=environ, where="local", ranks={"nodes": 1, "gpus_per_node": 2})


def poll(happened: Callable[[], Any], what: str, limit_s: float = 60.0) -> Any:
    """Wait until `happened()` is true and return it."""
    deadline = time.monotonic() + limit_s
    while not (value := happened()):
        assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.1)
    return value
