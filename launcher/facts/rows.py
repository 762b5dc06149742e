"""The user's rows: one streaming reader for every file kind, each row with the place it came from.

Kinds: .jsonl/.ndjson, .json (a list, {"data": [...]}, or JSON lines under that name), .csv/.tsv (header
required), .txt (documents separated by blank lines), .parquet, .arrow; the text kinds also as .gz. Lines are
streamed; a .json document is held in memory. No code that comes with the data is ever run.

Planner and worker both read through this module: what the planner refuses is what the job would refuse.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from launcher.errors import DataError
from launcher.facts.files import data_files, kind
from launcher.recipe.schema import DataSource

SHOWN_PROBLEMS = 5
MAX_BLOCK_CHARS = 1_000_000
_MAX_CSV_FIELD_CHARS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Located:
    """One row and where it is: `line` counts from 1, in lines or (where a file has none) in rows."""

    path: str
    line: int
    row: Mapping[str, Any]
    by_row: bool = False

    @property
    def where(self) -> str:
        """`file:line`, or `file: row N`."""
        return place(self.path, self.line, by_row=self.by_row)


def place(path: str | Path, line: int, *, by_row: bool = False) -> str:
    """How a row's place is written in messages."""
    return f"{path}: row {line}" if by_row else f"{path}:{line}"


@dataclass(slots=True)
class Problems:
    """Problems of rows: the first few in full, all of them counted."""

    shown: list[str] = field(default_factory=list)
    total: int = 0

    def add(self, where: str, why: str) -> None:
        """Note one more problem row."""
        self.total += 1
        if len(self.shown) < SHOWN_PROBLEMS:
            self.shown.append(f"{where}: {why}")

    def raise_if_any(self) -> None:
        """Raise DataError with the first few problems and the total.

        Raises:
            DataError: when any problem was added.
        """
        if self.total > len(self.shown):
            raise DataError(*self.shown, f"... {self.total} bad rows in all, the first {len(self.shown)} shown")
        if self.total:
            raise DataError(*self.shown)


def read_rows(source: DataSource, problems: Problems | None = None) -> Iterator[Located]:
    """Every row of the source, one at a time, in file order.

    Rows that cannot be read are noted and reported together once the files are through: in `problems` when
    given, else by raising. Data-set ids cannot be read here; the job reads them with `datasets`.

    Raises:
        DataError: missing, empty or undecodable files; malformed rows (when `problems` is None); a data-set id.
    """
    own = problems is None
    problems = Problems() if problems is None else problems
    before, rows = problems.total, 0
    for path in data_files(source):
        for located in _read_file(path, source, problems):
            rows += 1
            yield located
    if own:
        problems.raise_if_any()
    if rows == 0 and problems.total == before:
        raise DataError(f"{source.path}: no rows (the file is empty, or holds only blank lines)")


def _read_file(path: Path, source: DataSource, problems: Problems) -> Iterator[Located]:
    readers: dict[str, Callable[[Path, DataSource, Problems], Iterator[Located]]] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".txt": _read_txt,
        ".parquet": _read_parquet,
        ".arrow": _read_arrow,
    }
    try:
        yield from readers[kind(path)](path, source, problems)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged or truncated gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def _lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Number and text of each line; a byte-order mark and line ends (also CRLF) are taken off."""
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise DataError(f"{path}:1: UTF-16 text; save the file as UTF-8")
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                problems.add(place(path, number), _not_utf8(error))


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the line"


def _read_jsonl(path: Path, _source: DataSource, problems: Problems) -> Iterator[Located]:
    for number, line in _lines(path, problems):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(place(path, number), f"not JSON: {_json_reason(error)}")
            continue
        if isinstance(row, dict):
            yield Located(str(path), number, row)
        else:
            problems.add(place(path, number), f"a row must be an object, found {describe(row)}")


def _json_reason(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _read_json(path: Path, source: DataSource, problems: Problems) -> Iterator[Located]:
    """A whole JSON document, held in memory; JSON lines under the name .json are read as such."""
    with _open(path) as file:
        raw = file.read().removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        return
    try:
        document = json.loads(raw)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and raw.lstrip().startswith(b"{"):
            yield from _read_jsonl(path, source, problems)
            return
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    for number, row in enumerate(_document_rows(path, document, source), start=1):
        if isinstance(row, dict):
            yield Located(str(path), number, row, by_row=True)
        else:
            problems.add(place(path, number, by_row=True), f"a row must be an object, found {describe(row)}")


def _document_rows(path: Path, document: Any, source: DataSource) -> list[Any]:
    if isinstance(document, list):
        return document
    if isinstance(document, dict):
        for key in ("data", source.split):
            if isinstance(document.get(key), list):
                return list(document[key])
        if _looks_like_row(document):  # JSON lines with a single line
            return [document]
        found = ", ".join(map(repr, list(document)[:5])) or "nothing"
        raise DataError(f'{path}: expected a list of rows or {{"data": [...]}}, found an object with {found}')
    raise DataError(f'{path}: expected a list of rows or {{"data": [...]}}, found {describe(document)}')


def _looks_like_row(document: Mapping[str, Any]) -> bool:
    return bool({"messages", "conversations", "instruction", "prompt", "text"} & set(document))


def _read_csv(path: Path, _source: DataSource, problems: Problems) -> Iterator[Located]:
    csv.field_size_limit(_MAX_CSV_FIELD_CHARS)
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter="\t" if kind(path) == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                where = place(path, reader.line_num)
                if None in row:
                    problems.add(where, f"more fields than the {len(reader.fieldnames or ())} of the header")
                elif None in row.values():
                    problems.add(where, f"fewer fields than the {len(reader.fieldnames or ())} of the header")
                else:
                    yield Located(str(path), reader.line_num, row)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 after line {reader.line_num} ({error.reason})") from error
        except csv.Error as error:
            raise DataError(f"{path}:{reader.reader.line_num}: not CSV: {error}") from error


def _read_txt(path: Path, _source: DataSource, problems: Problems) -> Iterator[Located]:
    """Documents are blocks between blank lines, located by their first line.

    A block of more than MAX_BLOCK_CHARS (a file without blank lines) is broken at a line end, so that a corpus in
    one file never has to fit in memory.
    """
    block: list[str] = []
    start, characters = 1, 0
    for number, line in _lines(path, problems):
        if block and (not line.strip() or characters > MAX_BLOCK_CHARS):
            yield Located(str(path), start, {"text": "\n".join(block)})
            block, characters = [], 0
        if line.strip():
            start = start if block else number
            block.append(line)
            characters += len(line)
    if block:
        yield Located(str(path), start, {"text": "\n".join(block)})


def _read_parquet(path: Path, _source: DataSource, _problems: Problems) -> Iterator[Located]:
    parquet, arrow = _pyarrow(path, "pyarrow.parquet"), _pyarrow(path, "pyarrow")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Located(str(path), number, row, by_row=True)
    except arrow.ArrowException as error:
        raise DataError(f"{path}: not a complete parquet file ({error})") from error


def _read_arrow(path: Path, _source: DataSource, _problems: Problems) -> Iterator[Located]:
    arrow = _pyarrow(path, "pyarrow")
    number = 0
    try:
        with arrow.memory_map(str(path)) as file, arrow.ipc.open_stream(file) as stream:
            for batch in stream:
                for row in batch.to_pylist():
                    number += 1
                    yield Located(str(path), number, row, by_row=True)
    except arrow.ArrowException as error:
        raise DataError(f"{path}: not a complete arrow stream ({error})") from error


def _pyarrow(path: Path, module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{path}: reading {path.suffix} files needs pyarrow (pip install pyarrow)") from error


def describe(value: Any) -> str:
    """A value in a message: its kind, and the value where it is short."""
    kinds = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    kind = kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
    shown = json.dumps(value, default=str, ensure_ascii=False)
    return f"{kind} {shown}" if value is not None and len(shown) <= 40 else kind
