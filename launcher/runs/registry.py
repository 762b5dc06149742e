"""registry: the adapters below a runs folder, with where each comes from and the names people gave them.

There is no database: an adapter is a run folder's `adapter/` whose weights carry their lineage in their own header; a
tag is a line in `<runs>/.adapters/tags.json`.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ConflictError, RecipeError
from launcher.facts.adapters import CONFIG, LINEAGE, WEIGHTS, made_in_words, read_header
from launcher.runs.folder import RunFolder, read_json, write_json
from launcher.runs.lock import hold
from launcher.runs.status import find_run, runs_folder

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One adapter."""

    run: str
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
    bytes: int
    step: int | None
    validation_loss: float | None
    retention_loss: float | None
    finished_time_s: float | None

    @property
    def is_of_run(self) -> bool:
        """Not a folder that was named by its path."""
        return Path(self.run).name == self.run

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def list_adapters(parent: Path | None = None) -> list[Entry]:
    """Every adapter of finished runs, newest first."""
    folder = runs_folder(parent)
    named = _tags(folder)
    found = [_entry(RunFolder(path.parent.parent.resolve()), named) for path in folder.glob(f"*/adapter/{WEIGHTS}")]
    return sorted(found, key=lambda one: -(one.finished_time_s or 0.0))


def find_entry(name: str, parent: Path | None = None) -> Entry:
    """The adapter of a run, of a tag, or in a folder (combined, reduced, or of another tool).

    Raises:
        RecipeError: no such run or tag, or a run without an adapter.
    """
    alone = Path(name).expanduser()
    if (alone / CONFIG).is_file() and (alone / WEIGHTS).is_file():
        return _of_folder(alone.resolve(), str(alone), (), {})
    folder = runs_folder(parent)
    named = _tags(folder)
    run = find_run(run_of(name, parent), parent)
    if not (run.adapter / WEIGHTS).is_file():
        raise RecipeError(f"{run.run_id} has no adapter (launcher status {run.run_id} says why)")
    return _entry(run, named)


def run_of(name: str, parent: Path | None = None) -> str:
    """The run whose adapter was given this name; other names as they are."""
    return _tags(runs_folder(parent)).get(name, name)


def tag(name: str, label: str, parent: Path | None = None, *, move: bool = False) -> Entry:
    """Give a run's adapter a name that other verbs take.

    Raises:
        RecipeError: not a name, or no such adapter.
        ConflictError: the tag is another run's and `move` is not said.
    """
    if not _TAG.fullmatch(label):
        raise RecipeError(f"tag {label!r}: letters, digits, dot, dash and underscore, at most 63, first no sign")
    entry = find_entry(name, parent)
    if not entry.is_of_run:
        raise RecipeError(f"{entry.path}: a tag names the adapter of a run; a folder has its own name")
    folder = runs_folder(parent)
    with hold(RunFolder(Path(entry.path).parent), "tag"):
        named = _tags(folder)
        if named.get(label, entry.run) != entry.run and not move:
            raise ConflictError(f"tag {label!r} is of {named[label]}; say --move to give it to {entry.run}")
        (folder / ".adapters").mkdir(mode=0o700, exist_ok=True)
        write_json(folder / ".adapters" / "tags.json", named | {label: entry.run})
    return find_entry(entry.run, parent)


def diff(one: Entry, other: Entry) -> dict[str, tuple[Any, Any]]:
    """Field -> both values, where they differ; recipes included, dotted."""
    left, right = _facts(one), _facts(other)
    return {key: (left.get(key), right.get(key)) for key in sorted(left | right) if left.get(key) != right.get(key)}


def _facts(entry: Entry) -> dict[str, Any]:
    own = {key: value for key, value in entry.to_json().items() if key not in ("path", "tags", "run")}
    return own | _flat(read_json(Path(entry.path).parent / "plan.json").get("chosen", {}), "plan.")


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


def _entry(run: RunFolder, named: dict[str, str]) -> Entry:
    tags = tuple(sorted(label for label, target in named.items() if target == run.run_id))
    return _of_folder(run.adapter, run.run_id, tags, read_json(run.result))


def _of_folder(folder: Path, name: str, tags: tuple[str, ...], result: dict[str, Any]) -> Entry:
    config, told = read_json(folder / CONFIG), _lineage(folder / WEIGHTS)
    targets = config.get("target_modules") or ()
    return Entry(
        run=name,
        path=str(folder),
        tags=tags,
        method=told.get("method") or config.get("peft_type"),
        rank=config.get("r"),
        alpha=config.get("lora_alpha"),
        target_modules=tuple(sorted([targets] if isinstance(targets, str) else targets)),
        base=told.get("base") or config.get("base_model_name_or_path"),
        base_revision=told.get("base_revision"),
        base_fingerprint=told.get("base_fingerprint"),
        data_key=told.get("data_key"),
        made=_made(told.get("made")),
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


def _lineage(path: Path) -> dict[str, Any]:
    """The lineage in a safetensors header; {} where there is none."""
    try:
        told = json.loads(read_header(path).get("__metadata__", {}).get(LINEAGE, "{}"))
    except (OSError, ValueError, AttributeError):
        return {}
    return told if isinstance(told, dict) else {}


def _tags(folder: Path) -> dict[str, str]:
    found = read_json(folder / ".adapters" / "tags.json")
    return {str(label): str(run) for label, run in found.items()}
