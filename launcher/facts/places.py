"""places: where files can lie on a site, as this machine sees them: type, free space, quota, shared or not."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import TemporaryError
from launcher.facts.command import run_command
from launcher.facts.offer import FileSystem

SHARED_TYPES = frozenset(
    {
        *("nfs", "nfs3", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph", "fuse.ceph", "cephfs", "panfs"),
        *("wekafs", "afs", "glusterfs", "fuse.glusterfs", "orangefs", "pvfs2", "cifs", "smb3", "vast", "quobyte"),
    }
)
"""Types that other machines see too. Others may still be exported from here: the probe job knows better."""
MEMORY_TYPES = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_VARIABLES = (
    *("SCRATCH", "PSCRATCH", "SCRATCHDIR", "SCRATCH_DIR", "WORK", "WORKDIR", "PROJECT", "PROJECTDIR", "STORE"),
    *("GROUP_HOME", "GROUP_SCRATCH", "DATA", "FAST"),
)
"""What sites call their file systems, in the environment of a login."""
_KIB = 1024


def places(runs: Path, runs_written: str, environ: Mapping[str, str]) -> tuple[FileSystem, ...]:
    """The runs folder, which a profile names `runs_written`, the home folder and what the site's variables name."""
    wanted = [("runs", runs_written, runs), ("home", "$HOME", Path(environ.get("HOME") or "/nonexistent"))]
    wanted += [(name, f"${name}", Path(environ[name])) for name in _VARIABLES if environ.get(name, "").startswith("/")]
    found = (place(name, written, path) for name, written, path in wanted)
    return tuple(one for one in found if one is not None)


def place(name: str, written: str, path: Path) -> FileSystem | None:
    """What is known of the file system that holds `path` or will hold it; None where it cannot be looked at."""
    there = existing(path)
    try:
        space = os.statvfs(there)
    except OSError:
        return None
    source, kind = mount_of(there, mounts())
    return FileSystem(
        name=name,
        path=written,
        type=kind,
        shared=None if kind is None else kind in SHARED_TYPES,
        free_bytes=space.f_bavail * space.f_frsize,
        quota_bytes=_quota_left(there, source, kind),
    )


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = Path(os.path.realpath(path))
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def mounts() -> str:
    """What is mounted here, as the kernel lists it; empty where it does not."""
    try:
        return Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def mount_of(path: Path, mounts: str) -> tuple[str | None, str | None]:
    """Device and type of the mount that holds `path`, from the text of /proc/self/mounts; the last one mounted wins."""
    found: tuple[int, str | None, str | None] = (-1, None, None)
    for line in mounts.splitlines():
        words = line.split(" ")
        if len(words) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[1])
        inside = point == "/" or str(path) == point or str(path).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= found[0] and words[2] != "autofs":
            found = (len(point), words[0], words[2])
    return found[1], found[2]


def _quota_left(path: Path, source: str | None, kind: str | None) -> int | None:
    """Bytes that a quota leaves this user; None without one, or without a command that tells."""
    user = str(os.getuid())
    try:
        if kind == "lustre":
            ran = run_command(["lfs", "quota", "-q", "-u", user, str(path)], timeout_s=10)
            return lustre_quota_left(ran.stdout) if ran.returncode == 0 else None
        # quota exits 1 where a limit is passed, with the same table.
        return quota_left(run_command(["quota", "--no-wrap"], timeout_s=10).stdout, source)
    except TemporaryError:
        return None


def quota_left(text: str, source: str | None) -> int | None:
    """From `quota --no-wrap`: hard (else soft) limit less blocks of the row of `source`, both in KiB."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 4 and words[0] == source:
            return _left(*words[1:4])
    return None


def lustre_quota_left(text: str) -> int | None:
    """From `lfs quota -q`: path, KiB used, soft and hard limit; a long path has a line of its own."""
    numbers = re.findall(r"(?<=\s)(\d+\*?|\[\d+\])(?=\s|$)", " " + " ".join(text.split()))
    return _left(*numbers[:3]) if len(numbers) >= 3 else None


def _left(used: str, soft: str, hard: str) -> int | None:
    amounts = [re.sub(r"\D", "", word) for word in (used, soft, hard)]
    if not all(amount and len(amount) <= 18 for amount in amounts):
        return None
    taken, gentle, firm = (int(amount) for amount in amounts)
    limit = firm or gentle
    return max(0, limit - taken) * _KIB if limit else None
