"""What training itself does wrong, and what surrounds it: rows 10, 38, 40 to 48, 50, 52 and 53 of the fault matrix."""

from __future__ import annotations

import http.server
import json
import math
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.runs.folder import RunFolder, read_json_lines
from tests.faults.bed import RECIPES, SLOW, LocalBed
from tests.faults.conftest import Reference
from tests.faults.gauntlet import check_survival
from tests.faults.invariants import assert_equal_sequence, assert_no_orphans, assert_one_artifact
from tests.faults.report import Row
from tests.faults.story import events, sequence, story

FINISHED = "finished"


@pytest.fixture(autouse=True)
def local_row(row: Row) -> None:
    """Every row of this module is about this machine."""
    row.where = "local"


def case(name: str) -> pytest.MarkDecorator:
    """One parameter whose name carries the number in the matrix."""
    return pytest.mark.parametrize("_case", [pytest.param(None, id=name)])


@case("f38_two_jobs_on_one_host")
def test_two_jobs_at_once(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """Two runs that start together on one host do not meet at each other's port."""
    row.fault = "two runs started at the same moment"
    runs = [local_bed.inject("lora-twin") for _ in range(2)]
    for run in runs:
        check_survival(local_bed, run, local_reference("lora"), row, causes=(FINISHED,), lost=0)


@case("f41_other_number_of_ranks")
def test_other_number_of_ranks(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """A run goes on with one rank instead of two: same rows, same schedule, nearly the same loss, and it says so."""
    row.fault = "killed, then resumed with half as many ranks"
    run = local_bed.inject("full-reshaped", "at=step,rank=1,step=14,do=kill", slurm={"requeue": False})
    assert local_bed.wait(run).code == 8
    local_bed.launcher("resume", run.run_id, "slurm.gpus_per_node=1", "--detach").expect()
    local_bed.finished(run)
    row.measure(run)
    found, expected = sequence(run), sequence(local_reference("full"))
    assert found.keys() == expected.keys()
    worst = max(abs(found[step][0] / expected[step][0] - 1) for step in expected)
    row.seen = f"largest relative difference of a loss {worst:.1e}"
    assert worst <= 1e-3
    assert all(found[step][1:] == expected[step][1:] for step in expected)
    assert events(run, "reshaped")
    assert_one_artifact(run)


@case("f42_recipe_edited_between_attempts")
def test_drift(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """What the user edits while a run is interrupted is not what the run trains on."""
    row.fault = "the recipe's file edited before the run was killed"
    recipe = local_bed.home / local_bed.fault_recipe("lora-drift")
    run = local_bed.launch(recipe.name, LAUNCHER_FAULT=f"at=step,rank=1,step=14,do=kill;{SLOW}")
    local_bed.after_step(run, 5)
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.005", "learning_rate: 0.5"))
    assert "0.5\n" in recipe.read_text()
    check_survival(local_bed, run, local_reference("lora"), row, causes=("rank_killed", FINISHED))


ONLINE = {"mode": "online", "project": "faults"}
"""Enough for a run that talks to a server of W&B."""


class FakeWandb(http.server.BaseHTTPRequestHandler):
    """A W&B server that answers everything with the same error."""

    status = 500

    def do_POST(self) -> None:
        """Refuse."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"errors": [{"message": "run was deleted"}]}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST  # noqa: N815 - http.server's name
    do_PUT = do_POST  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def wandb_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that refuses with the parameter's status."""
    handler = type("Refusing", (FakeWandb,), {"status": request.param})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def check_without_wandb(bed: LocalBed, reference: RunFolder, row: Row, address: str) -> None:
    """A run whose W&B does not answer trains as any other, and is killed once on the way."""
    recipe = bed.fault_recipe("lora-wandb", wandb=ONLINE)
    fault = "at=step,rank=1,step=14,do=kill"
    variables = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "LAUNCHER_FAULT": fault}
    run = bed.launch(recipe, **variables)
    check_survival(bed, run, reference, row, causes=("rank_killed", FINISHED))


@case("f43_wandb_unreachable")
def test_wandb_unreachable(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """Nobody listens at W&B's address: training goes on without it."""
    row.fault = "nothing listens at WANDB_BASE_URL"
    check_without_wandb(local_bed, local_reference("lora"), row, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("wandb_server", "words"),
    [
        pytest.param(503, "answers 503 to everything", id="f43_wandb_5xx"),
        pytest.param(401, "answers 401 to everything", id="f43_wandb_bad_key"),
        pytest.param(404, "answers 404 to everything, as for a deleted run", id="f44_wandb_run_deleted"),
    ],
    indirect=["wandb_server"],
)
def test_wandb_refuses(
    wandb_server: str, words: str, local_bed: LocalBed, local_reference: Reference, row: Row
) -> None:
    """A server that refuses does not stop training."""
    row.fault = f"the W&B server {words}"
    check_without_wandb(local_bed, local_reference("lora"), row, wandb_server)


@case("f45_two_resume_at_once")
def test_double_resume(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """Of two operators who resume the same run one is refused, by name of the holder, and one job runs."""
    row.fault = "launcher resume, twice at the same moment, and again while it runs"
    run = local_bed.inject("lora-double", "at=step,rank=1,step=14,do=kill", slurm={"requeue": False})
    assert local_bed.wait(run).code == 8
    words = ("resume", run.run_id, "--detach")
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: local_bed.launcher(*words), range(2)))
    assert sorted(answer.code for answer in answers) == [0, 7], [answer.err for answer in answers]
    third = local_bed.launcher(*words)
    assert third.code == 7
    row.seen = third.err.strip().splitlines()[0][:100]
    check_survival(local_bed, run, local_reference("lora"), row, causes=("rank_killed", FINISHED))


@pytest.mark.parametrize(
    "written",
    [
        pytest.param("recipe.yaml", id="f46_client_killed_at_recipe"),
        pytest.param("plan.json", id="f46_client_killed_at_plan"),
        pytest.param("attempts.jsonl", id="f46_client_killed_at_ledger"),
        pytest.param("job.json", id="f46_client_killed_at_job"),
    ],
)
def test_client_killed(written: str, local_bed: LocalBed, row: Row) -> None:
    """Whatever the launcher had written when it was killed, `status` tells a state and nothing is submitted twice."""
    row.fault = f"the launcher killed as soon as {written} is there"
    name = f"lora-client-{written.partition('.')[0]}"
    recipe = local_bed.fault_recipe(name)
    command = [local_bed.python, "-m", "launcher.cli", "submit", recipe, "--local", "--detach"]
    environ = {**os.environ, **local_bed.environ}
    silent = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=local_bed.home, env=environ, stdout=silent, stderr=silent)
    while process.poll() is None:
        if list((local_bed.home / "runs").glob(f"{name}-*/{written}")):
            process.send_signal(signal.SIGKILL)
            break
    process.wait(60)
    (folder,) = (local_bed.home / "runs").glob(f"{name}-*")
    run = RunFolder(folder)
    answer = local_bed.launcher("status", run.run_id, "--json").expect()
    row.seen = f"status says {json.loads(answer.out)['state']}"
    assert len(events(run, "submitted")) <= 1
    local_bed.launcher("cancel", run.run_id)
    assert_no_orphans(run)


@case("f47_host_out_of_memory")
def test_host_out_of_memory(_case: None, local_bed: LocalBed, row: Row) -> None:
    """A rank that gets no more memory is diagnosed as such and not blindly tried again."""
    row.fault = "rank 1 allocates until it is refused"
    run = local_bed.inject("lora-memory", "at=step,rank=1,step=6,do=memory")
    assert local_bed.wait(run).code == 8
    (attempt,) = story(run)
    row.seen = f"cause {attempt.cause}, action {attempt.decision['action']}"
    assert (attempt.cause, attempt.decision["action"]) == ("host_out_of_memory", "stop")
    assert_no_orphans(run)


@case("f47_gpu_out_of_memory")
def test_accelerator_out_of_memory(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """The run goes on with half the micro-batch and the same global batch, from its checkpoint."""
    row.fault = "torch.OutOfMemoryError in rank 1 (raised, there is no GPU here)"
    run = local_bed.inject("lora-oom", "at=step,rank=1,step=14,do=oom")
    local_bed.finished(run)
    row.measure(run)
    first, second = story(run)
    row.seen = f"changes {first.decision['changes']}"
    assert (first.cause, second.cause) == ("gpu_out_of_memory", FINISHED)
    candidate = json.loads(run.plan.read_text())["chosen"]
    assert (candidate["micro_batch"], candidate["gradient_accumulation"]) == (1, 4)
    found, expected = sequence(run), sequence(local_reference("lora"))
    assert all(found[step][1:] == expected[step][1:] for step in expected)
    assert_one_artifact(run)


@case("f48_nan_loss")
def test_nan(_case: None, local_bed: LocalBed, row: Row) -> None:
    """A loss that is no number stops the run before it reaches a checkpoint; the last finite one is kept."""
    row.fault = "the forward pass of step 14 gives NaN"
    run = local_bed.inject("lora-nan", "at=step,rank=1,step=14,do=nan")
    assert local_bed.wait(run).code == 8
    (attempt,) = story(run)
    row.seen = f"cause {attempt.cause}, action {attempt.decision['action']}"
    assert (attempt.cause, attempt.decision["action"]) == ("nan_loss", "stop")
    assert all(math.isfinite(loss) for loss, _, _ in sequence(run).values())
    assert (run.checkpoints / "step-000012" / "manifest.json").exists()
    assert not run.result.exists()


@case("f50_time_zone_changes")
def test_time_zone(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """Where the launcher's clock face differs from the job's, ages and states stay right."""
    row.fault = "submitted and watched in time zones 26 hours apart"
    recipe = local_bed.fault_recipe("lora-zone")
    run = local_bed.launch(recipe, TZ="Etc/GMT+12", LAUNCHER_FAULT="at=step,rank=1,step=14,do=kill")
    local_bed.after_step(run, 2)
    status = json.loads(local_bed.launcher("status", run.run_id, "--json", TZ="Pacific/Kiritimati").expect().out)
    assert status["state"] == "RUNNING"
    check_survival(local_bed, run, local_reference("lora"), row, causes=("rank_killed", FINISHED))


@case("f52_crash_loop")
def test_crash_loop(_case: None, local_bed: LocalBed, row: Row) -> None:
    """Three attempts in a row without a new checkpoint end the run, with the budget hardly touched."""
    row.fault = "rank 1 killed in step 1 of every attempt"
    run = local_bed.inject("lora-loop", "at=step,rank=1,step=1,do=kill,always")
    assert local_bed.wait(run).code == 8
    attempts = story(run)
    row.seen = f"{len(attempts)} attempts, then: {attempts[-1].decision['reason']}"[:120]
    assert len(attempts) == 3
    assert attempts[-1].decision["action"] == "stop"
    assert "progress" in attempts[-1].decision["reason"]
    assert_no_orphans(run)


@pytest.mark.fast
@case("f53_killed_in_the_export")
def test_export(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """A run killed after its adapter was written writes it again, proves it, and has one."""
    row.fault = "rank 0 killed between the artifact and its proof"
    run = local_bed.inject("lora-export", "at=export,do=kill")
    check_survival(local_bed, run, local_reference("lora"), row, causes=("rank_killed", FINISHED))


@case("f53_sharded_export_killed")
def test_sharded_export(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """The same for a full model gathered from ZeRO-3's shards; every tensor has its shape."""
    row.fault = "all ranks killed between a model gathered from ZeRO-3 and its proof"
    run = local_bed.inject("sharded-export", "at=export,do=killall")
    check_survival(local_bed, run, local_reference("sharded"), row, causes=("rank_killed", FINISHED))


@pytest.mark.parametrize("recipe", [pytest.param(name, id=f"f07_every_kind_{name}") for name in sorted(RECIPES)])
def test_every_kind_of_run(recipe: str, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """Exact resume for every method and ZeRO stage of the bed, in the middle of an epoch."""
    row.fault = f"kill -9 of rank 1: {recipe}"
    run = local_bed.inject(f"{recipe}-kind", "at=step,rank=1,step=14,do=kill")
    check_survival(local_bed, run, local_reference(recipe), row, causes=("rank_killed", FINISHED))


def steps_are_monotonic(metrics: Path) -> bool:
    """Whether an attempt's lines never go back, and a later attempt's begin after its checkpoint."""
    steps = [line["step"] for line in read_json_lines(metrics) if "loss" in line]
    return steps == sorted(steps)


@case("f27_stop_signal_loses_nothing")
def test_graceful_stop(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """A stop signal to one rank stops all at the same step, with a checkpoint of it."""
    row.fault = "SIGUSR2 to rank 1 alone, then resumed"
    run = local_bed.inject("lora-graceful", "at=step,rank=1,step=14,do=usr2")
    local_bed.wait(run)
    if not run.result.exists():
        local_bed.launcher("resume", run.run_id, "--detach").expect()
        local_bed.finished(run)
    row.measure(run)
    assert story(run)[1].resumed_step == story(run)[0].last_step
    assert steps_are_monotonic(run.metrics)
    assert_equal_sequence(run, local_reference("lora"))
    assert_one_artifact(run)
