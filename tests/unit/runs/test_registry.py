"""`launcher adapters`: the registry is the run folders themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from launcher.cli import main
from launcher.errors import ConflictError, RecipeError
from launcher.runs import registry
from launcher.runs.adapters import find_adapter
from launcher.runs.folder import RunFolder, write_json
from tests.unit.runs.material import make_run


def with_adapter(parent: Path, *, rank: int, loss: float, finished_s: float) -> RunFolder:
    """A finished run with an adapter that carries its lineage."""
    run = make_run(parent)
    run.adapter.mkdir()
    told = {"method": "lora", "base": "org/base", "base_fingerprint": "ab" * 32, "data_key": "k"}
    save_file({"a": np.zeros(4, np.float32)}, run.adapter / "adapter_model.safetensors",
              metadata={"format": "pt", "launcher.lineage": json.dumps(told)})  # fmt: skip
    write_json(run.adapter / "adapter_config.json", {"peft_type": "LORA", "r": rank, "target_modules": ["q_proj"]})
    write_json(run.result, {"step": 4, "validation_loss": {"after": loss}, "finished_time_s": finished_s})
    return run


@pytest.fixture
def two(tmp_path: Path) -> tuple[RunFolder, RunFolder]:
    """Two adapters, the second one newer."""
    runs = tmp_path / "runs"
    first = with_adapter(runs, rank=8, loss=2.0, finished_s=1.0)
    return first, with_adapter(runs, rank=16, loss=1.5, finished_s=2.0)


def test_the_newest_comes_first_with_its_lineage(two: tuple[RunFolder, RunFolder]) -> None:
    """Rank, base and losses are read from the adapter's own files."""
    found = registry.list_adapters(two[0].path.parent)
    assert [(one.name, one.rank, one.base, one.validation_loss) for one in found] == [
        (two[1].run_id, 16, "org/base", 1.5),
        (two[0].run_id, 8, "org/base", 2.0),
    ]


def test_a_tag_is_one_runs_until_it_is_moved(two: tuple[RunFolder, RunFolder]) -> None:
    """Tags are taken where a run's name is; a second owner is a conflict."""
    parent = two[0].path.parent
    registry.tag(two[0].run_id, "best", parent)
    assert registry.find_entry("best", parent).run == two[0].run_id
    with pytest.raises(ConflictError, match="--move"):
        registry.tag(two[1].run_id, "best", parent)
    assert registry.tag(two[1].run_id, "best", parent, move=True).tags == ("best",)
    with pytest.raises(RecipeError, match="letters"):
        registry.tag(two[1].run_id, "../x", parent)


def test_a_diff_names_what_differs_and_nothing_else(two: tuple[RunFolder, RunFolder]) -> None:
    """Equal bases are no difference; ranks and losses are."""
    parent = str(two[0].path.parent)
    result = CliRunner().invoke(main, ["adapters", "diff", two[0].run_id, two[1].run_id, "--runs", parent, "--json"])
    told = json.loads(result.stdout)["different"]
    assert told["rank"] == [8, 16]
    assert "base_fingerprint" not in told


def test_foreign_and_broken_files_are_no_crash(two: tuple[RunFolder, RunFolder]) -> None:
    """An adapter without lineage, or with a torn header, is listed with what is known."""
    (two[0].adapter / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    found = registry.list_adapters(two[0].path.parent)
    assert {one.run: one.base for one in found}[two[0].run_id] is None
    assert CliRunner().invoke(main, ["adapters", "--runs", str(two[0].path.parent)]).exit_code == 0


def test_a_tag_names_an_adapter_to_merge_and_export_too(two: tuple[RunFolder, RunFolder]) -> None:
    """What is tagged is found by merge, export, combine and reduce, as by diff."""
    parent = two[0].path.parent
    registry.tag(two[0].run_id, "best", parent)
    assert find_adapter("best", parent)[0] == two[0].adapter


def test_a_folder_is_an_adapter_too(two: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    """Combined and reduced adapters lie where the user said: they are compared like others."""
    made = {"how": "reduce", "from_rank": 16, "rank": 8, "parents": [{"name": "a", "weight": 1.0}]}
    folder = tmp_path / "small"
    folder.mkdir()
    told = {"method": "lora", "base": "org/base", "base_fingerprint": "ab" * 32, "data_key": "k", "made": made}
    save_file({"a": np.zeros(4, np.float32)}, folder / "adapter_model.safetensors",
              metadata={"format": "pt", "launcher.lineage": json.dumps(told)})  # fmt: skip
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]})
    parent = two[0].path.parent
    different = registry.diff(registry.find_entry(two[1].run_id, parent), registry.find_entry(str(folder), parent))
    assert different["rank"] == (16, 8)
    assert different["made"] == (None, "rank 16 cut to 8 of a")


@pytest.mark.parametrize("made", [5, {"how": "ties"}, {"how": "ties", "parents": [{}]}, ["x"]])
def test_a_lineage_of_nobody_is_no_traceback(made: object, tmp_path: Path) -> None:
    """What the header says of its making is a stranger's word: what is not ours is left out."""
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "adapter_model.safetensors",
              metadata={"format": "pt", "launcher.lineage": json.dumps({"made": made})})  # fmt: skip
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    assert registry.find_entry(str(tmp_path)).made is None
