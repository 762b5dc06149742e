"""One repository of the hub brought into the cache: fetched beside its place, compared with what the hub said, renamed.

Until the rename nothing can be found; after it the folder is whole, and manifest.json holds the hash of every file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launcher.errors import ClusterError, TemporaryError, raise_all
from launcher.facts import hub
from launcher.facts.hub import RemoteFile, Repository
from launcher.facts.staged import FORMAT, MANIFEST, Kind, read_manifest, read_refs, repository
from launcher.facts.weights import model_folder_problems, shard_problem
from launcher.runs import partial
from launcher.runs.folder import write_json
from launcher.runs.wanted import Wanted

WORKERS = 4
"""Files fetched at once: one connection seldom fills a line."""
_CHUNK = 4 * 2**20
_POINTER = b"version https://git-lfs"


class Progress(Protocol):
    """Who is told how it goes; called from several threads."""

    def begin(self, what: str, total_bytes: int) -> None:
        """So many bytes of `what` will come."""

    def advance(self, bytes_: int) -> None:
        """So many came; fewer than none when a file is begun again."""

    def done(self, path: str, size_bytes: int, how: str) -> None:
        """One file is there and verified."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Digest:
    """A file as it lies there."""

    size_bytes: int
    sha256: str
    git_sha1: str
    pointer: bool
    """A git-lfs pointer stands where content should be."""


def digest(path: Path, advance: Callable[[int], None] = lambda _: None) -> Digest:
    """Read a file once and hash it in both of the hub's ways."""
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
        file.seek(0)
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            git.update(chunk)
            advance(len(chunk))
    return Digest(size_bytes=size, sha256=sha256.hexdigest(), git_sha1=git.hexdigest(), pointer=start == _POINTER)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetch:
    """What is to be fetched of one repository, and what is there already."""

    repo: Repository
    files: tuple[RemoteFile, ...]
    """All that belong into the folder, with sizes and hashes."""
    splits: dict[str, list[str]] | None
    configs: dict[str, dict[str, list[str]]] | None
    target: Path
    kept: frozenset[str]
    """Paths in `target` that are right."""

    @property
    def partial(self) -> Path:
        """Where files lie until they are verified."""
        return self.target.with_name(f"{self.target.name}{partial.SUFFIX}")

    @property
    def missing(self) -> tuple[RemoteFile, ...]:
        """What has to come."""
        return tuple(one for one in self.files if one.path not in self.kept)

    @property
    def fetch_bytes(self) -> int:
        """Bytes of `missing`; earlier tries may have brought some of them."""
        return sum(one.size_bytes or 0 for one in self.missing)

    @property
    def space_bytes(self) -> int:
        """Bytes of disk that are still needed."""
        there = sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
        return max(0, self.fetch_bytes - there)


def plan_fetch(repo: Repository, wanted: Wanted, cache: Path, *, verify: bool) -> Fetch:
    """Compare what is wanted with what is staged; `verify` reads staged files again, otherwise sizes must do.

    Raises:
        ModelError, DataError, TemporaryError: the hub does not tell what a file must be like.
    """
    target = repository(cache, repo.kind, repo.id) / repo.commit
    files = tuple(hub.completed(repo, path) for path in wanted.paths)
    whole = read_manifest(target) is not None
    kept = frozenset(one.path for one in files if whole and _is_right(target / one.path, one, verify=verify))
    splits = None if wanted.splits is None else _lists(wanted.splits)
    configs = None if wanted.configs is None else {name: _lists(one) for name, one in wanted.configs.items()}
    return Fetch(repo=repo, files=files, splits=splits, configs=configs, target=target, kept=kept)


def _lists(splits: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {split: list(paths) for split, paths in splits.items()}


def _is_right(path: Path, wanted: RemoteFile, *, verify: bool) -> bool:
    try:
        if path.stat().st_size != wanted.size_bytes or (path.suffix == ".safetensors" and shard_problem(path)):
            return False
        return not verify or _difference(digest(path), wanted) is None
    except OSError:
        return False


def _difference(found: Digest, wanted: RemoteFile) -> str | None:
    """In which way a file is not what the hub said; None where it is."""
    if found.pointer:
        return f"is a git-lfs pointer ({found.size_bytes} bytes), not the content"
    if found.size_bytes != wanted.size_bytes:
        return f"has {found.size_bytes} bytes, the hub said {wanted.size_bytes}"
    if wanted.sha256 and found.sha256 != wanted.sha256:
        return f"has sha256 {found.sha256[:16]}..., the hub said {wanted.sha256[:16]}..."
    if wanted.git_sha1 and found.git_sha1 != wanted.git_sha1:
        return f"has git hash {found.git_sha1[:16]}..., the hub said {wanted.git_sha1[:16]}..."
    return None


def carry_out(fetch: Fetch, progress: Progress) -> None:
    """Fetch, verify and publish; does nothing where all is there.

    Raises:
        ModelError, DataError: what came is not what the hub said, twice; or the whole is no usable model.
        TemporaryError: no network; what came is kept for the next try.
        ClusterError: the cache cannot be written.
    """
    if not fetch.missing and _unchanged(fetch):
        _remember(fetch)
        return
    try:
        with partial.growing(fetch.partial):
            with _cancellable(progress) as advance:
                progress.begin(fetch.repo.id, fetch.fetch_bytes)
                fetched = _fetch_all(fetch, progress, advance)
            _publish(fetch, fetched)
    except OSError as error:
        raise ClusterError(f"{fetch.target}: cannot be written ({error.strerror or error})") from error


def _unchanged(fetch: Fetch) -> bool:
    manifest = read_manifest(fetch.target) or {}
    return manifest.get("splits") == fetch.splits and manifest.get("configs") == fetch.configs


@contextlib.contextmanager
def _cancellable(progress: Progress) -> Iterator[Callable[[int], None]]:
    """An `advance` that ends its thread once this block was left by an error or Ctrl-C: downloads take hours."""
    over = threading.Event()

    def advance(bytes_: int) -> None:
        if over.is_set():
            raise TemporaryError("stopped")
        progress.advance(bytes_)

    try:
        yield advance
    except BaseException:
        over.set()
        raise


def _fetch_all(fetch: Fetch, progress: Progress, advance: Callable[[int], None]) -> dict[str, Digest]:
    """Every missing file, verified, a few at a time; the first error ends all."""
    pool = ThreadPoolExecutor(WORKERS)
    try:
        coming = {one.path: pool.submit(_verified, fetch, one, progress, advance) for one in fetch.missing}
        return {path: future.result() for path, future in coming.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _verified(fetch: Fetch, wanted: RemoteFile, progress: Progress, advance: Callable[[int], None]) -> Digest:
    """One file: fetched, and if it is not what the hub said, once more from its start."""
    wrong: str | None = None
    for again in (False, True):
        try:
            path = hub.fetch(fetch.repo, wanted.path, fetch.partial, advance, again=again)
        except hub.TornError as torn:
            wrong = torn.problems[0]
            continue
        found = digest(path)
        wrong = _difference(found, wanted)
        if wrong is None and path.suffix == ".safetensors":
            wrong = shard_problem(path)
        if wrong is None:
            progress.done(wanted.path, found.size_bytes, "fetched")
            return found
        path.unlink(missing_ok=True)
        advance(-(found.size_bytes))
    raise fetch.repo.error(
        f"{fetch.repo.where}: {wanted.path} {wrong}, twice; nothing of it is kept. Is a proxy in between?"
    )


def _publish(fetch: Fetch, fetched: dict[str, Digest]) -> None:
    """Manifest last, then the rename; files that replace damaged ones are moved one by one."""
    known = {one["path"]: one for one in (read_manifest(fetch.target) or {}).get("files", [])}
    files = [
        {"path": one.path, "bytes": one.size_bytes, "sha256": fetched[one.path].sha256}
        if one.path in fetched
        else known.get(one.path) or {"path": one.path, "bytes": one.size_bytes, "sha256": one.sha256}
        for one in fetch.files
    ]
    document = manifest(fetch.repo.kind, fetch.repo.id, fetch.repo.commit, files) | {
        "asked_revision": fetch.repo.asked,
        "splits": fetch.splits,
        "configs": fetch.configs,
    }
    partial.unmark(fetch.partial)
    repairs = read_manifest(fetch.target) is not None
    if not repairs and fetch.repo.kind == "model":
        problems = model_folder_problems(fetch.partial)
        raise_all(fetch.repo.error, [f"{fetch.repo.where}: {one}" for one in problems if "its own code" not in one])
    if repairs:
        for path in fetched:
            (fetch.target / path).parent.mkdir(parents=True, exist_ok=True)
            (fetch.partial / path).replace(fetch.target / path)
        write_shared(fetch.target / MANIFEST, document)
        shutil.rmtree(fetch.partial, ignore_errors=True)
    else:
        write_shared(fetch.partial / MANIFEST, document)
        _become(fetch.partial, fetch.target)
    _remember(fetch)


def _become(grown: Path, target: Path) -> None:
    """Rename, unless another process was first; whatever lies there without a manifest was never whole."""
    if target.exists() and read_manifest(target) is None:
        shutil.rmtree(target)
    try:
        grown.rename(target)
    except OSError:
        if read_manifest(target) is None:
            raise
        shutil.rmtree(grown, ignore_errors=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remember(fetch: Fetch) -> None:
    """Which commit the revision means, for those who ask without a network."""
    refs = read_refs(fetch.target.parent)
    if refs.get(fetch.repo.asked) != fetch.repo.commit:
        write_shared(fetch.target.parent / "refs.json", refs | {fetch.repo.asked: fetch.repo.commit})


def manifest(kind: str, name: str | None, revision: str, files: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of a staged folder."""
    return {FORMAT: 1, "kind": kind, "id": name, "revision": revision, "time_s": time.time(), "files": files}


def write_shared(path: Path, document: dict[str, Any]) -> None:
    """Write JSON that whoever may read the folder may read, too: colleagues train from the same cache."""
    write_json(path, document)
    path.chmod(stat.S_IMODE(path.parent.stat().st_mode) & 0o666)


def from_manifest(kind: Kind, name: str, path: Path) -> Fetch | None:
    """A staged folder as a finished fetch, sizes compared with its manifest; None where a file is not as it was."""
    document = read_manifest(path)
    if document is None:
        return None
    files = tuple(
        RemoteFile(path=str(one["path"]), size_bytes=one["bytes"], sha256=one["sha256"]) for one in document["files"]
    )
    if not all(_is_right(path / one.path, one, verify=False) for one in files):
        return None
    asked = str(document.get("asked_revision") or document["revision"])
    repo = Repository(kind=kind, id=name, asked=asked, commit=str(document["revision"]), files=files)
    kept = frozenset(one.path for one in files)
    return Fetch(
        repo=repo, files=files, splits=document.get("splits"), configs=document.get("configs"), target=path, kept=kept
    )
