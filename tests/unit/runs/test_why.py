"""`launcher why`: one sentence, the line that shows it and one command, for every state a run can be in."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.report.why import print_explanation
from launcher.runs.explanation import Explanation, explain
from launcher.runs.folder import append_json_line, write_json
from tests.unit.runs.material import FakeSlurm, make_run, write_result
from tests.unit.runs.story import Story


@pytest.fixture
def story(tmp_path: Path, fake_slurm: FakeSlurm) -> Story:
    """Job 5 of a run, and a Slurm that knows nothing."""
    return Story(make_run(tmp_path / "runs"))


def queue(slurm: FakeSlurm, state: str, reason: str = "None") -> None:
    """What squeue says of job 5."""
    slurm.say("squeue", f"5|{state}|node1|N/A|{reason}\n")


def decided(story: Story, cause: str, action: str, **facts: Any) -> Story:
    """The aftermath's line about the attempt that was told last."""
    line = {"cause": cause, "action": action, "reason": "r", "changes": {}, "sentence": "rank 1 on node1 hung: stuck",
            "evidence": "stuck", "where": "/errors/hung.json", "rank": 1, "culprit": "node1", "step": 10}  # fmt: skip
    return story.tell("decided", attempt=story.attempt, job_id=story.job_id, **(line | facts))


def why(story: Story) -> Explanation:
    """The explanation of the run now."""
    return explain(story.run)


def test_what_was_decided_is_told_again(story: Story, fake_slurm: FakeSlurm) -> None:
    """The line of the ledger is the diagnosis: sentence, evidence with its file, rank, host, and a command."""
    queue(fake_slurm, "FAILED", "NonZeroExitCode")
    decided(story.starts(), "hung", "stop", reason="crash loop: 3 attempts in a row")
    found = why(story)
    assert (found.state, found.cause, found.rank, found.host) == ("FAILED", "hung", 1, "node1")
    assert (found.sentence, found.evidence, found.where) == (
        "rank 1 on node1 hung: stuck",
        "stuck",
        "/errors/hung.json",
    )
    assert found.command == f"launcher resume {story.run.run_id}"
    assert found.decision == "stop: crash loop: 3 attempts in a row"


PROBLEMS = "rows.jsonl:3: 'messages' is an empty list\nrows.jsonl:9: role 'bot' is unknown\n\nrows.jsonl:12: no answer"


@pytest.mark.parametrize("told", ["report", "ledger", "decided"])
def test_every_line_of_an_error_is_shown(told: str, story: Story, fake_slurm: FakeSlurm) -> None:
    """All problems of a stage are raised at once, so all are shown: from the report, or what the ledger has of it."""
    queue(fake_slurm, "FAILED", "NonZeroExitCode")
    story.starts()
    if told == "ledger":
        facts = {"job_id": "5", "attempt": story.attempt, "rank": 1}
        story.tell("failed", error=f"DataError: {PROBLEMS}", **facts)
    else:
        story.reports(1, "DataError", PROBLEMS)
    if told == "decided":
        where = str(story.run.error(story.attempt, 1))
        decided(story, "data", "stop", evidence="DataError: rows.jsonl:3: 'messages' is an empty list", where=where)
    found = why(story)
    assert found.evidence == "DataError: rows.jsonl:3: 'messages' is an empty list"
    assert [line.split(": ", 1)[-1] for line in found.message[1:]] == ["role 'bot' is unknown", "no answer"]
    printed: list[str] = []
    print_explanation(found, printed.append)
    assert sum("rows.jsonl:" in line for line in printed[1:]) == 3
    assert json.loads(json.dumps(found.to_json()))["message"] == list(found.message)


def test_an_error_of_one_line_is_said_once(story: Story, fake_slurm: FakeSlurm) -> None:
    """And a report that is no longer there, or is none, is no error of its own."""
    queue(fake_slurm, "FAILED", "NonZeroExitCode")
    story.starts().reports(1, "DataError", "rows.jsonl:3: no answer")
    assert why(story).message == ()
    story.run.error(story.attempt, 1).write_text("[1, 2]")
    assert why(story).message == ()


def test_an_end_that_nobody_decided_about_is_diagnosed_now(story: Story, fake_slurm: FakeSlurm) -> None:
    """The job was killed before its last words: Slurm's state and the log tell."""
    queue(fake_slurm, "TIMEOUT", "TimeLimit")
    line = "slurmstepd: error: *** JOB 5 ON node1 CANCELLED AT 2026-11-22T20:54:14 DUE TO TIME LIMIT ***"
    story.starts().logs(line)
    found = why(story)
    assert (found.cause, found.evidence, found.where) == ("time_limit", line, str(story.run.log("5", 0)))
    assert "time limit" in found.sentence


def test_finished(story: Story) -> None:
    """A finished run needs nothing."""
    write_result(story.starts().run)
    found = why(story)
    assert (found.state, found.cause) == ("COMPLETED", "finished")


@pytest.mark.parametrize(
    ("reason", "words", "command"),
    [
        ("Resources", "the nodes it needs are still busy", "launcher status"),
        ("QOSMaxWallDurationPerJobLimit", "will never start", "launcher cancel"),
        ("PartitionConfig", "can never give what it asks for", "launcher cancel"),
        ("JobHeldUser", "scontrol release 5", "scontrol release 5"),
    ],
)
def test_pending(story: Story, fake_slurm: FakeSlurm, reason: str, words: str, command: str) -> None:
    """Slurm's reason in plain words with the word itself; what would wait for ever is to be cancelled."""
    queue(fake_slurm, "PENDING", reason)
    found = why(story)
    assert words in found.sentence
    assert found.evidence == f"PENDING ({reason})"
    assert str(found.command).startswith(command)
    assert found.cause is None


def test_pending_again_tells_what_came_before(story: Story, fake_slurm: FakeSlurm) -> None:
    """A requeued job waits for a reason of its own, and there is a reason why it was requeued."""
    queue(fake_slurm, "PENDING", "BeginTime")
    decided(story.starts(), "preempted", "wait", sentence="was preempted", reason="Slurm puts it back")
    assert why(story).decision == "wait: was preempted; Slurm puts it back"


def test_held_after_a_requeue(story: Story, fake_slurm: FakeSlurm) -> None:
    """`requeuehold` and failed launches leave a job that waits for a person."""
    queue(fake_slurm, "REQUEUE_HOLD", "JobHeldUser")
    decided(story.starts(), "operator_requeue", "wait")
    assert why(story).command == "scontrol release 5"


def test_cancelled_while_it_waited_for_its_next_start(story: Story, fake_slurm: FakeSlurm) -> None:
    """What ended the attempt before is not what ended the run."""
    queue(fake_slurm, "CANCELLED")
    decided(story.starts(), "preempted", "wait")
    found = why(story)
    assert (found.state, found.cause) == ("CANCELLED", "cancelled")


def test_cancelled_before_it_started(story: Story, fake_slurm: FakeSlurm) -> None:
    """There is no log to look at, and none is asked for."""
    queue(fake_slurm, "CANCELLED")
    found = why(story)
    assert (found.cause, found.sentence) == ("cancelled", "was cancelled before it started")


def test_running(story: Story, fake_slurm: FakeSlurm) -> None:
    """Nothing odd: what it does, and the log to follow."""
    queue(fake_slurm, "RUNNING")
    story.starts().logs("step 7/60  loss 2.3")
    beat = {"job_id": "5", "state": "training", "step": 7, "total_steps": 60, "time_s": time.time()}
    write_json(story.run.heartbeat, beat)
    found = why(story)
    assert (found.sentence, found.evidence) == ("runs: training, step 7 of 60", "step 7/60  loss 2.3")
    assert found.command == f"launcher logs -f {story.run.run_id}"


def test_running_silently(story: Story, fake_slurm: FakeSlurm) -> None:
    """No step for five minutes is worth a remark before anything counts as hung."""
    queue(fake_slurm, "RUNNING")
    write_json(
        story.starts().run.heartbeat, {"job_id": "5", "state": "training", "step": 7, "time_s": time.time() - 300}
    )
    assert "rank 0 took no step for 5 min" in why(story).sentence


def test_running_with_an_alarm(story: Story, fake_slurm: FakeSlurm) -> None:
    """A supervisor that sees its rank silent is believed before the end."""
    queue(fake_slurm, "RUNNING")
    folder = story.starts().run.errors / "5.0"
    folder.mkdir(parents=True)
    write_json(folder / "hang-rank-3.json", {"rank": 3, "host": "node2", "silent_s": 75.0, "at": "all_reduce"})
    found = why(story)
    assert "rank 3 on node2 gives no sign of life for 75 s" in found.sentence
    assert found.evidence == "all_reduce"


def test_running_slower_than_before(story: Story, fake_slurm: FakeSlurm) -> None:
    """A straggler shows in the speed of all; the newest line of the metrics is the evidence."""
    queue(fake_slurm, "RUNNING")
    for step in range(40):
        append_json_line(story.run.metrics, {"step": step, "loss": 1.0, "tokens_per_s": 900.0 if step < 30 else 90.0})
    found = why(story.starts())
    assert "it became slow: 90 tokens/s instead of 900" in found.sentence
    assert '"step": 39' in str(found.evidence)


def test_slurm_is_down(story: Story, fake_slurm: FakeSlurm) -> None:
    """Not to know is an answer, with the command that asks again."""
    fake_slurm.say("squeue", stderr="Unable to contact slurm controller", status=1)
    found = why(story)
    assert found.state == "UNKNOWN"
    assert found.command == f"launcher status {story.run.run_id}"


def test_never_submitted(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    """A folder whose script nobody gave to sbatch."""
    found = explain(make_run(tmp_path))
    assert (found.state, found.cause) == ("NOT_SUBMITTED", None)
    assert str(found.command).startswith("launcher submit ")


def test_on_the_command_line(story: Story, fake_slurm: FakeSlurm) -> None:
    """The sentence, the line with its file and the decision on stdout; the one command as Next; all of it as JSON."""
    queue(fake_slurm, "FAILED")
    decided(story.starts(), "hung", "requeue", reason="a hang may not come again")
    story.again()
    decided(story.starts(resumed=10), "hung", "stop", reason="restart budget used: 1 of 1")
    ran = CliRunner().invoke(main, ["why", str(story.run.path)])
    assert ran.stdout.splitlines() == [
        f"{story.run.run_id} rank 1 on node1 hung: stuck",
        "  stuck",
        "  in /errors/hung.json",
        "  not started again: restart budget used: 1 of 1",
        "  attempts:",
        "    5.0  hung -> started again, checkpoint of step 10",
        "    5.1  hung -> not started again, checkpoint of step 10",
    ]
    assert ran.stderr == f"Next: launcher resume {story.run.run_id}\n"
    document = json.loads(CliRunner().invoke(main, ["why", str(story.run.path), "--json"]).stdout)
    assert (document["schema"], document["cause"], document["command"]) == (1, "hung", ran.stderr[6:-1])
    assert [past["attempt"] for past in document["history"]] == ["5.0", "5.1"]
