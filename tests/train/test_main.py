"""A rank as a process: exit codes, signals, and what it leaves in the run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.folder import RunFolder, read_json_lines
from tests.tiny import make_recipe
from tests.train.ranks import RankFailedError, Ranks
from tests.train.runs import candidate_for, events, losses, make_run, result, train_here

PATIENCE_S = 300.0


def _start(run: RunFolder, rank: int = 0, world: int = 1) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    environment |= {"RANK": str(rank), "WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "job", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.worker.main", str(run.path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, output


def _until(condition: Callable[[], Any], *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_a_signal_to_one_rank_stops_both_with_a_checkpoint_and_the_next_start_finishes(tmp_path: Path) -> None:
    """Exit code 0 and no result.json the first time, a result the second time, and nothing to do the third time."""
    recipe = make_recipe(tmp_path, train={"max_steps": 300}, checkpoint={"save_minutes": None})
    run = make_run(recipe, candidate_for(2, 0))
    pair = [_start(run, rank, 2) for rank in range(2)]
    _until(lambda: len(_trained(run)) >= 2, *pair)
    pair[1].send_signal(signal.SIGTERM)
    assert [_end(process)[0] for process in pair] == [0, 0]
    assert events(run) == ["started", "joined", "stopped"]
    stopped = list(read_json_lines(run.attempts))[-1]["step"]
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step-{stopped:06d}"]
    assert not run.result.exists()

    outputs = [_end(process) for process in [_start(run, rank, 2) for rank in range(2)]]
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert len(losses(run)) == result(run)["step"] == 300
    assert json.loads(run.heartbeat.read_text())["state"] == "finishing"

    code, output = _end(_start(run))
    assert (code, "is finished already" in output) == (0, True)
    assert events(run)[3:] == ["started", "joined", "resumed", "completed"]


def _trained(run: RunFolder) -> list[Any]:
    return [line for line in read_json_lines(run.metrics) if line.get("loss") is not None]


def test_a_rank_that_is_killed_ends_the_others_with_an_error(tmp_path: Path) -> None:
    """The survivor's collective fails at once; it says so, writes it down and exits instead of waiting."""
    recipe = make_recipe(tmp_path, train={"max_steps": 100_000}, checkpoint={"save_minutes": None})
    run = make_run(recipe, candidate_for(2, 2))
    pair = [_start(run, rank, 2) for rank in range(2)]
    _until(lambda: len(_trained(run)) >= 2, *pair)
    pair[1].kill()
    killed = time.monotonic()
    code, output = _end(pair[0])
    assert (code, pair[1].wait(), time.monotonic() - killed < 30) == (1, -signal.SIGKILL, True), output
    assert events(run)[-1] == "failed"
    assert not run.result.exists()


def test_a_job_of_another_size_than_planned_is_refused(tmp_path: Path) -> None:
    """Exit code 5, the traceback once, and the error in the run folder."""
    run = make_run(make_recipe(tmp_path), candidate_for(2, 0))
    code, output = _end(_start(run, 1, 3))
    assert code == 5
    assert output.count("the job has 3 ranks, the plan 2 (1 nodes x 2)") == 1
    told = json.loads(run.error("job.0", 1).read_text())
    assert (told["type"], told["exit_code"], told["rank"]) == ("ClusterError", 5, 1)
    assert events(run) == ["failed"]


def test_a_run_folder_that_is_not_one_is_an_error_with_its_exit_code(tmp_path: Path) -> None:
    """A missing recipe is the recipe's exit code; nothing is created where nothing was."""
    code, output = _end(_start(RunFolder(tmp_path / "nothing")))
    assert (code, "no such recipe file" in output) == (2, True)
    assert not (tmp_path / "nothing").exists()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    group = Ranks(1, tmp_path_factory.mktemp("rendezvous"))
    yield group
    group.close()


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_is_not_finite_stops_before_the_weights_or_a_checkpoint_get_it(
    stage: int, tmp_path: Path, ranks: Ranks
) -> None:
    """The error names the step; the older checkpoint stays the newest."""
    recipe = make_recipe(tmp_path, method="full", train={"max_steps": 4}, checkpoint={"save_steps": 1})
    run = make_run(recipe, candidate_for(1, stage, method="full"))
    kind, message = ranks.run(_train_poisoned, run.path, 3)[0]
    assert kind == "JobFailedError"
    assert "the loss became nan; step 3" in message
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000001", "step-000002"]


def _train_poisoned(run_dir: Path, step: int) -> tuple[str, str]:
    """Train with a loss that is NaN from `step` on, as an overflow makes it."""
    from unittest.mock import patch

    from launcher.worker import engine_deepspeed, engine_torch
    from launcher.worker.loss import summed_token_loss

    calls = iter(range(1, 1000))

    def poisoned(forward: Any, batch: Any) -> Any:
        import torch

        loss = summed_token_loss(forward, batch)
        if not torch.is_grad_enabled():
            return loss
        return loss * float("nan") if next(calls) > 4 * (step - 1) else loss

    with (
        patch.object(engine_torch, "summed_token_loss", poisoned),
        patch.object(engine_deepspeed, "summed_token_loss", poisoned),
    ):
        try:
            train_here(run_dir)
        except Exception as error:
            return type(error).__name__, str(error)
    return "nothing", ""


def test_a_wrong_deepspeed_configuration_is_refused(tmp_path: Path) -> None:
    """The plan and ds_config.json must say the same; gradient clipping in particular must be there."""
    from launcher.errors import RecipeError
    from launcher.worker.engine_deepspeed import check_config

    candidate = candidate_for(2, 2)
    with pytest.raises(RecipeError, match=r"gradient_clipping is missing, and DeepSpeed would clip at 1\.0") as caught:
        check_config(candidate, {"train_batch_size": 8, "zero_optimization": {"stage": 3}})
    assert "zero_optimization.stage is 3, the plan says 2" in str(caught.value)


def test_adalora_with_zero_is_refused_by_name(tmp_path: Path, ranks: Ranks) -> None:
    """It needs whole gradients, which no ZeRO stage leaves on a rank."""
    run = make_run(make_recipe(tmp_path, method="adalora"), candidate_for(1, 2, method="adalora"))
    with pytest.raises(RankFailedError, match="adalora"):
        ranks.run(train_here, run.path)


def test_a_fractional_epoch_and_max_steps_decide_the_number_of_steps(tmp_path: Path) -> None:
    """max_steps wins; otherwise epochs are rounded up to whole steps."""
    from launcher.errors import DataError
    from launcher.worker.schedule import total_steps, warmup_steps

    assert total_steps(7, 3.0, 10) == 7
    assert total_steps(None, 1.5, 5) == 8
    assert total_steps(None, 0.01, 5) == 1
    assert warmup_steps(0.03, 10) == 1
    with pytest.raises(DataError, match="do not fill one global batch"):
        total_steps(None, 1.0, 0)


def test_the_cosine_schedule_warms_up_and_ends_near_zero() -> None:
    """The learning rate is a pure function of the step."""
    from launcher.worker.schedule import learning_rates

    rates = [learning_rates("cosine", 1e-3, 0.2, 10)(step) for step in range(10)]
    assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 1e-4


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_every_schedule_of_the_recipe_exists(name: str) -> None:
    """None is negative or above the peak."""
    from launcher.worker.schedule import learning_rates

    rate = learning_rates(name, 2e-4, 0.1, 20)
    assert all(0 <= rate(step) <= 2e-4 * (1 + 1e-9) for step in range(20))
