"""The token cache: built once, found by content, handed to the other ranks; splits, weights and data-set ids."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.errors import DataError, RecipeError, TemporaryError
from launcher.facts.dataset import dataset_facts
from launcher.recipe.schema import DataSource, Recipe, ValidationSpec
from launcher.worker.data import TokenCache, build_token_cache, open_token_cache
from launcher.worker.packing import IGNORED
from tests import tiny

CHAT = [{"role": "user", "content": "first question"}, {"role": "assistant", "content": "first answer"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = template
    return other


def write(path: Path, rows: list[dict[str, Any]]) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path=str(path))


def texts(path: Path, count: int, prefix: str = "doc") -> DataSource:
    return write(path, [{"text": f"{prefix} number {number}"} for number in range(count)])


def recipe_for(tmp: Path, *sources: DataSource, **overrides: Any) -> Recipe:
    return tiny.make_recipe(tmp, **{"data.train": sources, "data.validation": ValidationSpec()} | overrides)


def build(tmp: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, **candidate: Any) -> TokenCache:
    return build_token_cache(recipe, tiny.make_candidate(**candidate), tokenizer, tmp / "cache")


def said(cache: TokenCache, tokenizer: PreTrainedTokenizerBase, table: str = "train") -> list[str]:
    rows = getattr(cache, table)
    return [tokenizer.decode(rows.row(i).input_ids) for i in range(len(rows))]


def test_the_planner_counts_what_the_worker_makes(
    tmp_path: Path, model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """One epoch has the same rows and tokens before and after the queue, for every format."""
    sources = (
        DataSource(path=str(tiny.make_chat_rows(tmp_path / "chats.jsonl", 20))),
        write(tmp_path / "alpaca.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}] * 4),
        write(tmp_path / "pairs.jsonl", [{"prompt": "ab", "completion": " cd"}] * 3),
        texts(tmp_path / "texts.jsonl", 5),
    )
    recipe = recipe_for(tmp_path, *sources)
    stats = build(tmp_path, recipe, tokenizer).stats
    facts = dataset_facts(recipe.data, model)
    assert (facts.rows, facts.tokens, facts.basis) == (stats["rows"], stats["tokens"], "counted")
    assert facts.trained_share == pytest.approx(stats["trained_tokens"] / stats["tokens"], abs=0.05)


def test_every_document_is_in_exactly_one_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    recipe = recipe_for(tmp_path, texts(tmp_path / "a.jsonl", 50))
    cache = build(tmp_path, recipe, tokenizer, seq_len=64)
    whole = "".join(said(cache, tokenizer))
    assert sorted(whole.split("</s>")[:-1]) == sorted(f"doc number {number}" for number in range(50))
    assert max(len(cache.train.row(i).input_ids) for i in range(len(cache.train))) <= 64
    assert cache.stats["fill"] > 0.9


def test_packed_rows_restart_positions_and_mask_every_first_label(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Nothing predicts across a border, and trained_tokens counts what is left."""
    cache = build(tmp_path, recipe_for(tmp_path, texts(tmp_path / "a.jsonl", 20)), tokenizer, seq_len=64)
    for index in range(len(cache.train)):
        row = cache.train.row(index)
        assert row.position_ids is not None
        starts = np.flatnonzero(row.position_ids == 0)
        assert (row.labels[starts] == IGNORED).all()
        assert (np.diff(row.position_ids)[np.setdiff1d(np.arange(len(row.labels) - 1), starts[1:] - 1)] == 1).all()
        ends = np.append(starts[1:], len(row.labels)) - 1
        assert (row.input_ids[ends] == tokenizer.eos_token_id).all()
        assert cache.train.trained_tokens[index] == (row.labels != IGNORED).sum() == len(row.labels) - len(starts)


def test_without_packing_a_row_is_a_document(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    cache = build(tmp_path, recipe_for(tmp_path, texts(tmp_path / "a.jsonl", 7)), tokenizer, packing=False)
    assert len(cache.train) == 7
    assert cache.train.row(3).position_ids is None
    with pytest.raises(IndexError):
        cache.train.row(7)


def test_the_cache_is_found_again_by_content(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Same content, another name and time: the same cache. Another seed, length, loss or row: another one."""
    source = texts(tmp_path / "a.jsonl", 12)
    recipe = recipe_for(tmp_path, source, **{"data.validation": ValidationSpec(count=2)})
    first = build(tmp_path, recipe, tokenizer)
    written = (tmp_path / "cache" / first.key / "meta.json").stat().st_mtime_ns
    copy = tmp_path / "copied.jsonl"
    copy.write_bytes(Path(source.path).read_bytes())
    os.utime(copy, (1, 1))
    moved = (
        tiny.make_recipe(tmp_path, data=recipe.data, **{"data.train": (DataSource(path=str(copy)),)})
        if False
        else (dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=(DataSource(path=str(copy)),))))
    )
    tokenizer(["padding leaves state behind in the tokenizer", "x"], padding=True)
    assert build(tmp_path, moved, tokenizer).key == first.key
    assert (tmp_path / "cache" / first.key / "meta.json").stat().st_mtime_ns == written
    others = [
        build(tmp_path, recipe_for(tmp_path, source, **{"train.seed": 7}), tokenizer),
        build(tmp_path, recipe, tokenizer, seq_len=64),
        build(tmp_path, recipe, tokenizer, packing=False),
        build(tmp_path, recipe, with_template(tokenizer, tiny.CHAT_TEMPLATE_WITH_MARKERS)),
        build(tmp_path, recipe_for(tmp_path, source, **{"data.loss_on": "all"}), tokenizer),
        build(tmp_path, recipe_for(tmp_path, dataclasses.replace(source, weight=2.0)), tokenizer),
        build(tmp_path, recipe_for(tmp_path, texts(tmp_path / "b.jsonl", 13)), tokenizer),
    ]
    assert len({first.key, *(other.key for other in others)}) == 8


def test_a_damaged_cache_is_built_again(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A cut file (full disk, killed copy) is seen by its size."""
    recipe = recipe_for(tmp_path, texts(tmp_path / "a.jsonl", 12))
    before = said(build(tmp_path, recipe, tokenizer), tokenizer)
    key = build(tmp_path, recipe, tokenizer).key
    labels = tmp_path / "cache" / key / "labels.bin"
    labels.write_bytes(labels.read_bytes()[:-4])
    assert said(build(tmp_path, recipe, tokenizer), tokenizer) == before


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = DataSource(path=str(tmp_path / "a.jsonl"))
    Path(source.path).write_text('{"text": "good"}\n{bad\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        build(tmp_path, recipe_for(tmp_path, source), tokenizer)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["handoff"]


def test_other_ranks_open_what_rank_0_built(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """They wait while rank 0 is at work, without reading the data themselves."""
    recipe, candidate = recipe_for(tmp_path, texts(tmp_path / "a.jsonl", 12)), tiny.make_candidate()
    opened: list[TokenCache] = []

    def rank_1() -> None:
        opened.append(open_token_cache(recipe, candidate, tokenizer, tmp_path / "cache", wait_s=60, scope="7-0"))

    waiting = threading.Thread(target=rank_1)
    waiting.start()
    built = build_token_cache(recipe, candidate, tokenizer, tmp_path / "cache", scope="7-0")
    waiting.join(timeout=60)
    assert opened[0].key == built.key
    assert said(opened[0], tokenizer) == said(built, tokenizer)


def test_other_ranks_raise_what_rank_0_raised(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Instead of waiting for ever; and the next attempt does not read the outcome of the last one."""
    source = DataSource(path=str(tmp_path / "a.jsonl"))
    Path(source.path).write_text("{bad\n")
    recipe, candidate, cache = recipe_for(tmp_path, source), tiny.make_candidate(), tmp_path / "cache"
    with pytest.raises(DataError) as first:
        build_token_cache(recipe, candidate, tokenizer, cache, scope="7-0")
    with pytest.raises(DataError) as second:
        open_token_cache(recipe, candidate, tokenizer, cache, wait_s=60, scope="7-0")
    assert second.value.problems == first.value.problems
    with pytest.raises(TemporaryError, match="rank 0 has not finished the token cache within 0 s"):
        open_token_cache(recipe, candidate, tokenizer, cache, wait_s=0.01, scope="7-1")


def test_an_unwritable_cache_is_a_temporary_failure(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A file where the folder should be: the same OSError path as a full or read-only disk."""
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(TemporaryError, match="cannot write the token cache"):
        build(tmp_path, recipe_for(tmp_path, texts(tmp_path / "a.jsonl", 3)), tokenizer)


# Nothing to train on


def test_rows_without_anything_trained_are_left_out_and_noticed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A prompt longer than the limit leaves no answer: NaN loss in the making."""
    long = {"prompt": "word " * 100, "completion": "x"}
    source = write(tmp_path / "a.jsonl", [long] * 3 + [{"prompt": "a", "completion": "b"}] * 5)
    cache = build(tmp_path, recipe_for(tmp_path, source), tokenizer, seq_len=32)
    assert (cache.stats["rows"], cache.stats["dropped_rows"], cache.stats["truncated_rows"]) == (5, 3, 3)
    assert any("3 of 8 training rows (38%) have nothing to train on" in notice for notice in cache.stats["notices"])
    assert (cache.train.trained_tokens > 0).all()


def test_data_with_nothing_to_train_on_is_refused_with_counts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "word " * 100, "completion": "x"}] * 3)
    with pytest.raises(DataError, match=r"a\.jsonl: nothing to train on: in all 3 rows every label is masked \(3 rows"):
        build(tmp_path, recipe_for(tmp_path, source), tokenizer, seq_len=32)


def test_packing_with_virtual_tokens_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """They would stand before the first document only."""
    recipe = recipe_for(tmp_path, texts(tmp_path / "a.jsonl", 3))
    with pytest.raises(RecipeError, match=r"set data\.packing: false"):
        build(tmp_path, recipe, tokenizer, method="prompt")
    assert len(build(tmp_path, recipe, tokenizer, method="prompt", packing=False).train) == 3


# Splits and weights


def test_the_validation_split_is_whole_rows_and_repeatable(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every row on one side, chosen by the seed; long texts are not torn between the sides."""
    long = " ".join(tiny.words()[:60])
    rows = [{"text": f"row{number} {long}"} for number in range(20)]
    source = write(tmp_path / "a.jsonl", rows)
    spec = {"data.validation": ValidationSpec(share=0.25)}
    cache = build(tmp_path, recipe_for(tmp_path, source, **spec), tokenizer, seq_len=32, packing=False)
    assert cache.validation is not None
    assert (cache.stats["rows"], cache.stats["validation_rows"]) == (15, 5)
    starts = [text.split()[0] for text in said(cache, tokenizer, "validation") if text.startswith("row")]
    pieces = len(said(cache, tokenizer)) + len(said(cache, tokenizer, "validation"))
    assert len(starts) == 5 and len(said(cache, tokenizer, "validation")) == pieces / 4
    again = build_token_cache(
        recipe_for(tmp_path, source, **spec),
        tiny.make_candidate(seq_len=32, packing=False),
        tokenizer,
        tmp_path / "other",
    )
    assert said(again, tokenizer, "validation") == said(cache, tokenizer, "validation")
    other = build(
        tmp_path, recipe_for(tmp_path, source, **spec, **{"train.seed": 1}), tokenizer, seq_len=32, packing=False
    )
    assert said(other, tokenizer, "validation") != said(cache, tokenizer, "validation")


def test_validation_and_retention_may_have_rows_of_their_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    recipe = recipe_for(
        tmp_path,
        texts(tmp_path / "a.jsonl", 6),
        **{
            "data.validation": ValidationSpec(source=texts(tmp_path / "v.jsonl", 3, "held")),
            "data.retention": texts(tmp_path / "r.jsonl", 2, "kept"),
        },
    )
    cache = build(tmp_path, recipe, tokenizer, packing=False)
    assert len(cache.train) == 6
    assert [text.split()[0] for text in said(cache, tokenizer, "validation")] == ["held"] * 3
    assert [text.split()[0] for text in said(cache, tokenizer, "retention")] == ["kept"] * 2


def test_validation_rows_that_are_also_trained_are_noticed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = texts(tmp_path / "a.jsonl", 6)
    recipe = recipe_for(tmp_path, source, **{"data.validation": ValidationSpec(source=source)})
    notices = build(tmp_path, recipe, tokenizer).stats["notices"]
    assert notices == ["6 of 6 validation documents are also in the training data, word for word"]


def test_weights_repeat_and_thin_out_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """2.5 = every row twice and half of them once more; held-out rows are never repeated into training."""
    heavy = dataclasses.replace(texts(tmp_path / "a.jsonl", 8, "heavy"), weight=2.5)
    light = dataclasses.replace(texts(tmp_path / "b.jsonl", 8, "light"), weight=0.25)
    cache = build(tmp_path, recipe_for(tmp_path, heavy, light), tokenizer, packing=False)
    found = said(cache, tokenizer)
    counts = [found.count(f"heavy number {number}</s>") for number in range(8)]
    assert sorted(counts) == [2] * 4 + [3] * 4
    assert sum(text.startswith("light") for text in found) == 2
    held = build(
        tmp_path, recipe_for(tmp_path, heavy, **{"data.validation": ValidationSpec(count=3)}), tokenizer, packing=False
    )
    assert not set(said(held, tokenizer)) & set(said(held, tokenizer, "validation"))


# Data-set ids


class FakeHub:
    """Stands in for the hub: `load_dataset` by id, from rows in memory."""

    def __init__(self, rows: dict[tuple[str, ...], list[dict[str, Any]]]) -> None:
        self.rows = rows

    def load_dataset(self, path: str, *, name: str | None, split: str, revision: str | None) -> Any:
        from datasets import Dataset

        key = (path, split, *(one for one in (name, revision) if one is not None))
        if key not in self.rows:
            raise ValueError(f'Unknown split "{split}".')
        return Dataset.from_list(self.rows[key])


def test_data_set_ids_are_read_in_the_job(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same formats and the same checks as for files; columnar nulls are no keys."""
    chat = [CHAT[0] | {"name": None}, CHAT[1] | {"name": "x"}]
    hub = FakeHub(
        {
            ("org/chats", "train"): [{"messages": chat}, {"messages": CHAT}],
            ("org/bad", "train"): [{"messages": []}],
        }
    )
    monkeypatch.setattr("datasets.load_dataset", hub.load_dataset)
    cache = build(tmp_path, recipe_for(tmp_path, DataSource(path="org/chats")), tokenizer, packing=False)
    assert [text.endswith("first answer</s>") for text in said(cache, tokenizer)] == [True, True]
    with pytest.raises(DataError, match="org/bad: row 1: 'messages' is an empty list"):
        build(tmp_path, recipe_for(tmp_path, DataSource(path="org/bad")), tokenizer)
    with pytest.raises(DataError, match=r"org/chats \(split test\): cannot load this data set \(Unknown split"):
        build(tmp_path, recipe_for(tmp_path, DataSource(path="org/chats", split="test")), tokenizer)


def test_configuration_and_revision_of_an_id_reach_the_hub(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One id twice in a recipe: two configurations are two data sets, and a missing one is named in full."""
    rows = {
        ("org/chats", "train", "easy"): [{"messages": CHAT}],
        ("org/chats", "train", "hard", "v2"): [{"messages": CHAT}] * 3,
    }
    monkeypatch.setattr("datasets.load_dataset", FakeHub(rows).load_dataset)
    easy = DataSource(path="org/chats", config="easy")
    hard = DataSource(path="org/chats", config="hard", revision="v2")
    cache = build(tmp_path, recipe_for(tmp_path, easy, hard), tokenizer, packing=False)
    assert len(said(cache, tokenizer)) == 4
    with pytest.raises(DataError, match=r"org/chats \(split train, config soft, revision v2\): cannot load"):
        build(tmp_path, recipe_for(tmp_path, DataSource(path="org/chats", config="soft", revision="v2")), tokenizer)
