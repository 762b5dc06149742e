"""registry: the adapters of a folder of runs, with where each comes from and the names people gave them.

There is no database: an adapter is a run folder's `adapter/`, or one that runs/named.py knows (combined, reduced, of
another tool); its weights carry their lineage in their own header, and its tags are lines in a file.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ConflictError, RecipeError
from launcher.facts.adapters import CONFIG, LINEAGE, WEIGHTS, made_in_words, read_header
from launcher.runs import named
from launcher.runs.folder import RunFolder, read_json
from launcher.runs.status import find_run, runs_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One adapter."""

    name: str
    """What verbs take: the run's name, the adapter's own, or its folder where it has none here."""
    run: str | None
    """None: no run here trained it."""
    path: str
    tags: tuple[str, ...]
    method: str | None
    rank: int | None
    alpha: float | None
    target_modules: tuple[str, ...]
    base: str | None
    base_revision: str | None
    base_fingerprint: str | None
    data_key: str | None
    made: str | None
    """How it was made of other adapters; None: it was trained."""
    parents: tuple[dict[str, Any], ...]
    """Name, weight and sha256 of each of those."""
    bytes: int
    step: int | None
    validation_loss: float | None
    retention_loss: float | None
    finished_time_s: float | None
    """When the run ended; without one, when the weights were written."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def list_adapters(parent: Path | None = None) -> list[Entry]:
    """Every adapter of finished runs, and every one that has a name of its own; newest first."""
    folder = runs_folder(parent)
    tags = named.tags_of(folder)
    found = [_of_run(RunFolder(path.parents[1].resolve()), tags) for path in folder.glob(f"[!.]*/adapter/{WEIGHTS}")]
    found += [_of_folder(path, name, tags) for name, path in named.named_adapters(folder).items()]
    return sorted(found, key=lambda one: -(one.finished_time_s or 0.0))


def find_entry(name: str, parent: Path | None = None) -> Entry:
    """The adapter of a run, of a name or tag, or in a folder.

    Raises:
        RecipeError: nothing of this name, or a run without an adapter.
    """
    folder = runs_folder(parent)
    tags = named.tags_of(folder)
    path = Path(name).expanduser()
    found = path.resolve() if named.is_adapter(path) else find(name, parent)
    if isinstance(found, RunFolder):
        if not (found.adapter / WEIGHTS).is_file():
            raise RecipeError(f"{found.run_id} has no adapter (launcher status {found.run_id} says why)")
        return _of_run(found, tags)
    run = RunFolder(found.parent)
    if run.adapter == found and run.plan.is_file() and found.parents[1] == folder.resolve():
        return _of_run(run, tags)
    return _of_folder(found, named.name_of(folder, found) or str(found), tags)


def find(name: str, parent: Path | None = None) -> RunFolder | Path:
    """What a user means by a name: a run, or the folder of an adapter that no run trained.

    A tag comes before a run whose name begins with it, and so does an adapter.

    Raises:
        RecipeError: nothing; names what comes nearest among runs, adapters and tags.
    """
    adapter = adapter_of(name, parent)
    if adapter is not None:
        return adapter
    folder = runs_folder(parent)
    tags = named.tags_of(folder)
    owner = tags.get(name, name)
    try:
        return find_run(owner, parent)
    except RecipeError as error:
        if name in tags:
            raise RecipeError(f"{name!r} is of {owner}, which is gone; tag another adapter with it") from error
        close = difflib.get_close_matches(name, [*tags, *named.named_adapters(folder)], n=1)
        if close and " is the beginning of " not in str(error):
            raise RecipeError(f"no run, adapter or tag {name!r} in {folder}; did you mean {close[0]}?") from error
        raise


def run_of(name: str, parent: Path | None = None) -> str:
    """The run whose adapter was given this name; other names as they are.

    Raises:
        RecipeError: the name of an adapter that no run trained.
    """
    adapter = adapter_of(name, parent)
    if adapter is not None:
        raise RecipeError(f"{name!r} is an adapter that no run trained ({adapter}); name a run")
    return named.tags_of(runs_folder(parent)).get(name, name)


def adapter_of(name: str, parent: Path | None = None) -> Path | None:
    """The folder of an adapter that no run trained, by its name or tag; None: it is none's."""
    folder = runs_folder(parent)
    return named.named_adapter(folder, named.tags_of(folder).get(name, name))


def tag(name: str, label: str, parent: Path | None = None, *, move: bool = False, dry_run: bool = False) -> Entry:
    """Give an adapter a name that other verbs take; a folder that has no name here gets one with its first tag.

    Raises:
        RecipeError: not a name, or no such adapter.
        ConflictError: the tag is another adapter's and `move` is not said, or it is a name already.
    """
    named.refuse_name(label, "tag")
    folder, entry = runs_folder(parent), find_entry(name, parent)
    _refuse_label(folder, label, entry, move=move)
    if dry_run:
        return entry
    owner = entry.run or named.register(folder, Path(entry.path))
    with named.alone(folder):
        _refuse_label(folder, label, entry, move=move)
        named.write_tags(folder, named.tags_of(folder) | {label: owner})
    return find_entry(owner, parent)


def _refuse_label(folder: Path, label: str, entry: Entry, *, move: bool) -> None:
    owner = named.owner_of(folder, label)
    if owner is None:
        return
    tags = named.tags_of(folder)
    if label not in tags:
        raise ConflictError(f"tag {label!r} is the name of {owner} in {folder}; choose another")
    gone = not (named.named_adapter(folder, tags[label]) or (folder / tags[label]).is_dir())
    if tags[label] != entry.name and not move and not gone:
        raise ConflictError(f"tag {label!r} is of {tags[label]}; say --move to give it to {entry.name}")


def diff(one: Entry, other: Entry) -> dict[str, tuple[Any, Any]]:
    """Field -> both values, where they differ; recipes included, dotted."""
    left, right = _facts(one), _facts(other)
    return {key: (left.get(key), right.get(key)) for key in sorted(left | right) if left.get(key) != right.get(key)}


def _facts(entry: Entry) -> dict[str, Any]:
    own = {
        key: value for key, value in entry.to_json().items() if key not in ("name", "path", "tags", "run", "parents")
    }
    plan = read_json(Path(entry.path).parent / "plan.json") if entry.run else {}
    return own | _flat(plan.get("chosen", {}), "plan.")


def _flat(value: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Plain values of the plan's decision; estimates are no decisions."""
    kept = (
        "nodes",
        "gpus_per_node",
        "zero_stage",
        "micro_batch",
        "gradient_accumulation",
        "precision",
        "learning_rate",
    )
    return {f"{prefix}{key}": value[key] for key in kept if key in value}


def _of_run(run: RunFolder, tags: dict[str, str]) -> Entry:
    return _entry(run.adapter, run.run_id, tags, run=run.run_id, result=read_json(run.result))


def _of_folder(folder: Path, name: str, tags: dict[str, str]) -> Entry:
    return _entry(folder, name, tags, run=None, result={"finished_time_s": (folder / WEIGHTS).stat().st_mtime})


def _entry(folder: Path, name: str, tags: dict[str, str], *, run: str | None, result: dict[str, Any]) -> Entry:
    config, told = read_json(folder / CONFIG), _lineage(folder / WEIGHTS)
    targets = config.get("target_modules") or ()
    return Entry(
        name=name,
        run=run,
        path=str(folder),
        tags=tuple(sorted(label for label, owner in tags.items() if owner == name)),
        method=told.get("method") or config.get("peft_type"),
        rank=config.get("r"),
        alpha=config.get("lora_alpha"),
        target_modules=tuple(sorted([targets] if isinstance(targets, str) else targets)),
        base=told.get("base") or config.get("base_model_name_or_path"),
        base_revision=told.get("base_revision"),
        base_fingerprint=told.get("base_fingerprint"),
        data_key=told.get("data_key"),
        made=_made(told.get("made")),
        parents=_parents(told.get("made")),
        bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        step=result.get("step"),
        validation_loss=(result.get("validation_loss") or {}).get("after"),
        retention_loss=(result.get("retention_loss") or {}).get("after"),
        finished_time_s=result.get("finished_time_s"),
    )


def _made(told: Any) -> str | None:
    """In words; None for an adapter that was trained, or whose lineage is not ours."""
    try:
        return made_in_words(told) if told else None
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _parents(told: Any) -> tuple[dict[str, Any], ...]:
    """Of a lineage that is ours; () for any other."""
    if _made(told) is None:
        return ()
    return tuple({key: one.get(key) for key in ("name", "weight", "sha256")} for one in told["parents"])


def _lineage(path: Path) -> dict[str, Any]:
    """The lineage in a safetensors header; {} where there is none."""
    try:
        told = json.loads(read_header(path).get("__metadata__", {}).get(LINEAGE, "{}"))
    except (OSError, ValueError, AttributeError):
        return {}
    return told if isinstance(told, dict) else {}
