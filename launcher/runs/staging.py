"""staging: model, tokenizer, chat template and data of a recipe, brought into the shared cache before any job runs.

Ids are fetched at a commit; local folders and files are verified where they lie, and recorded with their hashes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, DataError, LauncherError, ModelError, RecipeError, TemporaryError
from launcher.facts import hub
from launcher.facts.files import is_dataset_id
from launcher.facts.places import place
from launcher.facts.site import Site, site_facts
from launcher.facts.staged import (
    Kind,
    cache_folder,
    find,
    holds,
    is_commit,
    is_model_id,
    read_manifest,
    repository,
    sources,
)
from launcher.recipe.load import load_recipe_with_notices
from launcher.recipe.schema import Recipe
from launcher.runs import fetching, recording, wanted
from launcher.runs.fetching import Fetch, Progress
from launcher.runs.recording import Local

SPARE_BYTES = 2**30
"""Left free on the cache's file system."""
_ORDER: tuple[type[LauncherError], ...] = (RecipeError, DataError, ModelError, ClusterError, TemporaryError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Staging:
    """What a recipe needs, and what is to be done for it."""

    recipe: Recipe
    cache: Path
    fetches: tuple[Fetch, ...]
    locals: tuple[Local, ...]
    notices: tuple[str, ...] = ()

    @property
    def fetch_bytes(self) -> int:
        """Bytes that have to come from the hub."""
        return sum(one.fetch_bytes for one in self.fetches)


@dataclass(slots=True)
class _Found:
    """Collected while looking: every problem is told at once."""

    fetches: list[Fetch] = field(default_factory=list)
    locals: list[Local] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    problems: dict[type[LauncherError], list[str]] = field(default_factory=dict)

    def add(self, error: LauncherError) -> None:
        kind = next((one for one in _ORDER if isinstance(error, one)), type(error))
        self.problems.setdefault(kind, []).extend(error.problems)

    def settle(self) -> None:
        everything = list(dict.fromkeys(text for kind in _ORDER for text in self.problems.get(kind, [])))
        for kind in _ORDER:
            if self.problems.get(kind):
                raise kind(*everything)


def look(path: Path, overrides: Sequence[str], *, copy: bool = False, verify: bool = False) -> Staging:
    """Find out what there is to do; nothing is written.

    Raises:
        RecipeError, DataError, ModelError, ClusterError, TemporaryError: the first class in this order that found
            something; its problems are those of every class.
    """
    loaded = load_recipe_with_notices(path, overrides)
    recipe = loaded.recipe
    site = site_facts(recipe.slurm.site)
    cache = cache_folder(recipe, site.cache_dir)
    found = _Found(notices=list(loaded.notices))
    for stage in (_model, _data, _template):
        stage(recipe, cache, found, copy, verify)
    found.settle()
    found.notices += _seen_by_nodes(found.locals, cache, site) if not copy else []
    staging = Staging(
        recipe=recipe,
        cache=cache,
        fetches=tuple(found.fetches),
        locals=tuple(found.locals),
        notices=tuple(found.notices),
    )
    _refuse_full_disk(staging)
    return staging


def _model(recipe: Recipe, cache: Path, found: _Found, copy: bool, verify: bool) -> None:
    model = recipe.model
    try:
        if Path(model.name_or_path).expanduser().exists():
            found.locals.append(recording.local_model(model, cache, copy=copy, verify=verify))
        elif is_model_id(model.name_or_path):
            found.fetches.append(_from_hub("model", model.name_or_path, model.revision, recipe, cache, found, verify))
        else:
            raise ModelError(
                f"model.name_or_path: {model.name_or_path!r} is neither a folder here nor an id (owner/name)"
            )
    except LauncherError as error:
        found.add(error)


def _data(recipe: Recipe, cache: Path, found: _Found, copy: bool, verify: bool) -> None:
    seen = set[tuple[str, str]]()
    for source in sources(recipe):
        named = is_dataset_id(source.path)
        if (key := (source.path, (source.revision or "") if named else source.split)) in seen:
            continue
        seen.add(key)
        try:
            if named:
                found.fetches.append(_from_hub("dataset", source.path, source.revision, recipe, cache, found, verify))
            else:
                found.locals.append(recording.local_data(source, cache, copy=copy, verify=verify))
        except LauncherError as error:
            found.add(error)


def _template(recipe: Recipe, cache: Path, found: _Found, copy: bool, verify: bool) -> None:
    if recipe.data.chat_template == "tokenizer":
        return
    try:
        found.locals.append(recording.local_template(recipe.data.chat_template, cache, copy=copy, verify=verify))
    except LauncherError as error:
        found.add(error)


def _from_hub(
    kind: Kind, name: str, revision: str | None, recipe: Recipe, cache: Path, found: _Found, verify: bool
) -> Fetch:
    """What is to be fetched of an id. A commit that is staged whole needs no hub; a branch may have moved on."""
    staged = find(cache, kind, name, revision)
    whole = None if staged is None else fetching.from_manifest(kind, name, staged.path)
    needed = _needed(recipe, name, revision) if kind == "dataset" else {}
    if staged is not None and not all(holds(staged.manifest, config) for config in needed):
        whole = None
    if whole is not None and is_commit(revision) and not verify:
        return whole
    try:
        repo = hub.repository(kind, name, revision)
        with tempfile.TemporaryDirectory() as scratch:
            chosen = _chosen(repo, recipe, _with_staged(needed, repo, cache), Path(scratch))
        found.notices += chosen.notices
        return fetching.plan_fetch(repo, chosen, cache, verify=verify)
    except TemporaryError as away:
        if whole is None:
            raise
        found.notices.append(
            f"{name}: staged at {whole.repo.commit[:12]}; whether that is the newest was not asked: {away}"
        )
        return whole


def _needed(recipe: Recipe, name: str, revision: str | None) -> dict[str | None, tuple[str, ...]]:
    """Configuration -> splits that the recipe reads of one data set at one revision."""
    asked: dict[str | None, tuple[str, ...]] = {}
    for one in sources(recipe):
        if (one.path, one.revision) == (name, revision):
            asked[one.config] = tuple(dict.fromkeys([*asked.get(one.config, ()), one.split]))
    return asked


def _with_staged(
    needed: dict[str | None, tuple[str, ...]], repo: hub.Repository, cache: Path
) -> dict[str | None, tuple[str, ...]]:
    """With the configurations that are staged of this commit: other recipes train from them."""
    there = read_manifest(repository(cache, repo.kind, repo.id) / repo.commit) or {}
    held: list[str | None] = [*(there.get("configs") or {}), *([None] if there.get("splits") else [])]
    return dict.fromkeys(held, ()) | needed


def _chosen(
    repo: hub.Repository, recipe: Recipe, needed: dict[str | None, tuple[str, ...]], scratch: Path
) -> wanted.Wanted:
    def read(path: str) -> bytes:
        return hub.fetch(repo, path, scratch, lambda _: None).read_bytes()

    if repo.kind == "model":
        return wanted.model_files(repo, read, trust_remote_code=recipe.model.trust_remote_code)
    return wanted.dataset_files(repo, read, needed)


def _refuse_full_disk(staging: Staging) -> None:
    """Refuse before anything is fetched; a full shared file system stops other people's runs, too."""
    needed = sum(one.space_bytes for one in staging.fetches) + sum(one.space_bytes for one in staging.locals)
    there = place("cache", str(staging.cache), staging.cache)
    if needed == 0 or there is None or there.free_bytes is None:
        return
    free = min(there.free_bytes, there.quota_bytes if there.quota_bytes is not None else there.free_bytes)
    if needed + SPARE_BYTES > free:
        raise ClusterError(
            f"cache: {staging.cache} has room for {free / 2**30:.1f} GiB, and {needed / 2**30:.1f} GiB are to come (1 "
            "GiB is left free); make room, or name another place with LAUNCHER_CACHE or cache_dir in the site profile"
        )


def _seen_by_nodes(found: Sequence[Local], cache: Path, site: Site) -> list[str]:
    """What lies on a disk of this machine alone, where the cache does not."""
    shared = place("cache", str(cache), cache)
    if site.executor != "slurm" or shared is None or shared.shared is False:
        return []
    alone = [one for one in found if (on := place("", "", one.path)) is not None and on.shared is False]
    return [
        f"{one.path} lies on a disk of this machine that compute nodes may not see; --copy puts it into the cache"
        for one in alone
    ]


def carry_out(staging: Staging, progress: Progress) -> list[Path]:
    """Do it all; returns the folder or file to train from, one for each fetch and then each local input.

    Raises:
        ModelError, DataError, TemporaryError, ClusterError: as `fetching.carry_out`.
    """
    for one in staging.fetches:
        fetching.carry_out(one, progress)
    copies = [recording.carry_out(one, progress) for one in staging.locals]
    return [*(one.target for one in staging.fetches), *copies]


def to_json(staging: Staging, paths: Sequence[Path] | None) -> dict[str, Any]:
    """The staging as `launcher stage --json` prints it; `paths` is None for a dry run."""
    used = list(paths) if paths is not None else [None] * (len(staging.fetches) + len(staging.locals))
    done = paths is not None
    items = [_fetch_json(one, done=done) for one in staging.fetches] + [_local_json(one) for one in staging.locals]
    return {
        "schema": 1,
        "dry_run": not done,
        "cache": str(staging.cache),
        "fetch_bytes": staging.fetch_bytes,
        "items": [
            item | ({"path": str(path)} if path is not None else {}) for item, path in zip(items, used, strict=True)
        ],
        "notices": list(staging.notices),
    }


def _fetch_json(fetch: Fetch, *, done: bool) -> dict[str, Any]:
    missing = {one.path for one in fetch.missing}
    came = "fetched" if done else "would fetch"
    return {
        "kind": fetch.repo.kind,
        "id": fetch.repo.id,
        "asked_revision": fetch.repo.asked,
        "revision": fetch.repo.commit,
        "path": str(fetch.target),
        "bytes": sum(one.size_bytes or 0 for one in fetch.files),
        "fetch_bytes": fetch.fetch_bytes,
        "files": [
            {"path": one.path, "bytes": one.size_bytes, "state": came if one.path in missing else "there"}
            for one in fetch.files
        ],
    }


def _local_json(local: Local) -> dict[str, Any]:
    return {
        "kind": local.kind,
        "id": None,
        "asked_revision": None,
        "revision": None,
        "path": str(local.path),
        "source": str(local.path),
        "bytes": local.bytes,
        "fetch_bytes": 0,
        "files": [{"path": name, "bytes": size, "state": local.state} for name, size in local.sizes.items()],
    }


def copy_overrides(paths: Sequence[Path], staging: Staging) -> list[str]:
    """Overrides that make a run use the copies of local inputs; ids need none, the recipe finds them by itself."""
    used = zip(staging.locals, paths[len(staging.fetches) :], strict=True)
    copies = {one.path: path for one, path in used if path != one.path}
    recipe = staging.recipe
    named = {"model.name_or_path": recipe.model.name_or_path, "data.chat_template": recipe.data.chat_template}
    named |= {f"data.train.{number}.path": source.path for number, source in enumerate(recipe.data.train)}
    if recipe.data.validation.source is not None:
        named["data.validation.path"] = recipe.data.validation.source.path
    if recipe.data.retention is not None:
        named["data.retention.path"] = recipe.data.retention.path
    found = ((key, copies.get(Path(value).expanduser().absolute())) for key, value in named.items())
    return [f"{key}={path}" for key, path in found if path is not None]
