"""`launcher trial` on this machine, as a user types it: real runs of a tiny model, interrupted and not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.recipe.load import load_recipe, recipe_to_yaml
from launcher.runs.folder import RunFolder, read_json_lines
from launcher.runs.status import run_status
from launcher.runs.trial_folder import Trial, find_trial
from launcher.runs.trial_scores import score
from launcher.runs.trial_standing import stand
from launcher.runs.trial_table import Row, rows
from tests.tiny import make_chat_rows, make_recipe

LIMIT_S = 1500
"""For a machine that does ten other things; an idle one takes a tenth of it."""
CANDIDATES = (
    "low: lora.r=4 train.learning_rate=1e-4",
    "high: lora.r=4 train.learning_rate=1e-2",
    "prompt: method=prompt",
)
RUNGS = ("--rungs", "1/2,1")
pytestmark = pytest.mark.timeout(LIMIT_S)


class User:
    """A folder with a recipe, and `launcher` typed in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        recipe = make_recipe(
            home,
            slurm={"site": "local", "nodes": 1, "gpus_per_node": 1},
            wandb={"mode": "disabled"},
            checkpoint={"save_minutes": None, "save_steps": 2},
            train={"max_steps": 8, "learning_rate": 1e-3, "precision": "fp32", "global_batch_size": 4},
            **{"data.packing": False},
        )
        make_chat_rows(home / "other.jsonl", n=8, seed=9)
        text = recipe_to_yaml(recipe).replace("retention: null", f"retention: {{path: {home / 'other.jsonl'}}}")
        (home / "tiny.yaml").write_text(text, encoding="utf-8")

    def start(self, *words: str, verb: str = "trial", **environ: str) -> subprocess.Popen[str]:
        """`launcher trial ...`, running."""
        settings = {"OMP_NUM_THREADS": "1", "LAUNCHER_RUNS": str(self.home / "runs"), **environ}
        unset = {"LAUNCHER_FAULT", "LAUNCHER_CACHE", "LAUNCHER_SITE"} - set(environ)
        top = str(Path(__file__).parents[2])
        return subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", verb, *words],
            env={key: value for key, value in os.environ.items() if key not in unset} | settings | {"PYTHONPATH": top},
            cwd=self.home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def trial(self, *words: str, code: int = 0, verb: str = "trial", **environ: str) -> str:
        """`launcher trial ...` to its end; what it printed."""
        asked = self.start(*words, verb=verb, **environ)
        out, err = asked.communicate(timeout=LIMIT_S)
        assert asked.returncode == code, out + err
        return out

    def trials(self) -> list[Trial]:
        """All of them, oldest first."""
        folders = sorted((self.home / "runs" / ".trials").glob("*/trial.json"), key=lambda path: path.stat().st_mtime)
        found = [find_trial(str(path.parent)) for path in folders]
        return [trial for trial in found if trial is not None]


def candidates(*lines: str) -> list[str]:
    return [word for line in lines for word in ("--candidate", line)]


def table(trial: Trial) -> dict[str, Row]:
    return {row.candidate: row for row in rows(trial, stand(trial))}


def quality(trial: Trial) -> dict[str, dict[str, Any]]:
    return {name: row.quality() for name, row in table(trial).items()}


def ledgers(trial: Trial, event: str) -> list[dict[str, Any]]:
    """Events of that name in the ledgers of all runs of a trial."""
    made = [line for line in read_json_lines(trial.folder.attempts) if line["event"] == "run"]
    runs = [RunFolder(trial.runs / str(line["run"])) for line in made]
    return [line for run in runs for line in read_json_lines(run.attempts) if line["event"] == event]


def until(happened: Any, what: str) -> None:
    deadline = time.monotonic() + LIMIT_S / 3
    while not happened():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    yield User(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def undisturbed(user: User) -> Trial:
    """A trial that nothing interrupted."""
    user.trial("tiny.yaml", *candidates(*CANDIDATES), *RUNGS, "--pick", "best.yaml", "--json")
    return user.trials()[-1]


def test_the_worst_stops_at_its_rung_and_the_others_finish(undisturbed: Trial) -> None:
    """The table holds what was measured of each, in the order of their losses; losers left no artifact."""
    told = table(undisturbed)
    assert sorted((row.status, row.steps) for row in told.values()) == [
        ("finished", 8),
        ("finished", 8),
        ("stopped", 4),
    ]
    best = next(iter(told.values()))
    assert best.validation_loss is not None and best.base_loss is not None
    assert best.validation_loss < best.base_loss
    for row in told.values():
        assert row.retention_change is not None and row.train_s and row.wall_s and row.wall_s > row.train_s
        assert (row.artifact_bytes is None) == (row.status == "stopped")
        assert row.peak_bytes is None and row.host_peak_bytes and row.host_peak_bytes > 50e6  # Python with PyTorch
    stored = json.loads(undisturbed.table.read_text(encoding="utf-8"))
    assert [row["candidate"] for row in stored["rows"]] == list(told)
    assert stored["state"] == "finished"


def test_the_winner_can_be_submitted(user: User, undisturbed: Trial) -> None:
    """--pick wrote a recipe that says why, with what was measured in it."""
    recipe = load_recipe(user.home / "best.yaml")
    best = next(iter(table(undisturbed).values()))
    assert (recipe.method, recipe.train.learning_rate) == (best.method, best.learning_rate)
    assert "one seed" in (user.home / "best.yaml").read_text(encoding="utf-8")


def test_a_function_of_the_user_judges_the_answers(user: User, undisturbed: Trial) -> None:
    """In the train environment, on the answers of those that finished and of the base; the best can be picked by it."""
    (user.home / "mine.py").write_text(
        "def judge(answer, reference, prompt):\n    return len(reference) + len(answer) / 1000\n"
    )
    words = ("--scorer", "mine.py:judge", "--objective", "score", "--json")
    document = json.loads(user.trial(undisturbed.name, *words))
    scores = {row["candidate"]: row["score"] for row in document["rows"]}
    finished = [name for name, row in table(undisturbed).items() if row.status == "finished"]
    assert {name for name, score in scores.items() if score is not None} == set(finished)
    assert all(scores[name] > 1 for name in finished) and document["base_score"] > 1
    assert scores[document["choice"]["candidate"]] == max(scores[name] for name in finished)
    (undisturbed.path / "scores.json").unlink()


def test_a_pause_changes_nothing_in_a_run(user: User, undisturbed: Trial) -> None:
    """Whoever finished has, to the last bit, the loss of a run that never paused: a rung is no shorter schedule."""
    finished = [line for line in CANDIDATES if table(undisturbed)[line.partition(":")[0]].status == "finished"]
    user.trial("tiny.yaml", *candidates(*finished), "--rungs", "1")
    straight = table(user.trials()[-1])
    assert len(straight) == 2
    for name, row in straight.items():
        assert row.losses == table(undisturbed)[name].losses
        assert len(ledgers(user.trials()[-1], "started")) == 2


def test_interruptions_leave_the_same_table(user: User, undisturbed: Trial) -> None:
    """Every run loses a rank once, the trial itself is killed, and goes on: the same quality, bit for bit."""
    words = ["tiny.yaml", *candidates(*CANDIDATES), *RUNGS]
    before = len(user.trials())
    asked = user.start(*words, LAUNCHER_FAULT="at=step,rank=0,step=4,do=kill;at=step,rank=0,step=7,do=kill")
    until(lambda: len(user.trials()) > before and ledgers(user.trials()[-1], "died"), "a rank died")
    asked.send_signal(signal.SIGKILL)
    asked.communicate()
    trial = user.trials()[-1]
    user.trial(trial.name, LAUNCHER_FAULT="at=step,rank=0,step=3,do=kill")
    assert len(ledgers(trial, "died")) >= 3
    assert quality(trial) == quality(undisturbed)


def test_a_trial_that_was_interrupted_says_so_and_goes_on(user: User, undisturbed: Trial) -> None:
    """Ctrl-C cancels the run it waits for; the trial's name is all it takes to go on."""
    before = len(user.trials())
    asked = user.start("tiny.yaml", *candidates(*CANDIDATES), *RUNGS)
    until(lambda: len(user.trials()) > before and ledgers(user.trials()[-1], "started"), "the first run")
    asked.send_signal(signal.SIGINT)
    _, err = asked.communicate(timeout=LIMIT_S)
    trial = user.trials()[-1]
    assert asked.returncode == 130
    assert f"go on with: launcher trial {trial.name}" in err
    user.trial(trial.name)
    assert quality(trial) == quality(undisturbed)


def test_a_trial_is_cancelled_as_a_whole_and_goes_on(user: User, undisturbed: Trial) -> None:
    """The launcher that waits for it says so and starts nothing more; the same name takes it to the same table."""
    before = len(user.trials())
    asked = user.start("tiny.yaml", *candidates(*CANDIDATES), *RUNGS)
    until(lambda: len(user.trials()) > before and ledgers(user.trials()[-1], "started"), "the first run")
    trial = user.trials()[-1]
    [run] = trial.made()
    assert f"would cancel job {run_status(run).job_id} ({run.run_id}" in user.trial(
        trial.name, "--dry-run", verb="cancel"
    )
    assert f"cancelled trial {trial.name}: 1 jobs" in user.trial(trial.name, verb="cancel")
    _, err = asked.communicate(timeout=LIMIT_S)
    assert asked.returncode == 8
    assert f"{trial.name} was cancelled; go on with: launcher trial {trial.name}" in err
    assert trial.made() == [run] and run_status(run).state == "CANCELLED"
    user.trial(trial.name)
    assert quality(trial) == quality(undisturbed)


def test_seeds_are_compared_on_the_same_rows(user: User, undisturbed: Trial) -> None:
    """LoRA begins as the base, so equal losses before the first step mean equal rows; from there on seeds differ."""
    words = [*candidates("low: lora.r=4 train.learning_rate=1e-4", "high: lora.r=4 train.learning_rate=1e-2")]
    document = json.loads(
        user.trial("tiny.yaml", "train.max_steps=3", *words, "--seeds", "2", "--rungs", "1", "--json")
    )
    trial = user.trials()[-1]
    runs = [trial.run_of(task) for task in trial.tasks(["low", "high"])]
    assert len({score(run, 3).base_loss for run in runs if run is not None}) == 1
    told = table(trial)
    assert all(len(set(row.losses)) == 2 and row.spread for row in told.values())
    noise, (best, other) = document["smallest_difference"], told.values()
    assert best.validation_loss is not None and other.validation_loss is not None
    assert (len(document["ties"]) == 1) == (other.validation_loss - best.validation_loss > noise)


def test_a_confirmation_runs_the_first_two_with_new_seeds(user: User, undisturbed: Trial) -> None:
    """A trial of its own on the same held-out rows; what it says of the first one is in its table."""
    document = json.loads(user.trial(undisturbed.name, "--confirm", "--seeds", "2", "--json"))
    again, before = user.trials()[-1], [row for row in table(undisturbed).values() if row.status == "finished"]
    said = [document["confirms"][name] for name in ("trial", "winner", "runner_up", "by")]
    assert said == [undisturbed.name, before[0].candidate, before[1].candidate, "loss"]
    assert document["confirms"]["outcome"] in {"confirmed", "tie", "reversed"}
    assert again.seeds == (43, 44)
    for row in before:
        same = table(again)[row.candidate].base_loss == row.base_loss
        assert same or row.method == "prompt"  # LoRA begins as the base, so equal losses mean equal rows
        assert not set(table(again)[row.candidate].losses) & set(row.losses)


def test_nothing_is_written_in_a_dry_run(user: User) -> None:
    """Candidates, rungs and cost, without a folder."""
    before = len(user.trials())
    document = json.loads(user.trial("tiny.yaml", *candidates(*CANDIDATES), "--dry-run", "--json"))
    assert [each["name"] for each in document["candidates"]] == ["low", "high", "prompt"]
    assert len(user.trials()) == before
