"""The table of results of the fault matrix, from the lines the tests leave."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

LIB = Path(__file__).parents[2] / "scripts" / "lib"
ROW = {"where": "local", "fault": "kill -9", "lost_steps": 1, "resume_s": 9.5, "seen": "cause rank_killed"}


def written(tmp_path: Path, *rows: dict[str, object]) -> str:
    """The page made of rows."""
    from_script = runpy.run_path(str(LIB / "faults_table.py"))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(ROW | row) + "\n" for row in rows))
    return str(from_script["table"](from_script["read_rows"](file), "scripts/test --faults"))


def test_a_row_shows_its_number_and_what_it_cost(tmp_path: Path) -> None:
    """The number of the matrix comes out of the test's name."""
    page = written(tmp_path, {"test": "test_death[f07_kill_rank_1]", "verdict": "held"})
    assert "| 7 | kill_rank_1 | local | kill -9 | 1 | 9.5 s | cause rank_killed | held |" in page
    assert "1 of 1 held" in page
    assert "scripts/test --faults" in page


def test_of_a_test_that_ran_twice_the_later_counts(tmp_path: Path) -> None:
    """A second try replaces the first; a broken row is counted as such."""
    again = [{"test": "test_death[f07_kill]", "verdict": verdict} for verdict in ("BROKEN", "held")]
    page = written(tmp_path, *again, {"test": "test_hang[f11_stop]", "verdict": "BROKEN"})
    assert "1 of 2 held" in page
    assert page.count("f07") == 0
    assert page.count("| 7 |") == 1


@pytest.mark.parametrize("seed", [1, 2])
def test_a_soak_has_one_fault_between_two_checkpoints(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every clause can be read, the same seed gives the same faults, and the steps never go back."""
    monkeypatch.syspath_prepend(str(LIB))
    soak = runpy.run_path(str(LIB / "bench_soak.py"))
    from launcher.worker.faults import parse

    told = soak["clauses"](50, seed)
    faults = parse(";".join(told))
    steps = [fault.step or 0 for fault in faults]
    assert told == soak["clauses"](50, seed)
    assert len(faults) == 50
    assert steps == sorted(steps)
    assert steps[0] > soak["SAVE_STEPS"]
