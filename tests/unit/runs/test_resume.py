"""A run goes on as another job: what is refused, what may change, what is written, what two operators do at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.errors import ClusterError, ConflictError, RecipeError, TemporaryError
from launcher.planning.plan import plan_from_json
from launcher.planning.prepare import plan_recipe
from launcher.recipe.load import load_recipe, recipe_to_yaml
from launcher.runs import launching, status
from launcher.runs.folder import RunFolder, append_json_line, read_json_lines, write_json
from launcher.runs.resume import Finished, Resumed, resume
from launcher.runs.submission import submit
from tests.tiny import make_recipe
from tests.unit.runs.material import FakeSlurm, write_result

SITE = """executor: slurm
gpu: cpu
gpus_per_node: 4
request_gpus: true
gpu_type: a100
max_nodes: 4
cpus_per_node: 16
mem_bytes_per_node: 64G
default_partition: main
"""
PARTITION = "PartitionName=main Default=YES State=UP TotalNodes=4 MaxTime=UNLIMITED MaxNodes=UNLIMITED\n"
DOWN = "squeue: error: Unable to contact slurm controller (connect failure)"


def in_queue(run: RunFolder, job_id: str, state: str, reason: str = "None") -> str:
    """What squeue prints of a job, asked by number and asked by name."""
    return f"{job_id}|{state}|node1|N/A|{reason}\n{run.run_id}|{job_id}|{state}|node1|N/A|{reason}\n"


@pytest.fixture
def run(tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run on 2 nodes x 2 ranks, submitted from its own folder as job 41, which failed after step 30."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text(SITE)
    recipe = make_recipe(
        tmp_path,
        deepspeed={"stage": 2},
        method="full",
        lora={},
        train={"per_device_train_batch_size": 2, "max_steps": 60},
        slurm={"site": str(tmp_path / "site.yaml"), "nodes": 2, "gpus_per_node": 2, "cpus_per_task": 1, "time": 60},
    )
    (tmp_path / "tiny.yaml").write_text(recipe_to_yaml(recipe))
    fake_slurm.say("scontrol", PARTITION)
    fake_slurm.say("sinfo", "main|16|65536|gpu:a100:4\n")
    fake_slurm.say("sbatch", "Submitted batch job 41\n")
    made = launching.create(plan_recipe(tmp_path / "tiny.yaml"))
    submit(made.request)
    run = made.run
    run.record("started", job_id="41", attempt="41.0")
    run.record("failed", job_id="41", rank=1, error="JobFailedError: boom")
    make_checkpoint(run, 30)
    fake_slurm.say("squeue", in_queue(run, "41", "FAILED"))
    fake_slurm.say("sbatch", "Submitted batch job 42\n")
    return run


def make_checkpoint(run: RunFolder, step: int) -> Path:
    """A checkpoint as the worker leaves it, seen from outside."""
    folder = run.checkpoint(step)
    folder.mkdir()
    (folder / "state.pt").write_bytes(b"x" * 100)
    write_json(folder / "manifest.json", {"step": step, "world_size": 4, "files": {"state.pt": {"bytes": 100}}})
    return folder


def events(run: RunFolder) -> list[str]:
    return [str(event["event"]) for event in read_json_lines(run.attempts)]


def everything(run: RunFolder) -> dict[str, Any]:
    """Every file of the run with its content."""
    return {str(path): path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()}


def resumed(run: RunFolder, *overrides: str, dry_run: bool = False) -> Resumed:
    done = resume(run, overrides, dry_run=dry_run)
    assert isinstance(done, Resumed)
    return done


# ---------------------------------------------------------------- the plain case


def test_a_stopped_run_goes_on_as_another_job(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Same folder, same name, same request; the step of the newest checkpoint is named."""
    before = json.loads(run.job.read_text())["request"]
    done = resumed(run)
    assert (done.job_id, done.step) == ("42", 30)
    assert json.loads(run.job.read_text())["request"] == before
    assert f"--job-name={run.run_id}" in fake_slurm.script
    assert events(run)[-2:] == ["submitting", "submitted"]
    assert status.read_evidence(run).job_id == "42"


def test_a_job_that_had_no_last_words_is_judged_by_the_resume(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Killed at its time limit without a warning: the ledger tells the cause before it tells of the next job."""
    run.record("started", job_id="43", attempt="43.0")
    fake_slurm.say("squeue", in_queue(run, "43", "TIMEOUT", "TimeLimit"))
    resumed(run)
    line = next(line for line in read_json_lines(run.attempts) if line["event"] == "decided")
    assert (line["attempt"], line["cause"], line["action"], line["late"]) == ("43.0", "time_limit", "stop", True)
    assert events(run)[-2:] == ["submitting", "submitted"]


def test_a_node_that_failed_twice_is_left_out_of_a_resume_by_hand(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """As after a failure of its own accord; a strike more than a day old no longer counts."""
    for attempt, age_s in (("41.1", 60.0), ("41.2", 30.0)):
        strike = {"event": "decided", "attempt": attempt, "cause": "crashed", "culprit": "node2", "action": "requeue"}
        append_json_line(run.attempts, strike | {"time_s": time.time() - age_s})
    done = resumed(run)
    assert "#SBATCH --exclude=node2" in fake_slurm.script
    assert any("without node2 (failed 2 times or more)" in notice for notice in done.notices)


def test_a_finished_run_is_left_alone(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Exit 0, nothing asked of Slurm, nothing written."""
    write_result(run, step=60)
    before, asked = everything(run), len(fake_slurm.calls("squeue"))
    done = resume(run)
    assert isinstance(done, Finished) and "complete at step 60" in done.sentence
    assert (everything(run), len(fake_slurm.calls("squeue"))) == (before, asked)
    answer = CliRunner().invoke(main, ["resume", str(run.path)])
    assert answer.exit_code == 0 and "already complete at step 60" in answer.stdout


def test_a_dry_run_says_all_and_touches_nothing(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """The request for the new shape is shown, the folder stays as it is."""
    before, sent = everything(run), len(fake_slurm.calls("sbatch"))
    done = resumed(run, "slurm.nodes=1", dry_run=True)
    assert (done.request.nodes, done.job_id, done.to_world) == (1, None, 2)
    assert (everything(run), len(fake_slurm.calls("sbatch"))) == (before, sent)


def test_the_job_starts_where_submit_was_typed(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of the recipe mean the same from wherever resume is typed."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resumed(run).request.chdir == str(tmp_path)
    assert Path.cwd() == tmp_path / "elsewhere"


# ---------------------------------------------------------------- a job that lives


@pytest.mark.parametrize(
    ("state", "reason", "command"),
    [
        ("RUNNING", "None", "launcher cancel"),
        ("PENDING", "Priority", "launcher cancel"),
        ("PENDING", "JobHeldUser", "scontrol release 41"),
        ("PENDING", "job_requeued_in_held_state", "scontrol release 41"),
        ("REQUEUE_HOLD", "JobHeldUser", "scontrol release 41"),
        ("COMPLETING", "None", "squeue --jobs=41"),
        ("SUSPENDED", "None", "launcher cancel"),
    ],
)
def test_a_living_job_is_never_joined_by_another(
    run: RunFolder, fake_slurm: FakeSlurm, state: str, reason: str, command: str
) -> None:
    """Exit 7 with the job, its state and the one command; nothing is sent."""
    fake_slurm.say("squeue", in_queue(run, "41", state, reason))
    before, sent = everything(run), len(fake_slurm.calls("sbatch"))
    with pytest.raises(ConflictError) as caught:
        resume(run)
    assert f"job 41 ({state})" in str(caught.value) and command in str(caught.value)
    assert (everything(run), len(fake_slurm.calls("sbatch"))) == (before, sent)


def test_a_job_that_nobody_wrote_down_counts_too(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """A follow-up job or one submitted by hand has the run's name."""
    fake_slurm.say("squeue", in_queue(run, "77", "PENDING", "Dependency"))
    with pytest.raises(ConflictError, match="job 77"):
        resume(run)


def test_when_slurm_cannot_be_asked_nothing_is_sent(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """A job may live: exit 75."""
    fake_slurm.say("squeue", stderr=DOWN, status=1)
    before = everything(run)
    with pytest.raises(TemporaryError, match="cannot be told, so nothing was submitted"):
        resume(run)
    assert everything(run) == before


def test_a_job_of_an_unanswered_resume_is_taken_over(
    run: RunFolder, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher was killed after sbatch: the next resume finds the job and makes no other."""
    run.record("submitting", token="t", purpose="resume", job_name=run.run_id)
    fake_slurm.say("squeue", in_queue(run, "77", "PENDING", "Priority"))
    sent = len(fake_slurm.calls("sbatch"))
    with pytest.raises(ConflictError, match="job 77"):
        resume(run)
    assert len(fake_slurm.calls("sbatch")) == sent
    assert status.run_status(run).job_id == "77"


def test_submitting_again_after_a_kill_makes_no_second_job(
    run: RunFolder, fake_slurm: FakeSlurm, tmp_path: Path
) -> None:
    """The launcher died after sbatch; the same `submit` once more finds the job instead of sending another."""
    run.attempts.unlink()
    run.record("submitting", token="t", purpose="submit", job_name=run.run_id)
    fake_slurm.say("squeue", in_queue(run, "41", "PENDING", "Priority"))
    sent = len(fake_slurm.calls("sbatch"))
    with pytest.raises(ConflictError, match=f"run {run.run_id}, job 41"):
        launching.create(plan_recipe(tmp_path / "tiny.yaml"))
    assert len(fake_slurm.calls("sbatch")) == sent
    assert events(run)[-1] == "submitted"
    other = launching.create(plan_recipe(tmp_path / "tiny.yaml", ["train.seed=7"]))
    assert other.run.run_id != run.run_id


# ---------------------------------------------------------------- two operators


def _operator(path: Path, start: Any, results: Any) -> None:
    start.wait()
    try:
        results.put(("won", getattr(resume(RunFolder(path)), "job_id", None)))
    except ConflictError as error:
        results.put(("lost", str(error)))


def test_of_two_operators_one_resumes(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Real processes, started together, and a Slurm that shows a job as soon as sbatch has taken it."""
    living = in_queue(run, "42", "PENDING", "Priority")
    (fake_slurm.folder / "sbatch").write_text(
        f"#!/bin/bash\necho call >> '{fake_slurm.folder}/sbatch.calls'\nsleep 0.5\n"
        f"printf '{living}' > '{fake_slurm.folder}/squeue.out'\necho 'Submitted batch job 42'\n"
    )
    fork = multiprocessing.get_context("fork")
    start, results = fork.Barrier(2), fork.Queue()
    operators = [fork.Process(target=_operator, args=(run.path, start, results)) for _ in range(2)]
    for operator in operators:
        operator.start()
    outcomes = sorted((results.get(timeout=120) for _ in operators), reverse=True)
    for operator in operators:
        operator.join(60)
    assert outcomes[0] == ("won", "42")
    assert outcomes[1][0] == "lost"
    assert "is being submitted by launcher resume" in outcomes[1][1] or "job 42 (PENDING)" in outcomes[1][1]
    assert (fake_slurm.folder / "sbatch.calls").read_text().count("call") == 1
    assert events(run).count("submitted") == 2  # job 41, job 42


# ---------------------------------------------------------------- what may change


def test_what_does_not_touch_the_training_may_change(run: RunFolder) -> None:
    """Time, partition, saving, logging: the plan's candidate stays, the request follows, the old recipe is kept."""
    before = plan_from_json(json.loads(run.plan.read_text()))
    done = resumed(
        run,
        "slurm.time=2:00:00",
        "slurm.mem=8G",
        "checkpoint.save_steps=5",
        "train.logging_steps=1",
        "wandb.mode=offline",
    )
    assert (done.request.time_min, done.request.mem) == (120, "8G")
    after = plan_from_json(json.loads(run.plan.read_text()))
    assert after.chosen.candidate == before.chosen.candidate
    recipe = load_recipe(run.resolved)
    assert (recipe.checkpoint.save_steps, recipe.train.logging_steps, recipe.wandb.mode) == (5, 1, "offline")
    assert load_recipe(run.path / "recipe.resolved-1.yaml").slurm.time == 60
    assert "replanned" not in events(run)


@pytest.mark.parametrize(
    "override",
    [
        "train.learning_rate=2e-3",
        "train.max_steps=100",
        "train.global_batch_size=16",
        "train.seed=7",
        "data.max_seq_length=64",
        "method=lora",
        "deepspeed.stage=3",
    ],
)
def test_what_makes_another_training_is_refused(run: RunFolder, fake_slurm: FakeSlurm, override: str) -> None:
    """Exit 7 with what the run has, what was asked, and what to do."""
    before, sent = everything(run), len(fake_slurm.calls("sbatch"))
    with pytest.raises(ConflictError) as caught:
        resume(run, [override, "slurm.time=30"])
    key = override.partition("=")[0]
    assert any(line.startswith(key) and "the run has" in line for line in caught.value.problems)
    assert "launcher submit RECIPE" in caught.value.problems[-1]
    assert "slurm.time" not in str(caught.value)
    assert (everything(run), len(fake_slurm.calls("sbatch"))) == (before, sent)


def test_saying_what_is_so_already_changes_nothing(run: RunFolder) -> None:
    """An override with the run's own value is no change."""
    resumed(run, "train.seed=42", "slurm.nodes=2")
    assert not (run.path / "plan-1.json").exists()


def test_a_mistyped_override_is_a_usage_error(run: RunFolder) -> None:
    """Exit 2 with the nearest key, as on submit."""
    with pytest.raises(RecipeError, match=r"slurm\.nodes"):
        resume(run, ["slurm.node=1"])


# ---------------------------------------------------------------- other ranks


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 2), (1, 1), (4, 2), (2, 1), (1, 4)])
def test_other_ranks_keep_the_training(run: RunFolder, nodes: int, per_node: int) -> None:
    """Global batch, rate, method, steps and sharding stay; accumulation makes up for the ranks; all is written down."""
    before = plan_from_json(json.loads(run.plan.read_text())).chosen
    done = resumed(run, f"slurm.nodes={nodes}", f"slurm.gpus_per_node={per_node}")
    after = plan_from_json(json.loads(run.plan.read_text())).chosen
    now, then = after.candidate, before.candidate
    assert (now.nodes, now.gpus_per_node) == (nodes, per_node) == (done.request.nodes, done.request.tasks_per_node)
    assert now.global_batch == then.global_batch and after.steps == before.steps
    assert (now.learning_rate, now.method, now.zero_stage, now.seq_len) == (
        then.learning_rate,
        then.method,
        then.zero_stage,
        then.seq_len,
    )
    assert now.micro_batch * now.gradient_accumulation * now.world_size == 8
    recipe = load_recipe(run.resolved)
    assert (recipe.slurm.nodes, recipe.train.per_device_train_batch_size) == (nodes, now.micro_batch)
    assert json.loads(run.ds_config.read_text())["train_batch_size"] == 8
    for kept in ("plan-1.json", "recipe.resolved-1.yaml", "ds_config-1.json"):
        assert (run.path / kept).exists()
    line = next(event for event in read_json_lines(run.attempts) if event["event"] == "replanned")
    assert (line["from_world"], line["to_world"]) == (4, nodes * per_node)
    assert any("instead of 2 x 2" in notice for notice in done.notices)


def test_ranks_that_do_not_divide_the_batch_are_refused(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Exit 2 with the nearest counts that do."""
    with pytest.raises(RecipeError, match=r"3 x 2 = 6 ranks do not divide the global batch of 8 .*slurm\.nodes 2 or 4"):
        resume(run, ["slurm.nodes=3"])


def test_a_range_of_nodes_can_be_allowed_later(run: RunFolder) -> None:
    """survival.min_nodes: layouts and configurations for fewer nodes lie beside the plan."""
    resumed(run, "survival.min_nodes=1")
    plan = plan_from_json(json.loads(run.plan.read_text()))
    assert [each.world_size for each in plan.elastic] == [2]
    assert json.loads(run.ds_config_of(2).read_text())["gradient_accumulation_steps"] == 2
    assert run.ds_config_of(4) == run.ds_config


def test_asking_for_fewer_than_the_minimum_is_asking_for_these(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """No range is left below them, and no configuration of the old range."""
    resumed(run, "survival.min_nodes=1")
    fake_slurm.say("squeue", in_queue(run, "42", "CANCELLED"))
    done = resumed(run, "slurm.nodes=1")
    assert (done.request.nodes, done.request.node_counts) == (1, ())
    assert not list(run.path.glob("ds_config-world*"))


def test_a_smaller_micro_batch_keeps_the_global_one(run: RunFolder) -> None:
    """What an out-of-memory run needs: same sums, more accumulation."""
    resumed(run, "train.per_device_train_batch_size=1")
    candidate = plan_from_json(json.loads(run.plan.read_text())).chosen.candidate
    assert (candidate.micro_batch, candidate.gradient_accumulation, candidate.global_batch) == (1, 2, 8)


def test_a_refused_change_leaves_the_old_plan(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Slurm says no to the new shape: plan, recipe and configuration are those of before."""
    names = ("plan.json", "recipe.resolved.yaml", "ds_config.json", "job.json")
    before = [(run.path / name).read_bytes() for name in names]
    fake_slurm.say("sbatch", stderr="sbatch: error: Invalid qos specification\n", status=1)
    with pytest.raises(ClusterError, match="Invalid qos"):
        resume(run, ["slurm.nodes=1"])
    assert [(run.path / name).read_bytes() for name in names] == before
    assert not (run.path / "plan-1.json").exists()
    assert events(run)[-1] == "not_submitted"
    assert status.read_evidence(run).job_id == "41"


def test_a_refused_resume_never_removes_the_run(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Not even a run in which nothing has happened yet."""
    run.attempts.unlink()
    fake_slurm.say("squeue")
    fake_slurm.say("sbatch", stderr="sbatch: error: Invalid qos specification\n", status=1)
    with pytest.raises(ClusterError):
        resume(run)
    assert run.recipe.exists()


def test_a_run_of_a_newer_launcher_is_refused(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Exit 7 with both versions of the format: what this one does not know would be lost. Nothing is sent."""
    write_json(run.plan, json.loads(run.plan.read_text()) | {"schema": 2})
    before, sent = everything(run), len(fake_slurm.calls("sbatch"))
    with pytest.raises(ConflictError, match="schema 2, this launcher reads 1"):
        resume(run)
    assert (everything(run), len(fake_slurm.calls("sbatch"))) == (before, sent)


# ---------------------------------------------------------------- checkpoints


def test_a_damaged_checkpoint_is_passed_over_and_its_price_named(run: RunFolder) -> None:
    """The sizes of the manifest are looked at; the job verifies every byte."""
    (make_checkpoint(run, 40) / "state.pt").write_bytes(b"short")
    done = resumed(run)
    assert done.step == 30
    assert any("step-000040 is damaged (state.pt has 5 of 100 bytes); 10 steps" in notice for notice in done.notices)


def test_without_any_whole_checkpoint_nothing_starts_at_zero_in_silence(run: RunFolder) -> None:
    """Some were written and none is whole: exit 7."""
    (run.checkpoint(30) / "manifest.json").unlink()
    with pytest.raises(ConflictError, match="none is whole"):
        resume(run)


def test_a_run_without_checkpoints_begins_again(run: RunFolder) -> None:
    """It died before its first one."""
    for path in run.checkpoint(30).iterdir():
        path.unlink()
    run.checkpoint(30).rmdir()
    assert resumed(run).step == 0


# ---------------------------------------------------------------- what changed meanwhile


def test_an_edited_recipe_is_reported_and_not_used(run: RunFolder, tmp_path: Path) -> None:
    """The run goes on with its own copy."""
    path = tmp_path / "tiny.yaml"
    path.write_text(path.read_text().replace("0.001", "0.5"))
    done = resumed(run)
    assert any("tiny.yaml was edited since" in notice for notice in done.notices)
    assert load_recipe(run.resolved).train.learning_rate == 1e-3


def test_other_packages_are_reported(run: RunFolder) -> None:
    """What was installed then and what is now."""
    facts = json.loads(run.environment.read_text())
    facts["packages"]["submitit"] = "0.0.1"
    write_json(run.environment, facts)
    assert any("submitit 0.0.1 ->" in notice for notice in resumed(run).notices)


def test_other_data_is_refused(run: RunFolder, tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    """Rows would be other rows: exit 7, with the sizes; touched but equal files are only mentioned."""
    data = tmp_path / "chats.jsonl"
    later = time.time_ns() + 10**9
    os.utime(data, ns=(later, later))
    assert any("was written to" in notice for notice in resumed(run, dry_run=True).notices)
    with data.open("a") as file:
        file.write(data.read_text().splitlines()[0] + "\n")
    with pytest.raises(ConflictError, match=r"chats\.jsonl: had \d+ bytes"):
        resume(run)


def test_another_site_is_not_moved_to_in_silence(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed elsewhere, the job would wait in another cluster's queue."""
    (tmp_path / "site.yaml").rename(tmp_path / "other.yaml")
    with pytest.raises(ClusterError):
        resume(run)
    done = resumed(run, f"slurm.site={tmp_path / 'other.yaml'}")
    assert done.job_id == "42"


# ---------------------------------------------------------------- the command


def test_the_verb_prints_one_document(run: RunFolder) -> None:
    """`--json`: run, job and step on stdout, notices on stderr."""
    answer = CliRunner().invoke(main, ["resume", str(run.path), "slurm.nodes=1", "--json"])
    assert answer.exit_code == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert (document["run"], document["job_id"], document["step"]) == (run.run_id, "42", 30)
    assert "goes on with 1 x 2 ranks" in answer.stderr


def test_the_verb_says_why_not(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """A living job: exit 7."""
    fake_slurm.say("squeue", in_queue(run, "41", "RUNNING"))
    answer = CliRunner().invoke(main, ["resume", str(run.path)])
    assert answer.exit_code == 7 and "job 41 (RUNNING)" in answer.stderr
