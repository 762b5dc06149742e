"""Autopsy: what is written down about a rank that died or hung, and which of them is to blame.

Everything is a small file in `errors/<attempt>/`: one `rank-N.json` per rank that died, one `hang-rank-N.json` and
`stack-rank-N.txt` per rank whose supervisor saw it silent, and one `hung.json`, written once, that names the culprit.
Light: no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.runs.folder import RunFolder, make_folder, write_atomic, write_json

GATHER_S = 4.0
"""How long a supervisor waits for the reports of the other ranks of a hung attempt."""
_POLL_S = 0.2


def write_death(run: RunFolder, attempt: str, facts: dict[str, Any]) -> bool:
    """Write `rank-N.json` of a rank that died, unless the rank wrote its own; whether it was written.

    `facts`: type, message, exit_code, signal, rank, host, attempt, job_id, step, phase, time_s, traceback or stack.
    """
    path = run.error(attempt, int(facts["rank"]))
    if path.exists():
        return False
    make_folder(run.errors)
    make_folder(path.parent)
    write_json(path, facts)
    return True


# --- hangs -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class HangReport:
    """What one supervisor saw of its silent rank."""

    rank: int
    host: str
    phase: str
    step: int
    position: int
    """See PulseReading.position."""
    silent_s: float
    state: str
    """/proc's letter of the rank's process; empty when it has ended."""
    cpu_share: float
    """CPU time it used per second while it was silent; about 1: it spins, or holds the GIL in a loop."""
    at: str
    """Innermost Python frame of its main thread; empty when it did not answer."""
    waits_for_others: bool | None
    """Whether that frame is inside a collective; None: unknown."""
    time_s: float

    @property
    def stopped(self) -> bool:
        """By SIGSTOP or a debugger."""
        return self.state in ("T", "t")


@dataclass(frozen=True, kw_only=True, slots=True)
class Culprit:
    """Which rank kept the others waiting, as far as it can be told."""

    rank: int | None
    host: str | None
    why: str


def report_hang(run: RunFolder, attempt: str, report: HangReport, stack: str) -> None:
    """Write what was seen of one silent rank; the first report is the alarm for the other supervisors."""
    folder = run.errors / attempt
    make_folder(run.errors)
    make_folder(folder)
    if stack:
        write_atomic(folder / f"stack-rank-{report.rank}.txt", stack)
    write_json(folder / f"hang-rank-{report.rank}.json", dataclasses.asdict(report))


def alarm(run: RunFolder, attempt: str) -> bool:
    """Whether a supervisor of this attempt has reported a silent rank."""
    return bool(_names(run.errors / attempt, "hang-rank-"))


def gather(run: RunFolder, attempt: str, world_size: int) -> list[HangReport]:
    """The reports of all ranks, or of those that come within GATHER_S."""
    deadline = time.monotonic() + GATHER_S
    while len(_names(run.errors / attempt, "hang-rank-")) < world_size and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    fields = {field.name for field in dataclasses.fields(HangReport)}
    documents = _documents(run.errors / attempt, "hang-rank-*.json")
    whole = [document for document in documents if document.keys() >= fields]
    reports = [HangReport(**{key: document[key] for key in fields}) for document in whole]
    return sorted(reports, key=lambda report: report.rank)


def find_culprit(reports: Sequence[HangReport], world_size: int) -> Culprit:
    """The rank that the others waited for. In this order: a stopped process; a rank that is behind the others; one
    that is not waiting in a collective; one whose supervisor said nothing; the only one that is elsewhere.
    """
    missing = sorted(set(range(world_size)) - {report.rank for report in reports})
    rules = (_stopped, _behind, lambda found: _not_waiting(found, missing), lambda _: _missing(missing, world_size))
    for rule in (*rules, _elsewhere):
        culprit = rule(reports)
        if culprit is not None:
            return culprit
    return Culprit(rank=None, host=None, why="no rank can be told from the others")


def _stopped(reports: Sequence[HangReport]) -> Culprit | None:
    found = [report for report in reports if report.stopped]
    return _named(found[0], f"its process is stopped (state {found[0].state})") if found else None


def _behind(reports: Sequence[HangReport]) -> Culprit | None:
    places = sorted({(report.step, report.position) for report in reports})
    if len(places) < 2:
        return None
    last = [report for report in reports if (report.step, report.position) == places[0]]
    if len(last) * 2 > len(reports):  # most are there: the few ahead are not where the others wait for them
        return None
    return _named(last[0], f"it is behind the others ({last[0].phase} after step {last[0].step})")


def _missing(missing: Sequence[int], world_size: int) -> Culprit | None:
    if not missing or len(missing) * 2 > world_size:
        return None
    others = f" (nor did {len(missing) - 1} more)" if missing[1:] else ""
    return Culprit(rank=missing[0], host=None, why=f"its supervisor did not report{others}: the host does not answer")


def _not_waiting(reports: Sequence[HangReport], missing: Sequence[int]) -> Culprit | None:
    """Its peers wait, or went on for a moment when it was asked for its stacks and are not silent any more."""
    found = [report for report in reports if report.waits_for_others is False]
    if not found or not (missing or any(report.waits_for_others for report in reports)):
        return None
    spins = ", and uses a whole core" if found[0].cpu_share > 0.8 else ""
    return _named(found[0], f"it does not wait for the others: {found[0].at}{spins}")


def _elsewhere(reports: Sequence[HangReport]) -> Culprit | None:
    places = Counter(report.at for report in reports)
    odd = [report for report in reports if report.at and places[report.at] == 1]
    if len(reports) < 3 or len(odd) != 1 or len(places) != 2:
        return None
    return _named(odd[0], f"it is not where the others are: {odd[0].at}")


def _named(report: HangReport, why: str) -> Culprit:
    return Culprit(rank=report.rank, host=report.host, why=why)


def settle(run: RunFolder, attempt: str, culprit: Culprit, facts: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Write `hung.json`, once per attempt; returns what stands there and whether this call wrote it."""
    path = run.errors / attempt / "hung.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    write_json(temporary, {**dataclasses.asdict(culprit), "time_s": time.time(), **facts})
    try:
        os.link(temporary, path)  # unlike rename, it fails where the file is there already
        first = True
    except FileExistsError:
        first = False
    finally:
        temporary.unlink(missing_ok=True)
    return json.loads(path.read_text(encoding="utf-8")), first


def hung(run: RunFolder, attempt: str) -> dict[str, Any] | None:
    """What `hung.json` of an attempt says; None when it did not hang."""
    found = _documents(run.errors / attempt, "hung.json")
    return found[0] if found else None


def _names(folder: Path, prefix: str) -> list[str]:
    """Listing, not asking for one name: NFS remembers for a while that a name was not there."""
    try:
        return [name for name in os.listdir(folder) if name.startswith(prefix) and name.endswith(".json")]  # noqa: PTH208
    except OSError:
        return []


def _documents(folder: Path, pattern: str) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob(pattern)):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found
