"""Local inputs of a run: verified where they lie, recorded with their hashes, and copied into the cache on request."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, ModelError, RecipeError, raise_all
from launcher.facts.files import data_files
from launcher.facts.staged import FORMAT, MANIFEST, read_manifest
from launcher.facts.weights import model_folder_problems
from launcher.recipe.schema import DataSource, ModelSection
from launcher.runs import partial
from launcher.runs.fetching import Progress, digest, manifest, write_shared

_NOT_READ = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf")
"""Other forms of the weights; a run never opens them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """A folder or file of this machine that a recipe reads."""

    kind: str
    """model | dataset | template."""
    path: Path
    """Absolute."""
    top: Path
    """What the names of `sizes` are relative to."""
    sizes: Mapping[str, int]
    """Relative name -> bytes."""
    known: Mapping[str, str]
    """Relative name -> sha256 of files that are as they were recorded last."""
    record: Path
    cache: Path
    copy: bool

    @property
    def bytes(self) -> int:
        """All files together."""
        return sum(self.sizes.values())

    @property
    def state(self) -> str:
        """What is done with its files."""
        return "copy" if self.copy else "local"

    @property
    def space_bytes(self) -> int:
        """Bytes of disk that the cache needs for it."""
        return self.bytes if self.copy else 0


def local_model(model: ModelSection, cache: Path, *, copy: bool, verify: bool) -> Local:
    """A model folder, checked as preflight does.

    Raises:
        ModelError: everything that is missing or broken in it.
    """
    folder = Path(model.name_or_path).expanduser().absolute()
    problems = model_folder_problems(folder)
    if model.trust_remote_code:
        problems = [problem for problem in problems if "its own code" not in problem]
    raise_all(ModelError, [f"model.name_or_path: {problem}" for problem in problems])
    files = [
        path
        for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")])
        if path.is_file() and not path.name.startswith(".") and path.suffix not in _NOT_READ and path.name != MANIFEST
    ]
    return _local("model", folder, folder, files, cache, copy=copy, verify=verify)


def local_data(source: DataSource, cache: Path, *, copy: bool, verify: bool) -> Local:
    """The files of a data source.

    Raises:
        DataError: there are none.
    """
    path = Path(source.path).expanduser().absolute()
    files = [file.absolute() for file in data_files(source)]
    extra = [
        path / name for name in ("state.json", "dataset_info.json", "dataset_dict.json") if (path / name).is_file()
    ]
    top = path if path.is_dir() else path.parent
    return _local("dataset", path, top, [*files, *(one for one in extra if one not in files)], cache,
                  copy=copy, verify=verify)  # fmt: skip


def local_template(name: str, cache: Path, *, copy: bool, verify: bool) -> Local:
    """A chat template.

    Raises:
        RecipeError: it cannot be read as text.
    """
    path = Path(name).expanduser().absolute()
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"data.chat_template: {path} cannot be read: {error}") from error
    return _local("template", path, path.parent, [path], cache, copy=copy, verify=verify)


def _local(kind: str, path: Path, top: Path, files: list[Path], cache: Path, *, copy: bool, verify: bool) -> Local:
    mark = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    record = cache / "local" / f"{_plain(path.name)}-{mark}.json"
    facts = {str(file.relative_to(top)): file.stat() for file in files}
    before = {} if verify else _recorded(record)
    known = {
        name: str(before[name]["sha256"])
        for name, fact in facts.items()
        if name in before and (before[name]["bytes"], before[name]["mtime_ns"]) == (fact.st_size, fact.st_mtime_ns)
    }
    sizes = {name: fact.st_size for name, fact in facts.items()}
    return Local(kind=kind, path=path, top=top, sizes=sizes, known=known, record=record, cache=cache, copy=copy)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)[:80]


def _recorded(record: Path) -> dict[str, Mapping[str, Any]]:
    try:
        document = json.loads(record.read_text(encoding="utf-8"))
        return {str(one["path"]): one for one in document["files"]} if document.get(FORMAT) == 1 else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def carry_out(local: Local, progress: Progress) -> Path:
    """Hash what is not known, copy if asked, record; returns where to train from.

    Raises:
        ClusterError: a file cannot be read, or the cache cannot be written.
    """
    try:
        progress.begin(str(local.path), sum(size for name, size in local.sizes.items() if name not in local.known))
        hashes = {name: _hash(local, name, progress) for name in local.sizes}
        used = _copied(local, hashes, progress) if local.copy else local.path
        _write_record(local, hashes, used)
    except OSError as error:
        raise ClusterError(f"{error.filename or local.path}: {error.strerror or error}") from error
    return used


def _hash(local: Local, name: str, progress: Progress) -> str:
    found = local.known.get(name)
    if found is None:
        found = digest(local.top / name, progress.advance).sha256
        progress.done(name, local.sizes[name], "verified")
    return found


def _copied(local: Local, hashes: Mapping[str, str], progress: Progress) -> Path:
    """The copy, named by its content; there already, or made beside its place and renamed."""
    content = hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()[:40]
    target = local.cache / f"{local.kind}s" / f"local--{_plain(local.path.name)}" / content
    used = target if local.path == local.top else target / local.path.name
    if read_manifest(target) is not None:
        return used
    copy = target.with_name(f"{content}{partial.SUFFIX}")
    shutil.rmtree(copy, ignore_errors=True)
    with partial.growing(copy):
        for name, wanted in hashes.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local.top / name, copy / name)
            if digest(copy / name).sha256 != wanted:
                raise ClusterError(
                    f"{local.top / name}: changed while it was copied, or the cache's disk is at fault; try again"
                )
            progress.done(name, local.sizes[name], "copied")
        files = [{"path": name, "bytes": size, "sha256": hashes[name]} for name, size in local.sizes.items()]
        partial.unmark(copy)
        write_shared(copy / MANIFEST, manifest(local.kind, None, content, files) | {"copied_from": str(local.path)})
        if target.exists():
            shutil.rmtree(target)  # no manifest: never finished
        copy.rename(target)
    return used


def _write_record(local: Local, hashes: Mapping[str, str], used: Path) -> None:
    files = [
        {"path": name, "bytes": size, "mtime_ns": (local.top / name).stat().st_mtime_ns, "sha256": hashes[name]}
        for name, size in local.sizes.items()
    ]
    local.record.parent.mkdir(parents=True, exist_ok=True)
    document = manifest(local.kind, None, "", files) | {
        "path": str(local.path),
        "copy": str(used) if local.copy else None,
    }
    write_shared(local.record, document)
