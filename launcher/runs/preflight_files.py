"""Preflight of files: whether compute nodes see the folders of a run, and whether its checkpoints have room."""

from __future__ import annotations

import contextlib
import grp
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from launcher.errors import ClusterError
from launcher.facts.files import is_dataset_id
from launcher.facts.offer import FileSystem, Site
from launcher.facts.places import MEMORY_TYPES, SHARED_TYPES, existing, mount_of, mounts, place
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe

_GIB = 2**30
_FILES_PER_RANK = 6
_FILES_OF_A_RUN = 100
"""Upper ends of what a checkpoint and a run folder hold besides, counted in files."""


def check_folder(parent: Path) -> None:
    """A file can be made where the run folder will be; sbatch would accept the job and lose its log.

    Raises:
        ClusterError: it cannot.
    """
    try:
        folder = parent.resolve()
        while not folder.exists():
            folder = folder.parent
        probe = folder / f".launcher-probe-{secrets.token_hex(6)}"
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        probe.unlink()
    except OSError as error:
        raise ClusterError(
            f"output_dir: {parent} cannot be written ({error.strerror}); set output_dir=... or LAUNCHER_RUNS to a "
            "folder that you own and that the compute nodes share"
        ) from error


def group_problems(group: str | None, parent: Path, notices: list[str]) -> Iterator[str]:
    """Why a run could not be given to a group to read; one notice where the group could not get as far as the run."""
    if group is None:
        return
    try:
        facts = grp.getgrnam(group)
    except KeyError:
        yield f"output_group: there is no group {group!r} here; yours: {', '.join(_my_groups())}"
        return
    if facts.gr_gid not in {os.getegid(), *os.getgroups()} and os.geteuid() != 0:
        yield f"output_group: you are not in the group {group!r}; yours: {', '.join(_my_groups())}"
        return
    closed = [str(folder) for folder in (parent, *parent.parents) if folder.exists() and not _may_pass(folder, facts)]
    if closed:
        notices.append(
            f"output_group: {group} may read the run but not pass {', '.join(reversed(closed))}; "
            f"chgrp {group} and chmod g+x where that is yours to decide"
        )


def _my_groups() -> list[str]:
    names = []
    for number in sorted({os.getegid(), *os.getgroups()}):
        with contextlib.suppress(KeyError):
            names.append(grp.getgrgid(number).gr_name)
    return names


def _may_pass(folder: Path, group: grp.struct_group) -> bool:
    mode = folder.stat()
    return bool(mode.st_mode & 0o001) or (mode.st_gid == group.gr_gid and bool(mode.st_mode & 0o010))


def check_working_folder() -> None:
    """The job starts where the launcher was called; a folder that is gone would end it in a second, without a log.

    Raises:
        ClusterError: it was removed, or may not be entered.
    """
    try:
        Path.cwd().stat()
    except OSError as error:
        raise ClusterError(
            f"working folder: it is gone ({error.strerror}), and jobs start in it; cd to one that exists"
        ) from error


# ---------------------------------------------------------------- seen by every node


def unshared(recipe: Recipe, site: Site, parent: Path, notices: list[str]) -> Iterator[str]:
    """Folders of the run that compute nodes cannot see; where only the probe job could tell, one notice."""
    maybe: dict[str, str] = {}
    listed = mounts()
    for key, path in _folders(recipe, parent):
        there = existing(path)
        kind = mount_of(there, listed)[1]
        shared = _by_profile(there, site)
        if shared is False:
            yield f"{key}: {path} is on a disk of this machine alone, says the profile of {site.name}; {_remedy(key)}"
        elif shared is None and kind in MEMORY_TYPES:
            yield f"{key}: {path} is in this machine's memory ({kind}), which no other node sees; {_remedy(key)}"
        elif shared is None and kind is not None and kind not in SHARED_TYPES:
            maybe.setdefault(kind, f"{key} ({path.absolute()})")
    if maybe:
        kind, where = next(iter(maybe.items()))
        notices.append(
            f"{where} lies on {kind}, which is often one machine's own disk; compute nodes must see it. "
            "launcher init --probe-job finds out, and writes it into the site profile (file_systems)"
        )


def _remedy(key: str) -> str:
    if key == "output_dir":
        return "set output_dir=... or LAUNCHER_RUNS to a folder that the compute nodes share"
    return "work from a folder that the compute nodes share" if key == "working folder" else "move it to a shared one"


def _folders(recipe: Recipe, parent: Path) -> Iterator[tuple[str, Path]]:
    yield "output_dir", parent
    yield "working folder", Path.cwd()
    model = Path(recipe.model.name_or_path).expanduser()
    if model.exists():
        yield "model.name_or_path", model
    for source in recipe.data.train:
        if not is_dataset_id(source.path):
            yield "data.train", Path(source.path).expanduser()


def _by_profile(path: Path, site: Site) -> bool | None:
    """What the site profile says of the file system that holds `path`: the longest of its paths above it."""
    best: tuple[int, bool | None] = (-1, None)
    for one in site.file_systems:
        root = os.path.expandvars(one.path)
        above = root.startswith("/") and (path == Path(root) or Path(root) in path.parents)
        if above and one.name != "node" and one.shared is not None and len(root) > best[0]:
            best = (len(root), one.shared)
    return best[1]


# ---------------------------------------------------------------- room for checkpoints


def no_room(recipe: Recipe, plan: Plan, parent: Path, *, kept: int = 0) -> Iterator[str]:
    """Space, quota and inodes for the checkpoints that are kept and the one being written; `kept` are there already."""
    found = place("runs", str(parent), parent)
    if found is None:
        return
    size, keep = plan.chosen.checkpoint_bytes, recipe.checkpoint.save_total_limit
    count = max(1, keep + 1 - kept)
    room, what = _room(found)
    if room is not None and size * count > room:
        fits = room // size - 1 + kept if size else keep
        smaller = f"checkpoint.save_total_limit={fits} fits; or " if 1 <= fits < keep else ""
        yield (
            f"output_dir: {parent.absolute()} has {_gib(room)} {what}, and the checkpoints need {_gib(size * count)}: "
            f"{count} of {_gib(size)} ({keep} kept and one being written); {smaller}set output_dir to a larger disk"
        )
    files = _FILES_PER_RANK * plan.chosen.candidate.world_size * count + _FILES_OF_A_RUN
    if (inodes := _free_inodes(parent)) is not None and inodes < files:
        yield f"output_dir: {parent} has room for {inodes} more files, and the run needs about {files}; remove some"


def _room(found: FileSystem) -> tuple[int | None, str]:
    amounts = [(found.free_bytes, "free"), (found.quota_bytes, "left of your quota")]
    known = [(amount, what) for amount, what in amounts if amount is not None]
    return min(known) if known else (None, "")


def _free_inodes(parent: Path) -> int | None:
    """Files that may still be made; None where the file system does not count them."""
    try:
        facts = os.statvfs(existing(parent))
    except OSError:
        return None
    return facts.f_favail if facts.f_files else None


def _gib(amount: int) -> str:
    return f"{amount / _GIB:,.1f} GiB" if amount >= _GIB // 10 else f"{amount / 2**20:,.1f} MiB"
