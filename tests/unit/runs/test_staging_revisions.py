"""Data sets named with a revision or a configuration: staged beside each other, and never taken for one another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import DataError
from launcher.facts.files import data_files
from launcher.planning.prepare import load_located
from launcher.recipe.schema import DataSource
from tests.hub import FakeHub
from tests.tiny import make_chat_rows
from tests.unit.runs import staging_material
from tests.unit.runs.staging_material import DATA, folder_of, launch, stage

published, hub, recipe = staging_material.published, staging_material.hub, staging_material.recipe
CONFIGS = (
    "configs:\n- {config_name: easy, data_files: [{split: train, path: easy.jsonl}]}\n"
    "- {config_name: hard, data_files: [{split: train, path: hard.jsonl}, {split: held, path: held.jsonl}]}\n"
)


@pytest.fixture
def configured(hub: FakeHub) -> FakeHub:
    """The data set with two configurations, none of them by default: 12 easy rows, 20 hard ones, 4 held out."""
    folder = hub.repos[("dataset", DATA)]
    for path in folder.glob("*.jsonl"):
        path.unlink()
    for name, rows in (("easy", 12), ("hard", 20), ("held", 4)):
        make_chat_rows(folder / f"{name}.jsonl", n=rows, seed=rows)
    (folder / "README.md").write_text(f"---\n{CONFIGS}---\n")
    return hub


def planned_rows(recipe: Path, *overrides: str) -> int:
    """Rows that plan counted, for training and validation."""
    done = launch("plan", recipe, "--json", *overrides)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)["data"]
    assert data["basis"] == "counted"
    return int(data["rows"] + data["validation_rows"])


def test_a_configuration_is_staged_and_read_by_its_name(recipe: Path, configured: FakeHub) -> None:
    """Only its files are fetched, its splits are read; a second one comes beside the first, which stays."""
    easy = "data.train.0.config=easy"
    data = folder_of(stage(recipe, easy), "dataset")
    assert sorted(path.name for path in data.glob("*.jsonl")) == ["easy.jsonl"]
    assert planned_rows(recipe, easy) == 12
    hard = ("data.train.0.config=hard", f"data.retention={{path: {DATA}, config: hard, split: held}}")
    stage(recipe, *hard)
    assert planned_rows(recipe, *hard) == 20
    configured.asked.clear()
    assert planned_rows(recipe, easy) == 12
    assert stage(recipe, easy)["fetch_bytes"] == 0 and configured.fetched(".jsonl") == []


def test_what_is_staged_of_one_configuration_is_not_another(recipe: Path, configured: FakeHub) -> None:
    """Unstaged ones are planned as unknown; unknown ones and none at all are refused by name."""
    stage(recipe, "data.train.0.config=easy")
    other = json.loads(launch("plan", recipe, "--json", "data.train.0.config=hard").stdout)
    assert other["data"]["basis"] == "assumed"
    done = launch("stage", recipe, "data.train.0.config=soft")
    assert done.exit_code == 3 and "no configuration 'soft'; its card has easy, hard" in done.stderr
    done = launch("stage", recipe)
    assert done.exit_code == 3 and "data.train.0.config=easy" in done.stderr


def test_a_configuration_where_the_card_has_none(recipe: Path, hub: FakeHub) -> None:
    """Exit 3 before anything is fetched."""
    done = launch("stage", recipe, "data.train.0.config=easy")
    assert done.exit_code == 3 and "names no configurations; leave config out" in done.stderr
    assert hub.fetched(".jsonl") == []


def test_a_revision_of_a_data_set_is_pinned(recipe: Path, hub: FakeHub, tmp_path: Path) -> None:
    """A branch is staged at its commit beside main's, found again by its name and by the commit, and recorded so."""
    folder = tmp_path / "hub" / "second"
    folder.mkdir()
    make_chat_rows(folder / "train.jsonl", n=24, seed=2)
    hub.branches[("dataset", DATA, "v2")] = folder
    stage(recipe)
    second = ("data.train.0.revision=v2",)
    data = folder_of(stage(recipe, *second), "dataset")
    assert data.name == FakeHub.commit(folder)
    assert (planned_rows(recipe), planned_rows(recipe, *second)) == (40, 24)
    assert planned_rows(recipe, f"data.train.0.revision={data.name}") == 24
    resolved = load_located(recipe, list(second)).recipe
    assert (resolved.data.train[0].path, resolved.data.train[0].revision) == (str(data), data.name)


def test_a_revision_that_is_not_there(recipe: Path, hub: FakeHub) -> None:
    """Exit 3 with the id and the revision."""
    done = launch("stage", recipe, "data.train.0.revision=v9")
    assert done.exit_code == 3 and "v9" in done.stderr and DATA in done.stderr


@pytest.mark.parametrize(
    ("field", "message"), [("revision", "is not a data set of the hub"), ("config", "name the folder or files")]
)
def test_files_have_neither_revision_nor_configuration(tmp_path: Path, field: str, message: str) -> None:
    """A setting that would be ignored is refused: somebody believes to train on something else."""
    (tmp_path / "rows").mkdir()
    make_chat_rows(tmp_path / "rows" / "train.jsonl", n=4)
    for path in (tmp_path / "rows", tmp_path / "rows" / "train.jsonl"):
        with pytest.raises(DataError, match=message):
            data_files(DataSource(path=str(path), **{field: "v1"}))
