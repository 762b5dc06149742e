"""`launcher init` as it is typed, on a fake site."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launcher.cli import main
from launcher.facts.profile import read_profile
from tests.unit.facts.slurm_site import recorded


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project on a login node of the 22.05 cluster."""
    for name in ("bash", "cat"):
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools" / name).symlink_to(str(shutil.which(name)))
    slurm = recorded("22.05", tmp_path / "slurm-commands")
    slurm.write()
    monkeypatch.setenv("PATH", f"{slurm.folder}:{tmp_path / 'tools'}")
    monkeypatch.delenv("LAUNCHER_RUNS", raising=False)
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def init(*words: str) -> Result:
    return CliRunner().invoke(main, ["init", *words])


def test_the_profile_is_named_like_the_cluster(project: Path) -> None:
    """stdout says where it is, stderr what is not known and what to type next."""
    done = init()
    assert done.exit_code == 0, done.output
    assert done.stdout == "wrote slurm/devcluster.yaml\n"
    assert "Next: launcher plan RECIPE slurm.site=devcluster" in done.stderr
    assert read_profile(project / "slurm" / "devcluster.yaml")["default_partition"] == "main"


def test_an_existing_profile_is_never_touched(project: Path) -> None:
    """Exit 7, with a name that is free; --site is another name, too."""
    (project / "slurm").mkdir()
    mine = project / "slurm" / "devcluster.yaml"
    mine.write_text("executor: slurm\n")
    done = init()
    assert done.exit_code == 7
    assert "launcher init -o slurm/devcluster-2.yaml" in done.stderr
    assert mine.read_text() == "executor: slurm\n"
    assert init("--site", "other").exit_code == 0


def test_dry_run_prints_and_touches_nothing(project: Path) -> None:
    """The same profile on stdout; no file, and no probe job either."""
    done = init("--dry-run", "--probe-job", "-p", "low")
    assert done.exit_code == 0, done.output
    assert "default_partition: low  # asked for" in done.stdout
    assert "would submit a probe job to partition low" in done.stderr
    assert list(project.iterdir()) == []


def test_two_surveys_write_the_same(project: Path) -> None:
    """The order is that of the fields and of names, so that a change in the file is a change of the site."""
    first, second = (
        "\n".join(line for line in init("--dry-run").stdout.splitlines() if "free_bytes" not in line) for _ in range(2)
    )
    assert first == second


def test_json_holds_values_sources_and_what_is_unknown(project: Path) -> None:
    """For programs; -o says where the profile goes."""
    done = init("--json", "-o", "there/site-a.yaml")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["schema"], document["site"], document["path"]) == (1, "site-a", "there/site-a.yaml")
    assert document["values"]["partitions"][0]["name"] == "high"
    assert set(document["sources"]) == set(document["values"])
    assert "internet_on_nodes" in document["unknown"]
    assert (project / "there" / "site-a.yaml").read_text() == document["profile"]


@pytest.mark.parametrize("words", [("--site", "../up"), ("--site", ""), ("-p", "mian"), ("-A", "nobody")])
def test_wrong_names_are_refused_before_anything_is_written(project: Path, words: tuple[str, str]) -> None:
    """A path as a name is usage (2); a partition or an account that is not there is the cluster's (5)."""
    done = init(*words)
    assert done.exit_code == (2 if words[0] == "--site" else 5), done.output
    assert list(project.iterdir()) == []
