"""trial_folder: what a trial is (trial.json, never changed), what happened to it (attempts.jsonl), and where it lies.

The runs of a trial are ordinary runs beside it; the trial knows their names. What a rung decided is not stored: it
follows from the runs' own losses, each time anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from launcher.errors import ConflictError, RecipeError
from launcher.runs.folder import RunFolder, read_json_lines, write_atomic, write_json
from launcher.runs.status import find_run, is_run, names_of_runs, runs_folder
from launcher.runs.trial_candidates import Candidate
from launcher.runs.trial_rungs import rung_steps
from launcher.runs.variables import private_files

SCHEMA = 1
_FOLDER = ".trials"
_TURNS = ("cancelled", "taken_on")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One run of a trial: a candidate with a seed."""

    candidate: str
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirms:
    """A finished trial, and the two of its candidates that are run again."""

    trial: str
    winner: str
    runner_up: str
    by: Literal["loss", "score"] = "loss"
    """What is compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What was asked for, complete."""

    path: Path
    candidates: tuple[Candidate, ...]
    """The rejected ones too."""
    shares: tuple[Fraction, ...]
    """Rungs, as shares of a whole run."""
    seeds: tuple[int, ...]
    executor: str
    """slurm | local."""
    parallel: int | None
    """Most tasks of an array at a time."""
    price: float | None
    """Of a GPU-hour."""
    overrides: tuple[str, ...]
    """Of the command line, before those of a candidate; the recipe's text is beside trial.json."""
    asked: tuple[str, ...]
    """Those of them that the user wrote."""
    origin: str
    """The recipe's file."""
    working_folder: str
    """Where the trial was started: the recipe's relative paths begin there."""
    confirms: Confirms | None = None
    """What it runs again, where it is the confirmation of another trial."""

    @property
    def name(self) -> str:
        """As it is called on command lines."""
        return self.path.name

    @property
    def folder(self) -> RunFolder:
        """Its ledger and its lock are as a run's."""
        return RunFolder(self.path)

    @property
    def recipe(self) -> Path:
        """The recipe as written."""
        return self.folder.recipe

    @property
    def table(self) -> Path:
        """What is known of the candidates; rewritten as the trial goes on."""
        return self.path / "table.json"

    @property
    def runs(self) -> Path:
        """Folder that holds the trial's runs."""
        return self.path.parent.parent

    @property
    def running(self) -> tuple[Candidate, ...]:
        """The candidates that take part."""
        return tuple(each for each in self.candidates if each.rejected is None)

    def candidate(self, name: str) -> Candidate:
        """One of them."""
        return next(each for each in self.candidates if each.name == name)

    def steps(self, name: str, rung: int) -> int:
        """Where a candidate's runs pause for a rung."""
        return rung_steps(self.shares, self.candidate(name).steps)[rung]

    def tasks(self, names: list[str]) -> list[Task]:
        """A run per candidate and seed."""
        return [Task(candidate=name, seed=seed) for name in names for seed in self.seeds]

    def made(self) -> list[RunFolder]:
        """The runs that it has so far, in the order in which they were made."""
        return [RunFolder((self.runs / str(event["run"])).resolve()) for event in self._events("run")]

    def arrays(self) -> list[Path]:
        """Folders of the arrays that were sent, in any order; none on this machine."""
        folder = self.path / "arrays"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    @property
    def cancelled(self) -> bool:
        """Whether a person has ended it, and nobody has taken it on since."""
        said = [event["event"] for event in read_json_lines(self.folder.attempts) if event.get("event") in _TURNS]
        return said[-1:] == ["cancelled"]

    def run_of(self, task: Task) -> RunFolder | None:
        """Its run; None while it has none."""
        for event in self._events("run"):
            if (event.get("candidate"), event.get("seed")) == (task.candidate, task.seed):
                return RunFolder((self.runs / str(event["run"])).resolve())
        return None

    def out(self) -> dict[str, tuple[int, str]]:
        """Candidates that could not go on: at which rung, and why."""
        found: dict[str, tuple[int, str]] = {}
        for event in self._events("out"):
            found.setdefault(str(event["candidate"]), (int(event["rung"]), str(event["why"])))
        return found

    def sent(self, run: str, rung: int) -> bool:
        """Whether a job was sent that takes this run to this rung."""
        return any((event["run"], event["rung"]) == (run, rung) for event in self._events("sent"))

    def _events(self, name: str) -> Iterator[dict[str, Any]]:
        return (event for event in read_json_lines(self.folder.attempts) if event.get("event") == name)


def create(parent: Path, name: str, recipe_text: str, **facts: Any) -> Trial:
    """Make the folder of a new trial; `facts` are Trial's other fields."""
    with private_files():
        folder = RunFolder.create(parent.resolve() / _FOLDER, name)
    trial = Trial(path=folder.path, **facts)
    write_atomic(trial.recipe, recipe_text)
    write_json(trial.path / "trial.json", _to_json(trial))
    return trial


def _to_json(trial: Trial) -> dict[str, Any]:
    document = asdict(trial)
    del document["path"]
    return document | {
        "schema": SCHEMA,
        "trial": trial.name,
        "candidates": [each.to_json() for each in trial.candidates],
        "shares": [str(share) for share in trial.shares],
    }


def read_trial(path: Path) -> Trial:
    """A trial from its folder.

    Raises:
        ConflictError: another version of the launcher wrote it.
    """
    document = json.loads((path / "trial.json").read_text(encoding="utf-8"))
    if document.pop("schema", None) != SCHEMA:
        raise ConflictError(f"{path}: was written by another version of the launcher; start a new trial")
    del document["trial"]
    document["candidates"] = tuple(Candidate.from_json(each) for each in document["candidates"])
    document["shares"] = tuple(Fraction(share) for share in document["shares"])
    for name in ("seeds", "overrides", "asked"):
        document[name] = tuple(document[name])
    if document.get("confirms") is not None:
        document["confirms"] = Confirms(**document["confirms"])
    return Trial(path=path.resolve(), **document)


def find_trial(name_or_path: str, parent: Path | None = None) -> Trial | None:
    """The trial that a word on the command line means: its folder, its name or the beginning of it; None for no trial.

    Raises:
        RecipeError: several begin so.
    """
    if (Path(name_or_path) / "trial.json").is_file():
        return read_trial(Path(name_or_path))
    found = sorted(path.parent for path in (runs_folder(parent) / _FOLDER).glob("*/trial.json"))
    same = [path for path in found if path.name == name_or_path]
    matching = same or [path for path in found if name_or_path and path.name.startswith(name_or_path)]
    if len(matching) > 1 and not Path(name_or_path).exists():
        names = ", ".join(path.name for path in matching[:5])
        raise RecipeError(f"{name_or_path!r} is the beginning of {len(matching)} trials: {names}")
    return read_trial(matching[0]) if len(matching) == 1 and not Path(name_or_path).is_file() else None


def find_run_or_trial(name_or_path: str, parent: Path | None = None) -> RunFolder | Trial:
    """What a word on the command line means where it may be either: an exact name first, then the beginning of one.

    Raises:
        RecipeError: none, or several.
    """
    path, trial = Path(name_or_path).expanduser(), find_trial(name_or_path, parent)
    runs = [name for name in names_of_runs(parent) if name.startswith(name_or_path)]
    if trial is None or name_or_path in runs or is_run(path):
        return find_run(name_or_path, parent)
    if runs and name_or_path != trial.name and not (path / "trial.json").is_file():
        names = ", ".join([trial.name, *runs[:4]])
        raise RecipeError(f"{name_or_path!r} is the beginning of a trial and of {len(runs)} runs: {names}")
    return trial
