"""The token cache on disk: documents stored once, tables that arrange them into rows.

A cache folder holds
  meta.json                    key, stats, byte sizes of the files below
  input_ids.bin, labels.bin    int32, every document behind the other
  starts.npy                   int64, where each document begins (one more at the end)
  <table>.documents.npy        int64, documents of all rows of the table, row behind row
  <table>.rows.npy             int64, where each row begins in that list (one more at the end)
  <table>.trained.npy          int64, trained tokens of each row
Everything is memory-mapped, so all ranks of a node share one copy in the page cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.runs.folder import write_json
from launcher.worker.packing import Ints, Row, Tokens
from launcher.worker.tokens import Document

TABLES = ("train", "validation", "retention")


class TokenTable:
    """Rows of one split, addressed by number.

    `trained_tokens` is the number of labels the loss looks at, per row (int64).
    """

    def __init__(self, store: DocumentStore, documents: Ints, rows: Ints, trained: Ints, *, packed: bool) -> None:
        self._store = store
        self._documents = documents
        self._rows = rows
        self._packed = packed
        self.trained_tokens = trained

    def __len__(self) -> int:
        return len(self.trained_tokens)

    def row(self, index: int) -> Row:
        """Row `index` (0 <= index < len); position_ids only in packed tables."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        chosen = self._documents[self._rows[index] : self._rows[index + 1]]
        parts = [self._store.document(int(document)) for document in chosen]
        input_ids = np.concatenate([part.input_ids for part in parts])
        labels = np.concatenate([part.labels for part in parts])
        if not self._packed:
            return Row(input_ids, labels, None)
        positions = np.concatenate([np.arange(len(part.labels), dtype=np.int32) for part in parts])
        return Row(input_ids, labels, positions)

    def documents(self) -> Iterator[Document]:
        """Every document of the table, in its order, whatever rows they are packed into."""
        return (self._store.document(int(number)) for number in self._documents)


def fingerprint(documents: Iterable[Document]) -> str:
    """sha256 over documents, tokens and labels; the same in whatever order and packing."""
    digests = sorted(hashlib.sha256(one.input_ids.tobytes() + one.labels.tobytes()).digest() for one in documents)
    return hashlib.sha256(b"".join(digests)).hexdigest()


@dataclass(frozen=True, slots=True)
class TokenCache:
    """Everything a run trains and evaluates on, as tokens."""

    train: TokenTable
    validation: TokenTable | None
    retention: TokenTable | None
    key: str
    stats: dict[str, Any]
    """rows, documents, tokens, trained_tokens, truncated_rows, dropped_rows, sequences, fill, notices (sentences)."""


class DocumentStore:
    """Documents by number, read from the memory-mapped files of a cache folder."""

    def __init__(self, folder: Path) -> None:
        self._ids: Tokens = np.memmap(folder / "input_ids.bin", dtype=np.int32, mode="r")
        self._labels: Tokens = np.memmap(folder / "labels.bin", dtype=np.int32, mode="r")
        self._starts: Ints = np.load(folder / "starts.npy")

    def document(self, index: int) -> Document:
        """Document `index`, as views into the files."""
        part = slice(int(self._starts[index]), int(self._starts[index + 1]))
        return Document(self._ids[part], self._labels[part])


class StoreWriter:
    """Appends documents to a new cache folder; only their lengths stay in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids = (folder / "input_ids.bin").open("wb")
        self._labels = (folder / "labels.bin").open("wb")
        self.lengths: list[int] = []
        self.trained: list[int] = []
        self.digests: list[bytes] = []
        """A short hash of each document's tokens, to find duplicates."""

    def add(self, document: Document) -> int:
        """Store the document; returns its number."""
        raw = document.input_ids.tobytes()
        self._ids.write(raw)
        self._labels.write(document.labels.tobytes())
        self.lengths.append(len(document.labels))
        self.trained.append(document.trained)
        self.digests.append(hashlib.blake2b(raw, digest_size=8).digest())
        return len(self.lengths) - 1

    def close(self) -> None:
        """Force the documents to disk."""
        for file in (self._ids, self._labels):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        _save(self._folder / "starts.npy", np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]))

    def table(self, name: str, rows: Sequence[Sequence[int]]) -> None:
        """Store a table whose rows are lists of document numbers."""
        trained = np.asarray(self.trained, dtype=np.int64)
        documents = np.asarray([number for row in rows for number in row], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        _save(self._folder / f"{name}.documents.npy", documents)
        _save(self._folder / f"{name}.rows.npy", starts)
        _save(self._folder / f"{name}.trained.npy", np.add.reduceat(trained[documents], starts[:-1]))


def write_meta(folder: Path, *, key: str, packed: bool, stats: dict[str, Any]) -> None:
    """Write meta.json, last: its list of sizes is what makes the folder complete."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_json(folder / "meta.json", {"key": key, "packed": packed, "stats": stats, "sizes_bytes": sizes})


def read_cache(folder: Path) -> TokenCache | None:
    """The cache in `folder`, or None where it is absent, incomplete or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        sizes = meta["sizes_bytes"]
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
    except (OSError, ValueError, KeyError):
        return None
    store = DocumentStore(folder)
    tables = {name: _read_table(folder, name, store, meta["packed"]) for name in TABLES}
    train = tables["train"]
    if train is None:
        return None
    return TokenCache(train, tables["validation"], tables["retention"], meta["key"], meta["stats"])


def _read_table(folder: Path, name: str, store: DocumentStore, packed: bool) -> TokenTable | None:
    if not (folder / f"{name}.rows.npy").exists():
        return None
    documents, rows, trained = (np.load(folder / f"{name}.{part}.npy") for part in ("documents", "rows", "trained"))
    return TokenTable(store, documents, rows, trained, packed=packed)


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
