"""Staging on a terminal: a bar while bytes come, one line per file where nobody watches, and a table at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(bytes_: float) -> str:
    """Bytes for people: 4.9 GiB."""
    unit = 0
    while bytes_ >= 1024 and unit < len(_UNITS) - 1:
        bytes_, unit = bytes_ / 1024, unit + 1
    return f"{bytes_:.0f} {_UNITS[unit]}" if unit == 0 else f"{bytes_:.1f} {_UNITS[unit]}"


class Lines:
    """One line per file, for logs."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def begin(self, what: str, total_bytes: int) -> None:
        """Say what comes."""
        if total_bytes:
            print(f"{what}: {size(total_bytes)}", file=self._out, flush=True)

    def advance(self, bytes_: int) -> None:
        """A log shows no bytes."""

    def done(self, path: str, size_bytes: int, how: str) -> None:
        """Name the file."""
        print(f"  {how} {path} ({size(size_bytes)})", file=self._out, flush=True)


class Bar:
    """One bar for all that comes, with speed and time left."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._task: Any = None

    def begin(self, what: str, total_bytes: int) -> None:
        """A new bar for each repository or folder that has bytes to come."""
        self._task = self._bars.add_task(what, total=total_bytes) if total_bytes else None

    def advance(self, bytes_: int) -> None:
        """Move it."""
        if self._task is not None:
            self._bars.advance(self._task, bytes_)

    def done(self, path: str, size_bytes: int, how: str) -> None:
        """Name the file above the bar."""
        self._bars.console.print(f"  {how} {path} ({size(size_bytes)})", highlight=False, markup=False)


@contextlib.contextmanager
def progress(out: TextIO) -> Iterator[Bar | Lines]:
    """A bar on a terminal, lines otherwise."""
    if not out.isatty():
        yield Lines(out)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=out)) as bars:
        yield Bar(bars)


def print_staging(document: Mapping[str, Any]) -> None:
    """What is staged and where; of a dry run, what would be fetched."""
    dry = document["dry_run"]
    for item in document["items"]:
        print(_headline(item, dry=dry))
        for file in item["files"] if dry else ():
            print(f"  {file['state']:<11} {size(file['bytes']):>10}  {file['path']}")
    to_come = document["fetch_bytes"]
    if dry:
        print(f"to fetch: {size(to_come)} into {document['cache']}")


def _headline(item: Mapping[str, Any], *, dry: bool) -> str:
    name = f"{item['id']} at {item['revision'][:12]}" if item["id"] else item["source"]
    what = f"{item['kind']} {name}: {len(item['files'])} files, {size(item['bytes'])}"
    if item["id"] is None:
        return what + (", local" if item["path"] == item["source"] else f", copied to {item['path']}")
    if dry:
        return what + (f", {size(item['fetch_bytes'])} to fetch" if item["fetch_bytes"] else ", staged already")
    return what + f", in {item['path']}"
