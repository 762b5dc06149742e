"""What `launcher stage` brings into the cache, verifies, refuses and goes on with, against a hub on loopback."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import time
from pathlib import Path

import pytest

from launcher.errors import DataError
from launcher.recipe.schema import DataSection, DataSource, ModelSection
from launcher.report.staging import progress
from launcher.runs.preflight import check
from tests.hub import FakeHub
from tests.tiny import make_recipe
from tests.unit.runs import staging_material
from tests.unit.runs.material import make_plan, make_site
from tests.unit.runs.staging_material import DATA, MODEL, folder_of, launch, stage, write_recipe

published, hub, recipe = staging_material.published, staging_material.hub, staging_material.recipe


def test_everything_a_run_reads_is_brought_and_nothing_else(recipe: Path, hub: FakeHub) -> None:
    """Configuration, tokenizer and safetensors weights at the commit; no card, no pickled copy; the manifest last."""
    folder = folder_of(stage(recipe))
    assert folder.name == FakeHub.commit(hub.repos[("model", MODEL)])
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.json", "generation_config.json", "manifest.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["id"], manifest["revision"]) == (MODEL, folder.name)
    assert all(len(file["sha256"]) == 64 for file in manifest["files"])
    assert (folder / "manifest.json").stat().st_mode & 0o044 == (folder / "config.json").stat().st_mode & 0o044


def test_a_dry_run_lists_sizes_and_touches_nothing(recipe: Path, hub: FakeHub, tmp_path: Path) -> None:
    """The weights are not fetched, and there is no cache afterwards."""
    done = launch("stage", recipe, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "model.safetensors" in done.stdout and "would fetch" in done.stdout and "to fetch:" in done.stdout
    assert hub.fetched(".safetensors") == []
    assert not (tmp_path / "cache").exists()


def test_staging_again_fetches_nothing(recipe: Path, hub: FakeHub) -> None:
    """What is there at its size stays; the second time the hub only says which commit `main` is."""
    stage(recipe)
    hub.asked.clear()
    document = stage(recipe)
    assert document["fetch_bytes"] == 0 and hub.fetched(".safetensors") == []


def test_a_cut_connection_is_taken_up_where_it_ended(
    recipe: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second request asks for the rest only, and the file is verified as a whole."""
    small_chunks(monkeypatch)
    hub.cut_after_bytes["model.safetensors"] = [70_000]
    stage(recipe)
    first, second = ranges(hub, "model.safetensors")
    assert first is None and 0 < int(str(second).removeprefix("bytes=").rstrip("-")) <= 70_000


def test_an_interrupted_stage_goes_on_with_the_next_command(
    recipe: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The network goes away for good: exit 75 and nothing to be found; later only the rest is fetched."""
    small_chunks(monkeypatch)
    hub.cut_after_bytes["model.safetensors"] = [70_000, *[0] * 6]
    done = launch("stage", recipe)
    assert done.exit_code == 75 and "what was fetched is kept" in done.stderr
    assert list((tmp_path / "cache" / "models").rglob("manifest.json")) == []
    hub.asked.clear()
    hub.cut_after_bytes.clear()
    stage(recipe)
    (only,) = ranges(hub, "model.safetensors")
    assert only is not None and hub.fetched("tokenizer.json") == []


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny files in many pieces, as large ones come; and no waiting between tries."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr(time, "sleep", lambda _: None)


def ranges(hub: FakeHub, file: str) -> list[str | None]:
    return [asked for method, path, asked in hub.asked if method == "GET" and path.endswith(f"/{file}")]


def test_wrong_bytes_are_fetched_twice_and_then_refused(recipe: Path, hub: FakeHub, tmp_path: Path) -> None:
    """A hash other than the listed one: nothing becomes visible, and the message names file and both hashes."""
    hub.wrong.add("model.safetensors")
    done = launch("stage", recipe)
    assert done.exit_code == 4
    assert "model.safetensors has sha256" in done.stderr and "the hub said" in done.stderr
    assert len(hub.fetched("model.safetensors")) == 2
    assert list((tmp_path / "cache" / "models").rglob("manifest.json")) == []
    hub.wrong.clear()
    stage(recipe)


def test_a_pointer_in_place_of_weights_is_named(recipe: Path, hub: FakeHub) -> None:
    """What a hub without its large-file store answers."""
    hub.pointers.add("model.safetensors")
    done = launch("stage", recipe)
    assert done.exit_code == 4 and "model.safetensors" in done.stderr
    hub.pointers.clear()
    stage(recipe)


def test_a_pushed_pointer_is_named(recipe: Path, hub: FakeHub) -> None:
    """The repository itself holds a pointer file, right in every hash."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    (hub.repos[("model", MODEL)] / "model.safetensors").write_text(pointer)
    done = launch("stage", recipe)
    assert done.exit_code == 4 and "model.safetensors is a git-lfs pointer" in done.stderr


def test_a_missing_shard_is_refused_before_anything_is_fetched(recipe: Path, hub: FakeHub) -> None:
    """The index names two files, the hub has one."""
    folder = hub.repos[("model", MODEL)]
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    done = launch("stage", recipe)
    assert done.exit_code == 4
    assert "1 of 2 weight files of the index are missing on the hub: model-00002-of-00002.safetensors" in done.stderr
    assert hub.fetched(".safetensors") == []


def test_an_index_that_promises_more_than_the_shards_hold_is_refused(
    recipe: Path, hub: FakeHub, tmp_path: Path
) -> None:
    """Whole files with the right hashes, and still no whole model."""
    folder = hub.repos[("model", MODEL)]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"ghost": "model.safetensors"}}))
    done = launch("stage", recipe)
    assert done.exit_code == 4 and "promises 1 tensors that its files do not hold: ghost" in done.stderr
    assert list((tmp_path / "cache" / "models").rglob("manifest.json")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pickle", "has only pickled weights (pytorch_model.bin)"),
        ("code", "wants to run its own code (evil.py)"),
        ("foreign code", "takes its code from another repository (someone/else)"),
        ("no tokenizer", "has no tokenizer"),
    ],
)
def test_models_that_no_job_may_load_are_refused(recipe: Path, hub: FakeHub, change: str, message: str) -> None:
    """Exit 4 before any weight is fetched."""
    folder = hub.repos[("model", MODEL)]
    config = json.loads((folder / "config.json").read_text())
    if change == "pickle":
        (folder / "model.safetensors").unlink()
    elif change == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        prefix = "someone/else--" if change == "foreign code" else ""
        config["auto_map"] = {"AutoModelForCausalLM": f"{prefix}evil.Model"}
        (folder / "config.json").write_text(json.dumps(config))
    done = launch("stage", recipe)
    assert done.exit_code == 4 and message in done.stderr, done.output
    assert hub.fetched(".safetensors") == []


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo"), (401, "RepoNotFound")])
def test_a_gated_model_says_which_token_is_missing(recipe: Path, hub: FakeHub, status: int, code: str) -> None:
    """The variable is named; exit 4."""
    hub.refuse[MODEL] = (status, code)
    done = launch("stage", recipe)
    assert done.exit_code == 4
    assert f"(the hub answered {status}), and no token is set here: HF_TOKEN is empty" in done.stderr


def test_a_refused_token_is_not_shown(recipe: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent, and no message or file holds it."""
    canary = "hf_" + "c4n4ry" * 6
    monkeypatch.setenv("HF_TOKEN", canary)
    hub.refuse[MODEL] = (403, "GatedRepo")
    done = launch("stage", recipe)
    assert done.exit_code == 4 and "the token of HF_TOKEN may not read it" in done.stderr
    assert f"Bearer {canary}" in hub.tokens and canary not in done.output
    hub.refuse.clear()
    document = stage(recipe)
    assert canary not in json.dumps(document)
    cache = Path(document["cache"])
    assert not any(canary.encode() in path.read_bytes() for path in cache.rglob("*") if path.is_file())


def test_no_network_is_temporary(recipe: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    """Exit 75; nothing listens at this address."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = launch("stage", recipe)
    assert done.exit_code == 75 and "does not answer" in done.stderr


def test_what_is_staged_is_found_without_network(recipe: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    """The newest commit cannot be asked for, which is said; the copy is good."""
    stage(recipe)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    document = stage(recipe)
    assert any("whether that is the newest was not asked" in notice for notice in document["notices"])


def test_a_damaged_file_is_found_and_replaced(recipe: Path, hub: FakeHub) -> None:
    """One flipped byte keeps the size: --verify reads again, and fetches this one file."""
    weights = folder_of(stage(recipe)) / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    hub.asked.clear()
    stage(recipe, "--verify")
    assert weights.read_bytes() == good and hub.fetched(".safetensors") == ["model.safetensors"]


def test_a_full_disk_is_refused_before_anything_is_fetched(
    recipe: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is needed and what is free; exit 5."""
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 9, 9, 9, 9, 9, 9, 0, 255)))
    done = launch("stage", recipe)
    assert done.exit_code == 5 and "has room for 0.0 GiB" in done.stderr and hub.fetched(".safetensors") == []


def test_a_listing_without_sizes_is_completed_file_by_file(recipe: Path, hub: FakeHub) -> None:
    """Mirrors leave them out; each file's own headers have them, and are held to."""
    hub.without_sizes = True
    stage(recipe)
    assert any(method == "HEAD" for method, _, _ in hub.asked)


def test_a_data_set_is_read_by_the_launcher_itself(recipe: Path, hub: FakeHub) -> None:
    """plan counts the rows of the training split exactly, where it could only guess before."""
    before = json.loads(launch("plan", recipe, "--json", "model.name_or_path=meta-llama/Llama-3.2-1B").stdout)
    assert before["data"]["basis"] == "assumed"
    stage(recipe)
    after = json.loads(launch("plan", recipe, "--json").stdout)
    assert after["data"]["basis"] == "counted"
    assert after["data"]["rows"] + after["data"]["validation_rows"] == 40


def test_splits_come_from_the_card(recipe: Path, hub: FakeHub) -> None:
    """Files whose names say nothing, and one that belongs to no split."""
    folder = hub.repos[("dataset", DATA)]
    (folder / "train.jsonl").rename(folder / "a.jsonl")
    card = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: a.jsonl}\n"
    (folder / "README.md").write_text(f"---\n{card}---\n# Chats\n")
    data = folder_of(stage(recipe), "dataset")
    assert sorted(path.name for path in data.glob("*.jsonl")) == ["a.jsonl"]
    planned = json.loads(launch("plan", recipe, "--json").stdout)
    assert planned["data"]["rows"] + planned["data"]["validation_rows"] == 40


@pytest.mark.parametrize("change", ["script", "configurations"])
def test_data_sets_that_cannot_be_read_plainly_are_refused(recipe: Path, hub: FakeHub, change: str) -> None:
    """A loading script is never run; several configurations are not guessed between. Exit 3."""
    folder = hub.repos[("dataset", DATA)]
    if change == "script":
        (folder / "chats.py").write_text("raise SystemExit('run!')\n")
        message = "is read by a script (chats.py), which is never run"
    else:
        card = "configs:\n- {config_name: a, data_files: train.jsonl}\n- {config_name: b, data_files: test.jsonl}\n"
        (folder / "README.md").write_text(f"---\n{card}---\n")
        message = "has several configurations (a, b)"
    done = launch("stage", recipe)
    assert done.exit_code == 3 and message in done.stderr


def test_all_problems_are_told_at_once(recipe: Path, hub: FakeHub) -> None:
    """A data set that is not there and a gated model: both lines, the exit code of the data."""
    hub.refuse[MODEL] = (403, "GatedRepo")
    done = launch("stage", recipe, "data.retention={path: acme/none}")
    assert done.exit_code == 3
    assert "acme/none" in done.stderr and "is gated" in done.stderr


def test_hostile_paths_are_refused(recipe: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing whose files would lie outside the cache."""
    original = hub.listing
    evil = {"rfilename": "../../evil.json", "size": 1, "blobId": "0" * 40}
    monkeypatch.setattr(hub, "listing", lambda folder: original(folder) | {"siblings": [evil]})
    done = launch("stage", recipe)
    assert done.exit_code in (3, 4) and "a file path that is refused: '../../evil.json'" in done.stderr


def test_a_run_names_the_staged_folder_and_stays_offline(recipe: Path, hub: FakeHub) -> None:
    """The plan speaks of the id; the resolved recipe of the folder and the commit; the job's libraries ask nobody."""
    document = stage(recipe)
    planned = json.loads(launch("plan", recipe, "--json").stdout)
    assert planned["model"]["name"] == MODEL
    request = json.loads(launch("submit", recipe, "--dry-run").stdout)
    assert {request["env"][name] for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")} == {"1"}
    from launcher.planning.prepare import plan_recipe

    located = plan_recipe(recipe).recipe
    assert Path(located.model.name_or_path) == folder_of(document)
    assert located.model.revision == folder_of(document).name
    assert Path(located.data.train[0].path) == folder_of(document, "dataset")


def test_an_id_that_is_not_staged_leaves_the_network_on(recipe: Path, hub: FakeHub) -> None:
    """The job has to fetch it then, and the notice says what would be better."""
    done = launch("submit", recipe, "--dry-run", "model.name_or_path=meta-llama/Llama-3.2-1B", "method=lora")
    assert "HF_HUB_OFFLINE" not in json.loads(done.stdout)["env"]
    assert "launcher stage RECIPE" in done.stderr


def test_a_local_folder_is_recorded_and_copied_only_on_request(tmp_path: Path, published: Path, hub: FakeHub) -> None:
    """Hashes of every file without a copy; with --copy the same content in the cache, and the command to use it."""
    recipe = write_recipe(tmp_path, str(published / "model"), str(published / "data" / "train.jsonl"))
    document = stage(recipe)
    assert folder_of(document) == published / "model"
    records = [json.loads(path.read_text()) for path in (tmp_path / "cache" / "local").glob("*.json")]
    assert sorted(record["path"] for record in records) == sorted(item["source"] for item in document["items"])
    assert not (tmp_path / "cache" / "models").exists()
    done = launch("stage", recipe, "--copy")
    following = shlex.split(done.stderr.split("Next: launcher ")[1])
    assert launch(*following, "--dry-run").exit_code == 0
    copied = next(word for word in done.stderr.split() if word.startswith("model.name_or_path=")).split("=")[1]
    assert (Path(copied) / "model.safetensors").read_bytes() == (published / "model" / "model.safetensors").read_bytes()
    assert not (Path(copied) / "pytorch_model.bin").exists()
    assert hub.asked == []


def test_a_broken_local_folder_is_refused(tmp_path: Path, published: Path, hub: FakeHub) -> None:
    """Truncated weights, by the header alone."""
    shutil.copytree(published / "model", tmp_path / "model")
    with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    done = launch("stage", write_recipe(tmp_path, str(tmp_path / "model"), str(published / "data" / "train.jsonl")))
    assert done.exit_code == 4 and "truncated: 5000 of" in done.stderr


def test_ids_that_only_the_job_could_fetch_are_refused_where_nodes_have_no_network(tmp_path: Path) -> None:
    """Model and data set, with the verb that helps; a site of which nothing is known gets a notice instead."""
    named = {"model": ModelSection(name_or_path=MODEL), "data": DataSection(train=(DataSource(path=DATA),))}
    recipe = make_recipe(tmp_path, **named)
    site = make_site(executor="local", internet_on_nodes=False)
    with pytest.raises(DataError) as refused:
        check(recipe, make_plan(), site, tmp_path / "runs")
    told = [line for line in refused.value.problems if line.endswith("launcher stage RECIPE")]
    assert [line.split(" is ")[0] for line in told] == [f"data: {DATA}", f"model.name_or_path: {MODEL}"]
    notices = check(recipe, make_plan(), make_site(executor="local"), tmp_path / "runs")
    assert sum("stage it first: launcher stage RECIPE" in notice for notice in notices) == 2


def test_a_terminal_sees_a_bar_and_each_file(capsys: pytest.CaptureFixture[str]) -> None:
    """Names above, bytes in the bar, and no complaint about files that were there already."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    with progress(screen) as shown:
        shown.begin("acme/tiny", 2 * 2**20)
        shown.advance(2**20)
        shown.done("model.safetensors", 2**20, "fetched")
        shown.begin("acme/there", 0)
        shown.advance(0)
    assert "fetched model.safetensors (1.0 MiB)" in screen.getvalue() and "1.0/2.0 MiB" in screen.getvalue()
