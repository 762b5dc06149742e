"""What the tests of trials share: a trial on disk whose runs say what a test wants of them."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

from launcher.runs import trial_folder
from launcher.runs.folder import RunFolder, append_json_line, write_json
from launcher.runs.trial_candidates import Candidate
from launcher.runs.trial_folder import Task, Trial
from tests.unit.runs.material import make_run

SHARES = (Fraction(1, 4), Fraction(1, 2), Fraction(1))
STEPS = 8


def make_candidate(name: str, **facts: Any) -> Candidate:
    """A LoRA candidate of eight steps."""
    usual = Candidate(
        name=name,
        overrides=(f"lora.r={len(name)}",),
        method="lora",
        lora_r=8,
        learning_rate=1e-3,
        steps=STEPS,
        device_hours=1.0,
        wall_s=3600.0,
    )
    return dataclasses.replace(usual, **facts)


def make_trial(tmp_path: Path, names: str = "abcd", **facts: Any) -> Trial:
    """A trial of one candidate per letter, nothing run yet."""
    values: dict[str, Any] = {
        "candidates": tuple(make_candidate(name) for name in names),
        "shares": SHARES,
        "seeds": (42,),
        "executor": "local",
        "parallel": None,
        "price": None,
        "overrides": (),
        "asked": (),
        "origin": "tiny.yaml",
        "working_folder": str(tmp_path),
    }
    return trial_folder.create(tmp_path / "runs", "tiny", "name: tiny\n", **(values | facts))


def give_run(trial: Trial, candidate: str, seed: int = 42) -> RunFolder:
    """A run folder for a task, as `make_runs` would have made it."""
    run = make_run(trial.runs, candidate)
    trial.folder.record("run", candidate=candidate, seed=seed, run=run.run_id)
    return run


def reach(
    trial: Trial, candidate: str, rung: int, loss: float | None, *, seed: int = 42, train_s: float = 10.0
) -> None:
    """What a worker leaves that has trained to a rung: the losses, and that it paused or finished."""
    run = trial.run_of(Task(candidate=candidate, seed=seed)) or give_run(trial, candidate, seed)
    step = trial.steps(candidate, rung)
    if rung == 0:
        append_json_line(run.metrics, {"step": 0, "validation_loss": 5.0, "retention_loss": 3.0})
    append_json_line(run.metrics, {"step": step, "validation_loss": loss, "retention_loss": 3.25})
    if rung == len(trial.shares) - 1:
        write_json(run.result, {"schema": 1, "step": step, "train_s": train_s, "tokens": 100})
    else:
        run.record("stopped", attempt="1.0", reason="paused", step=step, train_s=train_s, tokens=50)
