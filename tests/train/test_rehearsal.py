"""`launcher rehearse`: whole rehearsals on CPU ranks, and recipes that a rehearsal must not bless.

Each of the slow ones is one submission with one kill and one resume: what is judged is what really happened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.recipe.dump import recipe_to_yaml
from launcher.runs.verdicts import STAGES
from tests.tiny import make_model_dir, make_recipe

LIMIT_S = 900
"""For a machine that does ten other things; an idle one takes a tenth of it."""
ONLY_THE_QUESTION = "{{ bos_token }}{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
pytestmark = pytest.mark.timeout(LIMIT_S)


@pytest.fixture(autouse=True)
def _few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("LAUNCHER_FAULT", raising=False)
    monkeypatch.delenv("LAUNCHER_CACHE", raising=False)


def recipe_file(tmp_path: Path, *, ranks: int = 1, **changes: Any) -> Path:
    """A recipe for this machine over a tiny model and 64 chats."""
    recipe = make_recipe(tmp_path, slurm={"site": "local", "nodes": 1, "gpus_per_node": ranks}, **changes)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    return file


def rehearse(file: Path, *words: str, code: int = 0) -> dict[str, Any]:
    """The verb's JSON answer; fails with all it said on another exit code."""
    done = CliRunner().invoke(main, ["rehearse", str(file), *words, "--json"])
    assert done.exit_code == code, done.output + repr(done.exception)
    document = json.loads(done.stdout)
    assert (document["schema"], document["exit_code"]) == (1, code)
    assert [verdict["stage"] for verdict in document["verdicts"]] == list(STAGES)
    return document


def verdicts(document: dict[str, Any]) -> dict[str, str]:
    """Stage -> verdict."""
    return {each["stage"]: each["verdict"] for each in document["verdicts"]}


def note(document: dict[str, Any], stage: str) -> str:
    """What was said of a stage."""
    return next(each["note"] for each in document["verdicts"] if each["stage"] == stage)


def folders(tmp_path: Path) -> list[Path]:
    """What rehearsals left below the runs folder."""
    return sorted((tmp_path / "runs").glob(".rehearsals/*"))


# ---------------------------------------------------------------- what works


def test_a_lora_recipe_goes_through_its_whole_life_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Every stage is ok: the killed rank was noticed, the run went on, and the adapter loads in PEFT."""
    document = rehearse(recipe_file(tmp_path, ranks=2))
    assert set(verdicts(document).values()) == {"ok"}
    assert "rank 1 was killed" in note(document, "kill")
    assert "same loss" in note(document, "resume")
    assert "PEFT" in note(document, "export")
    assert not folders(tmp_path)


def test_a_sharded_full_recipe_is_rehearsed_with_its_deepspeed_config(tmp_path: Path) -> None:
    """ZeRO-3 over two ranks with an override; the kept folder shows what was run."""
    changes = {
        "method": "full",
        "deepspeed": {"stage": 3, "overrides": {"zero_optimization": {"sub_group_size": 4096}}},
    }
    document = rehearse(recipe_file(tmp_path, ranks=2, **changes), "--keep")
    assert set(verdicts(document).values()) == {"ok"}
    (kept,) = folders(tmp_path)
    (run,) = kept.glob("rehearsal-tiny-*")
    config = json.loads((run / "ds_config.json").read_text())
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["sub_group_size"] == 4096
    assert json.loads((run / "result.json").read_text())["world_size"] == 2


def test_a_qlora_recipe_quantizes_its_small_base(tmp_path: Path) -> None:
    """4-bit weights, bf16, one rank, and nothing held out: evaluation is said to be not exercised."""
    changes = {"method": "qlora", "train": {"precision": "bf16"}, "lora": {"r": 64}}
    document = rehearse(recipe_file(tmp_path, **changes), "data.validation=0")
    found = verdicts(document)
    assert found.pop("evaluation") == "not exercised"
    assert set(found.values()) == {"ok"}
    assert "LoRA rank 64 -> 16" in document["smaller"]


# ---------------------------------------------------------------- what must not be blessed


def test_a_template_that_hides_the_answers_is_refused_before_any_job(tmp_path: Path) -> None:
    """Every label would be masked: a data error, with the command that shows it."""
    make_model_dir(tmp_path / "model", chat_template=ONLY_THE_QUESTION)
    document = rehearse(recipe_file(tmp_path), code=3)
    assert verdicts(document)["data"] == "failed"
    assert verdicts(document)["start"] == "not exercised"
    assert "every label is masked" in note(document, "data")
    assert "launcher data show" in note(document, "data")
    assert not folders(tmp_path)


def test_targets_that_match_nothing_fail_at_the_plan(tmp_path: Path) -> None:
    """A recipe error: exit 2, and what the model has instead."""
    document = rehearse(recipe_file(tmp_path, lora={"target_modules": ("no_such_proj",)}), code=2)
    assert verdicts(document)["plan"] == "failed"
    assert "q_proj" in note(document, "plan")


def test_an_override_that_breaks_deepspeed_fails_at_the_start(tmp_path: Path) -> None:
    """A key that exists, with a value that only DeepSpeed itself refuses: its words are in the verdict."""
    changes = {
        "method": "full",
        "deepspeed": {"stage": 2, "overrides": {"zero_optimization": {"reduce_bucket_size": -1}}},
    }
    document = rehearse(recipe_file(tmp_path, ranks=2, **changes), code=8)
    failed = [stage for stage, verdict in verdicts(document).items() if verdict == "failed"]
    assert failed == ["start"]
    assert "reduce_bucket_size" in note(document, "start")
    assert verdicts(document)["export"] == "not exercised"
    assert Path(document["kept"]).is_dir()


def test_a_fault_in_the_export_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training went well and the artifact could not be proved: exit 8, everything before it ok."""
    monkeypatch.setenv("LAUNCHER_FAULT", "at=export,do=raise")
    document = rehearse(recipe_file(tmp_path), code=8)
    found = verdicts(document)
    assert found.pop("export") == "failed"
    assert set(found.values()) == {"ok"}
    assert "injected fault" in note(document, "export")


# ---------------------------------------------------------------- looking first


def test_a_dry_run_shows_the_job_and_touches_nothing(tmp_path: Path) -> None:
    """The request with the kill in it, and no folder."""
    file = recipe_file(tmp_path, ranks=2)
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(main, ["rehearse", str(file), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "do=kill" in json.loads(done.stdout)["env"]["LAUNCHER_FAULT"]
    assert sorted(tmp_path.rglob("*")) == before


def test_slurm_is_asked_for_only_where_the_site_has_it(tmp_path: Path) -> None:
    """`--slurm` for a recipe of this machine is a refusal that says what to leave out."""
    done = CliRunner().invoke(main, ["rehearse", str(recipe_file(tmp_path)), "--slurm"])
    assert done.exit_code == 5, done.output
    assert "leave --slurm out" in done.stderr
    assert not folders(tmp_path)
