"""What must hold after any fault, as assertions: EQ, <=K, ONE, NOORPH and REC of the fault matrix."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.runs.folder import RunFolder
from tests.faults.story import events, lost_steps, sequence, story

ORPHANS_END_WITHIN_S = 15.0
"""Slurm's KillWait on the development cluster and ten seconds."""


def assert_equal_sequence(run: RunFolder, reference: RunFolder) -> None:
    """EQ: loss, learning rate and rows of every step are those of the uninterrupted run, bit for bit."""
    found, expected = sequence(run), sequence(reference)
    assert sorted(found) == sorted(expected), f"steps differ: {sorted(found.keys() ^ expected.keys())}"
    different = [step for step in expected if found[step] != expected[step]]
    told = [f"step {step}: {found[step]} instead of {expected[step]}" for step in different[:3]]
    assert not different, f"{len(different)} steps differ from the uninterrupted run; {'; '.join(told)}"


def assert_lost_at_most(run: RunFolder, steps: int) -> None:
    """<=K: no interruption cost more than `steps` steps of training."""
    lost = lost_steps(run)
    assert all(count <= steps for count in lost), f"steps trained twice per interruption: {lost}, allowed {steps}"


def assert_one_artifact(run: RunFolder) -> None:
    """ONE: one result, one artifact whose bytes are those recorded, one completion, nothing half-written left."""
    result = json.loads(run.result.read_text(encoding="utf-8"))
    artifact = Path(result["artifact"]["path"])
    found = [folder for folder in (run.adapter, run.model) if folder.exists()]
    assert found == [artifact if artifact.is_absolute() else run.path / artifact]
    for name, digest in recorded_files(result["artifact"]).items():
        assert hashlib.sha256((found[0] / name).read_bytes()).hexdigest() == digest, name
    assert len(events(run, "completed")) == 1
    assert not unfinished(run), unfinished(run)


def recorded_files(artifact: dict[str, Any]) -> dict[str, str]:
    """File name -> sha256, as result.json lists them."""
    files: dict[str, str] = artifact["sha256"]
    assert files
    return files


def unfinished(run: RunFolder) -> list[str]:
    """Temporary files and folders anywhere in the run folder."""
    return [str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.name.endswith(".tmp")]


def assert_no_orphans(run: RunFolder, limit_s: float = ORPHANS_END_WITHIN_S) -> None:
    """NOORPH: within `limit_s` no process is left whose command line or environment names the run."""
    deadline = time.monotonic() + limit_s
    while left := processes_of(run):
        assert time.monotonic() < deadline, f"still there after {limit_s:.0f} s: {left}"
        time.sleep(0.1)


def processes_of(run: RunFolder) -> dict[int, str]:
    """Process number -> command line of everything that belongs to a run, whatever session it is in."""
    wanted = str(run.path).encode()
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it may end while we look
            command = (folder / "cmdline").read_bytes()
            if wanted in command or wanted in (folder / "environ").read_bytes():
                found[int(folder.name)] = command.replace(b"\0", b" ").decode(errors="replace")
    return found


def assert_record(run: RunFolder, causes: Sequence[str], states: Sequence[str] = (), seen: Sequence[str] = ()) -> None:
    """REC: the ledger tells these causes, one per attempt, and Slurm's accounting saw these states.

    A state may name several, as in "PREEMPTED|REQUEUED"; so may a cause. `seen` is what `sacct -D` listed.
    """
    told = [attempt.cause for attempt in story(run)]
    assert _agree(told, causes), f"the ledger says {told}, expected {list(causes)}"
    decided = [event["attempt"] for event in events(run, "decided")]
    assert len(decided) == len(set(decided)), f"an attempt was decided twice: {decided}"
    assert _agree(seen, states), f"sacct -D says {list(seen)}, expected {list(states)}"


def _agree(found: Sequence[str], expected: Sequence[str]) -> bool:
    return len(found) == len(expected) and all(
        one in allowed.split("|") for one, allowed in zip(found, expected, strict=True)
    )
