"""Staged inputs: models and data sets that `launcher stage` brought into the shared cache, and how a recipe finds them.

    <cache>/models/<owner>--<name>/refs.json            revision as asked for -> commit
    <cache>/models/<owner>--<name>/<commit>/             the files, and last of all manifest.json
    <cache>/datasets/<owner>--<name>/...                 the same
    <cache>/local/<name>-<hash of the path>.json         what was found in a local folder or file

A folder without manifest.json does not count. Nothing here asks a network.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher.facts.files import is_dataset_id
from launcher.recipe.schema import DataSource, Recipe

Kind = Literal["model", "dataset"]
MANIFEST = "manifest.json"
FORMAT = "launcher_staged"
"""The manifest's key for its own version."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """One model or data set in the cache."""

    kind: Kind
    id: str
    commit: str
    path: Path
    """Its folder, absolute."""
    manifest: Mapping[str, Any]


def is_model_id(name: str) -> bool:
    """Whether `name` is a hub id (`owner/name`), not something on this machine."""
    return bool(_ID.fullmatch(name)) and ".." not in name and not Path(name).expanduser().exists()


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash."""
    return revision is not None and bool(_COMMIT.fullmatch(revision))


def cache_folder(recipe: Recipe, cache_dir: str | None) -> Path:
    """The shared cache, absolute: $LAUNCHER_CACHE, the site's `cache_dir`, else .cache beside the run folders."""
    named = os.environ.get("LAUNCHER_CACHE") or cache_dir
    if named:
        return Path(named).expanduser().absolute()
    runs = (os.environ.get("LAUNCHER_RUNS") or "runs") if recipe.output_dir == "auto" else recipe.output_dir
    return Path(runs).expanduser().resolve() / ".cache"


def repository(cache: Path, kind: Kind, name: str) -> Path:
    """Folder of every revision of one id; `name` has been checked to be an id."""
    return cache / f"{kind}s" / name.replace("/", "--")


def find(cache: Path, kind: Kind, name: str, revision: str | None) -> Staged | None:
    """The staged copy of an id: of the commit, or of the commit that the revision meant when it was staged last."""
    folder = repository(cache, kind, name)
    commit = revision if is_commit(revision) else read_refs(folder).get(revision or "main")
    if commit is None:
        return None
    path = folder / commit
    manifest = read_manifest(path)
    return None if manifest is None else Staged(kind=kind, id=name, commit=commit, path=path, manifest=manifest)


def read_refs(folder: Path) -> dict[str, str]:
    """Revision as asked for -> commit; empty where nothing was staged, or the file is no such thing."""
    document = _read(folder / "refs.json") or {}
    return {str(name): commit for name, commit in document.items() if isinstance(commit, str) and is_commit(commit)}


def read_manifest(folder: Path) -> Mapping[str, Any] | None:
    """The manifest of a staged folder; None where there is none of ours."""
    document = _read(folder / MANIFEST)
    return document if document is not None and document.get(FORMAT) == 1 else None


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, Mapping) else None


def hub_name(folder: Path) -> tuple[str, str] | None:
    """Id and commit that a staged folder is a copy of."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest.get("id"):
        return None
    return str(manifest["id"]), str(manifest["revision"])


def names_ids(recipe: Recipe) -> bool:
    """Whether the recipe names anything by id, so that a staged copy may exist."""
    return is_model_id(recipe.model.name_or_path) or any(is_dataset_id(one.path) for one in sources(recipe))


def sources(recipe: Recipe) -> Iterator[DataSource]:
    """Every data source of a recipe: training, validation, retention."""
    yield from recipe.data.train
    if recipe.data.validation.source is not None:
        yield recipe.data.validation.source
    if recipe.data.retention is not None:
        yield recipe.data.retention


def with_staged(recipe: Recipe, cache: Path) -> Recipe:
    """The recipe with every id that is staged replaced by its folder, and the model's revision by the commit."""
    model = recipe.model
    if is_model_id(model.name_or_path):
        found = find(cache, "model", model.name_or_path, model.revision)
        if found is not None:
            model = replace(model, name_or_path=str(found.path), revision=found.commit)
    data = recipe.data
    validation, retention = data.validation, data.retention
    if validation.source is not None:
        validation = replace(validation, source=_source(validation.source, cache))
    data = replace(
        data,
        train=tuple(_source(one, cache) for one in data.train),
        validation=validation,
        retention=None if retention is None else _source(retention, cache),
    )
    return replace(recipe, model=model, data=data)


def _source(source: DataSource, cache: Path) -> DataSource:
    found = find(cache, "dataset", source.path, source.revision) if is_dataset_id(source.path) else None
    if found is None or not holds(found.manifest, source.config):
        return source
    return replace(source, path=str(found.path), revision=found.commit)


def holds(manifest: Mapping[str, Any], config: str | None) -> bool:
    """Whether a staged data set has the configuration, None being the one that is read by default."""
    configs = manifest.get("configs") or {}
    return config in configs if config is not None else bool(manifest.get("splits")) or not configs


def needs_no_hub(recipe: Recipe) -> bool:
    """Whether everything the job reads lies on this machine: the model, the data, and no data set named by id."""
    model = Path(recipe.model.name_or_path).expanduser()
    return model.is_dir() and not any(is_dataset_id(one.path) for one in sources(recipe))
