"""What scripts/test ran: one line per part, from pytest's JUnit files, and the total."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from xml.etree import ElementTree

COLUMNS = ("passed", "failed", "skipped")


def count(file: Path) -> dict[str, float]:
    """Passed, failed and skipped tests of one part, and the seconds it took."""
    suite = ElementTree.parse(file).getroot().find("testsuite")
    if suite is None:
        raise SystemExit(f"{file} is not a JUnit file")
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    passed = int(suite.get("tests", 0)) - failed - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped, "seconds": float(suite.get("time", 0))}


def main(folder: Path) -> int:
    """Print the table; 1 when a test failed, none ran, or one was skipped that must not be."""
    parts = {file.stem: count(file) for file in sorted(folder.glob("*.xml"))}
    print("\n== Summary")
    for name, numbers in parts.items():
        counted = "  ".join(f"{numbers[column]:4.0f} {column}" for column in COLUMNS)
        print(f"{name:8} {counted}  {numbers['seconds']:6.0f} s")
    for file in folder.glob("*.skipped"):
        print(f"{file.stem:8} skipped: {file.read_text().strip()}")
    total = {column: int(sum(numbers[column] for numbers in parts.values())) for column in COLUMNS}
    print(", ".join(f"{total[column]} {column}" for column in COLUMNS))
    return int(total["failed"] > 0 or total["passed"] == 0 or slurm_skipped(parts))


def slurm_skipped(parts: dict[str, dict[str, float]]) -> bool:
    """Whether a Slurm test was skipped where that is not allowed."""
    required = os.environ.get("CI") == "true" or os.environ.get("LAUNCHER_REQUIRE_SLURM")
    skipped = bool(required and parts.get("cluster", {}).get("skipped"))
    if skipped:
        print("Slurm tests were skipped, which CI=true and LAUNCHER_REQUIRE_SLURM do not allow", file=sys.stderr)
    return skipped


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
