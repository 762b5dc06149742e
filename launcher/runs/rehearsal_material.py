"""What a rehearsal is made of: its folder, and what the train environment puts there (worker/shrink.py)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, LauncherError
from launcher.facts.model import catalogue
from launcher.facts.train_environment import ask, train_python
from launcher.planning.plan import Candidate
from launcher.planning.prepare import Planned
from launcher.recipe.dump import recipe_to_yaml
from launcher.recipe.schema import DataSource, Recipe, ValidationSpec
from launcher.runs.folder import RunFolder
from launcher.runs.status import cancel

FOLDER = ".rehearsals"
"""Of all rehearsals, below the runs folder."""
MARK = "REHEARSAL"
"""A file that says a folder is a rehearsal's, and may be removed."""
ROWS = 300
"""Rows of each source that are read."""
_MATERIAL_S = 600.0
_HELD_OUT_ROWS = 8


@dataclass(kw_only=True)
class Space:
    """The folder of one rehearsal."""

    path: Path
    run: RunFolder | None = None

    def remove(self) -> None:
        """End its job and remove it: only a folder that carries our mark, and never through a link."""
        if self.run is not None and self.run.job.exists():
            with contextlib.suppress(LauncherError):
                cancel(self.run)
        if (self.path / MARK).is_file() and not self.path.is_symlink():
            shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()


@contextlib.contextmanager
def workspace(parent: Path, name: str) -> Iterator[Space]:
    """A new private folder below `.rehearsals`.

    Raises:
        ClusterError: it cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
        (path / MARK).touch()
    except OSError as error:
        raise ClusterError(f"output_dir: cannot make a folder for the rehearsal in {parent}: {error}") from error
    with _terminated_like_interrupted():
        yield Space(path=path)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, such as `timeout` sends, must not leave a job and its folder behind: it ends us as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, _frame: object) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_material(planned: Planned, folder: Path, candidate: Candidate) -> dict[str, Any]:
    """Have the small model and the head of the data made by the train environment.

    Raises:
        RecipeError, DataError, ModelError: what the run would be refused for.
        ClusterError: there is no train environment.
    """
    request = {
        "recipe": recipe_to_yaml(planned.recipe),
        "config": catalogue().get(planned.recipe.model.name_or_path.lower()),
        "folder": str(folder),
        "rows": ROWS,
        "micro_batch": candidate.micro_batch,
    }
    python = train_python(planned.site)
    python = python if os.access(python, os.X_OK) else train_python()
    return ask("launcher.worker.shrink", request, python=python, verb="rehearse", timeout_s=_MATERIAL_S)


def with_material(recipe: Recipe, made: dict[str, Any], folder: Path) -> Recipe:
    """The recipe with the small model and the files that were made."""
    paths = iter(made["paths"])
    data = recipe.data
    train = tuple(_from_head(source, next(paths)) for source in data.train)
    validation = data.validation
    if validation.source is not None:
        validation = ValidationSpec(source=_from_head(validation.source, next(paths)))
    elif validation.share is not None or validation.count is not None:
        validation = ValidationSpec(count=min(_HELD_OUT_ROWS, max(1, _lines(train[0].path) // 4)))
    retention = None if data.retention is None else _from_head(data.retention, next(paths))
    return replace(
        recipe,
        name=f"rehearsal-{recipe.name}",
        model=replace(recipe.model, name_or_path=str(folder / "model"), revision=None),
        data=replace(data, train=train, validation=validation, retention=retention),
        output_dir=str(folder),
    )


def _from_head(source: DataSource, path: str) -> DataSource:
    """The source, read from the file that its first rows were written to."""
    return replace(source, path=path, split="train", revision=None, config=None)


def _lines(path: str) -> int:
    with Path(path).open(encoding="utf-8") as file:
        return sum(1 for _ in file)
