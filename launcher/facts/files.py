"""Which files a data source consists of.

A path is a file, a folder or a data-set id. A folder is read file by file in sorted order; where its files are
named after splits (train-00000.parquet, test.jsonl) only those of the asked split are taken. A folder written
by `datasets.save_to_disk` is read through its own list of files.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

from launcher.errors import DataError
from launcher.recipe.schema import DataSource

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
"""Data files; the text kinds also with .gz behind."""
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
SIDE_FILES = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json", "manifest.json"}
)
"""JSON that lies beside data and holds no rows."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_dataset_id(path: str) -> bool:
    """Whether `path` names a data set to download (`owner/name`), not something on this machine."""
    plain = path.removesuffix(".gz")
    return bool(_ID.fullmatch(path)) and not plain.lower().endswith(SUFFIXES) and not _exists(Path(path))


def described(source: DataSource) -> str:
    """A data-set id in messages: with its split, and configuration and revision where they are named."""
    parts = [f"split {source.split}", *(f"{key} {value}" for key in ("config", "revision")
                                        if (value := getattr(source, key)) is not None)]  # fmt: skip
    return f"{source.path} ({', '.join(parts)})"


def data_files(source: DataSource) -> list[Path]:
    """The files a local source consists of, in the order they are read.

    Raises:
        DataError: nothing there, no data file in the folder, a file kind that cannot be read, or a data-set id.
    """
    path = Path(source.path).expanduser()
    if is_dataset_id(source.path):
        raise DataError(f"{source.path}: a data-set id, not a file on this machine; only the job can read it")
    if not _exists(path):
        raise DataError(f"{source.path}: no such file or folder{_nearest(path)}")
    if path.is_dir():
        return _folder_files(path, source)
    _refuse_other(source, None, [], default=True)
    if kind(path) not in SUFFIXES:
        raise DataError(f"{source.path}: cannot read this kind of file; expected one of {', '.join(SUFFIXES)}")
    return [path]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a parent folder that may not be entered
        raise DataError(f"{path}: cannot be looked at ({error.strerror})") from error


def _folder_files(folder: Path, source: DataSource) -> list[Path]:
    if (named := _named_files(folder, source)) is not None:
        return named
    if (folder / "dataset_dict.json").is_file():
        folder = _split_folder(folder, source)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved_files(folder)
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and kind(path) in SUFFIXES and path.name not in SIDE_FILES and not _hidden(path, folder)
    )
    if not found:
        present = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise DataError(f"{source.path}: no data file in this folder; expected {', '.join(SUFFIXES)}, found {present}")
    return _of_split(found, folder, source.split)


def _split_folder(folder: Path, source: DataSource) -> Path:
    splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
    if source.split not in splits:
        raise DataError(f"{source.path}: no split {source.split!r}; it has {', '.join(splits)}")
    return folder / source.split


def _saved_files(folder: Path) -> list[Path]:
    """Files of a `save_to_disk` folder, in the order its state.json names them."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    files = [folder / entry["filename"] for entry in state.get("_data_files", [])]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise DataError(f"{folder}: state.json names files that are not there: {', '.join(missing) or 'none at all'}")
    return files


def _named_files(folder: Path, source: DataSource) -> list[Path] | None:
    """Files of the split, where a staged folder's manifest names them; None where it leaves that to their names.

    Raises:
        DataError: the folder is of another revision, or has not the configuration or the split.
    """
    try:
        staged = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        commit, configs = staged.get("revision"), staged.get("configs") or {}
        splits = configs[source.config] if source.config in configs else staged["splits"]
        named = (
            None
            if splits is None
            else {str(split): [folder / path for path in paths] for split, paths in splits.items()}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        commit, configs, named = None, {}, None
    _refuse_other(source, commit, list(configs), default=named is not None)
    if named is not None and source.split not in named:
        raise DataError(f"{source.path}: no split {source.split!r}; it has {', '.join(named)}")
    return None if named is None else named[source.split]


def _refuse_other(source: DataSource, commit: str | None, configs: list[str], *, default: bool) -> None:
    """Revision and configuration are of data-set ids: a folder has them when it was staged from one, or not at all."""
    if source.revision is not None and source.revision != commit:
        has = f"is of revision {commit}" if commit else "is not a data set of the hub"
        raise DataError(f"{source.path}: revision {source.revision} was asked for, and this folder {has}; leave it out")
    if source.config is not None and source.config not in configs:
        has = f"has {', '.join(configs)}" if configs else "has none; name the folder or files that are meant"
        raise DataError(f"{source.path}: no configuration {source.config!r}; this folder {has}")
    if source.config is None and configs and not default:
        raise DataError(f"{source.path}: has several configurations ({', '.join(configs)}); say which with config")


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Only the files of `split` where names tell; training on a test file would go unnoticed otherwise."""
    named = {path: _split_of(path.relative_to(folder)) for path in files}
    wanted = SPLIT_WORDS.get(split, split)
    if wanted not in named.values():
        return files
    return [path for path in files if named[path] in (wanted, None)]


def _split_of(path: Path) -> str | None:
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def kind(path: Path) -> str:
    """Suffix that tells the reader, in lower case and without .gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _nearest(path: Path) -> str:
    """`; did you mean X?` from the deepest folder of the path that exists."""
    parent = path.parent
    if not parent.is_dir():
        return f" (the folder {parent} does not exist either)"
    names = [entry.name for entry in parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {parent / close[0]}?" if close else ""
