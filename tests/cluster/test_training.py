"""Real jobs on a real Slurm, submitted by a user without privileges, from `launcher submit` to result.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.runs.folder import RunFolder, read_json_lines
from tests.cluster.bed import Bed, losses, slurm

FOUR_RANKS = {"nodes": 2, "gpus_per_node": 2}


@pytest.fixture(scope="module")
def runs(bed: Bed) -> dict[str, RunFolder]:
    """All jobs of this module, queued at once: they import the training stack while the others do."""
    qlora = {"train": {"precision": "bf16"}}
    full = {"method": "full", "train": {"learning_rate": 2e-3}, "deepspeed": {"stage": 3}, "slurm": FOUR_RANKS}
    submitted = {
        "full": bed.submit(bed.recipe("full", **full)),
        "lora": bed.submit(bed.recipe("lora")),
        "qlora": bed.submit(bed.recipe("qlora", method="qlora", **qlora)),
    }
    script = bed.launcher("submit", bed.recipe("by-hand"), "--print-sbatch").expect().out
    bed.as_user(["sbatch", "--parsable"], input_text=script).expect()
    return submitted | {"by-hand": RunFolder(next((bed.home / "runs").glob("by-hand-*")))}


def test_single_node_lora_ends_in_an_adapter(bed: Bed, runs: dict[str, RunFolder]) -> None:
    """A LoRA job learns, writes result.json and leaves the adapter that PEFT loads."""
    result = bed.finished(runs["lora"])
    assert result["step"] == 6
    assert result["validation_loss"]["after"] < result["validation_loss"]["before"]
    assert (runs["lora"].adapter / "adapter_model.safetensors").exists()


def test_single_node_qlora_ends_in_an_adapter(bed: Bed, runs: dict[str, RunFolder]) -> None:
    """A 4-bit base under a LoRA adapter trains on CPU ranks of a Slurm job."""
    result = bed.finished(runs["qlora"])
    assert result["method"] == "qlora"
    assert result["validation_loss"]["after"] < result["validation_loss"]["before"]
    assert (runs["qlora"].adapter / "adapter_model.safetensors").exists()


def test_two_nodes_train_one_model_with_zero_3(bed: Bed, runs: dict[str, RunFolder]) -> None:
    """Two ranks on each of two nodes, parameters sharded over gloo, gather a complete model in the end."""
    run = runs["full"]
    result = bed.finished(run)
    assert (result["world_size"], result["zero_stage"]) == (4, 3)
    assert losses(run)[-1] < losses(run)[0]
    assert (run.model / "config.json").exists()
    joined = [event for event in read_json_lines(run.attempts) if event["event"] == "joined"]
    assert len(joined[-1]["hosts"]) == 2


def test_every_rank_has_a_log_of_its_own(bed: Bed, runs: dict[str, RunFolder]) -> None:
    """Four ranks leave four logs, named by job and rank."""
    run = runs["full"]
    job_id = bed.finished(run) and json.loads(run.job.read_text())["job_id"]
    assert {file.name for file in run.logs.iterdir()} == {f"{job_id}_{rank}.out" for rank in range(4)}


def test_a_printed_script_trains_the_same_way(bed: Bed, runs: dict[str, RunFolder]) -> None:
    """The script of --print-sbatch, given to sbatch by hand, reaches the very same losses as `submit`."""
    for name in ("lora", "by-hand"):
        bed.until(runs[name].result.exists, f"result of {name}", runs[name], limit_s=400)
    assert len(losses(runs["lora"])) == 6
    assert losses(runs["by-hand"]) == losses(runs["lora"])


def test_status_and_logs_tell_the_end(bed: Bed, runs: dict[str, RunFolder]) -> None:
    """`status` says completed, in the run's words and in Slurm's, and `logs` shows the steps."""
    bed.finished(runs["lora"])
    status = bed.status(runs["lora"])
    assert status["state"] == "COMPLETED"
    assert status["step"] == 6
    assert "6/6" in bed.launcher("logs", runs["lora"].run_id).expect().out
    listed = bed.launcher("status").expect().out
    assert all(run.run_id in listed for run in runs.values())


def test_accounting_agrees(bed: Bed, runs: dict[str, RunFolder]) -> None:
    """Slurm's accounting saw every job of these runs complete with exit code 0."""
    for run in runs.values():
        bed.finished(run)
    ids = {event["job_id"] for run in runs.values() for event in read_json_lines(run.attempts) if "job_id" in event}
    ask = ("sacct", "-X", "-n", "-P", "--format=State,ExitCode", f"--jobs={','.join(ids)}")
    # The result is written a moment before Slurm sees the job end.
    bed.until(lambda: "RUNNING" not in slurm(*ask), "accounting sees the jobs end", limit_s=60)
    assert slurm(*ask).split() == ["COMPLETED|0:0"] * 4


def test_run_folders_are_private(bed: Bed, runs: dict[str, RunFolder]) -> None:
    """Recipes, logs and data excerpts of a run are its owner's business only."""
    for run in runs.values():
        assert run.path.stat().st_mode & 0o077 == 0
        assert run.path.owner() == Path(bed.home).owner()
