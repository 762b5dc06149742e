"""adoption: a job whose submission was never answered, found again by its name.

Between sbatch and the ledger's `submitted` a launcher can be killed, a reply can get lost. The ledger then ends in
`submitting`, and a job may exist that nobody wrote down. Its name is the run id, so it can be asked for; what the
ledger does not know and Slurm does is ours.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.runs.folder import RunFolder, read_json_lines, write_json
from launcher.runs.process import Process, identify
from launcher.runs.slurm import SlurmJob, find_named

SETTLES_S = 60.0
"""An sbatch whose launcher was killed may still be on its way for so long (it gives up by itself before that)."""
_CLOCKS_DIFFER_S = 120.0
"""How far the clocks of this machine and of the accounting database may be apart."""
_CLOSES = frozenset({"submitted", "started", "not_submitted"})
Events = Sequence[Mapping[str, Any]]


def open_submission(events: Events) -> Mapping[str, Any] | None:
    """The `submitting` line that nothing has answered; None where every submission ended one way or the other."""
    for event in events[::-1]:
        if event.get("event") in _CLOSES:
            return None
        if event.get("event") == "submitting":
            return event
    return None


def has_settled(submitting: Mapping[str, Any]) -> bool:
    """Whether a job of this submission would be there by now."""
    return time.time() - _began_s(submitting) > SETTLES_S


def _began_s(submitting: Mapping[str, Any]) -> float:
    """When it was begun; long ago where the line does not say."""
    time_s = submitting.get("time_s")
    return float(time_s) if isinstance(time_s, int | float) else 0.0


def lost_jobs(events: Mapping[str, Events]) -> dict[str, SlurmJob]:
    """Newest job of each run (run id -> ledger) that Slurm knows and the run's ledger does not.

    Raises:
        TemporaryError: Slurm is not here or does not answer.
    """
    began = [_began_s(line) for each in events.values() if (line := open_submission(each)) is not None]
    since_s = min(began) - _CLOCKS_DIFFER_S if began else None
    found = find_named(events, since_s=since_s)
    unknown = {
        run_id: [job for job in jobs if job.job_id not in known_jobs(events[run_id])] for run_id, jobs in found.items()
    }
    return {run_id: jobs[-1] for run_id, jobs in unknown.items() if jobs}


def known_jobs(events: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Ids of every job that the ledger names."""
    return frozenset(str(event["job_id"]) for event in events if event.get("job_id"))


def adopt(run: RunFolder, job_id: str, *, cluster: str = "slurm") -> None:
    """Write down that this job is the run's, as its own submitter would have.

    Raises:
        OSError: the run folder cannot be written.
    """
    document: dict[str, Any] = {}
    if run.job.exists():
        document = json.loads(run.job.read_text(encoding="utf-8"))
    process = identify(int(job_id)) if cluster == "local" else None
    facts = None if process is None else {name: getattr(process, name) for name in process.__slots__}
    write_json(run.job, document | {"job_id": job_id, "submitted_s": time.time(), "process": facts})
    run.record("submitted", job_id=job_id, cluster=cluster, adopted=True)


def controller_of(run: RunFolder) -> Process | None:
    """The controller of the run's local job that runs on this machine now; None when there is none."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"launcher.runs.local" in words and str(run.path).encode() in words:
            return identify(int(entry.name))
    return None


def ledger(run: RunFolder) -> tuple[Mapping[str, Any], ...]:
    """The run's events, oldest first."""
    return tuple(read_json_lines(run.attempts))
