"""Adapters that no run trained: listed, tagged, diffed and found by name like those of runs."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.errors import ClusterError, ConflictError, RecipeError
from launcher.runs import registry
from launcher.runs.adapters import artifact_folder, combine_request, export_request, find_adapter, reduce_request
from launcher.runs.comparison import find_adapters, find_runs
from launcher.runs.folder import RunFolder
from launcher.runs.garbage import find_garbage
from launcher.runs.named import named_adapters, register
from launcher.runs.serving import find_target
from tests.unit.runs.material import make_run, write_adapter

REDUCED = {"how": "reduce", "from_rank": 16, "rank": 8,
           "parents": [{"name": "tiny-aaaaa", "weight": 1.0, "sha256": "cd" * 32}]}  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A runs folder with one trained adapter."""
    run = make_run(tmp_path / "runs")
    write_adapter(run.adapter, rank=16)
    return run.path.parent


@pytest.fixture
def trained(runs: Path) -> RunFolder:
    """Its run."""
    return RunFolder(next(path.resolve() for path in runs.glob("tiny-*")))


@pytest.fixture
def small(runs: Path) -> Path:
    """A reduced adapter where `--name small` puts it."""
    return write_adapter(runs / ".adapters" / "small", rank=8, made=REDUCED)


def names(runs: Path) -> list[str]:
    """What `launcher adapters` lists."""
    return sorted(one.name for one in registry.list_adapters(runs))


def test_a_derived_adapter_is_listed_with_what_it_was_made_of(runs: Path, trained: RunFolder, small: Path) -> None:
    """Beside the run's, in JSON and on the terminal, with its parents and when it was made."""
    assert names(runs) == ["small", trained.run_id]
    entry = registry.find_entry("small", runs)
    assert (entry.run, entry.path, entry.rank, entry.made) == (
        None, str(small.resolve()), 8, "rank 16 cut to 8 of tiny-aaaaa"
    )  # fmt: skip
    assert entry.parents == ({"name": "tiny-aaaaa", "weight": 1.0, "sha256": "cd" * 32},)
    assert entry.finished_time_s == pytest.approx(time.time(), abs=60)
    shown = CliRunner().invoke(main, ["adapters", "--runs", str(runs)])
    assert "rank 16 cut to 8 of tiny-aaaaa" in shown.stdout
    told = json.loads(CliRunner().invoke(main, ["adapters", "--runs", str(runs), "--json"]).stdout)["adapters"]
    assert {one["name"]: one["run"] for one in told} == {"small": None, trained.run_id: trained.run_id}


def test_its_name_and_its_tag_are_taken_where_a_runs_are(runs: Path, trained: RunFolder, small: Path) -> None:
    """By merge, export, combine, reduce, sign, serve and compare."""
    registry.tag("small", "best", runs)
    for name in ("small", "best", str(small)):
        assert find_adapter(name, runs) == (small.resolve(), None)
        assert artifact_folder(name, runs) == small.resolve()
        assert find_target(name, runs).folder == small.resolve()
        assert find_adapters([name], [trained], runs) == (small.resolve(),)
    assert registry.find_entry("best", runs).tags == ("best",)
    with pytest.raises(RecipeError, match="no run trained"):
        find_runs(["best"], runs)


def test_a_folder_elsewhere_gets_its_name_with_its_first_tag(runs: Path, tmp_path: Path) -> None:
    """Under `.adapters` lies a link to it; the same folder is not listed twice, another of its name gets a number."""
    folder = write_adapter(tmp_path / "a" / "mine", rank=4)
    assert registry.tag(str(folder), "best", runs).name == "mine"
    assert registry.tag(str(folder), "good", runs).tags == ("best", "good")
    other = write_adapter(tmp_path / "b" / "mine", rank=4)
    assert registry.tag(str(other), "best", runs, move=True).name == "mine-2"
    assert set(named_adapters(runs)) == {"mine", "mine-2"}
    assert registry.find_entry(str(folder), runs).tags == ("good",)


def test_a_removed_folder_is_gone_and_its_name_free(runs: Path, trained: RunFolder, tmp_path: Path) -> None:
    """Without an error; a tag of it says so and does not pass to what gets the name next."""
    folder = write_adapter(tmp_path / "mine", rank=4)
    registry.tag(str(folder), "best", runs)
    shutil.rmtree(folder)
    assert names(runs) == [trained.run_id]
    with pytest.raises(RecipeError, match="'best' is of mine, which is gone"):
        registry.find_entry("best", runs)
    again = write_adapter(tmp_path / "again" / "mine", rank=4)
    assert register(runs, again) == "mine"
    assert registry.find_entry("mine", runs).tags == ()
    assert registry.tag(trained.run_id, "best", runs).tags == ("best",)


def test_names_are_of_one_thing_only(runs: Path, trained: RunFolder, small: Path, tmp_path: Path) -> None:
    """A tag is neither a run's nor an adapter's name, and a new adapter's name none of the three."""
    registry.tag("small", "best", runs)
    for label in (trained.run_id, "small"):
        with pytest.raises(ConflictError, match="is the name of"):
            registry.tag(trained.run_id, label, runs, move=True)
    for name in (trained.run_id, "small", "best", "tags.json"):
        with pytest.raises(ConflictError, match="--name"):
            reduce_request(trained.run_id, runs, rank=4, name=name)
    with pytest.raises(RecipeError, match="letters"):
        reduce_request(trained.run_id, runs, rank=4, name="../x")
    with pytest.raises(RecipeError, match=r"--name.*--to"):
        reduce_request(trained.run_id, runs, rank=4)
    with pytest.raises(ConflictError, match="--move"):
        registry.tag(trained.run_id, "best", runs)


def test_what_is_made_goes_to_the_runs_folder_or_where_it_is_told(runs: Path, trained: RunFolder) -> None:
    """--name alone: below `.adapters`; --to alone: named as its folder; nothing is written by a request."""
    asked = combine_request([trained.run_id] * 2, runs, weights=[1, 1], how="cat", name="both")
    assert asked["target"] == str(runs.resolve() / ".adapters" / "both")
    asked = reduce_request(trained.run_id, runs, rank=4, target=runs.parent / "my small one")
    assert (asked["name"], asked["target"]) == ("my-small-one", str(runs.parent.resolve() / "my small one"))
    assert not (runs / ".adapters").exists()


def test_without_a_runs_folder_nothing_can_be_put_there(tmp_path: Path) -> None:
    """A folder that is named is written all the same, and not listed."""
    folder = write_adapter(tmp_path / "mine", rank=8)
    with pytest.raises(RecipeError, match=r"no folder of runs.*--to"):
        reduce_request(str(folder), tmp_path / "none", rank=4, name="small")
    assert reduce_request(str(folder), tmp_path / "none", rank=4, target=tmp_path / "x")["runs"] is None
    with pytest.raises(RecipeError, match="no folder of runs"):
        registry.tag(str(folder), "best", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_names_and_tags_given_at_once_are_all_kept(runs: Path, tmp_path: Path) -> None:
    """Eight at a time: each folder has a name of its own and each tag is there."""
    folders = [write_adapter(tmp_path / str(number) / "mine", rank=4) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda at: registry.tag(str(folders[at]), f"tag-{at}", runs), range(8)))
    assert len(named_adapters(runs)) == 8
    for at, folder in enumerate(folders):
        assert registry.find_entry(f"tag-{at}", runs).path == str(folder)


def test_exports_of_a_named_adapter_carry_its_name(runs: Path, small: Path, tmp_path: Path) -> None:
    """Also where its folder is called otherwise."""
    folder = write_adapter(tmp_path / "x" / "small", rank=8)
    name = register(runs, folder)
    asked = export_request(name, runs, engine="vllm", served_name=None, base=None, output=None, trust_base=False)
    assert asked["name"] == "small-2"


def test_gc_leaves_adapters_and_takes_what_was_left_half_made(runs: Path, small: Path) -> None:
    """However old; a folder that a killed combine left goes after a day."""
    half = write_adapter(runs / ".adapters" / ".big.k2j3h4", rank=8)
    for path in (small, half):
        os.utime(path, (1, 1))
    assert [one.path for one in find_garbage(runs)] == [half]
    assert "big" not in " ".join(names(runs))


def test_a_damaged_list_of_tags_is_not_written_over(runs: Path, trained: RunFolder, small: Path) -> None:
    """Reading goes on without tags; a new one is refused until somebody has looked."""
    (runs / ".adapters" / "tags.json").write_text('{"best": ')
    assert len(registry.list_adapters(runs)) == 2
    with pytest.raises(ConflictError, match=r"tags\.json"):
        registry.tag(trained.run_id, "good", runs)
    assert (runs / ".adapters" / "tags.json").read_text() == '{"best": '


def test_a_folder_that_cannot_be_written_is_an_error_of_the_place(runs: Path, trained: RunFolder) -> None:
    """Named, with exit code 5."""
    (runs / ".adapters").write_text("in the way")
    with pytest.raises(ClusterError, match=r"cannot write .*\.adapters"):
        registry.tag(trained.run_id, "best", runs)


def test_the_beginning_of_a_runs_name_does_not_hide_a_tag(runs: Path, trained: RunFolder, small: Path) -> None:
    """`tiny` is the beginning of a run's name and a tag of another adapter: the tag is meant, by serve as by merge."""
    registry.tag("small", "tiny", runs)
    assert find_adapter("tiny", runs)[0] == find_target("tiny", runs).folder == small.resolve()
    assert find_adapter("tiny-", runs)[0] == trained.adapter


def test_a_name_that_is_nothing_is_told_what_comes_nearest(runs: Path, small: Path) -> None:
    """Among runs, adapters and tags."""
    registry.tag("small", "production", runs)
    with pytest.raises(RecipeError, match="did you mean production"):
        registry.find_entry("producton", runs)
    with pytest.raises(RecipeError, match="did you mean small"):
        registry.find_entry("smal", runs)


def test_the_verb_says_the_next_step_and_a_dry_run_writes_nothing(runs: Path, trained: RunFolder, small: Path) -> None:
    """A dry run refuses what the real one would."""
    words = ["adapters", "tag", "--runs", str(runs)]
    dry = CliRunner().invoke(main, [*words, "small", "best", "--dry-run"])
    assert (dry.exit_code, (runs / ".adapters" / "tags.json").exists()) == (0, False)
    done = CliRunner().invoke(main, [*words, "small", "best"])
    assert done.stdout == "tagged small as best\n"
    assert done.stderr.startswith("Next: ")
    assert CliRunner().invoke(main, [*words, trained.run_id, "best", "--dry-run"]).exit_code == 7
    assert CliRunner().invoke(main, [*words, trained.run_id, "-x", "--dry-run"]).exit_code == 2
