"""The supervisor with real processes: a fake rank of a few lines in the rank's place, real signals, real deaths.

The fake ranks use the parts a rank has (pulse, stacks, stop flag); `tests/train/test_supervision.py` has the whole one.
"""

from __future__ import annotations

import contextlib
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

from launcher.runs import orphans, process
from launcher.runs.folder import RunFolder, read_json_lines

PATIENCE_S = 60.0
SUPERVISE = """
import sys
from pathlib import Path
from launcher.runs.supervisor import supervise
sys.exit(supervise(Path(sys.argv[1]), [sys.executable, "-c", sys.argv[2], sys.argv[1]]))
"""
FAKE_RANK = """
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
from launcher.runs import stacks
from launcher.runs.pulse import Pulse
pulse = Pulse.from_environment()
stacks.answer()
pulse.beat("training", 12)
def tell(name, text=""):
    path = Path(sys.argv[1], name + ".tmp")
    path.write_text(str(text))
    path.rename(Path(sys.argv[1], name))
"""
CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
LEAVES_A_CHILD = f"""
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], start_new_session=True)
tell("child", child.pid)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose ranks may be silent for 1.5 s."""
    folder = RunFolder.create(tmp_path, "tiny")
    folder.resolved.write_text("survival: {hang_minutes: 0.025}\n")
    return folder


@pytest.fixture
def start(run: RunFolder) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a supervisor with a fake rank; what still runs after the test is ended."""
    started: list[subprocess.Popen[str]] = []

    def begin(code: str) -> subprocess.Popen[str]:
        names = ("SLURM_", "SUBMITIT_", "LAUNCHER_SUPERVIS")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(names)}
        environment |= {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "job"}
        words = [sys.executable, "-c", SUPERVISE, str(run.path), FAKE_RANK + code]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(words, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield begin
    for supervisor in started:
        for pid in process.descendants(supervisor.pid):
            os.kill(pid, signal.SIGKILL)
        supervisor.kill()
        supervisor.communicate()


def _end(supervisor: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = supervisor.communicate(timeout=PATIENCE_S)
    return supervisor.returncode, output


def _until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def _told(run: RunFolder, name: str) -> str:
    """What the fake rank left under a name."""
    _until((run.path / name).exists)
    return (run.path / name).read_text()


def _events(run: RunFolder) -> list[dict[str, Any]]:
    return list(read_json_lines(run.attempts))


def _death(run: RunFolder) -> dict[str, Any]:
    return dict(json.loads(run.error("job.0", 1).read_text()))


# --- ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["done", "stopped"])
def test_a_rank_that_says_its_work_is_done_ends_with_0_and_leaves_no_record(
    phase: str, run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Nothing died, so nothing is written."""
    assert _end(start(f"print('hello'); pulse.beat('{phase}')")) == (0, "hello\n")
    assert (_events(run), run.errors.exists()) == ([], False)


def test_an_exit_with_0_in_the_middle_of_training_is_a_death(
    run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Otherwise the scheduler would call a half-trained run completed."""
    code, output = _end(start("os._exit(0)"))
    assert code == 95
    assert "rank 1 on" in output
    assert "exited with 0 before its work was done (training, after step 12)" in output
    assert [(event["event"], event["rank"], event["exit_code"]) for event in _events(run)] == [("died", 1, 95)]
    assert (_death(run)["type"], _death(run)["phase"], _death(run)["step"]) == ("Vanished", "training", 12)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGKILL", "os.kill(os.getpid(), signal.SIGKILL)"),
        ("SIGSEGV", "ctypes.string_at(0)"),
        ("SIGABRT", "os.abort()"),
    ],
)
def test_a_signal_that_ends_the_rank_is_in_the_exit_code_the_record_and_the_ledger(
    name: str, code: str, run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """128 + signal; a crash leaves the stacks of all threads, in the record and in the log."""
    number = int(signal.Signals[name])
    exit_code, output = _end(start(f"def crash():\n    {code}\ncrash()"))
    assert exit_code == 128 + number
    assert [(event["event"], event["signal"]) for event in _events(run)] == [("died", number)]
    death = _death(run)
    assert (death["type"], death["signal"], death["rank"], death["attempt"]) == (name, number, 1, "job.0")
    assert death["max_rss_bytes"] > 0
    if name != "SIGKILL":
        assert "in crash" in death["stack"]
        assert "in crash" in output


def test_a_rank_that_wrote_down_its_error_has_the_last_word(
    run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Exit code and record are the rank's; the ledger gets no second line for the same death."""
    path = run.error("job.0", 1)
    path.parent.mkdir(parents=True)
    path.write_text('{"message": "own words"}')
    assert _end(start("sys.exit(3)"))[0] == 3
    assert (_death(run), _events(run)) == ({"message": "own words"}, [])


@pytest.mark.parametrize("last_words", ["pulse.beat('done')", "os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(1)"])
def test_no_process_is_left_behind(
    last_words: str, run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Not even one in a session of its own that ignores SIGTERM, however the rank ended."""
    _end(start(LEAVES_A_CHILD + last_words))
    assert process.identify(int(_told(run, "child"))) is None


def test_a_killed_supervisor_takes_the_rank_and_all_it_started_along(
    run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """kill -9 of the supervisor: the kernel ends the rank, the guard what that had started."""
    supervisor = start(LEAVES_A_CHILD + "tell('rank', os.getpid())\nwhile True: pulse.beat(); time.sleep(0.1)")
    rank, child = (int(_told(run, name)) for name in ("rank", "child"))
    supervisor.kill()
    _until(lambda: process.identify(rank) is None)
    _until(lambda: process.identify(child) is None)


def test_a_guard_leaves_with_its_supervisor_and_holds_nothing_open(
    run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """A scheduler waits for the end of the output and for every process it knows of."""
    supervisor = start("tell('pid', os.getpid())\nwhile not Path(sys.argv[1], 'go').exists():\n"
                       "    time.sleep(0.01)\npulse.beat('done')")  # fmt: skip
    rank = int(_told(run, "pid"))
    (guard,) = _like(supervisor.pid)
    assert guard not in process.descendants(supervisor.pid)
    assert os.getsid(guard) != os.getsid(rank)
    opened = {str(entry.readlink()) for entry in Path(f"/proc/{guard}/fd").iterdir()}
    assert {name.partition(":")[0] for name in opened} == {"/dev/null", "pipe"}
    (run.path / "go").touch()
    assert _end(supervisor)[0] == 0
    _until(lambda: process.identify(guard) is None)


def _like(pid: int) -> list[int]:
    """Other processes with the same command line."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes()
    found = []
    for number in process.numbers():
        with contextlib.suppress(OSError):
            if number != pid and words and Path(f"/proc/{number}/cmdline").read_bytes() == words:
                found.append(number)
    return found


def test_what_an_earlier_attempt_left_is_ended_by_the_next(
    run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Supervisor, rank and guard were all killed; a child in a session of its own still holds memory."""
    left = subprocess.Popen(["sleep", "600"], env=_of_a_dead_supervisor(run.path))
    try:
        code, output = _end(start("pulse.beat('done')"))
        assert code == 0
        assert f"ended sleep ({left.pid}), left behind by an earlier attempt" in output
        assert left.wait(timeout=PATIENCE_S) == -signal.SIGKILL
    finally:
        left.kill()
        left.wait()


def _of_a_dead_supervisor(run_dir: Path) -> dict[str, str]:
    """The environment of a rank whose supervisor's number belongs to another process by now."""
    mine = orphans.environment(run_dir)
    return {**mine, "LAUNCHER_SUPERVISOR": "1:" + mine["LAUNCHER_SUPERVISOR"].partition(":")[2]}


def test_what_other_runs_left_is_not_touched(tmp_path: Path) -> None:
    """Nor the processes of a supervisor that is alive, nor those that carry no name."""
    mine, dead = orphans.environment(tmp_path), _of_a_dead_supervisor(tmp_path)
    others = [{}, mine, {**dead, "LAUNCHER_SUPERVISED_RUN": "/another/run"}]
    kept = [subprocess.Popen(["sleep", "600"], env=environment) for environment in others]
    orphan = subprocess.Popen(["sleep", "600"], env=dead)
    try:
        _until(lambda: orphans.end_orphans(tmp_path) == [f"sleep ({orphan.pid})"])
        assert orphan.wait(timeout=PATIENCE_S) == -signal.SIGKILL
        assert [sleeper.poll() for sleeper in kept] == [None, None, None]
    finally:
        for sleeper in kept:
            sleeper.kill()
            sleeper.wait()


# --- signals ---------------------------------------------------------------------------------------

STOPS = """
from launcher.worker.stopping import StopFlag
tell("pid", os.getpid())
while not {ready}: time.sleep(0.01)
flag = StopFlag.install()
while not flag.raised: pulse.beat(); time.sleep(0.01)
tell("reason", flag.reason)
pulse.beat("stopped")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
@pytest.mark.parametrize("to", ["supervisor", "rank", "both"])
def test_a_stop_signal_reaches_the_rank_even_before_its_handlers_stand(
    name: str, to: str, run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Slurm signals every process, the local controller the supervisor; neither is ended by it, and none is lost."""
    number = signal.Signals[name]
    supervisor = start(STOPS.format(ready=f"signal.{name} in signal.sigpending()"))
    rank = int(_told(run, "pid"))
    for pid in {"supervisor": [supervisor.pid], "rank": [rank], "both": [supervisor.pid, rank]}[to]:
        os.kill(pid, number)
    assert _end(supervisor)[0] == 0
    assert _told(run, "reason") == name


@pytest.mark.parametrize(("phase", "code"), [("done", 0), ("stopped", 0), ("training", 140)])
def test_a_stop_signal_on_the_way_out_spoils_nothing(
    phase: str, code: int, run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Python takes its handlers down before it exits: what is done and written then is no death."""
    supervisor = start(f"pulse.beat({phase!r})\nsignal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])\n"
                       "os.kill(os.getpid(), signal.SIGUSR2)")  # fmt: skip
    assert _end(supervisor)[0] == code


def test_a_death_after_a_stop_signal_says_so(run: RunFolder, start: Callable[[str], subprocess.Popen[str]]) -> None:
    """Whoever diagnoses it must tell a rank that the scheduler killed from one that the kernel did."""
    supervisor = start("tell('pid', os.getpid())\nwhile signal.SIGTERM not in signal.sigpending(): time.sleep(0.01)\n"
                       "os.kill(os.getpid(), signal.SIGKILL)")  # fmt: skip
    _told(run, "pid")
    supervisor.terminate()
    assert _end(supervisor)[0] == 137
    assert _death(run)["stop_signal"]["name"] == "SIGTERM"
    assert _death(run)["stop_signal"]["age_s"] < PATIENCE_S


# --- hangs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "state", "frame"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", "T", None),
        ("ctypes.PyDLL(None).sleep(600)", "S", "in stuck"),
        ("time.sleep(600)", "S", "in stuck"),
        ("while True: pass", "R", "in stuck"),
    ],
    ids=["stopped", "holds the GIL", "sleeps", "spins"],
)
def test_a_silent_rank_is_seen_described_and_ended(
    code: str, state: str, frame: str | None, run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Within the limit and 10 s, whatever keeps it: process state, stacks, culprit, exit code 94, no child left."""
    supervisor = start(f"def stuck():\n    {code}\n{LEAVES_A_CHILD}tell('began')\nstuck()")
    _told(run, "began")
    began_s = time.monotonic()
    exit_code, output = _end(supervisor)
    assert exit_code == 94
    assert time.monotonic() - began_s < 1.5 + 10
    report = json.loads((run.errors / "job.0" / "hang-rank-1.json").read_text())
    assert (report["state"], report["phase"], report["step"]) == (state, "training", 12)
    assert (report["cpu_share"] > 0.02) == (state == "R")  # of a core that others may use too
    stack = run.errors / "job.0" / "stack-rank-1.txt"
    if frame:
        assert frame in stack.read_text()
        assert frame in output
    else:
        assert not stack.exists()
        assert "its process is stopped (state T) and cannot show its stacks" in output
    assert [event["event"] for event in _events(run)] == ["hung"]
    assert (_death(run)["type"], _death(run)["exit_code"]) == ("Hung", 94)
    assert process.identify(int(_told(run, "child"))) is None


def test_two_supervisors_name_the_same_culprit_once(
    run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """The report of rank 0 is there (it waits for others); rank 1's own supervisor blames rank 1 for both."""
    from launcher.runs import autopsy
    from tests.unit.runs.test_autopsy import _report

    supervisor = start("time.sleep(600)")
    autopsy.report_hang(run, "job.0", _report(0), "")
    assert _end(supervisor)[0] == 94
    culprit = autopsy.hung(run, "job.0")
    assert culprit is not None
    assert culprit["rank"] == 1
    hung = [event for event in _events(run) if event["event"] == "hung"]
    assert [(event["rank"], event["host"]) for event in hung] == [(1, culprit["host"])]


def test_a_job_that_was_suspended_is_not_taken_for_hung(
    run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """`scontrol suspend` stops supervisor and rank together, for longer than the limit."""
    run.resolved.write_text("survival: {hang_minutes: 0.06}\n")
    supervisor = start("tell('pid', os.getpid())\nwhile not Path(sys.argv[1], 'go').exists():\n"
                       "    pulse.beat(); time.sleep(0.01)\npulse.beat('done')")  # fmt: skip
    rank = int(_told(run, "pid"))
    for pid in (supervisor.pid, rank):
        os.kill(pid, signal.SIGSTOP)
    began_s = time.monotonic()
    _until(lambda: time.monotonic() - began_s > 5)
    os.kill(supervisor.pid, signal.SIGCONT)
    _until(lambda: time.monotonic() - began_s > 6)  # the rank comes back a little later
    os.kill(rank, signal.SIGCONT)
    (run.path / "go").touch()
    code, output = _end(supervisor)
    assert code == 0, output


def test_a_rank_that_is_done_but_does_not_exit_is_a_success(
    run: RunFolder, start: Callable[[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its work is written; what a library does on the way out does not matter. (A stopped process counts sooner.)"""
    code, output = _end(start("pulse.beat('done'); os.kill(os.getpid(), signal.SIGSTOP)"))
    assert code == 0
    assert "has done its work but does not exit" in output
    assert _events(run) == []


def test_a_run_folder_that_cannot_be_written_does_not_keep_a_hung_rank_alive(
    run: RunFolder, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """The exit code still tells, and the log says why the rest is missing."""
    run.errors.write_text("in the way")
    code, output = _end(start("time.sleep(600)"))
    assert code == 94
    assert "cannot write it down" in output


# --- weight ----------------------------------------------------------------------------------------


def test_it_is_light(run: RunFolder, start: Callable[[str], subprocess.Popen[str]]) -> None:
    """Below 60 MB, and next to no CPU time while it watches: one per GPU runs beside the training."""
    supervisor = start("tell('pid', os.getpid())\nwhile True: pulse.beat(); time.sleep(0.05)")
    _told(run, "pid")
    first = process.activity(supervisor.pid)
    began_s = time.monotonic()
    _until(lambda: time.monotonic() - began_s > 4)
    last = process.activity(supervisor.pid)
    assert first is not None
    assert last is not None
    assert last.cpu_s - first.cpu_s <= 0.1
    resident_kb = Path(f"/proc/{supervisor.pid}/status").read_text().partition("VmRSS:")[2].split()[0]
    assert int(resident_kb) < 60_000
