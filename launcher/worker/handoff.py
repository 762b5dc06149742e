"""How rank 0 tells the other ranks that something it does alone is done, or why it failed.

A file on the shared file system, because the process group does not exist yet (building may take longer than
its time-out).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from launcher import errors
from launcher.errors import LauncherError
from launcher.runs.folder import write_json

_log = logging.getLogger(__name__)


class Handoff:
    """The file in which rank 0 tells the others how the build went."""

    def __init__(self, cache_dir: Path, name: str) -> None:
        self._path = cache_dir / "handoff" / f"{name}.json"

    def clear(self) -> None:
        """Forget an earlier outcome."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)

    def done(self, key: str) -> None:
        """The cache is complete under `key`."""
        write_json(self._path, {"key": key})

    def failed(self, error: BaseException) -> None:
        """The build ended with `error`."""
        problems = list(error.problems) if isinstance(error, LauncherError) else [f"{type(error).__name__}: {error}"]
        try:
            write_json(self._path, {"error": type(error).__name__, "problems": problems})
        except OSError:  # the disk that failed the build may fail this too; the others then run into their limit
            _log.exception("cannot tell the other ranks that the token cache failed")

    def key(self) -> str | None:
        """Key of the finished cache; None while rank 0 is at work.

        Raises:
            LauncherError: rank 0 failed.
        """
        # Listing the folder makes NFS ask the server again instead of repeating a remembered "not there".
        if not self._path.parent.is_dir() or self._path not in self._path.parent.iterdir():
            return None
        try:
            outcome = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:  # rank 0 has just cleared an older one
            return None
        if "key" in outcome:
            return str(outcome["key"])
        kind = getattr(errors, outcome["error"], None)
        if isinstance(kind, type) and issubclass(kind, LauncherError):
            raise kind(*outcome["problems"])
        raise RuntimeError("rank 0 failed to build the token cache: " + "; ".join(outcome["problems"]))
