"""Rows into tokens: what is trained, how rows are packed, cached, split, weighed and ordered."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.errors import DataError, ModelError, RecipeError, TemporaryError
from launcher.facts.dataset import dataset_facts
from launcher.facts.formats import to_example
from launcher.facts.rows import Located
from launcher.recipe.schema import DataSource, Recipe, ValidationSpec
from launcher.worker import data as data_module
from launcher.worker.data import Order, TokenCache, build_token_cache, collate, needs_flat, open_token_cache
from launcher.worker.packing import IGNORED, Row, pack
from launcher.worker.tokens import Document, Tokenizing
from tests import tiny

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
]


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


def documents(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], *, loss_on: str = "assistant", limit: int = 128
) -> tuple[Document, ...]:
    example = to_example(Located("a.jsonl", 3, row), "auto")
    (tokenized,) = Tokenizing(tokenizer, max_seq_length=limit, loss_on=loss_on)([("a.jsonl:3", example)])
    return tokenized.documents


def trained(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], **options: Any) -> str:
    (document,) = documents(tokenizer, row, **options)
    return tokenizer.decode(document.labels[document.labels != IGNORED])


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


# What is trained


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", "first answer</s>second answer</s>"),
        ("completion", "second answer</s>"),
        (
            "all",
            "<|system|>S</s><|user|>first question</s><|assistant|>first answer</s>"
            "<|user|>second question</s><|assistant|>second answer</s>",
        ),
    ],
)
@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, tiny.CHAT_TEMPLATE_WITH_MARKERS], ids=["plain", "markers"])
def test_the_loss_looks_at_the_asked_turns_and_their_ends(
    tokenizer: PreTrainedTokenizerBase, template: str, loss_on: str, expected: str
) -> None:
    """The same tokens, whether the template marks the assistant's part or it has to be found."""
    assert trained(with_template(tokenizer, template), {"messages": CHAT}, loss_on=loss_on) == expected


def test_the_rendered_text_is_the_templates_own(tokenizer: PreTrainedTokenizerBase) -> None:
    """No token is added or lost between the template and the model."""
    (document,) = documents(tokenizer, {"messages": CHAT})
    expected = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert document.input_ids.tolist() == expected


def test_the_end_is_trained_where_the_markers_leave_it_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that never trains the end of a turn never stops."""
    template = tiny.CHAT_TEMPLATE_WITH_MARKERS.replace(
        "{{ message['content'] }}{{ eos_token }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ eos_token }}",
    )
    assert template != tiny.CHAT_TEMPLATE_WITH_MARKERS
    assert trained(with_template(tokenizer, template), {"messages": CHAT}) == "first answer</s>second answer</s>"


def test_the_end_is_added_where_the_template_has_none(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    assert trained(with_template(tokenizer, template), {"messages": CHAT[1:3]}).endswith("first answer\n</s>")


def test_white_space_behind_the_end_of_a_turn_is_not_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    """Templates write a line break after the end marker; generation stops before it."""
    template = tiny.CHAT_TEMPLATE.replace("{{ eos_token }}", "{{ eos_token + '\\n' }}")
    assert trained(with_template(tokenizer, template), {"messages": CHAT}) == "first answer</s>second answer</s>"


def test_a_generation_prompt_may_say_more_than_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Such as an opened thinking block, which answers in the data do not have."""
    template = tiny.CHAT_TEMPLATE.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>' }}")
    assert trained(with_template(tokenizer, template), {"messages": CHAT}) == "first answer</s>second answer</s>"


THINKING_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ 'thoughts ' }}{% endif %}"
    "{{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Renders the last answer differently from earlier ones, as some reasoning models' templates do."""


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_way_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Masks found by rendering prefixes would be wrong; completion and single turns still work."""
    other = with_template(tokenizer, THINKING_TEMPLATE)
    with pytest.raises(
        DataError, match=r"a\.jsonl:3: the chat template renders earlier turns differently.*loss_on: compl"
    ):
        documents(other, {"messages": CHAT})
    assert trained(other, {"messages": CHAT}, loss_on="completion") == "thoughts second answer</s>"
    assert trained(other, {"messages": CHAT[1:3]}) == "thoughts first answer</s>"


def test_prompt_and_completion_as_messages_train_the_completion_only(tokenizer: PreTrainedTokenizerBase) -> None:
    """An assistant turn inside the prompt is context, also where the template has markers."""
    row = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    for template in (tiny.CHAT_TEMPLATE, tiny.CHAT_TEMPLATE_WITH_MARKERS):
        assert trained(with_template(tokenizer, template), row) == "second answer</s>"


@pytest.mark.parametrize(
    ("loss_on", "expected"), [("assistant", " cd</s>"), ("completion", " cd</s>"), ("all", "b cd</s>")]
)
def test_plain_prompt_and_completion(tokenizer: PreTrainedTokenizerBase, loss_on: str, expected: str) -> None:
    """No template; the first token of a document has nothing before it and is never trained."""
    row = {"prompt": "ab", "completion": " cd"}
    assert tokenizer.decode(documents(tokenizer, row)[0].input_ids) == "ab cd</s>"
    assert trained(tokenizer, row, loss_on=loss_on) == expected


def test_a_prompt_is_tokenized_as_at_inference(tokenizer: PreTrainedTokenizerBase) -> None:
    """ "ab " + "cd" must not be trained as "ab" + " cd": the model would never see a prompt that ends so."""
    prompt = tokenizer("ab ")["input_ids"]
    assert tokenizer("ab cd")["input_ids"][: len(prompt)] != prompt
    (document,) = documents(tokenizer, {"prompt": "ab ", "completion": "cd"})
    assert document.input_ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(document.labels[document.labels != IGNORED]) == "cd</s>"


def test_an_answer_that_shares_a_token_with_its_header_is_trained_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    """ "assistant: " + "first" has a token " first"-something; leaving it out would lose the start of every answer."""
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    assert trained(with_template(tokenizer, template), {"messages": CHAT[1:3]}).strip() == "first answer</s>"


def test_alpaca_without_a_template_has_a_plain_form(tokenizer: PreTrainedTokenizerBase) -> None:
    """Base models have no chat template, and alpaca data brings its own layout."""
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (document,) = documents(with_template(tokenizer, None), row)
    assert tokenizer.decode(document.input_ids) == ("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>")
    assert trained(with_template(tokenizer, None), row) == "3</s>"
    assert trained(tokenizer, row) == "3</s>"


def test_a_chat_without_a_template_names_the_key_to_set(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ModelError, match=r"a\.jsonl:3: .*no chat template; set data\.chat_template"):
        documents(with_template(tokenizer, None), {"messages": CHAT})


def test_what_the_template_refuses_has_its_place(tokenizer: PreTrainedTokenizerBase) -> None:
    other = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"a\.jsonl:3: the chat template refuses this chat: roles must alternate"):
        documents(other, {"messages": CHAT})


def test_a_long_text_becomes_pieces_and_loses_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """All of it is trained, save the first token of each piece."""
    text = " ".join(tiny.words()[:200])
    pieces = documents(tokenizer, {"text": text}, limit=32)
    assert tokenizer.decode(np.concatenate([piece.input_ids for piece in pieces])) == text + "</s>"
    assert {len(piece.labels) for piece in pieces[:-1]} == {32}
    assert all(piece.trained == len(piece.labels) - 1 for piece in pieces)


def test_other_characters_than_ascii_are_masked_exactly(tokenizer: PreTrainedTokenizerBase) -> None:
    """Several tokens make one character here; the mask is found in characters."""
    row = {"messages": [{"role": "user", "content": "说“你好”🙂"}, {"role": "assistant", "content": "你好 😀é"}]}
    assert trained(tokenizer, row) == "你好 😀é</s>"


# The cache


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

    def __init__(self, rows: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
        self.rows = rows

    def load_dataset(self, path: str, *, split: str) -> Any:
        from datasets import Dataset

        if (path, split) not in self.rows:
            raise ValueError(f'Unknown split "{split}".')
        return Dataset.from_list(self.rows[path, split])


def test_data_set_ids_are_read_in_the_job(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same formats and the same checks as for files; columnar nulls are no keys."""
    chat = [CHAT[1] | {"name": None}, CHAT[2] | {"name": "x"}]
    hub = FakeHub(
        {
            ("org/chats", "train"): [{"messages": chat}, {"messages": CHAT[1:3]}],
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


# Packing, batches, order


def test_packing_is_best_fit_longest_first() -> None:
    """Known by hand: 7+3, 6+4, 5+2+2 in rows of 10."""
    assert pack([2, 7, 3, 6, 5, 4, 2], 10) == [[1, 2], [3, 5], [4, 0, 6]]
    assert pack([], 10) == []
    with pytest.raises(ValueError, match="document 1 has 11 tokens, a row holds 10"):
        pack([3, 11], 10)


def test_packing_wastes_little_on_real_lengths() -> None:
    """Lengths spread like real chats leave under 2 % of the rows empty."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.0, 0.8, 5000).astype(int), 2, 512)
    rows = pack(lengths, 512)
    assert sorted(index for row in rows for index in row) == list(range(5000))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 512
    assert lengths.sum() / (512 * len(rows)) > 0.98


@given(lengths=st.lists(st.integers(2, 50), max_size=200), capacity=st.integers(50, 80))
def test_packing_is_a_partition_that_fits(lengths: list[int], capacity: int) -> None:
    """For any lengths: every document once, no row too long, and no two rows that would fit into one."""
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    totals = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(total <= capacity for total in totals)
    assert len(totals) < 2 or totals[0] + totals[1] > capacity


@given(rows=st.integers(1, 40), batch=st.integers(1, 90), seed=st.integers(0, 5), epochs=st.integers(1, 4))
def test_the_order_is_fair_for_any_sizes(rows: int, batch: int, seed: int, epochs: int) -> None:
    """After n epochs' worth of places, every row was trained n times; later steps need no earlier ones."""
    steps = -(-rows * epochs // batch)
    order = Order(rows, batch, seed)
    sequence = np.concatenate([order.indices(step) for step in range(steps)])[: rows * epochs]
    assert np.bincount(sequence, minlength=rows).tolist() == [epochs] * rows
    assert Order(rows, batch, seed).indices(steps - 1).tolist() == order.indices(steps - 1).tolist()


def row(length: int, *, packed: bool) -> Row:
    ids = np.arange(1, length + 1, dtype=np.int32)
    return Row(ids, ids.copy(), np.arange(length, dtype=np.int32) if packed else None)


def test_packed_batches_carry_positions_and_never_an_attention_mask() -> None:
    """The padded tail is a document of its own that the loss does not look at."""
    batch = collate([row(3, packed=True), row(5, packed=True)], pad_token_id=0, fixed_length=6)
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0], [1, 2, 3, 4, 5, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3, -100, -100, -100], [1, 2, 3, 4, 5, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]]
    flat = collate([row(3, packed=True), row(5, packed=True)], pad_token_id=0, fixed_length=None, flat=True)
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert needs_flat("flash_attention_2") and not needs_flat("sdpa")


def test_other_batches_are_padded_to_the_longest_and_masked() -> None:
    batch = collate([row(3, packed=False), row(5, packed=False)], pad_token_id=9, fixed_length=None)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="does not fit the fixed length 4"):
        collate([row(5, packed=False)], pad_token_id=0, fixed_length=4)


def test_every_epoch_trains_every_row_once_in_its_own_order() -> None:
    """Steps may straddle epochs; ten rows in batches of four."""
    order = Order(10, 4, seed=3)
    assert order.steps_per_epoch == 3
    sequence = np.concatenate([order.indices(step) for step in range(10)])
    epochs = sequence.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    """Resume needs the step number only: no state, any order of asking, also far ahead."""
    there = Order(10, 4, seed=3)
    walked = [there.indices(step).tolist() for step in range(50)]
    jumped = [Order(10, 4, seed=3).indices(step).tolist() for step in range(50)]
    backwards = [there.indices(step).tolist() for step in reversed(range(50))]
    assert walked == jumped == backwards[::-1]
    assert Order(10, 4, seed=4).indices(0).tolist() != walked[0]
    assert len(Order(1_000_000, 8, seed=3).indices(10**9)) == 8


def test_fewer_rows_than_a_batch_repeat_within_it() -> None:
    counts = np.bincount(Order(3, 9, seed=0).indices(0))
    assert counts.tolist() == [3, 3, 3]
    with pytest.raises(DataError, match="no rows to train on"):
        Order(0, 8, seed=0)


def test_the_order_does_not_change_between_versions() -> None:
    """A resumed run continues the order its first attempt began; a change here breaks exact resume."""
    assert Order(10, 10, seed=42).indices(0).tolist() == ORDER_OF_SEED_42
    assert data_module.CACHE_VERSION == 1


ORDER_OF_SEED_42 = [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]
