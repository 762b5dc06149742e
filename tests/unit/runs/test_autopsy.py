"""What is written down about ranks that died or hung, and whom it blames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import autopsy
from launcher.runs.autopsy import HangReport, find_culprit
from launcher.runs.folder import RunFolder, write_json
from launcher.runs.stacks import waits_for_others


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "tiny")


def _report(rank: int, **facts: Any) -> HangReport:
    """A rank that waits for the others in the backward pass of step 13."""
    usual: dict[str, Any] = {
        "rank": rank,
        "host": f"n{rank // 2 + 1}",
        "phase": "training",
        "step": 12,
        "position": 0,
        "silent_s": 60.0,
        "state": "S",
        "cpu_share": 0.0,
        "at": "torch/autograd/graph.py:979 in _engine_run_backward",
        "waits_for_others": True,
        "time_s": 0.0,
    }
    return HangReport(**(usual | facts))


def test_a_stopped_process_is_to_blame() -> None:
    """Whatever else was seen: it cannot do its part."""
    culprit = find_culprit([_report(0, step=11), _report(1, state="T", at="", waits_for_others=None)], 2)
    assert (culprit.rank, culprit.host) == (1, "n1")
    assert "stopped (state T)" in culprit.why


def test_the_rank_that_is_behind_is_to_blame() -> None:
    """By step first, then by the phases it has entered since."""
    assert find_culprit([_report(0), _report(1), _report(2, step=11), _report(3)], 4).rank == 2
    ahead = {"phase": "saving", "position": 1}
    assert find_culprit([_report(0, **ahead), _report(1), _report(2, **ahead)], 3).rank == 1


def test_a_host_that_says_nothing_is_to_blame_when_all_others_wait_at_the_same_place() -> None:
    """Its supervisor is as frozen as its rank."""
    culprit = find_culprit([_report(0), _report(1), _report(2)], 4)
    assert (culprit.rank, culprit.host) == (3, None)
    assert "did not report" in culprit.why


def test_the_rank_that_is_not_in_a_collective_is_to_blame() -> None:
    """It spins or waits for something of its own while the others wait for it."""
    spins = _report(1, at="launcher/worker/loop.py:178 in _step", waits_for_others=False, cpu_share=1.0)
    culprit = find_culprit([_report(0), spins], 2)
    assert culprit.rank == 1
    assert "loop.py:178 in _step, and uses a whole core" in culprit.why


def test_a_rank_that_does_not_wait_is_blamed_before_one_that_did_not_report() -> None:
    """Asked for its stacks, it may wake up; the others go on for a moment, and their supervisors see nothing wrong."""
    alone = _report(1, at="launcher/worker/faults.py:221 in _do", waits_for_others=False)
    assert find_culprit([alone], 2).rank == 1


def test_the_only_rank_that_is_elsewhere_is_to_blame() -> None:
    """On a GPU, waiting looks like any call that reads a number; the odd one out still shows."""
    waits = {"at": "launcher/worker/loss.py:70 in sum_over_ranks", "waits_for_others": False}
    reports = [_report(0, **waits), _report(1, **waits), _report(2, at="table.py:9 in row", waits_for_others=False)]
    assert find_culprit(reports, 3).rank == 2


def test_nobody_is_blamed_when_all_wait_at_the_same_place() -> None:
    """A switch that died is no rank's fault."""
    culprit = find_culprit([_report(0), _report(1)], 2)
    assert (culprit.rank, culprit.host) == (None, None)


def test_a_culprit_is_written_once_and_everybody_reads_the_same(run: RunFolder) -> None:
    """Supervisors of two hosts may decide at the same moment and see different reports."""
    autopsy.report_hang(run, "7.0", _report(0), "the stacks")
    first = autopsy.settle(run, "7.0", find_culprit([_report(1, state="T")], 1), {"step": 12})
    second = autopsy.settle(run, "7.0", find_culprit([_report(0)], 1), {"step": 12})
    assert (first[1], second[1]) == (True, False)
    assert first[0] == second[0] == autopsy.hung(run, "7.0")
    assert first[0]["rank"] == 1
    assert sorted(path.name for path in (run.errors / "7.0").iterdir()) == [
        "hang-rank-0.json",
        "hung.json",
        "stack-rank-0.txt",
    ]


def test_reports_are_gathered_as_they_were_written(run: RunFolder) -> None:
    """All of them at once when they are there; nobody waits longer than needed."""
    assert not autopsy.alarm(run, "7.0")
    reports = [_report(0), _report(1, state="T", waits_for_others=None)]
    for report in reversed(reports):
        autopsy.report_hang(run, "7.0", report, "")
    assert autopsy.alarm(run, "7.0")
    assert not autopsy.alarm(run, "7.1")
    assert autopsy.gather(run, "7.0", 2) == reports


def _death(run: RunFolder, rank: int, time_s: float, message: str, **facts: Any) -> None:
    autopsy.write_death(run, "7.0", {"rank": rank, "time_s": time_s, "message": message} | facts)


def test_what_a_rank_wrote_itself_is_not_overwritten(run: RunFolder) -> None:
    """Its traceback says more than its exit code."""
    _death(run, 0, 1.0, "the rank's own words")
    assert not autopsy.write_death(run, "7.0", {"rank": 0, "time_s": 2.0, "message": "exited with 1"})
    assert json.loads(run.error("7.0", 0).read_text())["message"] == "the rank's own words"


def test_a_half_written_or_foreign_file_does_not_hide_the_others(run: RunFolder) -> None:
    """Whoever looks at a broken run must not break on it."""
    autopsy.report_hang(run, "7.0", _report(0), "")
    (run.errors / "7.0" / "hang-rank-1.json").write_text("{")
    write_json(run.errors / "7.0" / "hang-rank-2.json", {"rank": 2})
    assert autopsy.gather(run, "7.0", 3) == [_report(0)]
    assert autopsy.hung(run, "7.0") is None


@pytest.mark.parametrize(
    ("frame", "waits"),
    [
        ('File "/x/torch/distributed/distributed_c10d.py", line 3 in all_reduce', True),
        ('File "/x/torch/autograd/graph.py", line 979 in _engine_run_backward', True),
        ('File "/x/torch/nn/parallel/distributed.py", line 2363 in _distributed_broadcast_coalesced', True),
        ('File "/x/torch/nn/parallel/distributed.py", line 1886 in forward', False),
        ('File "/x/launcher/worker/table.py", line 9 in row', False),
    ],
)
def test_waiting_for_others_is_seen_in_the_innermost_frames(frame: str, waits: bool) -> None:
    """A rank deep in its own work below a wrapper that also communicates does not wait."""
    own = "\n".join(f'  File "/x/own.py", line {line} in work' for line in range(3))
    helper = 'Thread 0x01 (most recent call first):\n  File "/x/threading.py", line 1 in run\n\n'
    stacks = f"{helper}Current thread 0x02 (most recent call first):\n"
    assert waits_for_others(f"{stacks}  {frame}\n{own}\n") is waits
    assert waits_for_others(f"{stacks}{own}\n  {frame}\n") is False
    assert waits_for_others("") is None
