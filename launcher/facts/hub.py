"""The hub asked: which files a repository has at a commit, and one of them fetched; its refusals as our errors.

huggingface_hub does the talking ($HF_ENDPOINT, resumed downloads, xet). What it fetched is not trusted here: callers
compare it with the sizes and hashes of the listing. Tokens come from the environment, `hf auth login` or netrc, and
are never shown.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.util
import netrc
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from launcher.errors import ClusterError, DataError, LauncherError, ModelError, RecipeError, TemporaryError, raise_all
from launcher.facts.staged import Kind

ENDPOINT = "https://huggingface.co"
MOST_HTTP_BYTES = 50 * 10**9
"""Larger files do not come over plain HTTP (huggingface_hub's MAX_HTTP_DOWNLOAD_SIZE)."""
UNFINISHED = ".cache"
"""Folder below the fetched files for what has not come whole."""
_CREDENTIALS = re.compile(r"//[^/@\s]+@")
_KEY = {"model": "model.name_or_path", "dataset": "data"}
_ERROR: dict[Kind, type[LauncherError]] = {"model": ModelError, "dataset": DataError}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


class TornError(TemporaryError):
    """An answer that is complete and yet not as long as the hub said the file is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """One file of a repository, as the hub lists it."""

    path: str
    """Relative to the repository, with slashes."""
    size_bytes: int | None
    sha256: str | None = None
    """Of large files (git-lfs, xet)."""
    git_sha1: str | None = None
    """Git's own hash of the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """One repository at one commit."""

    kind: Kind
    id: str
    asked: str
    """Branch, tag or commit as asked for."""
    commit: str
    files: tuple[RemoteFile, ...]

    def file(self, path: str) -> RemoteFile | None:
        """The file of that path, if there is one."""
        return next((one for one in self.files if one.path == path), None)

    @property
    def paths(self) -> list[str]:
        """Every path, in the hub's order."""
        return [one.path for one in self.files]

    @property
    def error(self) -> type[LauncherError]:
        """Class of errors about it."""
        return _ERROR[self.kind]

    @property
    def where(self) -> str:
        """What messages about it begin with."""
        return f"{_KEY[self.kind]}: {self.id} at {self.commit[:12]}"


def endpoint() -> str:
    """Address of the hub: $HF_ENDPOINT, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")


def available() -> bool:
    """Whether huggingface_hub is installed here; it comes with the train environment."""
    return importlib.util.find_spec("huggingface_hub") is not None


def repository(kind: Kind, name: str, revision: str | None) -> Repository:
    """What the hub has under an id, the revision resolved to a commit hash.

    Raises:
        ModelError, DataError: no such id or revision, it is gated, or it lists paths that no repository may have.
        TemporaryError: the hub does not answer.
        RecipeError: the hub client is told to stay offline.
        ClusterError: huggingface_hub is not installed here.
    """
    asked = revision or "main"
    with _asking(kind, name, asked):
        api = _library().HfApi(endpoint=endpoint(), token=_token())
        info = api.repo_info(name, repo_type=kind, revision=asked, files_metadata=True)
    commit = str(info.sha or "")
    if not _SHA1.fullmatch(commit):
        raise _ERROR[kind](f"{_KEY[kind]}: {name}: the hub gives no commit hash for {asked!r} (it says {commit!r})")
    files = tuple(_remote_file(one) for one in info.siblings or [])
    raise_all(_ERROR[kind], [f"{_KEY[kind]}: {name}: a file path that is refused: {one.path!r}" for one in files
                             if not _harmless(one.path)])  # fmt: skip
    return Repository(kind=kind, id=name, asked=asked, commit=commit, files=files)


def _remote_file(sibling: Any) -> RemoteFile:
    large = sibling.lfs
    sha256 = str(large["sha256"]) if large and large.get("sha256") else None
    size = large["size"] if large and large.get("size") is not None else sibling.size
    return RemoteFile(
        path=str(sibling.rfilename), size_bytes=size, sha256=sha256, git_sha1=None if large else sibling.blob_id
    )


def _harmless(path: str) -> bool:
    """Relative, printable, without a step upwards: it will be a path below our folder."""
    parts = PurePosixPath(path).parts
    return bool(parts) and path.isprintable() and not path.startswith("/") and "\\" not in path and ".." not in parts


def completed(repo: Repository, path: str) -> RemoteFile:
    """The file with size and hash, asked for one by one where the listing left them out, as some mirrors do.

    Raises:
        ModelError, DataError: the hub tells neither a size nor a hash, so nothing fetched could be verified.
    """
    listed = repo.file(path)
    if listed is not None and listed.size_bytes is not None and (listed.sha256 or listed.git_sha1):
        return listed
    library = _library()
    with _asking(repo.kind, repo.id, repo.asked):
        url = library.hf_hub_url(repo.id, path, repo_type=repo.kind, revision=repo.commit, endpoint=endpoint())
        found = library.get_hf_file_metadata(url, token=_token() or False, endpoint=endpoint())
    etag = str(found.etag or "")
    sha256 = etag if _SHA256.fullmatch(etag) else None
    git_sha1 = etag if _SHA1.fullmatch(etag) else None
    if found.size is None or not (sha256 or git_sha1):
        raise repo.error(f"{repo.where}: the hub tells no size or hash of {path}, so a copy could not be verified")
    return RemoteFile(path=path, size_bytes=found.size, sha256=sha256, git_sha1=git_sha1)


def fetch(repo: Repository, path: str, folder: Path, advance: Callable[[int], None], *, again: bool = False) -> Path:
    """Fetch one file into `folder`, going on where an earlier try stopped; `advance` is told of bytes as they come.

    What is there under that name already is left as it is, verified or not, unless it is to be fetched `again`.
    The library's own hf_hub_download begins every file anew in every process, which for a shard of gigabytes on an
    unsteady line may mean never; so its http_get is given a file that stays, and asks for the rest.

    Raises:
        TornError: the whole answer came, and it is not as long as the hub said.
        ModelError, DataError, TemporaryError: as `repository`.
        ClusterError: the folder cannot be written.
    """
    target, part = folder / path, folder / UNFINISHED / f"{path}.part"
    if target.is_file() and not again:
        return target
    expected = completed(repo, path).size_bytes or 0
    with _asking(repo.kind, repo.id, repo.asked):
        if expected > MOST_HTTP_BYTES:
            return _fetch_huge(repo, path, folder, advance, again=again)
        for one in (target, part):
            one.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            _alone(file, f"{_KEY[repo.kind]}: {path} of {repo.id}")
            if again or file.tell() > expected:
                file.truncate(0)
            _fetch_rest(repo, path, file, expected, advance)
        part.replace(target)
    return target


def _fetch_rest(
    repo: Repository, path: str, file: BinaryIO, expected_bytes: int, advance: Callable[[int], None]
) -> None:
    library = _library()
    url = library.hf_hub_url(repo.id, path, repo_type=repo.kind, revision=repo.commit, endpoint=endpoint())
    file.seek(0, os.SEEK_END)
    try:
        importlib.import_module("huggingface_hub.file_download").http_get(
            url,
            file,
            resume_size=file.tell(),
            headers=library.utils.build_hf_headers(token=_token() or False),
            expected_size=expected_bytes,
            displayed_filename=path,
            tqdm_class=_bar(advance),
        )
    except OSError as error:
        if type(error) is OSError and error.errno is None:  # its word for a whole answer of another length
            raise TornError("does not have the length that the hub said") from error
        raise


def _fetch_huge(repo: Repository, path: str, folder: Path, advance: Callable[[int], None], *, again: bool) -> Path:
    """A file that the hub gives out in chunks only (xet)."""
    found = _library().hf_hub_download(
        repo.id,
        path,
        repo_type=repo.kind,
        revision=repo.commit,
        local_dir=folder,
        endpoint=endpoint(),
        token=_token() or False,
        tqdm_class=_bar(advance),
        force_download=again,
    )
    return Path(found)


def _alone(file: BinaryIO, what: str) -> None:
    """Two processes that append to one file would spoil it; where locks are not kept, the hashes still tell.

    Raises:
        TemporaryError: another process is at it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TemporaryError(f"{what} is being fetched by another launcher stage; wait for it") from error
    except OSError:
        return


def _bar(advance: Callable[[int], None]) -> type[Any]:
    """A progress bar class, as the library wants one, that only passes the bytes on."""

    class Bar:
        def __init__(self, *_args: Any, total: int | None = None, initial: int = 0, **_named: Any) -> None:
            self.total, self.n = total, initial
            if initial:
                advance(initial)  # fetched by an earlier try

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_error: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            advance(int(n or 0))

        def ignore(self, *_args: Any, **_named: Any) -> None:
            """What a bar on a screen would do."""

        update_transfer = set_postfix_str = set_transfer_postfix_str = set_description = refresh = close = ignore

    return Bar


def _library() -> Any:
    """huggingface_hub, which says nothing: its warnings would show signed addresses.

    Raises:
        ClusterError: it is not installed.
    """
    try:
        library = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ClusterError(
            "stage: huggingface_hub is not installed here; install finetune-launcher[train], or name an environment "
            "that has it in LAUNCHER_VENV"
        ) from error
    library.logging.set_verbosity(50)
    return library


def _token() -> str | None:
    """The token of the environment or of `hf auth login`, else the password that netrc has for the hub's host."""
    token: str | None = _library().get_token()
    if token:
        return token
    try:
        entry = netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(endpoint()).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] if entry else None


@contextlib.contextmanager
def _asking(kind: Kind, name: str, asked: str) -> Iterator[None]:
    """Turn the library's complaints into our errors, naming the id and never a token."""
    errors = importlib.import_module("huggingface_hub.errors") if available() else None
    if errors is None:
        _library()
        return
    where, error = f"{_KEY[kind]}: {name}", _ERROR[kind]
    try:
        yield
    except errors.OfflineModeIsEnabled as offline:
        raise RecipeError(
            "HF_HUB_OFFLINE is set here, so the hub is not asked; staging is the step that needs it: "
            "HF_HUB_OFFLINE=0 launcher stage ..."
        ) from offline
    except errors.GatedRepoError as gated:
        raise error(f"{where} is gated{_access(gated, name)}") from gated
    except errors.RevisionNotFoundError as missing:
        raise error(f"{where} has no revision {asked!r}; give a branch, a tag or a commit hash") from missing
    except errors.RepositoryNotFoundError as missing:
        raise error(
            f"{where}: the hub has nothing of this name, or does not show it{_access(missing, name)}"
        ) from missing
    except errors.LocalEntryNotFoundError as away:
        raise _unavailable(away.__cause__ or away, where, error) from away
    except (errors.HTTPError, OSError) as trouble:
        raise _unavailable(trouble, where, error) from trouble
    except ValueError as refused:
        if isinstance(refused.__cause__, errors.HTTPError | OSError):
            raise _unavailable(refused.__cause__, where, error) from refused
        raise error(f"{where}: the hub client refuses it: {str(refused).strip().splitlines()[0]}") from refused


def _access(refusal: Any, name: str) -> str:
    """How the hub refused, and which token was missing; never its value."""
    status = getattr(getattr(refusal, "response", None), "status_code", None)
    said = f" (the hub answered {status})" if status else ""
    if _token() is None:
        return (
            f"{said}, and no token is set here: HF_TOKEN is empty, and neither `hf auth login` nor netrc has one. If "
            f"you may read {name}, set HF_TOKEN and stage it again"
        )
    source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login` or netrc"
    return f"{said}: the token of {source} may not read it. Ask for access on the page of {name}, then stage it again"


def _unavailable(trouble: BaseException, where: str, error: type[LauncherError]) -> LauncherError:
    """What is left: refused by status, no network, or a disk that takes no more."""
    status = getattr(getattr(trouble, "response", None), "status_code", None)
    if status in (401, 403):
        return error(f"{where}: the hub refuses it{_access(trouble, where.split(': ')[1])}")
    if status == 416:  # more was kept than there is
        return TornError("does not have the length that the hub said")
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return error(f"{where}: the hub answered {status}")
    if isinstance(trouble, OSError) and trouble.errno is not None and not isinstance(trouble, ConnectionError):
        return ClusterError(f"{where}: cannot be written to the cache ({trouble.strerror})")
    words = _CREDENTIALS.sub("//", str(trouble).strip().splitlines()[0] if str(trouble).strip() else "")
    return TemporaryError(
        f"{where}: {_CREDENTIALS.sub('//', endpoint())} does not answer ({type(trouble).__name__}: {words[:200]}); "
        "what was fetched is kept, so the same command goes on from there. On a node without network, stage from one "
        "that has it"
    )
