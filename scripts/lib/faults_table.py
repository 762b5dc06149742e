"""The table of a fault matrix: JSON lines of tests/faults -> benchmarks/faults-<machine>-<date>.md."""

from __future__ import annotations

import datetime
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.faults.report import Row, read_rows  # noqa: E402 - the checkout's, not an installed one

NUMBER = re.compile(r"f(\d\d)_")


def machine() -> str:
    """Such as `intel-xeon-2-cores`."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "cpu")
    words = re.findall(r"[a-z0-9]+", re.sub(r"\(.*?\)|processor|cpu|@.*", " ", name.lower()))
    return "-".join([*words[:2], str(os.cpu_count()), "cores"])


def table(rows: list[Row], command: str) -> str:
    """The whole page."""
    today = datetime.date.today().isoformat()
    held = sum(row.verdict == "held" for row in rows)
    resumed = sorted(row.resume_s for row in rows if row.resume_s is not None)
    head = [
        f"# Injected faults on {machine()}, {today}",
        "",
        f"Written by `{command}`. {held} of {len(rows)} held. A fault holds when everything its test asserts does:",
        "most often that loss, learning rate and rows of every step equal the uninterrupted run's bit for bit, that no",
        "interruption cost more than the interval between checkpoints, that there is one artifact with the recorded",
        "bytes, and that no process is left. *Lost* are steps trained twice; *resumed* is the time from the last step",
        "before the fault to the first after it, imports included, on a machine that may have been busy.",
        "",
        "| no. | test | where | fault | lost | resumed | seen | verdict |",
        "|---|---|---|---|---:|---:|---|---|",
    ]
    tail = ["", f"Median time to resume: {resumed[len(resumed) // 2]:.1f} s."] if resumed else []
    return "\n".join([*head, *(_line(row) for row in rows), *tail]) + "\n"


def _line(row: Row) -> str:
    name = row.test.partition("[")[2].rstrip("]") or row.test.removeprefix("test_")
    number = NUMBER.match(name)
    lost = "" if row.lost_steps is None else str(row.lost_steps)
    resumed = "" if row.resume_s is None else f"{row.resume_s:.1f} s"
    cells = (str(int(number[1])) if number else "", name[4:] if number else name, row.where, row.fault, lost, resumed)
    return "| " + " | ".join(cell.replace("|", "/") for cell in (*cells, row.seen, row.verdict)) + " |"


def _order(row: Row) -> tuple[int, str]:
    number = NUMBER.search(row.test)
    return (int(number[1]) if number else 99, row.test)


def main(arguments: list[str]) -> int:
    """`faults_table.py ROWS COMMAND`: write the page and print its name and verdicts."""
    rows = sorted(read_rows(Path(arguments[0])), key=_order)
    target = ROOT / "benchmarks" / f"faults-{machine()}-{datetime.date.today().isoformat()}.md"
    target.write_text(table(rows, arguments[1]), encoding="utf-8")
    print(f"{target.relative_to(ROOT)}: {sum(row.verdict == 'held' for row in rows)} of {len(rows)} faults held")
    for row in rows:
        if row.verdict != "held":
            print(f"  {row.verdict}: {row.test}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
