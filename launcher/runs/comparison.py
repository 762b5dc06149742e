"""comparison: several runs side by side, and what may be said of the difference between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ModelError, RecipeError, raise_all
from launcher.facts.formats import Example, read_examples
from launcher.facts.train_environment import ask, train_python
from launcher.recipe.schema import DataSource
from launcher.runs.folder import RunFolder
from launcher.runs.named import is_adapter
from launcher.runs.paired import LEAST_ROWS, Pair, all_pairs, winner
from launcher.runs.registry import adapter_of, run_of
from launcher.runs.run_facts import RunFacts, run_facts
from launcher.runs.status import find_run

MODULE = "launcher.adapters.job"
BASE = "base"
"""Name of the untrained model among the runs."""
_TIMEOUT_S = 6 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """How much of the models is looked at."""

    rows: int = 200
    """Validation rows whose loss is measured."""
    generations: int = 4
    """Prompts answered side by side."""
    max_new_tokens: int = 128
    prompts: Path | None = None
    """File of prompts; None = the first validation rows."""
    adapters: tuple[Path, ...] = ()
    """Folders of adapters that no run made, such as combined ones; measured beside the runs on their rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Runs side by side."""

    runs: tuple[RunFacts, ...]
    notes: tuple[str, ...]
    """What keeps the numbers from being compared, in sentences."""
    per_example: dict[str, Any] | None
    """Run -> losses per row, in nats per token, "base" among them; None: not measured, see notes."""
    pairs: tuple[Pair, ...]
    winner: str | None
    verdict: str
    generations: tuple[dict[str, Any], ...]
    """{"prompt", "reference" | None, "answers": {run: text}}."""

    def to_json(self) -> dict[str, Any]:
        """The document of `launcher compare --json`."""
        return {
            "schema": 1,
            "runs": [run.to_json() for run in self.runs],
            "notes": list(self.notes),
            "per_example": self.per_example,
            "pairs": [pair.to_json() for pair in self.pairs],
            "winner": self.winner,
            "verdict": self.verdict,
            "generations": list(self.generations),
        }


def find_runs(names: Sequence[str], parent: Path | None) -> list[RunFolder]:
    """The runs a user means, by name or tag, each once.

    Raises:
        RecipeError: no such run, or one named twice.
    """
    problems: list[str] = []
    found: list[RunFolder] = []
    for name in names:
        try:
            found.append(find_run(run_of(name, parent), parent))
        except RecipeError as error:
            problems += error.problems
    twice = {run.run_id for run in found if sum(other.run_id == run.run_id for other in found) > 1}
    problems += [f"{name} is named twice" for name in sorted(twice)]
    if problems:
        raise RecipeError(*problems)
    return found


def compare(folders: Sequence[RunFolder], asked: Asked | None) -> Comparison:
    """Compare runs; `asked` None loads no model and compares numbers alone.

    Raises:
        DataError, RecipeError: the prompts cannot be read.
        ModelError, ClusterError: a base is not here, does not fit, or there is no train environment.
    """
    runs = tuple(run_facts(folder) for folder in folders)
    notes = list(_notes(runs))
    told: dict[str, Any] = {}
    if asked is not None:
        told = _ask_models(folders, runs, asked)
        notes += told.get("notes", [])
    losses = told.get("losses")
    pairs = tuple(all_pairs(losses)) if losses else ()
    names = [name for name in losses or () if name != BASE]
    best = winner(pairs, names) if len(names) > 1 else None
    return Comparison(
        runs=runs,
        notes=tuple(notes),
        per_example=None if losses is None else {"losses": losses, "tokens": told["tokens"], "device": told["device"]},
        pairs=pairs,
        winner=best,
        verdict=_verdict(runs, pairs, best, names),
        generations=tuple(told.get("generations", [])),
    )


def _notes(runs: Sequence[RunFacts]) -> Iterator[str]:
    """What makes numbers of these runs different things."""
    for run in runs:
        if not run.finished:
            yield f"{run.run} has not finished (step {run.step or 0} of {run.total_steps or '?'}): numbers are interim"
        for warning in run.warnings:
            yield f"{run.run}: {warning.get('message')}"
    if len(runs) < 2:
        return
    for name in ("validation", "retention"):
        hashes = {getattr(run, f"{name}_sha256") for run in runs}
        if len(hashes - {None}) > 1:
            yield f"the {name} sets differ: losses on them are of different rows and cannot be compared"
        elif None in hashes and any(getattr(run, name).last is not None for run in runs):
            yield f"whether the {name} sets are the same is not recorded for every run"
    if len({run.base for run in runs}) > 1:
        bases = ", ".join(f"{run.run}: {run.base}" for run in runs)
        yield f"the bases differ ({bases}): what a run gained is not what it ended with"
    if len({run.data_key for run in runs} - {None}) > 1 and len({run.validation_sha256 for run in runs}) == 1:
        yield "the training data or its packing differs, the validation rows are the same"


def _verdict(runs: Sequence[RunFacts], pairs: Sequence[Pair], best: str | None, measured: Sequence[str]) -> str:
    """What may be said, in one sentence."""
    if len(runs) < 2 and len(measured) < 2:
        return _of_one(runs[0], pairs)
    if not measured:
        return "no winner is called: differences were not measured row by row"
    if pairs[0].rows < LEAST_ROWS:
        return f"no winner is called on {pairs[0].rows} rows; {LEAST_ROWS} are the least (data.validation)"
    if best is not None:
        others = [pair for pair in pairs if best in (pair.one, pair.other) and BASE not in (pair.one, pair.other)]
        least = min(abs(pair.difference) for pair in others)
        return (
            f"{best} is better on these rows: by {least:.4f} nats per token or more, beyond what a choice of other "
            "rows would change; another seed is another matter (launcher trial)"
        )
    return "no winner: the differences between the best runs are within what a choice of other rows would change"


def _of_one(run: RunFacts, pairs: Sequence[Pair]) -> str:
    own = next((pair for pair in pairs if BASE in (pair.one, pair.other)), None)
    if own is None:
        return "one run: nothing to compare it with but its base"
    if own.better is None:
        return f"{run.run} and its base differ by no more than a choice of other rows would change"
    return f"{'better' if own.better == run.run else 'worse'} than its base on these rows"


def _ask_models(folders: Sequence[RunFolder], runs: Sequence[RunFacts], asked: Asked) -> dict[str, Any]:
    """Losses per row and answers, from the train environment; nothing of runs that have no artifact."""
    without = [run.run for run in runs if run.artifact is None]
    if without:
        return {"notes": [f"no model is loaded: {', '.join(without)} left no adapter or model yet"]}
    request = {
        "ask": "compare",
        "runs": [str(folder.path) for folder in folders],
        "rows": asked.rows,
        "generations": asked.generations,
        "max_new_tokens": asked.max_new_tokens,
        "adapters": [str(path) for path in asked.adapters],
        "prompts": None if asked.prompts is None else [_plain(one) for one in read_prompts(asked.prompts)],
    }
    try:
        return ask(MODULE, request, python=train_python(), verb="compare", timeout_s=_TIMEOUT_S)
    except ModelError as error:
        raise ModelError(*error.problems, "launcher compare --no-model compares the numbers alone") from error


def part(names: Sequence[str], parent: Path | None) -> tuple[list[str], list[str]]:
    """Names of runs, and those of adapters that no run trained, which are measured beside them."""
    beside = [name for name in names if adapter_of(name, parent) is not None]
    return [name for name in names if name not in beside], beside


def find_adapters(names: Sequence[str], runs: Sequence[RunFolder], parent: Path | None = None) -> tuple[Path, ...]:
    """Folders of adapters to measure beside the runs: folders, or names and tags of adapters that no run trained.

    Raises:
        RecipeError: no adapter, or a folder's name that another one has.
    """
    taken = {BASE, *(run.run_id for run in runs)}
    problems, found = [], []
    for name in names:
        path = Path(name).expanduser()
        folder = path.resolve() if is_adapter(path) else adapter_of(name, parent)
        if folder is None:
            problems.append(f"--adapter: {name} is no adapter folder (no adapter_config.json), and no adapter's name")
            continue
        if folder.name in taken:
            problems.append(f"--adapter: another one is called {folder.name}; rename the folder")
        taken.add(folder.name)
        found.append(folder)
    raise_all(RecipeError, problems)
    return tuple(found)


def read_prompts(path: Path) -> list[Example]:
    """Prompts of a file: lines of .txt, or rows in any of the data formats, of which the last answer is left out.

    Raises:
        RecipeError: no such file. DataError: rows that cannot be read.
    """
    if not path.is_file():
        raise RecipeError(f"--prompts: {path} is no file")
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [Example(text=line.strip()) for line in lines if line.strip()]
    else:
        found = [example for _, example in read_examples(DataSource(path=str(path)))]
    if not found:
        raise RecipeError(f"--prompts: {path} holds no prompt")
    return found


def _plain(example: Example) -> dict[str, Any]:
    """What to answer, as plain values: {"messages"}, {"prompt"} or {"text"}, and the file's answer as "reference"."""
    if example.messages:
        messages, reference = [dict(message) for message in example.messages], None
        if messages[-1]["role"] == "assistant":
            reference = messages.pop().get("content")
        return {"messages": messages, "reference": reference}
    if example.prompt is not None:
        return {"prompt": example.prompt, "reference": example.completion}
    return {"text": example.text or "", "reference": None}
