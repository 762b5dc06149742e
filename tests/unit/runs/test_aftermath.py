"""The last words of a job: asked of a fake Slurm, decided once, done in the way that Slurm allows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.planning.plan import plan_to_json
from launcher.recipe.load import load_recipe, recipe_to_yaml
from launcher.runs import aftermath
from launcher.runs.aftermath import NOT_AGAIN, NOTHING_TO_DO, TEMPORARY, main
from launcher.runs.folder import RunFolder, read_json_lines, write_json
from launcher.runs.request import request_to_json
from launcher.runs.view import JobView
from tests.tiny import make_recipe
from tests.unit.runs.material import FakeSlurm, make_plan, make_request, make_run, write_result
from tests.unit.runs.story import Story

SHOWN = (
    "JobId=5 JobName=x JobState={state} Reason={reason} Requeue={requeue} Restarts={restarts} ExitCode=0:0 "
    "TimeLimit=01:00:00 EndTime={end} PreemptTime={preempt} Partition=main NodeList=node[1-2]"
)


class FakeController:
    """A scontrol that answers by its arguments, in front of the other fake commands."""

    def __init__(self, slurm: FakeSlurm) -> None:
        self.slurm = slurm
        self.answers: dict[str, tuple[str, int]] = {}
        self.job()
        self.answer("show partition", "PartitionName=main PreemptMode=REQUEUE State=UP")
        self.answer("requeue", "")

    def job(self, **facts: Any) -> None:
        """What `show job` says of job 5."""
        values = {"state": "RUNNING", "reason": "None", "requeue": 1, "restarts": 0, "end_s": 3600, "preempt": "None"}
        values |= facts
        values["end"] = stamp(float(values.pop("end_s")))
        self.answer("show job", SHOWN.format(**values))

    def answer(self, words: str, text: str, status: int = 0) -> None:
        """What a call with these words prints (on stderr when it fails)."""
        self.answers[words] = (text, status)
        cases = "".join(
            f"*'{words}'*) echo '{text}'{' >&2' if status else ''}; exit {status};;\n"
            for words, (text, status) in self.answers.items()
        )
        self.slurm.say("scontrol")
        path = self.slurm.folder / "scontrol"
        lines = path.read_text().splitlines()
        at = next(index for index, line in enumerate(lines) if line.startswith("cat "))
        path.write_text("\n".join([*lines[:at], f'case "$*" in\n{cases}esac', *lines[at:]]) + "\n")

    @property
    def requeues(self) -> int:
        """How often `scontrol requeue` was called."""
        return sum(call[:1] == ["requeue"] for call in self.slurm.calls("scontrol"))


def stamp(after_s: float) -> str:
    """Slurm's form of a moment so many seconds from now."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + after_s))


@pytest.fixture
def controller(fake_slurm: FakeSlurm) -> FakeController:
    """A Slurm that knows a running job 5."""
    fake_slurm.say("sbatch", "Submitted batch job 6\n")
    return FakeController(fake_slurm)


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Story:
    """Job 5, first start; the recipe allows four restarts."""
    run = make_run(tmp_path)
    slurm = {"max_restarts": 4, "nodes": 2}
    recipe = make_recipe(tmp_path, slurm=slurm, train={"per_device_train_batch_size": 4, "global_batch_size": 16})
    run.resolved.write_text(recipe_to_yaml(recipe))
    write_json(run.plan, plan_to_json(make_plan(micro_batch=4, gradient_accumulation=2)))
    told = Story(run)
    document = json.loads(run.job.read_text())
    request = make_request(run.path, name=run.run_id, signal_lead_s=60, extra={"exclude": "node4"})
    write_json(run.job, document | {"request": request_to_json(request)})
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("LAUNCHER_AFTERMATH_PATIENCE_S", "0.1")
    monkeypatch.setenv("LAUNCHER_PATIENCE_S", "0.1")
    monkeypatch.setattr("launcher.runs.aftermath._POLL_S", 0.01)
    return told


def end(story: Story, exit_code: int | str, monkeypatch: pytest.MonkeyPatch | None = None) -> int:
    """Run the aftermath of the attempt that was told last; its exit status."""
    if monkeypatch is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(story.restart))
    return main(["aftermath", str(story.run.path), str(exit_code)])


def decisions(run: RunFolder) -> list[dict[str, Any]]:
    """The decisions in the ledger."""
    return [line for line in read_json_lines(run.attempts) if line["event"] == "decided"]


def only(run: RunFolder) -> tuple[str, str]:
    """Cause and action of the only decision."""
    [line] = decisions(run)
    return line["cause"], line["action"]


# ---------------------------------------------------------------- after srun


def test_a_finished_run(story: Story, controller: FakeController) -> None:
    """With result.json nothing is asked to come back, and srun's status is the job's."""
    write_result(story.starts().run)
    assert end(story, 0) == 0
    assert only(story.run) == ("finished", "finish")
    assert controller.requeues == 0


def test_the_time_limit(story: Story, controller: FakeController) -> None:
    """Warned a minute before the limit, saved: the job goes back to its queue."""
    controller.job(end_s=45)
    story.starts().stops(12)
    assert end(story, 0) == 0
    assert only(story.run) == ("time_limit", "requeue")
    assert controller.requeues == 1


def test_preempted_where_slurm_requeues(
    story: Story, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job stays until Slurm ends it (here: until it is no longer running), and asks for nothing itself."""
    story.starts().stops(12, "SIGTERM")
    answers = iter([{}, {"state": "COMPLETING", "restarts": 1}])
    real = aftermath.job_view

    def as_time_goes_by(job_id: str) -> JobView | None:
        controller.job(**({"preempt": stamp(0), "end_s": 5} | next(answers)))
        return real(job_id)

    monkeypatch.setattr(aftermath, "job_view", as_time_goes_by)
    assert end(story, 0) == 0
    assert next(answers, None) is None
    assert only(story.run) == ("preempted", "wait")
    assert controller.requeues == 0


@pytest.mark.parametrize("mode", ["CANCEL", "OFF", "SUSPEND,GANG"])
def test_preempted_where_slurm_does_not_requeue(story: Story, controller: FakeController, mode: str) -> None:
    """Where preempted jobs are cancelled waiting would be the end: the job asks for the requeue in its grace time."""
    controller.answer("show partition", f"PartitionName=main PreemptMode={mode}")
    controller.job(preempt=stamp(0), end_s=5)
    story.starts().stops(12, "SIGTERM")
    assert end(story, 0) == 0
    assert only(story.run) == ("preempted", "requeue")
    assert controller.requeues == 1


def test_requeued_by_an_operator(story: Story, controller: FakeController) -> None:
    """It is in the queue already: nothing is asked twice."""
    controller.job(state="COMPLETING", restarts=1)
    story.starts().stops(12, "SIGTERM")
    assert end(story, 0) == 0
    assert only(story.run) == ("operator_requeue", "wait")
    assert controller.requeues == 0


def test_cancelled(story: Story, controller: FakeController) -> None:
    """A job that Slurm is ending for good is left to end."""
    controller.job(state="COMPLETING", end_s=0)
    story.starts().stops(12, "SIGTERM")
    end(story, 0)
    assert only(story.run) == ("cancelled", "stop")
    assert controller.requeues == 0


def test_a_killed_rank(story: Story, controller: FakeController) -> None:
    """A failure of the cluster goes back to the queue with its own exit status, whoever asks first."""
    story.starts().reports(1, "SIGKILL", signal=9)
    assert end(story, 137) == 137
    assert only(story.run) == ("rank_killed", "requeue")


def test_a_data_error(story: Story, controller: FakeController) -> None:
    """What the user has to correct is never tried again."""
    story.starts().reports(0, "DataError", "chats.jsonl:65: not JSON")
    assert end(story, 3) == 3
    assert only(story.run) == ("data_error", "stop")
    assert controller.requeues == 0


def test_only_one_decides(story: Story, controller: FakeController) -> None:
    """Called twice for one attempt, the second call does nothing."""
    story.starts().reports(1, "SIGKILL", signal=9)
    assert [end(story, 137), end(story, 137)] == [137, 137]
    assert only(story.run) == ("rank_killed", "requeue")
    assert controller.requeues == 1


def test_the_budget_ends_a_run_that_left_politely(
    story: Story, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fifth start was the last of four restarts: the job ends with a status of its own, not as if finished."""
    controller.job(end_s=30)
    codes = []
    for number in range(5):
        controller.job(end_s=30, restarts=number)
        story.starts(resumed=10 * number).stops(10 * (number + 1))
        codes.append(end(story, 0, monkeypatch))
        story.again()
    assert codes == [0, 0, 0, 0, NOT_AGAIN]
    assert [line["action"] for line in decisions(story.run)] == ["requeue"] * 4 + ["stop"]
    assert decisions(story.run)[-1]["reason"] == "restart budget used: 4 of 4 (slurm.max_restarts)"


def test_a_full_gpu(story: Story, controller: FakeController) -> None:
    """The plan is rewritten for half the micro-batch and the same global batch; the old one is kept."""
    story.starts().reports(0, "OutOfMemoryError", "CUDA out of memory")
    end(story, 1)
    assert only(story.run) == ("gpu_out_of_memory", "requeue")
    chosen = json.loads(story.run.plan.read_text())["chosen"]
    assert (chosen["micro_batch"], chosen["gradient_accumulation"]) == (2, 4)
    assert load_recipe(story.run.resolved).train.per_device_train_batch_size == 2
    assert json.loads((story.run.path / "plan-1.json").read_text())["chosen"]["micro_batch"] == 4
    assert controller.requeues == 1


# ---------------------------------------------------------------- refusals


def test_a_follow_up_where_requeue_is_disabled(story: Story, controller: FakeController) -> None:
    """Slurm's refusal becomes a new job that waits for this one, with the recipe's own options."""
    controller.answer("requeue", "Requested operation is presently disabled for job 5", 1)
    story.starts().reports(1, "SIGKILL", signal=9)
    end(story, 137)
    assert only(story.run) == ("rank_killed", "follow_up")
    assert "presently disabled" in decisions(story.run)[0]["reason"]
    assert "#SBATCH --dependency=afterany:5" in controller.slurm.script
    assert "#SBATCH --exclude=node4" in controller.slurm.script
    [sent] = [
        line for line in read_json_lines(story.run.attempts) if line["event"] == "submitted" and line["job_id"] == "6"
    ]
    assert sent["purpose"] == "follow-up"


def test_a_follow_up_without_scontrol(story: Story, controller: FakeController) -> None:
    """On nodes without scontrol the run goes on in a new job."""
    (controller.slurm.folder / "scontrol").unlink()
    story.starts().reports(1, "SIGKILL", signal=9)
    end(story, 137)
    assert only(story.run) == ("rank_killed", "follow_up")
    assert "no scontrol on this node" in decisions(story.run)[0]["reason"]


def test_a_follow_up_that_is_there_is_not_sent_twice(story: Story, controller: FakeController) -> None:
    """A job of the same name that waits is taken for the follow-up."""
    controller.job(requeue=0)
    name = story.run.run_id
    controller.slurm.say("squeue", f"{name}|5|RUNNING|node1|N/A|None\n{name}|6|PENDING||N/A|Dependency\n")
    story.starts().reports(1, "SIGKILL", signal=9)
    end(story, 137)
    assert only(story.run) == ("rank_killed", "follow_up")
    assert controller.slurm.calls("sbatch") == []


def test_a_bad_node_is_left_out_of_the_follow_up(
    story: Story, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second failure on node1 asks for a job without it, beside what the recipe leaves out itself."""
    controller.slurm.say("sinfo", "3\n1\n")
    for step in (10, 20):
        story.starts().saves(step).reports(1, "SIGKILL", signal=9)
        end(story, 137, monkeypatch)
        story.again()
        controller.job(restarts=story.restart)
    first, second = decisions(story.run)
    assert (first["action"], second["action"]) == ("requeue", "follow_up")
    assert second["changes"] == {"exclude": ["node1"]}
    assert "#SBATCH --exclude=node4,node1" in controller.slurm.script


def test_slurm_does_not_answer(story: Story, controller: FakeController) -> None:
    """The job ends visibly, with "try again later", and the ledger says what to do."""
    for words in ("show job", "requeue", "show partition"):
        controller.answer(words, "Unable to contact slurm controller (connect failure)", 1)
    story.starts().reports(1, "Vanished", "exited with 0 before its work was done")
    assert end(story, 0) == TEMPORARY
    assert only(story.run) == ("rank_exited", "stop")
    assert "resume it by hand" in decisions(story.run)[0]["reason"]


# ---------------------------------------------------------------- before srun


def test_a_finished_run_is_not_trained_again(story: Story, controller: FakeController) -> None:
    """`scontrol requeue` of a finished job ends at once."""
    write_result(story.run)
    assert end(story, "before") == NOTHING_TO_DO


def test_the_first_start_is_not_held_back(story: Story, controller: FakeController) -> None:
    """There is nothing to decide about."""
    assert end(story, "before") == 0
    assert decisions(story.run) == []


def test_a_start_without_last_words_is_decided_late(
    story: Story, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node was lost with everything on it: the next start writes the line, from accounting."""
    controller.slurm.say("sacct", "NODE_FAIL\nRUNNING\n")
    story.starts().again()
    assert end(story, "before", monkeypatch) == 0
    [line] = decisions(story.run)
    assert (line["attempt"], line["cause"], line["action"], line["late"]) == ("5.0", "node_lost", "wait", True)


def test_a_crash_loop_of_silent_starts_ends_too(
    story: Story, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm would start a job on failing nodes for ever; the fourth start is held back."""
    controller.slurm.say("sacct", "NODE_FAIL\nNODE_FAIL\nNODE_FAIL\nRUNNING\n")
    codes = []
    for _ in range(4):
        codes.append(end(story, "before", monkeypatch))
        if codes[-1] == 0:
            story.starts().again()
    assert codes == [0, 0, 0, NOT_AGAIN]
    assert decisions(story.run)[-1]["held_back"]


def test_whoever_requeues_a_stopped_job_by_hand_may(
    story: Story, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decision to stop binds the machine; a person who puts the job back has looked at it."""
    story.starts().reports(0, "DataError", "chats.jsonl:65: not JSON")
    end(story, 3, monkeypatch)
    story.again()
    assert end(story, "before", monkeypatch) == 0


# ---------------------------------------------------------------- the process


def test_an_error_of_our_own_does_not_change_the_status(story: Story, controller: FakeController) -> None:
    """Whatever goes wrong here, the job's status stays srun's."""
    story.run.decisions.write_text("not a folder")
    assert end(story, 17) == 17


def test_outside_a_job_nothing_is_decided(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module run by hand touches nothing."""
    monkeypatch.delenv("SLURM_JOB_ID")
    assert end(story, 4) == 4
    assert decisions(story.run) == []


def test_it_outlives_the_signals_that_end_the_job(story: Story, controller: FakeController) -> None:
    """SIGTERM at the end of the grace time, while Slurm is being asked, does not keep the line from being written."""
    asked, go = story.run.path / "asked", story.run.path / "go"
    path = controller.slurm.folder / "scontrol"
    wait = f": > {asked}; for i in {{1..300}}; do [ -e {go} ] && break; sleep 0.1; done"
    path.write_text(path.read_text().replace('note "$@"', f'note "$@"\n{wait}', 1))
    story.starts().reports(1, "SIGKILL", signal=9)
    command = [sys.executable, "-m", "launcher.runs.aftermath", str(story.run.path), "137"]
    environ = os.environ | {"PYTHONPATH": str(Path(launcher.__file__).parents[1])}
    process = subprocess.Popen(command, env=environ)
    deadline = time.monotonic() + 60
    while not asked.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        process.send_signal(number)
    go.touch()
    assert process.wait(timeout=60) == 137
    assert only(story.run) == ("rank_killed", "requeue")
