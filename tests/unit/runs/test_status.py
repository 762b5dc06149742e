"""The state of runs under Slurm, as squeue, sacct and scontrol tell it, with and without accounting."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from launcher.errors import ClusterError, JobFailedError, RecipeError, TemporaryError
from launcher.report.status import duration, print_status
from launcher.runs import slurm, status
from launcher.runs.folder import RunFolder, write_json
from launcher.runs.reasons import reason_words
from tests.unit.runs.material import FakeSlurm, make_run, note_job, write_result

DOWN = "squeue: error: Unable to contact slurm controller (connect failure)"
DISABLED = "Slurm accounting storage is disabled"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was submitted as job 42."""
    run = make_run(tmp_path / "runs")
    note_job(run, "42")
    return run


def age(run: RunFolder, seconds: float) -> None:
    """Let everything the run said be `seconds` old."""
    lines = run.attempts.read_text().splitlines()
    then = time.time() - seconds
    run.attempts.write_text("".join(line.replace('"time_s": ', f'"time_s": {then}, "was": ') + "\n" for line in lines))


# ---------------------------------------------------------------- what Slurm says


@pytest.mark.parametrize(
    ("reason", "plain"),
    [
        ("Priority", "other jobs come first"),
        ("Resources", "the nodes it needs are still busy"),
        ("PartitionTimeLimit", "will never start: set slurm.time"),
        ("QOSMaxGRESPerUser", "limit of its QOS"),
        ("AssocGrpGRES", "your account together is at its limit"),
        ("BeginTime", "Slurm waits a moment"),
        ("DependencyNeverSatisfied", "will never start"),
        ("JobHeldUser", "scontrol release 42"),
        ("ReqNodeNotAvail, UnavailableNodes:n1", "down, drained or reserved"),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs", "down or drained"),
    ],
)
def test_pending_reasons_are_explained(run: RunFolder, fake_slurm: FakeSlurm, reason: str, plain: str) -> None:
    """Slurm's own word stays beside one plain sentence."""
    fake_slurm.say("squeue", f"42|PENDING||N/A|{reason}\n")
    now = status.run_status(run)
    assert (now.state, now.reason, now.ended) == ("PENDING", reason, False)
    assert plain in now.sentence


def test_an_unknown_reason_is_shown_as_it_is(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Nothing is made up about a word we do not know."""
    fake_slurm.say("squeue", "42|PENDING||N/A|SomethingNew\n")
    assert (status.run_status(run).reason, status.run_status(run).sentence) == ("SomethingNew", "waits in the queue")


def test_a_running_job_before_its_first_word(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Between Slurm's start and the first heartbeat the ranks import their libraries."""
    fake_slurm.say("squeue", "42|RUNNING|node[1-2]|2026-01-01T00:00:00|None\n")
    now = status.run_status(run)
    assert (now.state, now.nodes, now.reason) == ("RUNNING", "node[1-2]", None)
    assert "starting" in now.sentence


def test_a_silent_run_is_pointed_out(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """A heartbeat that stopped long ago is told, although Slurm still says RUNNING."""
    fake_slurm.say("squeue", "42|RUNNING|node1|N/A|None\n")
    write_json(run.heartbeat, {"time_s": time.time() - 1800, "job_id": "42", "state": "training", "step": 3})
    assert "no sign of life for 30 min" in status.run_status(run).sentence


def test_the_result_beats_everything(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """With result.json Slurm is not even asked."""
    write_result(run)
    assert (status.run_status(run).state, status.run_status(run).step) == ("COMPLETED", 4)
    assert fake_slurm.calls("squeue") == []


@pytest.mark.parametrize("word", ["COMPLETED", "COMPLETED+"])
def test_completed_without_result_is_a_failure(run: RunFolder, fake_slurm: FakeSlurm, word: str) -> None:
    """Slurm calls half-trained runs COMPLETED."""
    fake_slurm.say("squeue", f"42|{word}|node1|N/A|None\n")
    now = status.run_status(run)
    assert (now.state, now.ended) == ("FAILED", True)
    assert "without result.json" in now.sentence


def test_a_run_that_was_told_to_stop_is_not_a_failure_of_training(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """It saved and left: STOPPED, with the step that can be gone on from."""
    run.record("started", job_id="42", attempt="0")
    run.record("stopped", job_id="42", attempt="0", reason="SIGUSR2", step=30)
    run.checkpoint(30).mkdir()
    fake_slurm.say("squeue", "42|COMPLETED|node1|N/A|None\n")
    now = status.run_status(run)
    assert now.state == "STOPPED"
    assert now.sentence == "was told to stop (SIGUSR2), saved and left; a checkpoint of step 30 is there"


@pytest.mark.parametrize("word", ["NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "PREEMPTED", "BOOT_FAIL"])
def test_slurms_own_words_are_kept(run: RunFolder, fake_slurm: FakeSlurm, word: str) -> None:
    """A time-out is not folded into FAILED."""
    fake_slurm.say("squeue", f"42|{word}|node1|N/A|{word}\n")
    assert (status.run_status(run).state, status.run_status(run).ended) == (word, True)


def test_the_first_failing_rank_of_the_last_attempt_is_shown(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Its peers fail a moment later with less telling words."""
    run.record("started", job_id="42", attempt="0")
    run.record("failed", rank=2, error="old story")
    run.record("started", job_id="42", attempt="1")
    run.record("failed", rank=1, error="DataError: chats.jsonl:7: not JSON\nsecond line")
    run.record("failed", rank=0, error="connection reset by peer")
    fake_slurm.say("squeue", "42|FAILED|node1|N/A|NonZeroExitCode\n")
    assert "failed: rank 1: DataError: chats.jsonl:7: not JSON;" in status.run_status(run).sentence
    assert status.run_status(run).restarts == 1


def test_a_job_that_left_the_queue_is_asked_of_accounting(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """squeue forgets after minutes; sacct's "CANCELLED by 2000" is CANCELLED."""
    fake_slurm.say("squeue", stderr="slurm_load_jobs error: Invalid job id specified", status=1)
    fake_slurm.say("sacct", "42|CANCELLED by 2000|0:15|node1\n")
    assert status.run_status(run).state == "CANCELLED"


def test_without_accounting_the_controller_is_asked(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """sacct prints that it is disabled; scontrol may still know."""
    fake_slurm.say("sacct", stderr=DISABLED, status=1)
    fake_slurm.say("scontrol", "JobId=42 JobName=x UserId=u(2000) JobState=FAILED Reason=NonZeroExitCode Restarts=2 "
                   "ExitCode=3:0 NodeList=node1\n")  # fmt: skip
    now = slurm.find_jobs(["42"])["42"]
    assert (now.state, now.exit_code, now.restarts, now.nodes) == ("FAILED", "3:0", 2, "node1")
    assert status.run_status(run).state == "FAILED"


@pytest.mark.parametrize("gone", [{"stderr": "slurm_load_jobs error: Invalid job id specified", "status": 1}, {}])
def test_with_its_database_down_slurm_is_still_believed(run: RunFolder, fake_slurm: FakeSlurm, gone: dict) -> None:
    """A job that left the queue (squeue says so in two ways), accounting that fails: the controller's memory tells."""
    fake_slurm.say("squeue", **gone)
    fake_slurm.say("sacct", stderr="sacct: error: Problem talking to the database: Connection refused", status=1)
    fake_slurm.say("scontrol", "JobId=42 JobName=x JobState=TIMEOUT Reason=TimeLimit ExitCode=0:15 NodeList=node1\n")
    now = status.run_status(run)
    assert (now.state, now.ended) == ("TIMEOUT", True)
    fake_slurm.say("scontrol", stderr="slurm_load_jobs error: Invalid job id specified", status=1)
    assert status.run_status(run).state == "UNKNOWN"


def test_newer_sacct_fields_are_asked_and_done_without(fake_slurm: FakeSlurm) -> None:
    """`Restarts` is younger than the oldest Slurm we work with."""
    fake_slurm.say("sacct", stderr='sacct: error: Invalid field requested: "Restarts"', status=1)
    slurm.find_jobs(["42"])
    asked = [next(word for word in call if word.startswith("--format=")) for call in fake_slurm.calls("sacct")]
    assert asked == ["--format=JobIDRaw,State,ExitCode,NodeList,Restarts", "--format=JobIDRaw,State,ExitCode,NodeList"]


def test_a_forgotten_job_is_not_called_failed_at_once(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Accounting may lag behind by minutes: unknown first, failed only after ten minutes of silence."""
    fake_slurm.say("scontrol", stderr="slurm_load_jobs error: Invalid job id specified", status=1)
    assert status.run_status(run).state == "UNKNOWN"
    age(run, 3600)
    assert status.run_status(run).state == "FAILED"


def test_an_unreachable_controller_is_a_state_not_an_error(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """`status` still shows what the run folder says."""
    fake_slurm.say("squeue", stderr=DOWN, status=1)
    write_json(run.heartbeat, {"time_s": time.time(), "job_id": "42", "state": "training", "step": 3})
    now = status.run_status(run)
    assert (now.state, now.step, now.ended) == ("UNKNOWN", 3, False)
    assert DOWN in now.sentence


@pytest.mark.parametrize(
    "line", ["", "garbage", "42", "|||||||", "42|RUNNING", "x|RUNNING|n|N/A|r", "42_[1-3]|PENDING||N/A|r"]
)
def test_garbage_from_slurm_is_not_believed(fake_slurm: FakeSlurm, line: str) -> None:
    """Other people's job names and new formats must not turn into states."""
    fake_slurm.say("squeue", line + "\n")
    fake_slurm.say("sacct", line + "\n")
    fake_slurm.say("scontrol", line + "\n")
    assert slurm.find_jobs(["42"]) == {}


def test_only_numbers_are_asked_of_slurm(fake_slurm: FakeSlurm) -> None:
    """A job id from a file that is not a job id never becomes an argument."""
    assert slurm.find_jobs(["--help", "1;id", "local-7"]) == {}
    assert fake_slurm.calls("squeue") == []


# ---------------------------------------------------------------- many runs


def test_many_runs_cost_one_question(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    """`status` without a name asks squeue once, however many runs there are, and lists the newest first."""
    runs = [make_run(tmp_path / "runs", f"run{n}") for n in range(5)]
    for number, one in enumerate(runs):
        note_job(one, str(100 + number))
    fake_slurm.say("squeue", "".join(f"{100 + n}|PENDING||N/A|Priority\n" for n in range(5)))
    states = status.list_runs(tmp_path / "runs")
    assert [one.job_id for one in states] == ["104", "103", "102", "101", "100"]
    assert len(fake_slurm.calls("squeue")) == 1


def test_no_runs_is_an_empty_list(tmp_path: Path, no_slurm: Path) -> None:
    """A folder that is not there holds no runs."""
    assert status.list_runs(tmp_path / "nothing") == []


def test_a_run_is_found_by_name_beginning_or_path(tmp_path: Path) -> None:
    """The five random letters need not be typed while the beginning is unique."""
    one, other = make_run(tmp_path, "alpha"), make_run(tmp_path, "beta")
    assert status.find_run(one.run_id, tmp_path) == one
    assert status.find_run("bet", tmp_path) == other
    assert status.find_run(str(other.path)) == other


@pytest.mark.parametrize(
    ("name", "message"), [("tiny", "is the beginning of 2 runs"), ("tinny-", "did you mean tiny-")]
)
def test_a_run_that_is_not_meant_clearly_is_refused(tmp_path: Path, name: str, message: str) -> None:
    """Ambiguous and misspelt names are answered with what is there."""
    make_run(tmp_path, "tiny")
    make_run(tmp_path, "tiny")
    with pytest.raises(RecipeError, match=message):
        status.find_run(name, tmp_path)


# ---------------------------------------------------------------- waiting, ending, reading


def test_wait_returns_on_success(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """The result is all that counts."""
    write_result(run)
    assert status.wait(run).state == "COMPLETED"


def test_wait_gives_a_late_result_file_time(
    run: RunFolder, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a shared file system result.json may be seen after Slurm's COMPLETED: one look is not enough."""
    fake_slurm.say("squeue", "42|COMPLETED|node1|N/A|None\n")
    looks = iter([None, None, write_result])
    real = status.run_status

    def look(folder: RunFolder) -> status.RunStatus:
        late = next(looks)
        if late is not None:
            late(folder)
        return real(folder)

    monkeypatch.setattr(status, "run_status", look)
    assert status.wait(run, poll_s=0.05).state == "COMPLETED"


def test_wait_raises_when_the_job_failed(
    run: RunFolder, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 8, with the sentence and the log to look at."""
    monkeypatch.setattr(status, "_RESULT_MAY_LAG_S", 0.1)
    fake_slurm.say("squeue", "42|TIMEOUT|node1|N/A|TimeLimit\n")
    with pytest.raises(JobFailedError) as caught:
        status.wait(run, poll_s=0.05)
    assert "time limit" in caught.value.problems[0]
    assert str(run.log("42", 0)) in caught.value.problems[1]


def test_wait_goes_on_while_the_controller_is_down(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Not reaching Slurm says nothing about the job."""
    fake_slurm.say("squeue", stderr=DOWN, status=1)
    with pytest.raises(TemporaryError, match="has not ended"):
        status.wait(run, poll_s=0.05, timeout_s=0.2)


def test_cancel_asks_slurm_once(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """While Slurm is still cleaning up, a second cancel says so and sends nothing."""
    fake_slurm.say("squeue", "42|RUNNING|node1|N/A|None\n")
    assert "cancelled" in status.cancel(run)
    assert "being cancelled already" in status.cancel(run)
    assert status.run_status(run).sentence == "is being cancelled"
    assert fake_slurm.calls("scancel") == [["42"]]


def test_cancel_of_an_arrays_task_leaves_the_others(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """One task of every array has the array's own number, which Slurm's commands would take for all of it."""
    run.record("submitted", job_id="60_2", cluster="slurm", purpose="trial")
    run.record("started", job_id="60", attempt="60.0")
    fake_slurm.say("squeue", "60_2|RUNNING|node1|N/A|None\n")
    assert "job 60_2" in status.cancel(run)
    assert fake_slurm.calls("scancel") == [["60_2"]]
    assert status.read_evidence(run).cancelled


def test_a_cancelled_job_is_cancelled_even_when_slurm_forgets(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """The ledger remembers who ended it."""
    fake_slurm.say("squeue", "42|PENDING||N/A|Priority\n")
    status.cancel(run)
    fake_slurm.say("squeue")
    fake_slurm.say("scontrol", status=1)
    assert status.run_status(run).state == "CANCELLED"


def test_cancel_of_somebody_elses_job_is_explained(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Slurm's "Access/permission denied" in plain words; the ledger claims nothing."""
    fake_slurm.say("squeue", "42|RUNNING|node1|N/A|None\n")
    fake_slurm.say("scancel", stderr="scancel: error: Kill job error on job id 42: Access/permission denied", status=1)
    with pytest.raises(ClusterError, match="belongs to another user"):
        status.cancel(run)
    assert status.run_status(run).sentence != "is being cancelled"


def test_cancel_needs_the_controller(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Exit 75 when Slurm does not answer."""
    fake_slurm.say("squeue", stderr=DOWN, status=1)
    fake_slurm.say("scancel", stderr="scancel: error: Unable to contact slurm controller (connect failure)", status=1)
    with pytest.raises(TemporaryError):
        status.cancel(run)


def test_cancel_ends_every_job_of_the_run(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """A follow-up waits while the job before it still ends: neither may train on."""
    run.record("submitted", job_id="43", purpose="follow_up")
    lines = "43|PENDING||N/A|Dependency\n" + "".join(
        f"{run.run_id}|{job}|{state}|node1|N/A|None\n"
        for job, state in (("41", "FAILED"), ("42", "RUNNING"), ("43", "PENDING"))
    )
    fake_slurm.say("squeue", lines)
    assert "job 43, 42" in status.cancel(run)
    assert fake_slurm.calls("scancel") == [["43"], ["42"]]


def test_a_cancelled_job_that_was_put_back_by_hand_runs(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """`scontrol requeue` after a cancel is somebody's wish; the old cancel does not describe the new start."""
    run.record("started", job_id="42", attempt="42.0")
    run.record("cancelled", job_id="42")
    assert status.read_evidence(run).cancelled
    run.record("started", job_id="42", attempt="42.1")
    assert not status.read_evidence(run).cancelled


def test_cancel_before_submission_does_nothing(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    """A run folder of --print-sbatch has no job yet."""
    assert "never submitted" in status.cancel(make_run(tmp_path))
    assert fake_slurm.calls("scancel") == []


def test_logs_of_all_jobs_come_in_order(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """A run that was started again shows both jobs, one rank only."""
    run.log("42", 0).write_text("first\n")
    run.log("42", 1).write_text("another rank\n")
    run.log("43", 0).write_text("second\nlast without end")
    assert list(status.follow_logs(run)) == ["first", "second", "last without end"]


def test_what_a_run_warns_of_is_shown(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """From the heartbeat while it runs, from the result afterwards; other shapes are passed over."""
    fake_slurm.say("squeue", "42|RUNNING|node1|N/A|None\n")
    warning = {"code": "retention", "message": "the base is being forgotten"}
    write_json(run.heartbeat, {"time_s": time.time(), "job_id": "42", "state": "training", "warnings": [warning, 3]})
    now = status.run_status(run)
    assert now.warnings == ("the base is being forgotten",)
    for one in (True, False):
        text = io.StringIO()
        print_status([now], one=one, console=Console(file=text, width=400))
        assert "the base is being forgotten" in text.getvalue()
    write_json(run.result, {"step": 4, "warnings": []})
    assert status.run_status(run).warnings == ()


def test_a_missing_log_is_explained(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """A job that waits has written nothing; the message says that it waits."""
    fake_slurm.say("squeue", "42|PENDING||N/A|Priority\n")
    with pytest.raises(RecipeError, match=r"no log of rank 0 .* waits in the queue"):
        list(status.follow_logs(run))


# ---------------------------------------------------------------- for people


def test_the_table_and_the_block_show_the_run(run: RunFolder, fake_slurm: FakeSlurm) -> None:
    """Name, state, step and the plain sentence are there; brackets in Slurm's words are not markup."""
    fake_slurm.say("squeue", "42|RUNNING|node[1-2]|N/A|None\n")
    write_json(run.heartbeat, {"time_s": time.time(), "job_id": "42", "state": "training", "step": 3, "total_steps": 9})
    now = status.run_status(run)
    for one in (True, False):
        text = io.StringIO()
        print_status([now], one=one, console=Console(file=text, width=200))
        assert all(word in text.getvalue() for word in (run.run_id, "RUNNING", "3/9", "training, step 3 of 9"))
    assert now.to_json()["schema"] == 1 and now.to_json()["nodes"] == "node[1-2]"


@pytest.mark.parametrize("width", [80, 110, 160, 4000])
def test_long_words_leave_the_numbers_whole(run: RunFolder, fake_slurm: FakeSlurm, width: int) -> None:
    """On any terminal: a warning of three lines is no reason to cut a name; where it has no room it follows."""
    warning = "the loss rose " + "and rose " * 30 + "past its limit: lower the learning rate"
    write_json(run.heartbeat, {"time_s": time.time(), "step": 120, "total_steps": 120})
    write_json(run.result, {"step": 120, "warnings": [{"message": warning}]})
    now, text = status.run_status(run), io.StringIO()
    print_status([now, now], one=False, console=Console(file=text, width=width))
    first = text.getvalue().splitlines()[1]
    assert first.startswith(run.run_id) and now.state in first and "120/120" in first
    shown = " ".join(text.getvalue().split())
    assert shown.count("past") == 2 and "learning rate" not in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (45, "45s"), (720, "12m"), (11_100, "3h05m"), (187_200, "2d04h")]
)
def test_durations_are_short(seconds: float | None, text: str) -> None:
    """Columns stay narrow."""
    assert duration(seconds) == text


def test_reasons_of_running_jobs_say_nothing_new() -> None:
    """A reason is explained where it explains something."""
    assert reason_words("RUNNING", "None", "42") is None
    assert reason_words("FAILED", "OutOfMemory", "42") == "it needs more host memory: set slurm.mem"
