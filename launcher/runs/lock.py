"""lock: one submitter of a run at a time.

    with hold(run, "resume"):
        ...                      # look for live jobs, write, submit

`submit.lock` in the run folder says who holds it. It appears by O_EXCL and goes with its holder. One that was left
behind is taken over when its process is provably gone (this machine, this boot, this process namespace), or, where that
cannot be told, after FOREIGN_AGE_S: longer than any submission takes. Two that take over at once are kept apart by
flock on the very file, which the kernel drops with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, ConflictError
from launcher.facts.probe import user_name
from launcher.runs.folder import RunFolder
from launcher.runs.process import Process, identify, is_alive, is_here, process_from_json
from launcher.runs.variables import not_ours

FOREIGN_AGE_S = 900.0
"""A lock of another machine (or one that cannot be read) counts as left behind when it is older than this."""
_RENEW_S = 60.0
_WRITTEN_AFTER_S = 2.0
"""So long a lock may be there without its holder's name in it; then it is judged as it is."""
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a lock."""

    token: str
    """Random; the lock is removed only by who wrote it."""
    purpose: str
    """The verb: submit, resume, requeue."""
    user: str
    time_s: float
    process: Process
    namespace: str
    """Process namespace: in another one (a container), the same number is another process."""
    renewed_s: float | None = None
    """When its holder last said that it is still at work (`renew`)."""

    @property
    def gone(self) -> bool:
        """Whether the holder is provably dead, or too old to be believed."""
        if is_here(self.process) and self.namespace == _namespace():
            return not is_alive(self.process)
        return time.time() - max(self.time_s, self.renewed_s or 0.0) > FOREIGN_AGE_S

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time_s))
        return (
            f"launcher {self.purpose} of {self.user} on {self.process.host} (process {self.process.pid}, since {when})"
        )


def lock_path(run: RunFolder) -> Path:
    """The lock file of a run."""
    return run.path / "submit.lock"


@contextlib.contextmanager
def hold(run: RunFolder, purpose: str) -> Iterator[None]:
    """Be the only one who submits this run, for as long as the block lasts.

    Raises:
        ConflictError: somebody else is; names the host, process, user and time.
        ClusterError: the run folder cannot be written, or is not ours alone.
    """
    path, mine = lock_path(run), _myself(purpose)
    trouble = not_ours(run.path)
    if trouble:
        raise ClusterError(f"run folder {run.path}: {trouble}; its job would run whatever others put there")
    try:
        _take(path, mine)
    except OSError as error:
        raise ClusterError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if (held := _read(path)) is not None and held.token == mine.token:
                path.unlink()


def renew(run: RunFolder) -> None:
    """Keep a lock of ours from looking left behind on other machines; for who holds one longer than FOREIGN_AGE_S.

    Does nothing more often than once a minute, and nothing to a lock that is somebody else's.
    """
    path = lock_path(run)
    held = _read(path)
    if held is None or held.process != identify(os.getpid()):
        return
    if time.time() - max(held.time_s, held.renewed_s or 0.0) < _RENEW_S:
        return
    with contextlib.suppress(OSError):  # a full disk now is no reason to end what is at work
        descriptor = os.open(path, _FLAGS)
        with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, file.fileno()):
                _write(file.fileno(), replace(held, renewed_s=time.time()))


def holder(run: RunFolder) -> Holder | None:
    """Who holds the run's lock now; None when nobody alive does."""
    held = _read(lock_path(run))
    return None if held is None or held.gone else held


def _myself(purpose: str) -> Holder:
    process = identify(os.getpid())
    if process is None:
        raise RuntimeError("this process has no entry in /proc; the launcher needs Linux")
    return Holder(
        token=secrets.token_hex(8),
        purpose=purpose,
        user=user_name(),
        time_s=time.time(),
        process=process,
        namespace=_namespace(),
    )


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _take(path: Path, mine: Holder) -> None:
    """Create the lock, or take it over from somebody who is gone."""
    written_by = time.monotonic() + _WRITTEN_AFTER_S
    while True:
        try:
            descriptor = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            if _take_over(path, mine, patient=time.monotonic() < written_by):
                return
            time.sleep(0.02)
            continue
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            _write(file.fileno(), mine)
        return


def _take_over(path: Path, mine: Holder, *, patient: bool) -> bool:
    """Write ourselves into a lock that was left behind; False when it is no longer there, or (patient) being written.

    Raises:
        ConflictError: its holder lives, or may.
    """
    if path.is_symlink():
        raise ConflictError(f"{path} is a symbolic link, which no launcher makes; look where it points and remove it")
    try:
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError:
        return False
    with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if patient:
                return False
            raise ConflictError(f"{path} is being taken over by another launcher ({error.strerror})") from error
        if not _is_still(path, file.fileno()):
            return False
        held = _parse(file.read())
        if held is None and patient:
            return False
        _refuse_living(path, held, os.fstat(file.fileno()).st_mtime)
        _write(file.fileno(), mine)
    return True


def _refuse_living(path: Path, held: Holder | None, written_s: float) -> None:
    """Raise unless the holder is gone; a lock without a readable holder is one being written, or an old torn one."""
    if held is None:
        if time.time() - written_s > FOREIGN_AGE_S:
            return
        raise ConflictError(f"another launcher is about to submit this run ({path}); try again in a moment")
    if held.gone:
        return
    hint = "wait for it to end"
    if not (is_here(held.process) and held.namespace == _namespace()):
        age_min = FOREIGN_AGE_S / 60
        hint = f"wait for it, or, if that process is gone, remove {path} (after {age_min:.0f} min it counts as gone)"
    raise ConflictError(f"run {path.parent.name} is being submitted by {held}; {hint}")


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name."""
    opened = os.fstat(descriptor)
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return (opened.st_ino, opened.st_dev) == (there.st_ino, there.st_dev)


def _write(descriptor: int, mine: Holder) -> None:
    text = json.dumps(asdict(mine)).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)
    os.fsync(descriptor)


def _read(path: Path) -> Holder | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
        return _parse(file.read())


def _parse(text: str) -> Holder | None:
    try:
        document: dict[str, Any] = json.loads(text)
        process = process_from_json(document.pop("process"))
        return None if process is None else Holder(process=process, **document)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
