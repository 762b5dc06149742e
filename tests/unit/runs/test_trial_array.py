"""A rung of a trial on a cluster: one job array, the job that waits for it, and what becomes of interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from launcher.errors import ClusterError, JobFailedError, TemporaryError
from launcher.recipe.load import load_recipe, recipe_to_yaml
from launcher.runs import trial, trial_ending
from launcher.runs.folder import RunFolder, append_json_line, read_json_lines
from launcher.runs.lock import lock_path
from launcher.runs.sending import silent
from launcher.runs.slurm import find_jobs
from launcher.runs.state import read_evidence
from launcher.runs.train_job import run_of_task
from launcher.runs.trial_array import next_script, sent_request
from launcher.runs.trial_candidates import parse_specs
from launcher.runs.trial_folder import Task, Trial
from launcher.runs.trial_standing import stand
from tests.tiny import make_recipe
from tests.unit.runs.material import FakeSlurm

SITE = """
executor: slurm
gpu: cpu
gpus_per_node: 1
request_gpus: false
max_nodes: 2
cpus_per_node: 4
mem_bytes_per_node: 8G
max_array_size: 1001
default_partition: main
modules: [gcc]
file_systems: [{name: all, path: /, shared: true}]
"""
LINES = ("a: lora.r=4", "b: lora.r=8", "c: lora.r=16 train.learning_rate=1e-3", "d: method=full")


@pytest.fixture
def cluster(tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A site in the working folder whose sbatch takes everything: the array as job 42, the job after it as 43."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAUNCHER_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("launcher.runs.trial_array._FILES_LAG_S", 0.0)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "small.yaml").write_text(SITE)
    partition = "PartitionName=main State=UP TotalNodes=2 MaxTime=UNLIMITED\n"
    fake_slurm.say_when("scontrol", "partition", partition)
    fake_slurm.say("sbatch", "Submitted batch job 42\n")
    fake_slurm.say_when("sbatch", "--parsable", "43\n")
    return fake_slurm


def make_trial(folder: Path, *, parallel: int | None = None, seeds: int = 1) -> Trial:
    """Four candidates of eight steps, written down."""
    recipe = make_recipe(folder, slurm={"site": "small", "nodes": 1}, train={"max_steps": 8}, output_dir="auto")
    (folder / "tiny.yaml").write_text(recipe_to_yaml(recipe))
    asked = trial.Asked(
        recipe=folder / "tiny.yaml",
        specs=tuple(parse_specs(LINES, "test")),
        shares=(Fraction(1, 2), Fraction(1)),
        parallel=parallel,
        seeds=seeds,
    )
    return trial.create(asked, trial.plan(asked))


def go_on(made: Trial, *, by_hand: bool = True) -> list[str]:
    """Advance once; what was said."""
    said: list[str] = []
    trial.advance(made, said.append, by_hand=by_hand, wait=False)
    return said


def queue(cluster: FakeSlurm, *tasks: int, job: int = 42, state: str = "RUNNING") -> None:
    """What squeue knows: these tasks of an array."""
    cluster.say("squeue", "".join(f"{job}_{task}|{state}|n1|N/A|None|{job + task}\n" for task in tasks))


def arrays(made: Trial) -> list[RunFolder]:
    return [RunFolder(path) for path in sorted((made.path / "arrays").glob("*"))]


def scripts(cluster: FakeSlurm) -> list[str]:
    """Scripts of the arrays that were sent."""
    return [Path(words[-1]).read_text() for words in cluster.calls("sbatch") if "--parsable" not in words]


def run_of(made: Trial, name: str) -> RunFolder:
    run = made.run_of(Task(candidate=name, seed=42))
    assert run is not None
    return run


def reach(made: Trial, rung: int, **losses: float) -> None:
    """What workers leave that have paused at a rung."""
    for name, loss in losses.items():
        run, step = run_of(made, name), made.steps(name, rung)
        append_json_line(run.metrics, {"step": step, "validation_loss": loss})
        run.record("stopped", attempt="1.0", job_id="1", reason="paused", step=step, train_s=1.0, tokens=10)


# ---------------------------------------------------------------- the array


def test_a_rung_is_one_array_with_a_task_per_run(tmp_path: Path, cluster: FakeSlurm) -> None:
    """Throttled as asked; Slurm's own index leads each task to its run and its log."""
    made = make_trial(tmp_path, parallel=2)
    said = go_on(made)
    [script] = scripts(cluster)
    [array] = arrays(made)
    assert "#SBATCH --array=0-3%2" in script
    assert f"#SBATCH --job-name={array.run_id}" in script
    assert f"#SBATCH --output={array.path}/%a/logs/%j_0.out" in script
    assert f"launcher.runs.train_job {array.path}/%a" in script
    assert f"launcher.runs.aftermath {array.path}/%a before" in script
    links = [(array.path / str(index)).resolve() for index in range(4)]
    assert links == [run_of(made, name).path for name in "abcd"]
    assert any("4 runs as job array 42" in line for line in said)


def test_every_run_of_an_array_is_an_ordinary_run(tmp_path: Path, cluster: FakeSlurm) -> None:
    """Its own request for a follow-up job, its own place in the array, and where it is to pause."""
    made = make_trial(tmp_path)
    go_on(made)
    run = run_of(made, "c")
    request = json.loads(run.job.read_text())["request"]
    assert (request["run_dir"], request["name"], request["array"]) == (str(run.path), run.run_id, None)
    assert [line["job_id"] for line in read_json_lines(run.attempts) if line["event"] == "submitted"] == ["42_2"]
    assert json.loads(run.pause.read_text()) == {"after_step": 4}


def test_the_runs_of_a_trial_are_one_group(tmp_path: Path, cluster: FakeSlurm) -> None:
    """W&B shows them together, each under its candidate's name, with all that must be the same."""
    made = make_trial(tmp_path)
    trial.make_runs(made, stand(made).todo, silent)
    recipes = [load_recipe(run_of(made, name).resolved) for name in "abcd"]
    assert {recipe.wandb.group for recipe in recipes} == {made.name}
    assert [recipe.name for recipe in recipes] == [f"tiny-{name}" for name in "abcd"]
    assert {(recipe.train.seed, recipe.train.max_steps, recipe.data) for recipe in recipes} == {
        (42, 8, recipes[0].data)
    }


def test_a_task_finds_its_run_by_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside an array the word is the run's folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "3").symlink_to("run")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert run_of_task(f"{tmp_path}/%a") == tmp_path / "run"
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert run_of_task(f"{tmp_path}/run") == tmp_path / "run"


def test_a_job_waits_for_the_array_and_goes_on(tmp_path: Path, cluster: FakeSlurm) -> None:
    """A small job of fixed words, after every task however it ends."""
    made = make_trial(tmp_path)
    go_on(made)
    [words] = [words for words in cluster.calls("sbatch") if "--parsable" in words]
    assert {"--dependency=afterany:42", "--ntasks=1", "--partition=main", f"--chdir={tmp_path}"} <= set(words)
    assert not any("begin" in word for word in words)
    script = next_script(made, sent_request(made, stand(made).todo[0]))
    assert Path(words[-1]).read_text() == script
    assert "module load gcc || exit 1" in script
    assert script.rstrip().endswith(f"-m launcher.runs.trial_job {made.path}")


def test_nothing_is_sent_twice(tmp_path: Path, cluster: FakeSlurm) -> None:
    """While the array lives, going on means waiting for it; a job that waits already is enough."""
    made = make_trial(tmp_path)
    go_on(made)
    queue(cluster, 0, 1, 2, 3)
    cluster.say_when("squeue", f"--name={made.name}-next", f"{made.name}-next|43|PENDING||N/A|Dependency|43\n")
    go_on(made)
    assert len(cluster.calls("sbatch")) == 2


def test_survivors_go_on_in_the_next_array(tmp_path: Path, cluster: FakeSlurm) -> None:
    """The better half, to the end: without a pause."""
    made = make_trial(tmp_path)
    go_on(made)
    reach(made, 0, a=3.0, b=1.0, c=4.0, d=2.0)
    cluster.say("sbatch", "Submitted batch job 50\n")
    go_on(made, by_hand=False)
    assert "#SBATCH --array=0-1\n" in scripts(cluster)[-1]
    links = [(arrays(made)[-1].path / str(index)).resolve() for index in range(2)]
    assert links == [run_of(made, "b").path, run_of(made, "d").path]
    assert not run_of(made, "b").pause.exists()


# ---------------------------------------------------------------- interruptions


def test_one_that_is_still_at_work_is_waited_for_again(tmp_path: Path, cluster: FakeSlurm) -> None:
    """A follow-up job outlives its array: nobody decides before it has ended, and nobody asks every second."""
    made = make_trial(tmp_path)
    go_on(made)
    reach(made, 0, a=3.0, b=1.0, c=4.0)
    queue(cluster, 3)
    go_on(made, by_hand=False)
    assert len(scripts(cluster)) == 1
    words = cluster.calls("sbatch")[-1]
    assert {"--dependency=afterany:42_3", "--begin=now+60"} <= set(words)


def test_what_a_person_ended_is_started_again_by_a_person_only(tmp_path: Path, cluster: FakeSlurm) -> None:
    """The waiting job stops with the run's name; typing the trial's name sends that run alone."""
    made = make_trial(tmp_path)
    go_on(made)
    reach(made, 0, a=3.0, b=1.0, c=4.0)
    run_of(made, "d").record("cancelled", job_id="42_3")
    with pytest.raises(JobFailedError, match=run_of(made, "d").run_id):
        go_on(made, by_hand=False)
    assert len(scripts(cluster)) == 1
    cluster.say("sbatch", "Submitted batch job 50\n")
    go_on(made)
    assert "#SBATCH --array=0-0\n" in scripts(cluster)[-1]
    assert (arrays(made)[-1].path / "0").resolve() == run_of(made, "d").path


def test_a_candidate_that_fails_is_out_and_the_rest_goes_on(tmp_path: Path, cluster: FakeSlurm) -> None:
    """A loss that is not finite comes again; no job is spent on it."""
    made = make_trial(tmp_path)
    go_on(made)
    reach(made, 0, a=3.0, b=1.0, d=2.0)
    run_of(made, "c").record("failed", attempt="44.0", job_id="44", error="NaN", rank=0)
    run_of(made, "c").record("decided", attempt="44.0", action="stop", cause="nan_loss", sentence="loss is not finite")
    cluster.say("squeue", "42_2|FAILED|n1|N/A|NonZeroExitCode|44\n")
    go_on(made, by_hand=False)
    assert made.out() == {"c": (0, "loss is not finite")}
    assert "#SBATCH --array=0-1\n" in scripts(cluster)[-1]


def test_a_refusal_leaves_no_trace_but_its_words(tmp_path: Path, cluster: FakeSlurm) -> None:
    """The runs are there, nothing is queued, and the same command tries again."""
    made = make_trial(tmp_path)
    cluster.say("sbatch", stderr="sbatch: error: Invalid qos specification\n", status=1)
    with pytest.raises(ClusterError, match="Invalid qos"):
        go_on(made)
    assert [line["event"] for line in read_json_lines(arrays(made)[0].attempts)] == ["submitting", "not_submitted"]
    cluster.say("sbatch", "Submitted batch job 42\n")
    go_on(made)
    assert "#SBATCH --array=0-3\n" in scripts(cluster)[-1]


def test_an_array_whose_answer_was_lost_is_found_by_its_name(tmp_path: Path, cluster: FakeSlurm) -> None:
    """A launcher that was killed between question and answer is no reason for a second array."""
    made = make_trial(tmp_path)
    trial.make_runs(made, stand(made).todo, silent)
    (made.path / "arrays" / f"{made.name}-1").mkdir(parents=True)
    [array] = arrays(made)
    runs = [run_of(made, name).run_id for name in "abcd"]
    array.record("submitting", token="t", rung=0, runs=runs, cluster="slurm", job_name=array.run_id)
    with pytest.raises(TemporaryError, match="try again"):
        go_on(made)
    lines = "".join(f"{array.run_id}|42_{task}|RUNNING|n1|N/A|None|{42 + task}\n" for task in range(4))
    queue(cluster, 0, 1, 2, 3)
    cluster.say_when("squeue", f"--name={array.run_id}", lines)
    said = go_on(made)
    assert any("taken over" in line for line in said)
    assert not scripts(cluster)
    assert all(made.sent(run, 0) for run in runs)


# ---------------------------------------------------------------- Slurm's names for tasks


def test_a_task_is_known_by_both_its_names(cluster: FakeSlurm) -> None:
    """ARRAY_TASK, and the number it runs under; one that waits has the first only."""
    cluster.say("squeue", "42_0|RUNNING|n1|N/A|None|42\n42_1|PENDING||N/A|Resources|45\n")
    found = find_jobs(["42_1", "42"])
    assert (found["42_1"].state, found["42"].state) == ("PENDING", "RUNNING")


def test_accounting_is_asked_for_tasks_by_their_own_name(cluster: FakeSlurm) -> None:
    """What has left the queue: JobIDRaw is another number."""
    cluster.say("sacct", "42_1|COMPLETED|0:0|n1|0\n")
    assert find_jobs(["42_1"])["42_1"].state == "COMPLETED"
    assert any("--format=JobID,State,ExitCode,NodeList,Restarts" in words for words in cluster.calls("sacct"))


# ---------------------------------------------------------------- ended by a person


def alive(cluster: FakeSlurm, made: Trial, *tasks: int, next_job: str | None = "PENDING") -> None:
    """What squeue knows by names: these tasks of the first array, and the job that waits for it."""
    [array] = arrays(made)
    lines = [f"{array.run_id}|42_{task}|RUNNING|n1|N/A|None|{42 + task}" for task in tasks]
    lines += [f"{made.name}-next|43|{next_job}||N/A|Dependency|43"] if next_job else []
    cluster.say("squeue", "".join(f"{line}\n" for line in lines))


def test_cancelling_a_trial_ends_who_would_send_more_and_then_the_rest(tmp_path: Path, cluster: FakeSlurm) -> None:
    """Task by task, as each one's run is told; a dry run tells the same and ends nothing."""
    made = make_trial(tmp_path)
    go_on(made)
    alive(cluster, made, 0, 2, 3)
    named = [str(each) for each in trial_ending.living(made)]
    assert named[:2] == [
        f"job 43 ({made.name}-next, PENDING)",
        f"job 42_0 ({run_of(made, 'a').run_id}, RUNNING)",
    ]
    assert not cluster.calls("scancel") and not made.cancelled
    assert len(trial_ending.cancel(made)) == 4
    assert cluster.calls("scancel") == [["43"], ["42_0"], ["42_2"], ["42_3"]]
    assert [read_evidence(run_of(made, name)).cancelled for name in "abcd"] == [True, False, True, True]


def test_a_cancelled_trial_goes_on_when_a_person_says_so(tmp_path: Path, cluster: FakeSlurm) -> None:
    """Not by the job that waited for the array, should it come after all."""
    made = make_trial(tmp_path)
    go_on(made)
    reach(made, 0, a=3.0, b=1.0, c=4.0)
    alive(cluster, made, 3, next_job=None)
    trial_ending.cancel(made)
    cluster.say("squeue")
    with pytest.raises(JobFailedError, match=f"{made.name} was cancelled; go on with: launcher trial {made.name}"):
        go_on(made, by_hand=False)
    assert len(scripts(cluster)) == 1
    cluster.say("sbatch", "Submitted batch job 50\n")
    cluster.say("sacct", "42_3|CANCELLED|0:0|n1|0\n")
    go_on(made)
    assert "#SBATCH --array=0-0\n" in scripts(cluster)[-1]
    assert not made.cancelled


def test_what_is_sent_while_a_trial_is_cancelled_is_ended_by_its_sender(tmp_path: Path, cluster: FakeSlurm) -> None:
    """Who cancels looks for jobs that are not there yet: the word in the ledger is seen after the answer."""
    made = make_trial(tmp_path)

    def say(words: str) -> None:
        if "as job array 42" in words:
            made.folder.record("cancelled")
            alive(cluster, made, 0, 1, 2, 3, next_job=None)

    with pytest.raises(JobFailedError, match="was cancelled"):
        trial.advance(made, say, wait=False)
    assert cluster.calls("scancel") == [["42_0"], ["42_1"], ["42_2"], ["42_3"]]


def test_the_job_after_an_array_leaves_no_lock_when_it_is_ended(tmp_path: Path, cluster: FakeSlurm) -> None:
    """Elsewhere nobody could tell that its process is gone, and going on would have to wait."""
    made = make_trial(tmp_path)
    go_on(made)
    asked = tmp_path / "asked"
    (cluster.folder / "squeue").write_text(f"#!/bin/bash\n: > '{asked}'\nexec sleep 600\n")
    words = [sys.executable, "-m", "launcher.runs.trial_job", str(made.path)]
    job = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])})
    until = time.monotonic() + 120
    while not asked.exists():
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    assert lock_path(made.folder).exists()
    job.terminate()
    assert job.wait(timeout=120) == 128 + signal.SIGTERM
    assert not lock_path(made.folder).exists()


def test_a_trial_is_cancelled_even_where_slurm_does_not_answer(tmp_path: Path, cluster: FakeSlurm) -> None:
    """Nothing more is sent; for what runs, the same command again."""
    made = make_trial(tmp_path)
    go_on(made)
    cluster.say("squeue", stderr="slurm_load_jobs error: Unable to contact slurm controller", status=1)
    with pytest.raises(TemporaryError, match=f"for what runs: launcher cancel {made.name}"):
        trial_ending.cancel(made)
    assert made.cancelled


def test_a_job_that_is_being_ended_is_not_taken_for_one_that_runs(
    tmp_path: Path, cluster: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on sends the run anew, which can be done when the old job has left."""
    monkeypatch.setattr("launcher.runs.trial_array._LEAVE_S", 0.0)
    made = make_trial(tmp_path)
    go_on(made)
    alive(cluster, made, 1, next_job=None)
    trial_ending.cancel(made)
    queue(cluster, 1, state="COMPLETING")
    with pytest.raises(TemporaryError, match=run_of(made, "b").run_id):
        go_on(made)
    assert len(scripts(cluster)) == 1
