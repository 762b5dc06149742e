"""`launcher data`: what is shown, counted and prepared is what the run would train on."""

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.recipe.dump import recipe_to_yaml
from launcher.worker.data import build_token_cache
from launcher.worker.packing import IGNORED
from launcher.worker.tokenizer import load_tokenizer
from tests.tiny import make_candidate, make_recipe


def run(*words, code=0):
    """The verb's JSON answer; fails with all it said on another exit code."""
    result = CliRunner().invoke(main, ["data", *words, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def written(tmp_path):
    """(recipe, its file) over a tiny model and 64 chats."""
    recipe = make_recipe(tmp_path, **{"slurm.site": "local"})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(recipe))
    return recipe, file


def rewrite(path: Path, change):
    """Rewrite the rows of a JSONL file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def test_shown_pieces_are_the_documents_the_run_trains(written):
    """Pieces put together are the rendered chat, and the trained ones are the assistant's turns with their ends."""
    recipe, file = written
    row = json.loads(Path(recipe.data.train[0].path).read_text().splitlines()[1])
    shown = run("show", str(file), "-n", "1", "--skip", "1")["rows"][0]
    pieces = shown["documents"][0]
    trained = "".join(piece["text"] for piece in pieces if piece["trained"] and not piece["eos"])
    assert trained == "".join(turn["content"] for turn in row["messages"] if turn["role"] == "assistant")
    assert [piece["eos"] for piece in pieces if piece["trained"]][-1], "the end of the answer is trained"
    assert shown["trained_tokens"] == sum(piece["tokens"] for piece in pieces if piece["trained"])
    assert shown["where"].endswith("chats.jsonl:2")


def test_counts_agree_with_the_token_cache_of_the_run(written, tmp_path):
    """Tokens and trained tokens counted are those of the cache that a run without packing builds."""
    recipe, file = written
    counted = run("stats", str(file), "data.validation=0", "data.packing=false")["sources"][0]
    plain = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, packing=False))
    cache = build_token_cache(plain, make_candidate(packing=False), load_tokenizer(plain), tmp_path / "cache")
    rows = [cache.train.row(i) for i in range(len(cache.train))]
    rows += [cache.validation.row(i) for i in range(len(cache.validation))]
    assert counted["tokens"] == sum(len(row.input_ids) for row in rows)
    assert counted["trained_tokens"] == sum(int((row.labels != IGNORED).sum()) for row in rows)


def test_repeats_empty_turns_and_overlap_are_counted(written, tmp_path):
    """Two repeated rows, one empty turn, and one validation row that is also trained."""
    recipe, file = written
    data = Path(recipe.data.train[0].path)
    empty = {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "yes"}]}
    rewrite(data, lambda rows: [*rows, rows[0], rows[1], empty])
    held = tmp_path / "held.jsonl"
    held.write_text(data.read_text().splitlines()[2] + "\n")
    counted = run("stats", str(file), f"data.validation={{path: {held}}}")
    assert counted["sources"][0]["repeated_rows"] >= 2
    assert counted["sources"][0]["empty_turns"] == 1
    assert counted["validation_rows_also_trained"] == 1


def test_data_of_which_nothing_is_trained_is_refused(written):
    """Cut before the first answer: exit 3 with the reason, and the counts are still printed."""
    _, file = written
    result = CliRunner().invoke(main, ["data", "stats", str(file), "data.max_seq_length=8"])
    assert result.exit_code == 3
    assert "nothing to train on" in result.stderr
    assert "64 rows" in result.stdout


def test_a_prepared_cache_is_the_one_the_run_finds(written, monkeypatch):
    """Prepared twice, the second time finds the first; the worker opens the same key in the same folder."""
    recipe, file = written
    monkeypatch.delenv("LAUNCHER_CACHE", raising=False)
    first, second = run("prepare", str(file)), run("prepare", str(file))
    assert (first["reused"], second["reused"]) == (False, True)
    folder = Path(recipe.output_dir) / ".cache" / "tokens"
    assert Path(first["path"]).parent == folder
    before = {path.name for path in folder.iterdir()}
    build_token_cache(recipe, make_candidate(), load_tokenizer(recipe), folder, scope="a run")
    assert {path.name for path in folder.iterdir()} == before


def test_a_dry_run_touches_nothing(written):
    """`prepare --dry-run` names the folder and makes none."""
    recipe, file = written
    told = run("prepare", str(file), "--dry-run")
    assert told["cache"].startswith(recipe.output_dir)
    assert not Path(recipe.output_dir).exists()
