"""adapters: what the verbs about adapters ask of the train environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.errors import ConflictError, JobFailedError, ModelError, RecipeError
from launcher.facts.train_environment import ask, train_python
from launcher.runs.folder import RunFolder
from launcher.runs.status import find_run

MODULE = "launcher.adapters.job"
_TIMEOUT_S = 12 * 3600.0


def find_adapter(name: str, parent: Path | None) -> tuple[Path, RunFolder | None]:
    """The adapter folder a user means: an adapter folder, or a run that has one.

    Raises:
        RecipeError: neither, or a run of full fine-tuning, which has a model and no adapter.
        JobFailedError: the run has not finished.
    """
    path = Path(name).expanduser()
    if (path / "adapter_config.json").is_file():
        return path.resolve(), None
    run = find_run(name, parent)
    if (run.adapter / "adapter_config.json").is_file():
        return run.adapter, run
    if run.model.is_dir():
        raise RecipeError(f"{run.run_id} was fully fine-tuned: it has a whole model ({run.model}) and no adapter")
    raise JobFailedError(f"{run.run_id} has no adapter: it has not finished (launcher status {run.run_id})")


def merge_request(
    name: str, parent: Path | None, *, base: Path | None, dtype: str | None, output: Path | None, trust_base: bool
) -> dict[str, Any]:
    """What is asked of the train environment.

    Raises:
        RecipeError, JobFailedError: no adapter. ModelError: no base folder. ConflictError: the target exists.
    """
    adapter, run = find_adapter(name, parent)
    folder = base_folder(adapter, base)
    target = output or (run.path / "merged" if run else adapter.with_name(f"{adapter.name}-merged"))
    if target.exists():
        raise ConflictError(f"{target} exists already; name another folder with -o, or move it away")
    return {
        "ask": "merge",
        "adapter": str(adapter),
        "base": str(folder),
        "target": str(target.resolve()),
        "dtype": dtype,
        "trust_base": trust_base,
        "proof_bytes": None,
    }


def base_folder(adapter: Path, named: Path | None) -> Path:
    """The base's folder on this machine.

    Raises:
        ModelError: the adapter names an id or a folder that is not here.
    """
    if named is not None:
        found = named.expanduser()
    else:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        found = Path(str(config.get("base_model_name_or_path") or "")).expanduser()
    if not (found / "config.json").is_file():
        raise ModelError(f"{found}: is no model folder on this machine; name the base with --base FOLDER")
    return found.resolve()


def merge(request: dict[str, Any]) -> dict[str, Any]:
    """Merge; returns where the model is and how it was proved.

    Raises:
        LauncherError: what the train environment found.
    """
    return ask(MODULE, request, python=train_python(), verb="merge", timeout_s=_TIMEOUT_S)
