"""What ended an attempt: the origin and not its symptoms, from reports, logs, the ledger and Slurm's word."""

from __future__ import annotations

import json
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click import Context
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.cli import main
from launcher.runs.changes import Change
from launcher.runs.diagnosis import Cause, Diagnosis, diagnose
from launcher.runs.folder import write_json
from launcher.runs.remedies import command_for
from launcher.runs.state import read_evidence
from launcher.runs.view import JobView, parse_job
from tests.unit.runs.material import make_run, write_result
from tests.unit.runs.story import Story

RESET = "RuntimeError", "[enforce fail at tcp/pair.cc:547] read: Connection reset by peer"


@pytest.fixture
def story(tmp_path: Path) -> Story:
    """A run whose job is number 5, with four ranks on two nodes."""
    return Story(make_run(tmp_path))


def diagnosed(story: Story, **facts: Any) -> Diagnosis:
    """The diagnosis of the attempt that was told last."""
    return diagnose(read_evidence(story.run), attempt=story.attempt, **facts)


def view(**facts: Any) -> JobView:
    """What the controller says of job 5."""
    return JobView(**({"job_id": "5", "state": "RUNNING", "restarts": 0} | facts))


# ---------------------------------------------------------------- reports of ranks


@pytest.mark.parametrize(
    ("kind", "message", "cause"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB", Cause.GPU_OUT_OF_MEMORY),
        ("RuntimeError", "CUDA error: out of memory", Cause.GPU_OUT_OF_MEMORY),
        ("RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory: you", Cause.HOST_OUT_OF_MEMORY),
        ("OSError", "[Errno 28] No space left on device: 'step-000010'", Cause.DISK_FULL),
        ("JobFailedError", "could not write x\nrank 1: [Errno 122] Disk quota exceeded", Cause.DISK_FULL),
        ("RuntimeError", "PytorchStreamWriter failed writing file data/3: file write failed", Cause.DISK_FULL),
        ("JobFailedError", "the loss became nan; step 12. Checkpoints so far hold finite values", Cause.NAN_LOSS),
        ("JobFailedError", "/r/checkpoints holds 2 checkpoints and none is whole; move", Cause.DAMAGED_CHECKPOINTS),
        ("DataError", "chats.jsonl:65: CUDA out of memory is what the user wrote", Cause.DATA_ERROR),
        ("ModelError", "config.json is missing", Cause.MODEL_ERROR),
        ("RecipeError", "unknown key", Cause.RECIPE_ERROR),
        ("FencedError", "attempt 6.0 has begun", Cause.SUPERSEDED),
        ("RuntimeError", "CUDA error: uncorrectable ECC error encountered", Cause.BAD_NODE),
        ("ClusterError", "local rank 1 on node2 sees 1 GPUs (CUDA_VISIBLE_DEVICES=0)", Cause.BAD_NODE),
        ("ClusterError", "ranks 3 of 4 did not come within 900 s; present: 0 on node1", Cause.RENDEZVOUS),
        ("KeyError", "'lora_A'", Cause.OUR_BUG),
        ("SIGSEGV", "was ended by SIGSEGV", Cause.CRASHED),
        ("Vanished", "rank 1 exited with 0 before its work was done", Cause.RANK_EXITED),
        ("Hung", "no sign of life for 600 s", Cause.HUNG),
    ],
)
def test_an_error_by_its_words(story: Story, kind: str, message: str, cause: Cause) -> None:
    """Class and words of a rank's own report name the cause, with rank, host and the file that says so."""
    name = {"signal": signal.SIGSEGV} if kind == "SIGSEGV" else {}
    story.starts().reports(1, kind, message, **name)
    found = diagnosed(story, exit_code=1, slurm=view())
    assert found.cause == cause
    assert (found.rank, found.host) == (1, "node1")
    assert found.where == str(story.run.error("5.0", 1))


def test_the_dead_rank_is_the_cause_not_those_that_lost_it(story: Story) -> None:
    """Three peers report a connection reset first; the killed rank's supervisor says what happened."""
    story.starts()
    for rank in (0, 1, 3):
        story.reports(rank, *RESET)
    story.reports(2, "SIGKILL", "rank 2 on node2 was ended by SIGKILL", signal=9)
    found = diagnosed(story, exit_code=137, slurm=view())
    assert found.cause is Cause.RANK_KILLED
    assert (
        found.sentence == "rank 2 on node2 was killed from outside (training, after step 25): it was ended by SIGKILL"
    )
    assert found.command == f"launcher resume {story.run.run_id}"


def test_the_hung_rank_is_the_cause_not_the_time_outs(story: Story) -> None:
    """The supervisors' verdict goes before everything that the ranks say."""
    story.starts().reports(0, "DistBackendError", "Watchdog caught collective operation timeout")
    story.reports(3, "SIGKILL", signal=9).hangs(1, "its process is stopped (state T)")
    found = diagnosed(story, exit_code=94, slurm=view())
    assert found.cause is Cause.HUNG
    assert found.sentence == "rank 1 on node1 hung: its process is stopped (state T)"


def test_the_first_of_several_errors_counts(story: Story) -> None:
    """An error that spreads is told as it began."""
    story.starts().reports(3, "OutOfMemoryError", "CUDA out of memory").reports(0, "KeyError", "'x'")
    assert diagnosed(story, exit_code=1).rank == 3


def test_a_rank_that_left_without_a_word_is_found_by_its_silence(story: Story) -> None:
    """Every rank but one reports a lost connection: the one that says nothing is named."""
    story.starts()
    for rank in (0, 1, 2):
        story.reports(rank, *RESET)
    found = diagnosed(story, exit_code=1, slurm=view())
    assert (found.cause, found.rank) == (Cause.RANK_EXITED, 3)


def test_only_symptoms(story: Story) -> None:
    """Where all ranks lost each other nobody is blamed."""
    story.starts()
    for rank in range(4):
        story.reports(rank, *RESET)
    assert diagnosed(story, exit_code=1).cause is Cause.PEER_LOST


# ---------------------------------------------------------------- Slurm's word

PREEMPTING = view(preempted=True, end_s=time.time() + 5)
LIMIT_NEAR = view(end_s=time.time() + 50)
LIMIT_FAR = view(end_s=time.time() + 5000)


@pytest.mark.parametrize(
    ("slurm", "cause"),
    [
        (PREEMPTING, Cause.PREEMPTED),
        (LIMIT_NEAR, Cause.TIME_LIMIT),
        (LIMIT_FAR, Cause.STOPPED),
        (None, Cause.STOPPED),
        (view(state="COMPLETING", restarts=1), Cause.OPERATOR_REQUEUE),
        (view(state="COMPLETING"), Cause.CANCELLED),
        (view(state="COMPLETING", reason="TimeLimit"), Cause.TIME_LIMIT),
    ],
)
def test_why_the_ranks_were_told_to_stop_is_slurms_to_say(story: Story, slurm: JobView | None, cause: Cause) -> None:
    """The same signal, the same agreed stop: only Slurm's answer tells preemption, limit, requeue and cancel apart."""
    story.starts().stops(12)
    found = diagnosed(story, exit_code=0, slurm=slurm)
    assert found.cause == cause
    assert "saved after step 12" in found.sentence


def test_a_killed_rank_under_preemption_is_preemption(story: Story) -> None:
    """At the end of the grace time Slurm kills the ranks; that is not a rank's death."""
    story.starts().reports(0, "SIGKILL", signal=9)
    assert diagnosed(story, exit_code=137, slurm=PREEMPTING).cause is Cause.PREEMPTED


def test_an_error_before_the_preemption_stays_the_cause(story: Story) -> None:
    """A data error does not become retryable because Slurm preempts the job in the same minute."""
    story.starts().reports(0, "DataError", "chats.jsonl:65: not JSON")
    assert diagnosed(story, exit_code=3, slurm=PREEMPTING).cause is Cause.DATA_ERROR


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (
            "slurmstepd-node1: error: *** JOB 5 ON node1 CANCELLED AT 2026-11-22T20:51:34 DUE TO PREEMPTION ***",
            "preempted",
        ),
        ("slurmstepd: error: *** JOB 5 ON node1 CANCELLED AT 2026-11-22T20:54:14 DUE TO TIME LIMIT ***", "time_limit"),
        (
            "slurmstepd: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-22T20:52:15 DUE TO JOB REQUEUE ***",
            "operator_requeue",
        ),
        ("slurmstepd: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-22T20:52:15 DUE TO NODE FAILURE ***", "node_lost"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=5.0. Some of the", "host_out_of_memory"),
        ("srun: error: Node failure on node2", "node_lost"),
        ("srun: error: node2: task 3: Segmentation fault (core dumped)", "crashed"),
        ("srun: error: node2: task 3: Killed", "rank_killed"),
        ("srun: error: node2: tasks 2-3: Exited with exit code 94", "hung"),
    ],
)
def test_slurms_own_lines_in_the_log(story: Story, line: str, cause: str) -> None:
    """Where no report and no answer of Slurm is left, its words in rank 0's log tell; the line is the evidence."""
    story.starts().logs("step 24/60  loss 2.31", line)
    found = diagnosed(story, exit_code=1)
    assert (found.cause, found.evidence) == (cause, line)
    assert found.where == str(story.run.log("5", 0))


def test_lines_of_an_earlier_start_do_not_count(story: Story) -> None:
    """All starts of a job share one log; the mark of the batch script parts them."""
    story.logs("launcher: attempt 5.0").starts()
    story.logs("slurmstepd: error: *** JOB 5 ON node1 CANCELLED AT 2026-11-22T20:51:34 DUE TO PREEMPTION ***")
    story.again().starts().reports(0, "SIGKILL", signal=9)
    assert diagnosed(story, exit_code=137, slurm=view(restarts=1)).cause is Cause.RANK_KILLED
    assert diagnose(read_evidence(story.run), attempt="5.0").cause is Cause.PREEMPTED


def test_a_text_that_trains_on_slurms_words_is_not_believed(story: Story) -> None:
    """Only lines that begin as Slurm's do count: the model may print anything."""
    story.starts().logs("sample: slurmstepd: error: *** JOB 5 ON n CANCELLED AT x DUE TO PREEMPTION ***")
    assert diagnosed(story, exit_code=1).cause is Cause.UNKNOWN


def test_killed_for_memory_by_the_node(story: Story) -> None:
    """Signal 9 and the kernel's out-of-memory killer together are one cause, with the rank."""
    story.starts().reports(2, "SIGKILL", signal=9)
    story.logs("slurmstepd: error: Detected 1 oom_kill event in StepId=5.0.")
    found = diagnosed(story, exit_code=137)
    assert (found.cause, found.rank) == (Cause.HOST_OUT_OF_MEMORY, 2)
    assert found.command == f"launcher resume {story.run.run_id} slurm.mem=8G"


# ---------------------------------------------------------------- ends of other kinds


def test_a_result_is_the_last_word(story: Story) -> None:
    """A library that crashes on the way out does not undo a verified result."""
    story.starts().reports(0, "SIGSEGV", signal=11)
    write_result(story.run)
    assert diagnosed(story, exit_code=139).cause is Cause.FINISHED


def test_cancelled_through_the_launcher(story: Story) -> None:
    """The ledger knows a cancel before Slurm does."""
    story.starts().tell("cancelled", job_id="5").stops(3, "SIGTERM")
    assert diagnosed(story, exit_code=0, slurm=view()).cause is Cause.CANCELLED


def test_ranks_that_never_began(story: Story) -> None:
    """srun failed before any rank could speak: the last line of the log is the evidence."""
    story.logs("srun: error: Unable to create step for job 5: Job/step already completing or completed")
    found = diagnosed(story, exit_code=1)
    assert found.cause is Cause.LAUNCH_FAILED
    assert "Unable to create step" in str(found.evidence)


def test_exit_codes_of_a_local_job(tmp_path: Path) -> None:
    """Where ranks could write nothing, the controller's codes tell which one failed first."""
    story = Story(make_run(tmp_path), cluster="local").starts()
    story.tell("ended", job_id="5", exit_codes=[-9, 3])
    found = diagnosed(story)
    assert (found.cause, found.rank) == (Cause.DATA_ERROR, 1)


def test_gpu_memory_is_answered_with_the_next_smaller_micro_batch(story: Story) -> None:
    """The command names the very value, with the same global batch."""
    plan = json.loads(story.run.plan.read_text())
    plan["chosen"] |= {"micro_batch": 6, "gradient_accumulation": 2}
    write_json(story.run.plan, plan)
    story.starts().reports(0, "OutOfMemoryError", "CUDA out of memory")
    assert str(diagnosed(story).command).endswith("train.per_device_train_batch_size=3")


@pytest.mark.parametrize("cause", sorted(Cause))
def test_every_command_can_be_typed(story: Story, cause: Cause) -> None:
    """A command is a real verb of ours or of the shell, and `resume` is asked for nothing that it refuses."""
    command = command_for(cause, read_evidence(story.run), rank=1)
    words = shlex.split(str(command))
    assert words[0] == "mv" or (words[0] == "launcher" and words[1] in main.list_commands(Context(main)))
    overrides = [word.split("=")[0] for word in words if "=" in word]
    if words[1] == "resume":
        assert all(Change(key=key, saved=1, asked=2).allowed for key in overrides)


def test_scontrols_line_is_read_with_the_first_name_of_two() -> None:
    """A comment cannot pretend to be a state: Slurm writes it last."""
    line = "JobId=5 JobName=x JobState=RUNNING Reason=None Requeue=1 Restarts=2 PreemptTime=None EndTime=Unknown"
    found = parse_job(f"{line} Comment=JobState=CANCELLED Restarts=9 Requeue=0\n")
    assert found == JobView(job_id="5", state="RUNNING", requeue=True, restarts=2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["type", "message", "rank", "host", "signal", "exit_code", "time_s", "phase", "step", "stack"]


@given(
    report=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=8),
    event=st.dictionaries(st.sampled_from(["event", "attempt", "job_id", "step", "exit_codes", "reason"]), JSON),
    code=st.none() | st.integers(0, 255),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_dying_process_writes_there_is_a_diagnosis(
    tmp_path_factory: pytest.TempPathFactory, report: dict[str, Any], event: dict[str, Any], code: int | None
) -> None:
    """Nothing in the reports or the ledger makes the diagnosis itself fail."""
    story = Story(make_run(tmp_path_factory.mktemp("any")))
    story.starts().tell(**({"event": "stopped"} | event))
    path = story.run.error(story.attempt, 1)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report))
    assert diagnosed(story, exit_code=code).sentence
