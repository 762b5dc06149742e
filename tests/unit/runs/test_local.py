"""A job of this machine: its ranks, logs, ends and cancellation, with fake ranks in place of training."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.errors import JobFailedError, TemporaryError
from launcher.runs import local, status
from launcher.runs.folder import RunFolder, read_json_lines, write_json
from launcher.runs.process import Process, identify, is_alive
from tests.unit.runs.material import make_request, make_run, note_job

LIMIT_S = 30.0
REPOSITORY = Path(launcher.__file__).parents[1]


def until(true: Callable[[], bool]) -> None:
    """Wait for something that is about to happen."""
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.05)


class FakeRanks:
    """Starts jobs whose "Python" is a shell script: `rank` is its number, `run` the run folder."""

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self.started: list[Process] = []

    def start(self, script: str, *, ranks: int = 2, **request: Any) -> RunFolder:
        """Start a job through submitit and note it as `submit` does."""
        run = make_run(self.parent / "runs")
        python = self.parent / f"fake-python-{run.run_id}"
        python.write_text(f"#!/bin/bash\nrank=$SUBMITIT_LOCAL_GLOBALID\nrun={run.path}\n{script}\n")
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        values = {"cluster": "local", "nodes": 1, "gpus_per_node": None, "time_min": None, "chdir": str(self.parent)}
        request["env"] = {"PYTHONPATH": str(REPOSITORY), **request.get("env", {})}
        job_id = local.start(make_request(run.path, python=str(python), tasks_per_node=ranks, **(values | request)))
        process = identify(int(job_id))
        if process is not None:
            self.started.append(process)
        note_job(run, job_id, "local", process)
        return run


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[FakeRanks]:
    """Fake ranks; whatever is left of them is killed after the test."""
    fake = FakeRanks(tmp_path)
    yield fake
    for process in fake.started:
        if is_alive(process):
            os.killpg(process.pid, signal.SIGKILL)


def job_id(run: RunFolder) -> str:
    return str(status.run_status(run).job_id)


def test_every_rank_has_its_own_log_named_as_under_slurm(ranks: FakeRanks) -> None:
    """<job>_<rank>.out holds both streams of a rank, and the ranks know who they are."""
    run = ranks.start('echo "rank $rank of $SUBMITIT_LOCAL_NTASKS"; echo trouble >&2; echo {} > $run/result.json')
    assert status.wait(run, timeout_s=LIMIT_S).state == "COMPLETED"
    until(lambda: "ended" in [event["event"] for event in read_json_lines(run.attempts)])
    for rank in (0, 1):
        assert run.log(job_id(run), rank).read_text() == f"rank {rank} of 2\ntrouble\n"


def test_a_job_without_result_has_failed_whatever_its_exit_status(ranks: FakeRanks) -> None:
    """Success is result.json: ranks that leave politely and early have not succeeded."""
    run = ranks.start("exit 0")
    with pytest.raises(JobFailedError, match="without a result"):
        status.wait(run, timeout_s=LIMIT_S)


def test_the_failing_rank_is_named(ranks: FakeRanks) -> None:
    """The exit code of the rank that failed first is what the user is told."""
    run = ranks.start("[ $rank = 1 ] && exit 3; exit 0")
    with pytest.raises(JobFailedError, match="rank 1 ended with exit code 3"):
        status.wait(run, timeout_s=LIMIT_S)


def test_a_failing_rank_takes_the_others_with_it(ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that waits for a dead one would wait for ever; it is ended, as srun would."""
    run = ranks.start("[ $rank = 1 ] && exit 3; exec sleep 600")
    with pytest.raises(JobFailedError, match="rank 1 ended with exit code 3"):
        status.wait(run, timeout_s=LIMIT_S + local.PEERS_MAY_FINISH_S)


def test_the_workers_own_words_come_first(ranks: FakeRanks) -> None:
    """When a rank has said why it failed, that is shown instead of its exit code."""
    run = ranks.start(
        """echo '{"event": "failed", "rank": 0, "error": "DataError: no rows"}' >> $run/attempts.jsonl; exit 3"""
    )
    with pytest.raises(JobFailedError, match="rank 0 failed: DataError: no rows"):
        status.wait(run, timeout_s=LIMIT_S)


def test_the_job_lives_in_a_session_of_its_own(ranks: FakeRanks) -> None:
    """Ctrl-C and a closed terminal reach the watching command, not the training."""
    run = ranks.start("exec sleep 600")
    controller = int(job_id(run))
    until(lambda: os.getsid(controller) == controller)
    assert os.getsid(controller) != os.getsid(0)
    assert status.run_status(run).state == "RUNNING"


def test_cancel_ends_every_process_and_can_be_repeated(ranks: FakeRanks) -> None:
    """No rank survives, the state is CANCELLED, and a second cancel says so and does nothing."""
    run = ranks.start("echo $$ > $run/pid-$rank; exec sleep 600")
    until(lambda: (run.path / "pid-0").exists() and (run.path / "pid-1").exists())
    pids = [int((run.path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    assert "cancelled" in status.cancel(run)
    until(lambda: all(identify(pid) is None for pid in pids))
    assert status.run_status(run).state == "CANCELLED"
    assert "has ended already (CANCELLED)" in status.cancel(run)
    with pytest.raises(JobFailedError, match="was cancelled"):
        status.wait(run, timeout_s=LIMIT_S)


def test_ranks_that_ignore_sigterm_are_killed(ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that does not listen has the grace time, no more."""
    monkeypatch.setattr(status, "_GRACE_S", 0.5)
    run = ranks.start("trap '' TERM; touch $run/deaf-$rank; while :; do sleep 0.2; done")
    until(lambda: (run.path / "deaf-0").exists() and (run.path / "deaf-1").exists())
    status.cancel(run)
    assert status.run_status(run).state == "CANCELLED"


def test_a_killed_controller_leaves_no_rank(ranks: FakeRanks) -> None:
    """Even kill -9 of the controller ends the ranks, and the run counts as failed."""
    run = ranks.start("echo $$ > $run/pid-$rank; exec sleep 600")
    until(lambda: (run.path / "pid-1").exists())
    pids = [int((run.path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    os.kill(int(job_id(run)), signal.SIGKILL)
    until(lambda: all(identify(pid) is None for pid in pids))
    assert status.run_status(run).state == "FAILED"
    assert "gone without a word" in status.run_status(run).sentence


def test_another_process_with_the_same_number_is_left_alone(ranks: FakeRanks, tmp_path: Path) -> None:
    """After a reboot or a wrap-around the recorded number may be anybody's; it is not signalled."""
    run = make_run(tmp_path / "runs")
    mine = identify(os.getpid())
    assert mine is not None
    earlier = Process(pid=mine.pid, start_ticks=mine.start_ticks - 1, boot_id=mine.boot_id, host=mine.host)
    note_job(run, str(mine.pid), "local", earlier)
    assert status.run_status(run).state == "FAILED"
    assert "has ended already" in status.cancel(run)


def test_a_failing_setup_line_is_shown(ranks: FakeRanks) -> None:
    """When the site's set-up fails no rank starts; `logs` shows what it said."""
    run = ranks.start("exit 0", setup=("echo no such module >&2; false",))
    with pytest.raises(JobFailedError):
        status.wait(run, timeout_s=LIMIT_S)
    assert list(status.follow_logs(run)) == ["no such module"]


def test_following_ends_with_the_job_and_misses_nothing(ranks: FakeRanks) -> None:
    """Every line comes once and whole, the last one without its line end too."""
    run = ranks.start(
        "for i in 1 2 3; do echo line $i; sleep 0.2; done; printf end; echo {} > $run/result.json", ranks=1
    )
    assert list(status.follow_logs(run, follow=True)) == ["line 1", "line 2", "line 3", "end"]


def test_ranks_may_ask_to_be_started_again(ranks: FakeRanks) -> None:
    """submitit's requeue code starts the ranks of the same job once more, appending to their logs."""
    run = ranks.start(
        "echo start; [ -e $run/again ] && { echo {} > $run/result.json; exit 0; }; touch $run/again; exit 144", ranks=1
    )
    assert status.wait(run, timeout_s=LIMIT_S).state == "COMPLETED"
    assert list(status.follow_logs(run)) == ["start", "start"]


def test_waiting_can_be_limited(ranks: FakeRanks) -> None:
    """`wait --timeout` gives up with "try again", and the job goes on."""
    run = ranks.start("exec sleep 600", ranks=1)
    with pytest.raises(TemporaryError, match="has not ended after 0 s"):
        status.wait(run, timeout_s=0.3)
    assert status.run_status(run).state == "RUNNING"


def test_the_heartbeat_fills_the_status(ranks: FakeRanks) -> None:
    """Step, loss and speed come from what rank 0 wrote last."""
    run = ranks.start("exec sleep 600", ranks=1)
    write_json(run.heartbeat, {"time_s": time.time(), "job_id": job_id(run), "state": "training", "step": 7,
                               "total_steps": 20, "loss": 1.5, "tokens_per_s": 900.0, "eta_s": 13.0})  # fmt: skip
    now = status.run_status(run)
    assert (now.step, now.total_steps, now.loss, now.eta_s) == (7, 20, 1.5, 13.0)
    assert now.sentence == "runs: training, step 7 of 20"


def test_threads_and_environment_reach_the_ranks(ranks: FakeRanks) -> None:
    """The request's environment is the ranks' environment; no GPU is visible to a job that asks for none."""
    run = ranks.start('echo "$OMP_NUM_THREADS|$CUDA_VISIBLE_DEVICES|"; echo {} > $run/result.json', ranks=1,
                      env={"OMP_NUM_THREADS": "3"})  # fmt: skip
    status.wait(run, timeout_s=LIMIT_S)
    assert list(status.follow_logs(run)) == ["3||"]


# ---------------------------------------------------------------- again


def decisions(run: RunFolder) -> list[tuple[str, str, str]]:
    """Number of the attempt, cause and action of every decision in the ledger."""
    lines = [event for event in read_json_lines(run.attempts) if event["event"] == "decided"]
    return [(line["attempt"].split(".")[1], line["cause"], line["action"]) for line in lines]


def test_killed_ranks_are_started_again_with_a_new_number(ranks: FakeRanks) -> None:
    """A rank that is killed from outside is no reason to give up; the second attempt knows that it is the second."""
    run = ranks.start(
        "[ $LAUNCHER_RESTART = 1 ] && { [ $rank = 0 ] && echo {} > $run/result.json; exit 0; }; "
        "[ $rank = 1 ] && kill -9 $$; exec sleep 600"
    )
    assert status.wait(run, timeout_s=LIMIT_S + local.PEERS_MAY_FINISH_S).state == "COMPLETED"
    until(lambda: len(decisions(run)) == 2)
    assert decisions(run) == [("0", "rank_killed", "requeue"), ("1", "finished", "finish")]


def test_ranks_that_keep_dying_are_not_started_for_ever(ranks: FakeRanks) -> None:
    """Three attempts without a checkpoint end the run, and the reason is written down."""
    run = ranks.start("kill -SEGV $$", ranks=1)
    with pytest.raises(JobFailedError):
        status.wait(run, timeout_s=LIMIT_S)
    assert decisions(run) == [("0", "crashed", "requeue"), ("1", "crashed", "requeue"), ("2", "crashed", "stop")]
    assert "crash loop: 3 attempts" in str([line.get("reason") for line in read_json_lines(run.attempts)])


def test_the_pause_grows_only_while_nothing_is_gained() -> None:
    """A crash loop must not spin; an attempt that left a newer checkpoint, or lasted, is none."""
    pauses = [0.0]
    for _ in range(8):
        pauses.append(local.next_pause(pauses[-1], progressed=False, lasted_s=5.0))
    assert pauses[1:] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert local.next_pause(60.0, progressed=True, lasted_s=5.0) == 1
    assert local.next_pause(60.0, progressed=False, lasted_s=3600.0) == 1


def test_a_users_error_is_not_tried_again(ranks: FakeRanks) -> None:
    """The exit code of a data error ends the run at once."""
    run = ranks.start("exit 3", ranks=1)
    with pytest.raises(JobFailedError):
        status.wait(run, timeout_s=LIMIT_S)
    assert decisions(run) == [("0", "data_error", "stop")]


def test_a_cancelled_run_does_not_come_back(ranks: FakeRanks) -> None:
    """Cancelled while its ranks die again and again: the next start does not happen."""
    run = ranks.start("echo x >> $run/starts; exec sleep 600", ranks=1)
    until(lambda: (run.path / "starts").exists())
    status.cancel(run)
    assert status.run_status(run).state == "CANCELLED"
    assert (run.path / "starts").read_text() == "x\n"


def test_nothing_that_a_rank_started_outlives_it(ranks: FakeRanks) -> None:
    """A child in a session of its own, deaf to SIGTERM, ends with the attempt of its rank."""
    run = ranks.start("setsid bash -c 'trap \"\" TERM; echo $$ > '$run'/child; sleep 600' & "
                      "while [ ! -s $run/child ]; do sleep 0.1; done; exit 3", ranks=1)  # fmt: skip
    with pytest.raises(JobFailedError):
        status.wait(run, timeout_s=LIMIT_S)
    child = int((run.path / "child").read_text())
    until(lambda: identify(child) is None)
