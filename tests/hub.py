"""A hub-shaped server on loopback: repositories from folders, with the faults that real networks and hubs have."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 4096
"""Files from this size on are listed as git-lfs files, with their sha256."""


class FakeHub:
    """Serves folders as `owner/name`; what it was asked is kept, and it can be told to misbehave."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Path] = {}
        self.branches: dict[tuple[str, str, str], Path] = {}
        """(kind, id, branch or tag) -> folder; `main` and commits need none."""
        self.asked: list[tuple[str, str, str | None]] = []
        """(method, path, Range) of every request."""
        self.tokens: set[str | None] = set()
        self.cut_after_bytes: dict[str, list[int]] = {}
        """File -> after how many bytes its next answers end; once used up, answers are whole."""
        self.wrong: set[str] = set()
        """Files whose answers have another byte in them than what was listed."""
        self.pointers: set[str] = set()
        """Files that come as git-lfs pointers."""
        self.refuse: dict[str, tuple[int, str]] = {}
        """Id -> status and error code; GatedRepo is what the hub calls a gated one."""
        self.without_sizes = False
        """Leave sizes and hashes out of listings, as mirrors do."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[FakeHub]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join(10)

    def add(self, kind: str, name: str, folder: Path) -> str:
        """Publish a folder; returns its commit, which changes with the content."""
        self.repos[(kind, name)] = folder
        return self.commit(folder)

    def at(self, kind: str, name: str, revision: str) -> Path | None:
        """The folder of a branch, a tag or a commit."""
        main = self.repos[(kind, name)]
        branches = {"main": main} | {key[2]: one for key, one in self.branches.items() if key[:2] == (kind, name)}
        by_commit = {self.commit(one): one for one in branches.values()}
        return branches.get(revision) or by_commit.get(revision)

    @staticmethod
    def commit(folder: Path) -> str:
        content = hashlib.sha1(usedforsecurity=False)
        for path in _files(folder):
            content.update(str(path.relative_to(folder)).encode() + path.read_bytes())
        return content.hexdigest()

    def fetched(self, suffix: str = "") -> list[str]:
        """Names of files that were downloaded, in order."""
        return [path.split("/resolve/")[1].split("/", 1)[1] for method, path, _ in self.asked
                if method == "GET" and "/resolve/" in path and path.endswith(suffix)]  # fmt: skip

    def listing(self, folder: Path) -> dict[str, Any]:
        siblings = []
        for path in _files(folder):
            entry: dict[str, Any] = {"rfilename": str(path.relative_to(folder))}
            if not self.without_sizes:
                content = path.read_bytes()
                entry |= {"size": len(content), "blobId": _git_hash(content)}
                if len(content) >= LARGE_BYTES:
                    sha256 = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": "x", "sha": self.commit(folder), "siblings": siblings}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_args: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path, self.headers.get("Range")))
            hub.tokens.add(self.headers.get("Authorization"))
            if path.startswith("/api/"):
                _, _, kinds, owner, name, _, revision = path.split("/", 6)
                self._list(kinds.removesuffix("s"), f"{owner}/{name}", revision)
                return
            kind = "dataset" if path.startswith("/datasets/") else "model"
            owner, name, _, revision, file = path.removeprefix("/datasets").lstrip("/").split("/", 4)
            self._file(kind, f"{owner}/{name}", revision, file, body=body)

        def _refused(self, kind: str, name: str, revision: str) -> bool:
            status, code = hub.refuse.get(name, (0, ""))
            if not status and (kind, name) not in hub.repos:
                status, code = 404, "RepoNotFound"
            elif not status and hub.at(kind, name, revision) is None:
                status, code = 404, "RevisionNotFound"
            if status:
                self._send(status, b"{}", {"X-Error-Code": code})
            return bool(status)

        def _list(self, kind: str, name: str, revision: str) -> None:
            if not self._refused(kind, name, revision):
                document = hub.listing(hub.at(kind, name, revision))
                self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

        def _file(self, kind: str, name: str, revision: str, file: str, *, body: bool) -> None:
            if self._refused(kind, name, revision):
                return
            folder = hub.at(kind, name, revision)
            if not (folder / file).is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit(folder)})
                return
            content = (folder / file).read_bytes()
            large = len(content) >= LARGE_BYTES
            etag = hashlib.sha256(content).hexdigest() if large else _git_hash(content)
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit(folder), "Accept-Ranges": "bytes"}
            if large:
                headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            if not body:
                self._send(200, b"", headers | {"Content-Length": str(len(content))})
                return
            self._content(file, content, headers)

        def _content(self, file: str, content: bytes, headers: dict[str, str]) -> None:
            if file in hub.pointers:
                content = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
            if file in hub.wrong:
                content = bytes([content[0] ^ 1]) + content[1:]
            start = 0
            if asked := self.headers.get("Range"):
                start = int(asked.removeprefix("bytes=").split("-")[0])
                headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            rest = content[start:]
            cuts = hub.cut_after_bytes.get(file)
            if cuts:
                self._send(206 if start else 200, rest[: cuts.pop(0)], headers | {"Content-Length": str(len(rest))})
                self.close_connection = True
                return
            self._send(206 if start else 200, rest, headers)

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

    return Handler
