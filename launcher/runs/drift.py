"""drift: what has changed around a run since it was submitted: code, packages, its recipe's file, data and model files.

The run goes on with its own recipe and plan. Code and packages are those that are installed now, which is said; data
and model files of another size would be another training, which is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import ConflictError, LauncherError, raise_all
from launcher.facts.files import data_files, is_dataset_id
from launcher.recipe.schema import Recipe
from launcher.runs.environment import environment_facts
from launcher.runs.folder import RunFolder

_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model")


def input_facts(recipe: Recipe) -> list[dict[str, Any]]:
    """Size and time of every local file that the training reads; what cannot be looked at is left out."""
    found = []
    for path in _inputs(recipe):
        try:
            facts = path.stat()
        except OSError:
            continue
        found.append({"path": str(path.resolve()), "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns})
    return found


def _inputs(recipe: Recipe) -> Iterator[Path]:
    held_out = (recipe.data.validation.source, recipe.data.retention)
    for source in (*recipe.data.train, *(source for source in held_out if source is not None)):
        try:
            if not is_dataset_id(source.path):
                yield from data_files(source)
        except LauncherError:
            continue
    model = Path(recipe.model.name_or_path).expanduser()
    if model.is_dir():
        for pattern in _MODEL_FILES:
            yield from sorted(model.glob(pattern))


def drift(run: RunFolder, job_python: str) -> list[str]:
    """What a person should know, one sentence each.

    Raises:
        ConflictError: data or model files are not those the run began with.
    """
    try:
        before: dict[str, Any] = json.loads(run.environment.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ["environment.json cannot be read, so what changed since the run began is not known"]
    raise_all(ConflictError, list(_other_inputs(before.get("inputs", []))))
    return [
        *_touched(before.get("inputs", [])),
        *_code(before, environment_facts(job_python)),
        *_recipe_file(run, before.get("recipe_file")),
    ]


def _other_inputs(inputs: list[Mapping[str, Any]]) -> Iterator[str]:
    for facts in inputs:
        path = Path(str(facts["path"]))
        try:
            size = path.stat().st_size
        except OSError as error:
            yield f"{path}: the run reads it, and it is not there any more ({error.strerror}); bring it back"
            continue
        if size != facts["bytes"]:
            yield (
                f"{path}: had {facts['bytes']} bytes when the run began and has {size} now; bring the old file back, "
                "or start a new run"
            )


def _touched(inputs: list[Mapping[str, Any]]) -> Iterator[str]:
    for facts in inputs:
        if Path(str(facts["path"])).stat().st_mtime_ns != facts["mtime_ns"]:
            yield f"{facts['path']} was written to since the run began; its size is the same"


def _code(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for what in ("launcher", "python", "job_python"):
        if before.get(what) != now.get(what):
            yield f"{what.replace('_', ' ')} was {before.get(what)} when the run began and is {now.get(what)} now"
    was, packages = before.get("packages", {}), now.get("packages", {})
    changed = [name for name in {**was, **packages} if was.get(name) != packages.get(name)]
    if changed:
        listed = ", ".join(f"{name} {was.get(name)} -> {packages.get(name)}" for name in sorted(changed))
        yield f"packages changed since the run began: {listed}"
    code, current = before.get("code") or {}, now.get("code") or {}
    if (code.get("commit"), code.get("diff")) != (current.get("commit"), current.get("diff")):
        was_at, is_at = (str(each.get("commit"))[:10] for each in (code, current))
        where = f"uncommitted changes of {is_at}" if was_at == is_at else f"{was_at} -> {is_at}"
        yield f"the launcher's own code changed since the run began ({where}); the job runs today's"


def _recipe_file(run: RunFolder, origin: Any) -> Iterator[str]:
    """A recipe edited since: the run keeps its own copy."""
    if not isinstance(origin, str):
        return
    try:
        if Path(origin).read_text(encoding="utf-8") == run.recipe.read_text(encoding="utf-8"):
            return
        yield f"{origin} was edited since; the run goes on with its own copy ({run.recipe.name}), edits are not used"
    except OSError:
        yield f"{origin} is gone; the run goes on with its own copy ({run.recipe.name})"
