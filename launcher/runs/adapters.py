"""adapters: what the verbs about adapters ask of the train environment."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import ConflictError, JobFailedError, LauncherError, ModelError, RecipeError, raise_all
from launcher.facts.adapters import not_combinable, not_plain_lora, read_adapter_facts
from launcher.facts.train_environment import ask, train_python
from launcher.recipe.load import load_recipe
from launcher.runs import named
from launcher.runs.folder import RunFolder, read_json
from launcher.runs.registry import find
from launcher.runs.signing import SUMS
from launcher.runs.status import find_run, runs_folder

MODULE = "launcher.adapters.job"
_TIMEOUT_S = 12 * 3600.0
_ARTIFACT = ("*.safetensors", "*/*.safetensors", SUMS)
_SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")


def find_adapter(name: str, parent: Path | None) -> tuple[Path, RunFolder | None]:
    """The adapter folder a user means: an adapter folder, a run that has one, or an adapter's name or tag.

    Raises:
        RecipeError: neither, or a run of full fine-tuning, which has a model and no adapter.
        JobFailedError: the run has not finished.
    """
    path = Path(name).expanduser()
    if (path / "adapter_config.json").is_file():
        return path.resolve(), None
    run = find(name, parent)
    if isinstance(run, Path):
        return run, None
    if (run.adapter / "adapter_config.json").is_file():
        return run.adapter, run
    if run.model.is_dir():
        raise RecipeError(
            f"{run.run_id} was fully fine-tuned: it has a whole model and no adapter; serve it: vllm serve {run.model}"
        )
    raise JobFailedError(f"{run.run_id} has no adapter: it has not finished (launcher status {run.run_id})")


def artifact_folder(name: str, parent: Path | None) -> Path:
    """The folder that a name means: one on disk, an adapter's, or (of a run of full fine-tuning) the model's.

    Raises:
        RecipeError, JobFailedError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "plan.json").is_file():
        if not any(next(path.glob(pattern), None) for pattern in _ARTIFACT):
            raise RecipeError(f"{path}: holds no safetensors file; name an adapter, a merged or an exported folder")
        return path.resolve()
    run = find(name, parent)
    return run.model if isinstance(run, RunFolder) and run.model.is_dir() else find_adapter(name, parent)[0]


def merge_request(
    name: str, parent: Path | None, *, base: Path | None, dtype: str | None, output: Path | None, trust_base: bool
) -> dict[str, Any]:
    """What is asked of the train environment.

    Raises:
        RecipeError, JobFailedError: no adapter. ModelError: no base folder. ConflictError: the target exists.
    """
    adapter, run = find_adapter(name, parent)
    folder = base_folder(adapter, base, run)
    target = output or (run.path / "merged" if run else adapter.with_name(f"{adapter.name}-merged"))
    _refuse_there(target)
    return {
        "ask": "merge",
        "adapter": str(adapter),
        "base": str(folder),
        "target": str(target.resolve()),
        "dtype": dtype,
        "trust_base": trust_base,
        "proof_bytes": None,
    }


def base_folder(adapter: Path, given: Path | None, run: RunFolder | None = None) -> Path:
    """The base's folder on this machine; a relative one is looked for from here and from where `run` was submitted.

    Raises:
        ModelError: the adapter names an id or a folder that is not here, or its files cannot be read.
    """
    if given is not None:
        told, found = str(given), [given.expanduser()]
    else:
        told = str(read_adapter_facts(adapter).config.get("base_model_name_or_path") or "")
        request = read_json(run.job).get("request") if run else None
        submitted = str(request.get("chdir") or ".") if isinstance(request, dict) else "."
        found = [place / Path(told).expanduser() for place in (Path(), Path(submitted))] if told else []
    here = next((path.resolve() for path in found if (path / "config.json").is_file()), None)
    if here is None:
        raise ModelError(f"{told or adapter}: is no model folder on this machine; name the base with --base FOLDER")
    return here


def _refuse_there(target: Path) -> None:
    if target.exists():
        raise ConflictError(f"{target} exists already; name another folder with -o, or move it away")


def merge(request: dict[str, Any]) -> dict[str, Any]:
    """Merge; returns where the model is and how it was proved.

    Raises:
        LauncherError: what the train environment found.
    """
    return ask(MODULE, request, python=train_python(), verb="merge", timeout_s=_TIMEOUT_S)


def export_request(
    name: str,
    parent: Path | None,
    *,
    engine: str,
    served_name: str | None,
    base: Path | None,
    output: Path | None,
    trust_base: bool,
) -> dict[str, Any]:
    """What is asked of the train environment; the base is optional: without it nothing is loaded and compared.

    Raises:
        RecipeError, JobFailedError: no adapter. ConflictError: the target exists.
    """
    adapter, run = find_adapter(name, parent)
    try:
        folder: Path | None = base_folder(adapter, base, run)
    except ModelError:
        if base is not None:
            raise
        folder = None
    target = output or (run.path / "export" / engine if run else adapter.with_name(f"{adapter.name}-{engine}"))
    _refuse_there(target)
    called = served_name or (run.run_id if run else named.name_of(runs_folder(parent), adapter) or adapter.name)
    if not _SERVED_NAME.fullmatch(called):
        raise RecipeError(f"--name: engines cannot serve {called!r}; letters, digits and . _ : / -, first no sign")
    return {
        "ask": "export",
        "adapter": str(adapter),
        "base": str(folder) if folder else None,
        "target": str(target.resolve()),
        "engine": engine,
        "name": called,
        "trust_base": trust_base,
    }


def combine_request(
    names: Sequence[str],
    parent: Path | None,
    *,
    weights: Sequence[float],
    how: str,
    name: str | None = None,
    target: Path | None = None,
    density: float | None = None,
    majority: str = "total",
    rank: int | None = None,
    seed: int = 0,
    trust_base: bool = False,
) -> dict[str, Any]:
    """What is asked of the train environment; everything that can be refused without it is.

    Raises:
        RecipeError: fewer than two adapters, settings that the way does not take, or adapters that do not go together.
        JobFailedError: a run has no adapter yet. ConflictError: the target exists, or the name is something else's.
    """
    found = [find_adapter(one, parent) for one in names]
    folders = [folder for folder, _ in found]
    facts = [read_adapter_facts(folder) for folder in folders]
    raise_all(
        RecipeError,
        [
            *_combine_settings(len(names), weights, how, density, rank),
            *not_combinable(facts, how, trust_base=trust_base),
        ],
    )
    return {
        "ask": "combine",
        "adapters": [str(folder) for folder in folders],
        "weights": list(weights),
        "how": how,
        "density": density,
        "majority": majority,
        "rank": rank,
        "seed": seed,
        "trust_base": trust_base,
        "base_folder": _base_here(*found[0]),
        **_place(parent, name, target),
    }


def _combine_settings(
    adapters: int, weights: Sequence[float], how: str, density: float | None, rank: int | None
) -> Iterator[str]:
    if adapters < 2:
        yield f"{adapters} adapter named; combining takes two or more (launcher adapters reduce takes one)"
    if len(weights) != adapters:
        yield f"--weights: {len(weights)} numbers for {adapters} adapters; give one each, such as --weights 0.7,0.3"
    if not all(math.isfinite(weight) and weight for weight in weights):
        yield "--weights: every weight is a number other than 0"
    prunes = how not in ("linear", "cat", "svd")
    if prunes and density is None:
        yield f"--how {how} drops numbers and needs --density: the share to keep, such as 0.5"
    if not prunes and density is not None:
        yield f"--density: {how} drops nothing; leave it out, or choose ties or a dare form"
    if density is not None and not 0 < density <= 1:
        yield f"--density: {density:g} is no share above 0 and up to 1"
    if rank is not None and (rank < 1 or not how.endswith("svd")):
        yield f"--rank: {rank} with --how {how}; a rank of 1 or more is for the svd forms, the others keep or add ranks"


def reduce_request(
    adapter: str,
    parent: Path | None,
    *,
    rank: int,
    name: str | None = None,
    target: Path | None = None,
    prove: bool = False,
    base: Path | None = None,
    trust_base: bool = False,
) -> dict[str, Any]:
    """What is asked of the train environment; the base only where the difference of logits is wanted.

    Raises:
        RecipeError: no adapter that can be reduced to `rank`. JobFailedError: the run has none yet.
        ModelError: the base is not here. ConflictError: the target exists, or the name is something else's.
    """
    folder, run = find_adapter(adapter, parent)
    facts = read_adapter_facts(folder)
    problems = not_plain_lora(facts)
    if rank >= facts.rank and not problems:
        problems.append(f"--rank: {rank} is no reduction, {facts.name} has rank {facts.rank}; ask for less")
    raise_all(RecipeError, problems)
    return {
        "ask": "reduce",
        "adapter": str(folder),
        "rank": rank,
        "base": str(base_folder(folder, base, run)) if prove or base else None,
        "trust_base": trust_base,
        "base_folder": _base_here(folder, run),
        **_place(parent, name, target),
    }


def _base_here(adapter: Path, run: RunFolder | None) -> str | None:
    """What an adapter made of this one may say of where the base is: its run's relative folder leads there no more."""
    try:
        return str(base_folder(adapter, None, run))
    except ModelError:
        return None


def _place(parent: Path | None, name: str | None, target: Path | None) -> dict[str, Any]:
    """What an adapter that will be made is called, where it is written, and the folder of runs that lists it, if any.

    Raises:
        RecipeError: neither name nor folder is given, or no folder of runs for a name alone.
        ConflictError: the name or the folder is there already.
    """
    runs = runs_folder(parent)
    listed = runs.is_dir()
    if name is None and target is None:
        raise RecipeError("say what it is to be called with --name NAME, or which folder to write with --to DIR")
    if target is None and not listed:
        raise RecipeError(f"{runs}: there is no folder of runs for --name; name one with --runs, or a folder with --to")
    if name is not None:
        named.refuse_taken(runs, name)
    folder = target.expanduser().resolve() if target is not None else named.place_of(runs, str(name))
    if folder.exists():
        raise ConflictError(f"{target or folder} exists already; name another folder with --to, or move it away")
    called = name or named.free_name(runs, folder.name)
    return {"name": called, "target": str(folder), "runs": str(runs.resolve()) if listed else None}


def derive(request: dict[str, Any]) -> dict[str, Any]:
    """Combine or reduce; returns where the adapter is, what is known of it and the name it is listed under, if it is.

    Raises:
        LauncherError: what the train environment found.
    """
    runs = Path(request["runs"]) if request["runs"] else None
    inside = runs is not None and Path(request["target"]) == named.place_of(runs, request["name"])
    if runs is not None and inside:
        named.prepare(runs, request["name"])
    made = ask(MODULE, request, python=train_python(), verb="adapters", timeout_s=_TIMEOUT_S)
    notices = list(made.get("notices", ()))
    name: str | None = request["name"] if inside else None
    if runs is not None and not inside:
        try:
            name = named.register(runs, Path(made["path"]), request["name"])
        except LauncherError as error:
            notices.append(f"it is not listed: {error}")
    return {**made, "name": name, "notices": notices}


def checkpoint_request(
    name: str, parent: Path | None, *, base: Path | None, dtype: str | None, output: Path | None
) -> dict[str, Any]:
    """What is asked for a full run: its newest checkpoint as a model, verified against its manifest first.

    Raises:
        JobFailedError: no checkpoint that is whole. ModelError: the base's folder is not here.
    """
    run = find_run(name, parent)
    recipe = load_recipe(run.resolved)
    folder = (base or Path(recipe.model.name_or_path)).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: is no model folder on this machine; name the base with --base FOLDER")
    target = output or run.path / "export" / "checkpoint"
    _refuse_there(target)
    precision = recipe.train.precision
    return {
        "ask": "export_checkpoint",
        "checkpoint": str(newest_whole(run)),
        "base": str(folder.resolve()),
        "target": str(target.resolve()),
        "dtype": dtype or (precision if precision in ("bf16", "fp16") else "fp32"),
        "shard_bytes": 5 * 10**9,
    }


def newest_whole(run: RunFolder) -> Path:
    """The newest checkpoint whose files have the sizes and sha256 sums of its manifest.

    Raises:
        JobFailedError: there is none.
    """
    trouble = []
    for path in sorted(run.checkpoints.glob("step-*"), reverse=True):
        try:
            files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
            bad = next((name for name, facts in files.items() if not _as_written(path / name, facts)), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            bad = f"manifest.json ({error})"
        if bad is None:
            return path
        trouble.append(f"{path.name}: {bad} is not as it was written")
    raise JobFailedError(f"{run.run_id} has no whole checkpoint in {run.checkpoints}", *trouble)


def _as_written(path: Path, facts: dict[str, Any]) -> bool:
    if path.is_symlink() or path.stat().st_size != facts["bytes"]:
        return False
    with path.open("rb") as file:
        return bool(hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"])


def export(request: dict[str, Any]) -> dict[str, Any]:
    """Export; returns where it is and the command that serves it.

    Raises:
        LauncherError: what the train environment found.
    """
    return ask(MODULE, request, python=train_python(), verb="export", timeout_s=_TIMEOUT_S)
