"""Runs that go on: after scancel, a lost answer, a killed launcher, a controller that was away, and on other ranks.

The runs are small and alike, so that all of them must learn what the uninterrupted one learnt, step by step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.folder import RunFolder, read_json_lines
from tests.cluster.bed import JOB_USER, Bed, dev_cluster, give_to_job_user, slurm

TRAIN = {"max_steps": 12, "eval_steps": 12}
SAVES = {"save_minutes": None, "save_steps": 3, "background": False}


def recipe(bed: Bed, name: str, **slurm_section: Any) -> str:
    return bed.recipe(name, train=TRAIN, checkpoint=SAVES, slurm=slurm_section)


def late(step: int) -> dict[str, str]:
    """A fault that makes the run wait after `step`, once, until something else happens to it."""
    return {"LAUNCHER_FAULT": f"at=after_step,rank=0,step={step},do=sleep:900"}


def learnt(run: RunFolder) -> dict[int, tuple[float, float, str]]:
    """Loss, learning rate and rows of every step; of a step that was done twice the last time counts."""
    lines = [line for line in read_json_lines(run.metrics) if "loss" in line]
    return {line["step"]: (line["loss"], line["learning_rate"], line["samples"]) for line in lines}


def events(run: RunFolder, name: str) -> list[dict[str, Any]]:
    return [event for event in read_json_lines(run.attempts) if event["event"] == name]


def job_id(run: RunFolder) -> str:
    return str(json.loads(run.job.read_text())["job_id"])


def jobs_named(run: RunFolder) -> list[str]:
    """Every job of the run's name that Slurm has seen, running or not."""
    seen = slurm("sacct", "-X", "-n", "-P", f"--user={JOB_USER}", f"--name={run.run_id}", "--format=JobIDRaw").split()
    return sorted({*seen, *slurm("squeue", "-h", f"--name={run.run_id}", "--states=all", "--format=%i").split()})


def fake_sbatch(bed: Bed, name: str, after: str) -> dict[str, str]:
    """A PATH whose sbatch hands the job to Slurm and then does `after` instead of passing the answer on."""
    folder = bed.home / name
    folder.mkdir()
    asking = 'case " $* " in *" --test-only "*) exec /usr/bin/sbatch "$@" ;; esac'
    (folder / "sbatch").write_text(f'#!/bin/bash\n{asking}\n/usr/bin/sbatch "$@" >/dev/null\n{after}\n')
    (folder / "sbatch").chmod(0o755)
    give_to_job_user(folder)
    return {"PATH": f"{folder}:{Path(bed.python).parent}:/usr/bin:/bin"}


@pytest.fixture(scope="module")
def whole(bed: Bed) -> RunFolder:
    """The uninterrupted run; the answer of its sbatch got lost."""
    answer = bed.launcher("submit", recipe(bed, "whole"), "--json", **fake_sbatch(bed, "lossy", "exit 1")).expect()
    return RunFolder(Path(json.loads(answer.out)["path"]))


@pytest.fixture(scope="module")
def cut(bed: Bed, whole: RunFolder) -> RunFolder:
    """A run that somebody ended with scancel after step 7."""
    answer = bed.launcher("submit", recipe(bed, "cut"), "--json", **late(7)).expect()
    run = RunFolder(Path(json.loads(answer.out)["path"]))
    bed.until(lambda: 7 in learnt(run), "step 7", run, limit_s=300)
    slurm("scancel", job_id(run))
    bed.until(lambda: job_id(run) not in bed.queue(), "the job leaves the queue", run)
    return run


def test_a_job_whose_answer_got_lost_is_the_only_one(bed: Bed, whole: RunFolder) -> None:
    """It is found by its name, written down, and trains to the end."""
    assert bed.finished(whole)["step"] == 12
    assert jobs_named(whole) == [job_id(whole)]


def test_after_scancel_nothing_happens_by_itself(bed: Bed, cut: RunFolder) -> None:
    """Cancelled is what it is called, and what it stays."""
    bed.until(lambda: bed.status(cut)["state"] == "CANCELLED", "the state is cancelled", cut)
    assert jobs_named(cut) == [job_id(cut)]


def test_of_two_operators_one_resumes_and_the_training_is_the_same(bed: Bed, cut: RunFolder, whole: RunFolder) -> None:
    """One job more, from step 6; loss, rate and rows of every step are the uninterrupted run's, bit for bit."""
    bed.until(lambda: bed.status(cut)["state"] == "CANCELLED", "the state is cancelled", cut)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: bed.launcher("resume", cut.run_id, "--json"), range(2)))
    assert sorted(answer.code for answer in answers) == [0, 7], [answer.err for answer in answers]
    won = next(answer for answer in answers if answer.code == 0)
    assert json.loads(won.out)["step"] == 6
    bed.finished(cut)
    assert len(jobs_named(cut)) == 2
    assert [event["step"] for event in events(cut, "resumed")] == [6]
    assert learnt(cut) == learnt(whole)
    assert bed.status(cut)["restarts"] == 1


def test_a_finished_run_cannot_be_started_again(bed: Bed, whole: RunFolder) -> None:
    """Neither by resume (exit 0, nothing done) nor by `scontrol requeue`: result and artifact stay as they are."""
    bed.finished(whole)
    before = {path: path.stat().st_mtime_ns for path in [whole.result, *whole.adapter.rglob("*")]}
    answer = bed.launcher("resume", whole.run_id).expect()
    assert "already complete at step 12" in answer.out
    assert jobs_named(whole) == [job_id(whole)]
    slurm("scontrol", "requeue", job_id(whole))
    slurm("scontrol", "update", f"jobid={job_id(whole)}", "StartTime=now")
    bed.until(lambda: job_id(whole) not in bed.queue(), "the requeued job has ended again", whole, limit_s=200)
    assert bed.status(whole)["state"] == "COMPLETED"
    assert {path: path.stat().st_mtime_ns for path in [whole.result, *whole.adapter.rglob("*")]} == before
    assert len(learnt(whole)) == 12


@pytest.fixture(scope="module")
def held(bed: Bed, whole: RunFolder) -> RunFolder:
    """A run whose launcher was killed the moment sbatch had taken the job, before it could write that down."""
    before = set((bed.home / "runs").iterdir())
    killed = bed.launcher("submit", recipe(bed, "held"), **fake_sbatch(bed, "deadly", "kill -9 $PPID"), **late(4))
    assert killed.code == -9
    (folder,) = set((bed.home / "runs").iterdir()) - before
    return RunFolder(folder)


def test_a_killed_launcher_loses_no_job(bed: Bed, held: RunFolder) -> None:
    """`status` finds the job by the run's name and writes it down; the job trains, with the pickle it brought along."""
    assert [event["event"] for event in read_json_lines(held.attempts)][:1] == ["submitting"]
    found = bed.status(held)
    assert found["job_id"] is not None and jobs_named(held) == [found["job_id"]]
    assert bed.launcher("resume", held.run_id).code == 7
    bed.until(lambda: 4 in learnt(held), "step 4", held, limit_s=300)
    assert jobs_named(held) == [found["job_id"]]


@pytest.fixture
def no_controller(bed: Bed) -> Iterator[None]:
    """Slurm's controller is away, and comes back."""
    dev_cluster("stop-controller")
    yield
    dev_cluster("start-controller")
    bed.until(lambda: "main" in slurm("sinfo", "--noheader", "--format=%R"), "the controller answers")


def test_without_its_controller_a_run_goes_on_and_nobody_guesses(
    bed: Bed, held: RunFolder, no_controller: None
) -> None:
    """Unknown is not failed, what the run says of itself is shown, and nothing is submitted beside it."""
    state = bed.status(held)
    assert (state["state"], state["ended"]) == ("UNKNOWN", False)
    assert "the run itself said" in state["sentence"]
    refused = bed.launcher("resume", held.run_id)
    assert refused.code == 75 and "nothing was submitted" in refused.err


def test_a_job_that_is_put_back_and_held_waits_for_its_release(bed: Bed, held: RunFolder, whole: RunFolder) -> None:
    """`scontrol requeuehold`: shown as held with the command; no second job; released, the training is the same."""
    bed.until(lambda: 4 in learnt(held), "step 4", held, limit_s=300)
    slurm("scontrol", "requeuehold", job_id(held))
    bed.until(lambda: "held" in bed.status(held)["sentence"], "it is shown as held", held)
    state = bed.status(held)
    assert state["sentence"].startswith("held (requeued)") and f"scontrol release {job_id(held)}" in state["sentence"]
    refused = bed.launcher("resume", held.run_id)
    assert refused.code == 7 and f"scontrol release {job_id(held)}" in refused.err
    slurm("scontrol", "release", job_id(held))
    slurm("scontrol", "update", f"jobid={job_id(held)}", "StartTime=now")
    bed.finished(held)
    assert jobs_named(held) == [job_id(held)]
    assert learnt(held) == learnt(whole)


def test_while_the_controller_is_away_nothing_is_left_behind(bed: Bed, no_controller: None) -> None:
    """Exit 75 after a bounded wait, whether or not the recipe names the site; no folder, no job; later it works."""
    before = set((bed.home / "runs").iterdir())
    for named in ([], ["slurm.site=dev-cluster"]):
        answer = bed.launcher("submit", recipe(bed, "away"), *named, LAUNCHER_PATIENCE_S="5")
        assert answer.code == 75, answer.out + answer.err
        assert "contact slurm controller" in answer.err.lower()
    assert set((bed.home / "runs").iterdir()) == before
    dev_cluster("start-controller")
    bed.until(lambda: "main" in slurm("sinfo", "--noheader", "--format=%R"), "the controller answers")
    run = bed.submit(recipe(bed, "away"), "slurm.extra.hold=true")
    assert jobs_named(run) == [job_id(run)]
    bed.launcher("cancel", run.run_id).expect()


@pytest.fixture(scope="module")
def wide(bed: Bed, whole: RunFolder) -> RunFolder:
    """A run on one rank that was cancelled after step 7 and goes on with two nodes."""
    answer = bed.launcher("submit", recipe(bed, "wide"), "--json", **late(7)).expect()
    run = RunFolder(Path(json.loads(answer.out)["path"]))
    bed.until(lambda: 7 in learnt(run), "step 7", run, limit_s=300)
    bed.launcher("cancel", run.run_id).expect()
    bed.until(lambda: job_id(run) not in bed.queue(), "the job leaves the queue", run)
    return run


def test_a_run_goes_on_with_more_nodes(bed: Bed, wide: RunFolder, whole: RunFolder) -> None:
    """Same rows, same rates, same sums up to rounding; the old plan is kept, and the ledger says what changed."""
    refused = bed.launcher("resume", wide.run_id, "slurm.nodes=3")
    assert refused.code == 2 and "do not divide the global batch" in refused.err
    assert bed.launcher("resume", wide.run_id, "train.learning_rate=1e-4").code == 7
    answer = bed.launcher("resume", wide.run_id, "slurm.nodes=2", "--json").expect()
    assert "goes on with 2 x 1 ranks" in answer.err
    bed.finished(wide)
    (line,) = events(wide, "replanned")
    assert (line["from_world"], line["to_world"]) == (1, 2)
    assert (wide.path / "plan-1.json").exists()
    reference, found = learnt(whole), learnt(wide)
    assert found.keys() == reference.keys()
    for step, (loss, rate, rows) in reference.items():
        assert found[step][1:] == (rate, rows)
        assert found[step][0] == pytest.approx(loss, rel=1e-3), f"step {step}"


@pytest.fixture
def short_of_nodes() -> Iterator[None]:
    """One node of four is drained."""
    slurm("scontrol", "update", "nodename=node4", "state=drain", "reason=test")
    yield
    slurm("scontrol", "update", "nodename=node4", "state=resume")


def test_a_run_takes_as_many_nodes_as_it_can_use(bed: Bed, whole: RunFolder, short_of_nodes: None) -> None:
    """Of three free nodes it uses two (the batch does not divide by three); put back, it goes on with all four."""
    name = bed.recipe(
        "elastic", train=TRAIN | {"per_device_train_batch_size": "auto"}, checkpoint=SAVES,
        slurm={"nodes": 4}, survival={"min_nodes": 1},
    )  # fmt: skip
    answer = bed.launcher("submit", name, "--json", **late(7)).expect()
    run = RunFolder(Path(json.loads(answer.out)["path"]))
    bed.until(lambda: 7 in learnt(run), "step 7", run, limit_s=300)
    assert [event["world_size"] for event in events(run, "started")] == [2]
    slurm("scontrol", "update", "nodename=node4", "state=resume")
    slurm("scontrol", "requeue", job_id(run))
    slurm("scontrol", "update", f"jobid={job_id(run)}", "StartTime=now")
    bed.finished(run)
    assert [event["world_size"] for event in events(run, "started")] == [2, 4]
    reference, found = learnt(whole), learnt(run)
    assert found.keys() == reference.keys()
    for step, (loss, rate, rows) in reference.items():
        assert found[step][1:] == (rate, rows)
        assert found[step][0] == pytest.approx(loss, rel=1e-3), f"step {step}"


def test_no_lock_is_left_behind(whole: RunFolder, cut: RunFolder, wide: RunFolder) -> None:
    """Every launcher gave back what it held."""
    assert [run.run_id for run in (whole, cut, wide) if (run.path / "submit.lock").exists()] == []
