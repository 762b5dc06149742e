"""What is refused before the queue, all at once, and with the exit code of the first stage that found something."""

from __future__ import annotations

import grp
import json
import os
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ClusterError, DataError, LauncherError, ModelError, RecipeError
from launcher.facts.weights import model_folder_problems
from launcher.recipe.schema import DataSource, ModelSection
from launcher.runs.preflight import check
from launcher.runs.preflight_files import group_problems
from tests.tiny import make_model_dir, make_recipe
from tests.unit.runs.material import FakeSlurm, make_plan, make_site

MAIN = "PartitionName=main AllowAccounts=ALL Default=YES MaxTime=1-00:00:00 MaxNodes=UNLIMITED State=UP TotalNodes=4\n"
LOW = "PartitionName=low AllowAccounts=dev AllowQos=normal MaxTime=02:00:00 State=DOWN TotalNodes=2\n"
ACCOUNTS = "||||||||normal|||normal,urgent|dev\n||||||||normal|||normal|proj1\n"
QOS = "".join(f"||||||||cluster||||{name}\n" for name in ("normal", "urgent", "gold"))
NODES = "main|16|65536|gpu:a100:8\nlow|16|65536|(null)\n"


@pytest.fixture
def cluster(fake_slurm: FakeSlurm) -> FakeSlurm:
    """Four nodes with eight GPUs for a day in `main`; `low` is down."""
    fake_slurm.say("scontrol", MAIN + LOW)
    fake_slurm.say("sinfo", NODES)
    return fake_slurm


def refuse(
    tmp_path: Path, *, plan: Any = None, site: Any = None, parent: Path | None = None, **recipe: Any
) -> LauncherError:
    with pytest.raises(LauncherError) as caught:
        check(make_recipe(tmp_path, **recipe), plan or make_plan(), site or make_site(), parent or tmp_path / "runs")
    return caught.value


def test_a_good_request_passes_and_leaves_nothing_behind(tmp_path: Path, cluster: FakeSlurm) -> None:
    """No notices, no folder, no probe file."""
    recipe = make_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert check(recipe, make_plan(nodes=4, gpus_per_node=8), make_site(), tmp_path / "runs" / "deep") == []
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and "fake-slurm" not in str(path)]
    assert left == []


@pytest.mark.parametrize(
    ("plan", "slurm", "message"),
    [
        ({"nodes": 5}, {}, "slurm.nodes: 5 nodes asked of partition main, which gives at most 4"),
        ({"time_limit_min": 2880}, {}, "slurm.time: 2-00:00:00 asked of partition main, which allows 1-00:00:00"),
        ({"gpus_per_node": 9}, {}, "slurm.gpus_per_node: 9 asked, but a node of partition main has 8"),
        ({"gpus_per_node": 8, "cpus_per_task": 4}, {}, "8 tasks x 4 CPUs asked, but a node of partition main has 16"),
        ({"mem": "100G"}, {}, "slurm.mem: 100G asked, but a node of partition main has 64G"),
        ({}, {"partition": "mian"}, "slurm.partition: 'mian' does not exist; did you mean main? there are: main, low"),
        ({}, {"partition": "low"}, "slurm.partition: low does not start jobs now"),
        ({}, {"partition": "low", "account": "other"}, "slurm.account: partition low is for dev, not other"),
        ({}, {"partition": "low", "qos": "urgent"}, "slurm.qos: partition low takes normal, not urgent"),
    ],
)
def test_what_the_partition_can_never_give_is_refused(
    tmp_path: Path, cluster: FakeSlurm, plan: dict[str, Any], slurm: dict[str, Any], message: str
) -> None:
    """Plain sbatch would take each of these, and the job would wait for ever."""
    error = refuse(tmp_path, plan=make_plan(**plan), slurm=slurm)
    assert isinstance(error, ClusterError)
    assert message in str(error)


def test_one_of_several_partitions_is_enough(tmp_path: Path, cluster: FakeSlurm) -> None:
    """Slurm takes a list and starts the job where it can."""
    assert check(make_recipe(tmp_path, slurm={"partition": "low,main"}), make_plan(), make_site(), tmp_path) == []


def test_accounts_and_qos_are_compared_where_accounting_answers(tmp_path: Path, cluster: FakeSlurm) -> None:
    """Without enforcement sbatch would accept an unknown account and the hours would go nowhere."""
    cluster.say_when("sacctmgr", "associations", ACCOUNTS)
    cluster.say_when("sacctmgr", "qos", QOS)
    error = refuse(tmp_path, slurm={"account": "prj1", "qos": "gold"})
    assert "slurm.account: 'prj1' is not yours to use; did you mean proj1? yours: dev, proj1" in error.problems
    assert "slurm.qos: 'gold' is not yours to use; yours: normal, urgent" in error.problems


def test_without_accounting_names_are_left_to_slurm(tmp_path: Path, cluster: FakeSlurm) -> None:
    """What cannot be known is not guessed."""
    assert check(make_recipe(tmp_path, slurm={"account": "any"}), make_plan(), make_site(), tmp_path) == []


def test_without_slurm_the_rest_is_still_checked(tmp_path: Path, no_slurm: Path) -> None:
    """A dry run on a laptop works, and says what could not be checked."""
    notices = check(make_recipe(tmp_path), make_plan(), make_site(), tmp_path / "runs")
    assert len(notices) == 1 and notices[0].startswith("cluster: not checked")


def test_bad_rows_are_named_with_file_and_line(tmp_path: Path, cluster: FakeSlurm) -> None:
    """Every row is read, not only the first ones."""
    rows = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    rows.write_text(f"{good}\n{good}\n{{broken\n")
    error = refuse(tmp_path, **{"data.train": (DataSource(path=str(rows)),)})
    assert isinstance(error, DataError)
    assert f"{rows}:3" in str(error)


def test_data_and_models_on_the_hub_are_left_to_the_job_with_a_notice(tmp_path: Path, cluster: FakeSlurm) -> None:
    """Ids are not refused for want of a network here."""
    recipe = make_recipe(
        tmp_path,
        model=ModelSection(name_or_path="meta-llama/Llama-3.1-8B"),
        **{"data.train": (DataSource(path="org/rows"),)},
    )
    notices = check(recipe, make_plan(), make_site(), tmp_path)
    assert [notice.split(":")[0] for notice in notices] == ["data", "model.name_or_path"]


def test_every_stage_is_told_and_the_first_gives_the_exit_code(tmp_path: Path, cluster: FakeSlurm) -> None:
    """Data (3) comes before model (4) and cluster (5); the messages of all are there."""
    (tmp_path / "empty").mkdir()
    error = refuse(
        tmp_path,
        plan=make_plan(nodes=9),
        model=ModelSection(name_or_path=str(tmp_path / "empty")),
        **{"data.train": (DataSource(path=str(tmp_path / "missing.jsonl")),)},
    )
    assert isinstance(error, DataError)
    text = str(error)
    assert "missing.jsonl: no such file" in text and "no config.json" in text and "9 nodes asked" in text


def test_hostile_values_are_refused_before_a_folder_is_made(tmp_path: Path, cluster: FakeSlurm) -> None:
    """What must not reach sbatch is found here, together with everything else."""
    error = refuse(tmp_path, plan=make_plan(nodes=9), slurm={"constraint": "a'b"})
    assert isinstance(error, RecipeError)
    assert "slurm.constraint" in error.problems[0] and "9 nodes asked" in error.problems[1]


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path: Path, cluster: FakeSlurm) -> None:
    """sbatch would accept the job and lose its log; a file in the way is found by root too."""
    (tmp_path / "runs").write_text("a file")
    error = refuse(tmp_path, parent=tmp_path / "runs" / "below")
    assert isinstance(error, ClusterError)
    assert "output_dir:" in str(error) and "cannot be written" in str(error)


def test_the_kernel_decides_what_is_writable(tmp_path: Path, cluster: FakeSlurm) -> None:
    """A real file is made: permission bits say nothing about read-only mounts and quotas."""
    error = refuse(tmp_path, parent=Path("/proc/runs"))
    assert "output_dir: /proc/runs cannot be written" in str(error)


def test_a_missing_virtual_environment_is_refused(tmp_path: Path, cluster: FakeSlurm) -> None:
    """The job would fail in its first second."""
    error = refuse(tmp_path, site=make_site(venv=str(tmp_path / "venv")))
    assert "venv: no Python at" in str(error)


# ---------------------------------------------------------------- model folders


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model_dir(tmp_path / "model")


def test_a_whole_model_folder_has_no_problems(model: Path) -> None:
    """Config, tokenizer and one safetensors file are enough."""
    assert model_folder_problems(model) == []


def test_everything_missing_is_listed(tmp_path: Path) -> None:
    """An empty folder lacks three things, and all three are said."""
    (tmp_path / "empty").mkdir()
    problems = model_folder_problems(tmp_path / "empty")
    assert [word for word in ("config.json", "tokenizer", "safetensors") if any(word in one for one in problems)] == [
        "config.json",
        "tokenizer",
        "safetensors",
    ]


def test_pickled_weights_are_refused(model: Path) -> None:
    """Opening them can run code."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "only pickled weights (pytorch_model.bin)" in model_folder_problems(model)[0]


def test_a_truncated_weight_file_is_found_by_its_header(model: Path) -> None:
    """A copy that was cut short is told from its own table of contents."""
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert model_folder_problems(model) == [
        f"{weights}: truncated: {len(whole) - 100} of {len(whole)} bytes; copy it again"
    ]


def test_a_git_lfs_pointer_is_not_weights(model: Path) -> None:
    """A clone without git-lfs leaves small text files in place of the weights."""
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in model_folder_problems(model)[0]


def test_missing_shards_are_named(model: Path) -> None:
    """Every file of the index must be there."""
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert model_folder_problems(model) == [
        f"{model}: 1 of 2 weight files of the index are missing: model-2.safetensors"
    ]


def test_custom_code_needs_trust(tmp_path: Path, model: Path, cluster: FakeSlurm) -> None:
    """A config that names its own classes is refused unless the recipe trusts it."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_x.Model"}}))
    error = refuse(tmp_path)
    assert isinstance(error, ModelError) and "modeling_x.py" in str(error)
    assert check(make_recipe(tmp_path, model={"trust_remote_code": True}), make_plan(), make_site(), tmp_path) == []


def test_a_group_that_could_not_read_the_run_is_refused(tmp_path: Path) -> None:
    """One that does not exist, with the groups there are; a notice where a folder above the run is closed to it."""
    notices: list[str] = []
    mine = grp.getgrgid(os.getegid()).gr_name
    (problem,) = group_problems("no-such-group", tmp_path, notices)
    assert "no group 'no-such-group'" in problem and mine in problem
    assert list(group_problems(None, tmp_path, notices)) == [] == notices
    tmp_path.chmod(0o700)
    assert list(group_problems(mine, tmp_path / "runs", notices)) == []
    assert len(notices) == 1 and str(tmp_path) in notices[0] and f"chgrp {mine}" in notices[0]


def test_a_group_that_is_not_the_users_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root could give it a folder."""
    other = next(one for one in grp.getgrall() if one.gr_gid not in {os.getegid(), *os.getgroups()})
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (problem,) = group_problems(other.gr_name, tmp_path, [])
    assert f"you are not in the group {other.gr_name!r}" in problem
