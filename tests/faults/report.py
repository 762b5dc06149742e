"""One line per injected fault: what it was, what it cost, and whether everything held afterwards."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.runs.folder import RunFolder, append_json_line
from tests.faults.story import lost_steps, seconds_to_resume

ROWS = "LAUNCHER_FAULT_ROWS"
"""Environment variable: the JSON-lines file that gets the rows."""


@dataclass(kw_only=True)
class Row:
    """A row of the table of results."""

    test: str
    where: str = ""
    """local | slurm | none"""
    fault: str = ""
    """In words."""
    lost_steps: int | None = None
    """Steps trained twice, the worst interruption of the run."""
    resume_s: float | None = None
    """Last step before to first step after, the longest of the run."""
    seen: str = ""
    """What else was measured."""
    verdict: str = "not run"

    def measure(self, run: RunFolder, interruption: int | None = None) -> None:
        """Note what the run's interruptions cost: one of them, or the worst."""
        lost, seconds = lost_steps(run), seconds_to_resume(run)
        if interruption is not None:
            lost, seconds = lost[interruption : interruption + 1], seconds[interruption : interruption + 1]
        self.lost_steps = max(lost, default=None)
        self.resume_s = round(max(seconds), 1) if seconds else None

    def write(self) -> None:
        """Append it to the file of rows, where one is asked for."""
        if path := os.environ.get(ROWS):
            append_json_line(Path(path), asdict(self))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; of a test that ran twice the later one."""
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return sorted({row.test: row for row in rows}.values(), key=lambda row: row.test)
