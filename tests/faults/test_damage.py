"""Checkpoints that are not what they were, and disks that do not take them: rows 32 to 36 of the fault matrix."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.runs.folder import RunFolder
from tests.faults.bed import SAVE_STEPS, SLOW, LocalBed
from tests.faults.conftest import Reference
from tests.faults.gauntlet import check_survival
from tests.faults.report import Row
from tests.faults.story import events, story
from tests.privileges import unavailable

INTERRUPTED = "at=step,rank=1,step=14,do=kill"
"""Two checkpoints are there: of steps 8 and 12."""


@pytest.fixture(autouse=True)
def local_row(row: Row) -> None:
    """Every row of this module is about this machine."""
    row.where = "local"


@pytest.fixture(scope="module")
def stopped(local_bed: LocalBed) -> RunFolder:
    """A run that died and is not tried again, with two checkpoints."""
    run = local_bed.inject("lora-stopped", INTERRUPTED, slurm={"requeue": False})
    assert local_bed.wait(run).code == 8
    assert [path.name for path in checkpoints(run)] == ["step-000008", "step-000012"]
    return run


def checkpoints(run: RunFolder) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(run.checkpoints.glob("step-*"))


@pytest.fixture
def damaged(stopped: RunFolder) -> Iterator[RunFolder]:
    """The stopped run as it was, for one test; put back afterwards."""
    kept = stopped.path.with_name(stopped.path.name + ".kept")
    shutil.copytree(stopped.path, kept)
    yield stopped
    shutil.rmtree(stopped.path)
    kept.rename(stopped.path)


def truncate(file: Path) -> None:
    """The last bytes never reached the disk."""
    os.truncate(file, file.stat().st_size - 100)


def flip(file: Path) -> None:
    """One byte is another."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte[0] ^ 0xFF]))


def empty(file: Path) -> None:
    """Created, never written."""
    os.truncate(file, 0)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(truncate, "truncated", id="f32_truncated"),
        pytest.param(flip, "one byte flipped", id="f32_flipped_byte"),
        pytest.param(empty, "emptied", id="f32_zero_length"),
    ],
)
def test_damaged_checkpoint(
    damage: object, words: str, damaged: RunFolder, local_bed: LocalBed, local_reference: Reference, row: Row
) -> None:
    """A damaged checkpoint is named and skipped; the run goes on from the one before and says what that costs."""
    row.fault = f"the largest file of the newest checkpoint {words}"
    newest = checkpoints(damaged)[-1]
    file = max((path for path in newest.rglob("*.pt")), key=lambda path: path.stat().st_size)
    damage(file)  # type: ignore[operator]
    local_bed.launcher("resume", damaged.run_id, "--detach").expect()
    check_survival(
        local_bed, damaged, local_reference("lora"), row, causes=("rank_killed", "finished"), lost=2 * SAVE_STEPS
    )
    assert story(damaged)[1].resumed_step == 8
    log = "".join(path.read_text() for path in damaged.logs.glob("*_0.out"))
    assert file.name in log
    assert "damaged" in log


def lose_manifests(run: RunFolder) -> None:
    """No checkpoint can be verified any more."""
    for path in checkpoints(run):
        (path / "manifest.json").unlink()


def garbage_pointer(run: RunFolder) -> None:
    """What another tool's pointer would look like; ours needs none."""
    (run.checkpoints / "latest").write_text("global_step999\n")


@pytest.mark.parametrize("_case", [pytest.param(None, id="f33_no_manifest")])
def test_no_checkpoint_verifies(_case: None, damaged: RunFolder, local_bed: LocalBed, row: Row) -> None:
    """When nothing can be trusted the run refuses to start again from step 0 in silence."""
    row.fault = "the manifests of all checkpoints deleted"
    lose_manifests(damaged)
    answer = local_bed.launcher("resume", damaged.run_id)
    assert answer.code != 0
    assert len([attempt for attempt in story(damaged) if attempt.steps]) == 1
    why = local_bed.launcher("why", damaged.run_id).out + answer.err
    row.seen = f"exit {answer.code}"
    assert "none is whole" in why or "damaged" in why


@pytest.mark.parametrize("_case", [pytest.param(None, id="f33_garbage_pointer")])
def test_garbage_beside_checkpoints(
    _case: None, damaged: RunFolder, local_bed: LocalBed, local_reference: Reference, row: Row
) -> None:
    """Which checkpoint is newest is read from the checkpoints themselves."""
    row.fault = "a pointer file with nonsense beside the checkpoints"
    garbage_pointer(damaged)
    local_bed.launcher("resume", damaged.run_id, "--detach").expect()
    check_survival(local_bed, damaged, local_reference("lora"), row, causes=("rank_killed", "finished"))


@pytest.mark.parametrize("_case", [pytest.param(None, id="f34_stale_temporaries")])
def test_stale_temporaries(
    _case: None, damaged: RunFolder, local_bed: LocalBed, local_reference: Reference, row: Row
) -> None:
    """What a killed save left behind is swept away."""
    row.fault = "half a checkpoint and half a pickle left behind by a killed attempt"
    stale = damaged.checkpoints / ".step-000016.1.0.tmp"
    stale.mkdir()
    (stale / "engine.pt").write_bytes(b"half")
    (damaged.submission / "1_submitted.pkl.save_tmp").write_bytes(b"")
    local_bed.launcher("resume", damaged.run_id, "--detach").expect()
    check_survival(local_bed, damaged, local_reference("lora"), row, causes=("rank_killed", "finished"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A place for a file system of its own; unmounted afterwards."""
    if os.geteuid() != 0:
        unavailable("mounting takes root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=False, capture_output=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param("size={bytes}", "no space left", id="f35_disk_full"),
        pytest.param("size=1g,nr_inodes={inodes}", "no inodes left", id="f36_no_inodes"),
    ],
)
def test_full_disk(
    options: str,
    words: str,
    stopped: RunFolder,
    damaged: RunFolder,
    small_disk: Path,
    local_bed: LocalBed,
    local_reference: Reference,
    row: Row,
) -> None:
    """A save that does not fit is told and leaves the checkpoints before it alone; training goes on without it."""
    row.fault = f"checkpoints on a file system with {words}"
    there = [path for path in damaged.checkpoints.rglob("*") if not path.name.startswith(".")]
    room = {"bytes": sum(path.stat().st_size for path in there) + 65536, "inodes": len(there) + 4}
    mount = ["mount", "-t", "tmpfs", "-o", options.format(**room), "tmpfs", str(small_disk)]
    subprocess.run(mount, check=True)
    shutil.copytree(damaged.checkpoints, small_disk, dirs_exist_ok=True)
    shutil.rmtree(damaged.checkpoints)
    damaged.checkpoints.symlink_to(small_disk)
    local_bed.launcher("resume", damaged.run_id, "--detach").expect()
    check_survival(local_bed, damaged, local_reference("lora"), row, causes=("rank_killed", "finished"))
    failed = events(damaged, "save_failed")
    row.seen = f"{len(failed)} saves failed, none of them fatal"
    assert failed
    assert str(damaged.checkpoints) in failed[0]["error"]
    assert (damaged.checkpoints / "step-000012" / "manifest.json").exists()
    damaged.checkpoints.unlink()


@pytest.mark.parametrize("_case", [pytest.param(None, id="f36_read_only_folder")])
def test_read_only_folder(_case: None, local_bed: LocalBed, row: Row) -> None:
    """A folder for runs that cannot be written is refused before anything starts."""
    row.fault = "output_dir on a read-only file system"
    target = local_bed.home / "read-only"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(target)], check=True)
    try:
        answer = local_bed.launcher(
            "submit", local_bed.fault_recipe("lora-readonly", output_dir=str(target)), "--local"
        )
    finally:
        subprocess.run(["umount", str(target)], check=True)
    row.seen = f"refused, exit {answer.code}"
    assert answer.code not in (0, 1)
    assert "read-only" in answer.err.lower() or "read only" in answer.err.lower()


@pytest.mark.parametrize("_case", [pytest.param(None, id="f37_slow_steps")])
def test_slow_steps_do_not_matter(_case: None, local_bed: LocalBed, local_reference: Reference, row: Row) -> None:
    """Faults that only slow a run down leave its numbers alone: the premise of every test that needs time."""
    row.fault = "0.4 s of sleep before every step"
    run = local_bed.inject("lora-slow", SLOW)
    check_survival(local_bed, run, local_reference("lora"), row, causes=("finished",), lost=0)


SLOW_CALLS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>

static void wait_ms(const char *path, long ms) {
    const char *slow = getenv("SLOW_FOLDER");
    if (!slow || !path || !strstr(path, slow)) return;
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, 0);
}
int rename(const char *from, const char *to) {
    wait_ms(to, 1000);
    return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(from, to);
}
int stat(const char *path, struct stat *into) {
    wait_ms(path, 20);
    return ((int (*)(const char *, struct stat *))dlsym(RTLD_NEXT, "stat"))(path, into);
}
"""
"""A shared file system under load, as its clients see it: every rename takes a second, every stat 20 ms."""


@pytest.fixture(scope="module")
def slow_calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that slows them down, for LD_PRELOAD."""
    folder = tmp_path_factory.mktemp("slow")
    source, library = folder / "slow.c", folder / "slow.so"
    source.write_text(SLOW_CALLS)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@pytest.mark.parametrize("_case", [pytest.param(None, id="f37_slow_file_system")])
def test_slow_file_system(
    _case: None, slow_calls: Path, local_bed: LocalBed, local_reference: Reference, row: Row
) -> None:
    """Nobody takes a slow answer for a missing one: the run dies once, goes on, and ends as ever."""
    row.fault = "every rename in the run folder takes 1 s, every stat 20 ms; rank 1 killed"
    recipe = local_bed.fault_recipe("lora-slowdisk", checkpoint={"save_steps": SAVE_STEPS * 2})
    slow = {"LD_PRELOAD": str(slow_calls), "SLOW_FOLDER": "/runs/lora-slowdisk"}
    run = local_bed.launch(recipe, LAUNCHER_FAULT=INTERRUPTED, **slow)
    status = local_bed.launcher("status", run.run_id, "--json").expect()
    assert '"UNKNOWN"' not in status.out
    causes = ("rank_killed", "finished")
    check_survival(local_bed, run, local_reference("lora"), row, causes=causes, lost=SAVE_STEPS * 2)
