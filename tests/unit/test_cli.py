"""The command line: usage, exit codes, stdout for data and stderr for messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launcher.cli import main

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> Result:
    """Call the CLI in this process."""
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAUNCHER_RUNS", raising=False)
    monkeypatch.delenv("LAUNCHER_SITE", raising=False)


def test_plan_prints_one_json_document_on_stdout() -> None:
    """`--json` can be piped: nothing but the document reaches stdout."""
    result = run("plan", "llama3.1-70b-full", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["schema"] == 1
    assert document["chosen"]["nodes"] * document["chosen"]["gpus_per_node"] == 64
    assert document["chosen"]["fits"] is True


def test_a_plan_that_does_not_fit_is_printed_and_exits_6() -> None:
    """70B full fine-tuning on one node of 8 x 80 GB: estimated as written, refused, with what would fit."""
    result = run("plan", "llama3.1-70b-full", "slurm.nodes=1", "--json")
    assert result.exit_code == 6
    assert json.loads(result.stdout)["chosen"]["fits"] is False
    assert "fit" in result.stderr


def test_a_plan_can_be_written_as_a_page_whether_it_fits_or_not() -> None:
    """The same exit code, and the page with its formulas beside the printed plan."""
    fits = run("plan", "tiny-cpu", "--html", "fits.html")
    refused = run("plan", "llama3.1-70b-full", "slurm.nodes=1", "slurm.gpus_per_node=1", "--html", "refused.html")
    assert (fits.exit_code, refused.exit_code) == (0, 6)
    assert "This fits." in Path("fits.html").read_text(encoding="utf-8")
    assert "This does not fit" in Path("refused.html").read_text(encoding="utf-8")
    assert "How the numbers come about" in Path("fits.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_a_usage_error() -> None:
    """No traceback for a folder that is not there."""
    done = run("plan", "tiny-cpu", "--html", "no/such/folder/plan.html")
    assert done.exit_code == 2
    assert "no/such/folder/plan.html" in done.stderr


def test_every_mistake_of_a_command_is_reported_at_once() -> None:
    """Two wrong overrides cost one round trip, not two."""
    result = run("plan", "tiny-cpu", "train.learing_rate=1", "lora.r=0")
    assert result.exit_code == 2
    assert "did you mean train.learning_rate" in result.stderr
    assert "lora.r" in result.stderr.splitlines()[1]
    assert result.stdout == ""


def test_an_override_may_be_dashed_like_rival_tools_write_it() -> None:
    """`--lora.r=4` and `--lora.r 4` mean lora.r=4."""
    for form in (("lora.r=4",), ("--lora.r=4",), ("--lora.r", "4")):
        document = json.loads(run("plan", "tiny-cpu", *form, "--json").stdout)
        assert document["chosen"]["lora_r"] == 4


def test_a_mistyped_option_is_not_taken_for_an_override() -> None:
    """`--jsn` is refused with exit 2."""
    assert run("plan", "tiny-cpu", "--jsn").exit_code == 2


def test_an_unknown_recipe_names_the_nearest_shipped_one() -> None:
    """Nobody has to list the folder."""
    result = run("plan", "llama3.1-70b-ful")
    assert result.exit_code == 2
    assert "llama3.1-70b-full" in result.stderr


def test_sbatch_flags_set_the_recipe_fields_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """-N, -t, -p and -J on submit are recipe fields; a dry run works on a laptop without Slurm and touches nothing."""
    monkeypatch.setenv("PATH", "/nonexistent")
    flags = ["-N", "2", "-t", "2:00:00", "-J", "mine", "slurm.site=a100-80gb", "-p", "gpu"]
    result = run("submit", "llama3.1-8b-full", *flags, "--dry-run")
    assert result.exit_code == 0, result.stderr
    request = json.loads(result.stdout)
    assert (request["nodes"], request["time_min"], request["partition"]) == (2, 120, "gpu")
    assert request["name"].startswith("mine-")
    assert list(Path.cwd().iterdir()) == []


def test_copying_a_recipe_never_overwrites() -> None:
    """A second copy is refused with exit 7 and the file stays as the user left it."""
    assert run("recipes", "tiny-cpu").exit_code == 0
    Path("tiny-cpu.yaml").write_text("mine")
    assert run("recipes", "tiny-cpu").exit_code == 7
    assert Path("tiny-cpu.yaml").read_text() == "mine"


def test_recipes_lists_every_shipped_recipe_with_planned_numbers() -> None:
    """The list's numbers come from the planner."""
    rows = json.loads(run("recipes", "--json").stdout)
    assert {row["name"] for row in rows} == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert all(row["peak_bytes"] > 0 for row in rows)


def test_the_command_reference_is_what_the_cli_says() -> None:
    """docs/commands.md is generated; a drift fails here."""
    script = [sys.executable, str(ROOT / "scripts" / "command-reference"), "--check"]
    finished = subprocess.run(script, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
