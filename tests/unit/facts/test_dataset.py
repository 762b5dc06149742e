"""Counting rows and tokens before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import DataError, ModelError
from launcher.facts.dataset import ASSUMED_ROWS, SAMPLE_ROWS, dataset_facts
from launcher.recipe.schema import DataSection, DataSource, ValidationSpec
from tests import tiny

NO_VALIDATION = ValidationSpec()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model_dir(tmp_path_factory.mktemp("model"))


def section(*paths: Path | str, **fields: Any) -> DataSection:
    fields = {"validation": NO_VALIDATION, "max_seq_length": 128} | fields
    return DataSection(train=tuple(DataSource(path=str(path)) for path in paths), **fields)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_small_data_is_counted_exactly(tmp_path: Path, model: Path) -> None:
    """By the model's own tokenizer: "<s><|user|>ab</s><|assistant|>cd</s>" is known token by token."""
    chat = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Z"}]}
    facts = dataset_facts(section(write(tmp_path / "a.jsonl", [chat] * 5)), model)
    assert (facts.rows, facts.tokens, facts.basis) == (5, 5 * 7, "counted")
    assert facts.max_tokens == 7
    assert facts.trained_share == pytest.approx(2 / 7, abs=0.01)


def test_large_data_is_sampled_with_a_fixed_seed(tmp_path: Path, model: Path) -> None:
    """Every row is read, a sample is tokenized, and twice gives the same answer."""
    path = tiny.make_chat_rows(tmp_path / "a.jsonl", SAMPLE_ROWS + 500)
    facts = dataset_facts(section(path), model)
    assert (facts.rows, facts.basis) == (SAMPLE_ROWS + 500, "sampled")
    assert facts == dataset_facts(section(path), model)
    half = tiny.make_chat_rows(tmp_path / "b.jsonl", SAMPLE_ROWS, seed=1)
    assert facts.mean_tokens == pytest.approx(dataset_facts(section(half), model).mean_tokens, rel=0.1)


def test_the_sampling_error_is_stated_and_true(tmp_path: Path, model: Path) -> None:
    """A sample says how far its tokens may be off; the true count lies inside, and a full count has no error."""
    rows = [{"prompt": "Q", "completion": "Z " * (1 + index % 97)} for index in range(SAMPLE_ROWS + 2000)]
    whole = section(write(tmp_path / "all.jsonl", rows), max_seq_length=512)
    facts = dataset_facts(whole, model)
    parts = [
        dataset_facts(
            section(write(tmp_path / f"{start}.jsonl", rows[start : start + 2000]), max_seq_length=512), model
        )
        for start in range(0, len(rows), 2000)
    ]
    true = sum(part.tokens for part in parts)
    assert [part.sampling_error for part in parts] == [0.0] * len(parts)
    assert 0 < facts.sampling_error < 0.03
    assert abs(facts.tokens - true) <= 1.5 * facts.sampling_error * true


def test_lengths_are_told_as_quantiles_and_a_histogram(tmp_path: Path, model: Path) -> None:
    """Before truncation, in bins that double: what decides max_seq_length."""
    rows = [{"prompt": "Q", "completion": "Z"}] * 90 + [{"prompt": "Q", "completion": "Z " * 300}] * 10
    facts = dataset_facts(section(write(tmp_path / "a.jsonl", rows)), model)
    assert facts.p50_tokens is not None and facts.p50_tokens < 32
    assert facts.p95_tokens == facts.max_tokens > 300
    shares = {each.up_to_tokens: each.share for each in facts.histogram}
    assert shares[32] == pytest.approx(0.9)
    assert shares[max(shares)] == pytest.approx(0.1)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_repeated_rows_are_counted(tmp_path: Path) -> None:
    """Equal rows of a file, the first one aside."""
    rows = [{"prompt": f"Q{index % 3}", "completion": "Z"} for index in range(10)]
    assert dataset_facts(section(write(tmp_path / "a.jsonl", rows)), None).repeated_share == pytest.approx(0.7)


def test_without_a_tokenizer_characters_are_counted(tmp_path: Path, model: Path) -> None:
    path = tiny.make_chat_rows(tmp_path / "a.jsonl", 64)
    assert dataset_facts(section(path), None).basis == "characters"
    assert dataset_facts(section(path), tmp_path).basis == "characters"  # a folder without tokenizer.json


def test_validation_rows_are_taken_off(tmp_path: Path, model: Path) -> None:
    """A share, a count, or rows of their own, which cost nothing."""
    path = tiny.make_chat_rows(tmp_path / "a.jsonl", 100)
    other = tiny.make_chat_rows(tmp_path / "b.jsonl", 30)

    def counts(spec: ValidationSpec) -> tuple[int, int]:
        facts = dataset_facts(section(path, validation=spec), model)
        return facts.rows, facts.validation_rows

    assert counts(ValidationSpec(share=0.1)) == (90, 10)
    assert counts(ValidationSpec(share=0.001)) == (99, 1)
    assert counts(ValidationSpec(count=7)) == (93, 7)
    assert counts(ValidationSpec(source=DataSource(path=str(other)))) == (100, 30)
    assert counts(NO_VALIDATION) == (100, 0)
    with pytest.raises(DataError, match="holding out 100 of 100 rows leaves none"):
        counts(ValidationSpec(count=100))


def test_weights_repeat_rows(tmp_path: Path, model: Path) -> None:
    path = str(tiny.make_chat_rows(tmp_path / "a.jsonl", 100))
    once = dataset_facts(section(path), model)
    data = dataclasses.replace(section(), train=(DataSource(path=path, weight=2.5), DataSource(path=path)))
    facts = dataset_facts(data, model)
    assert facts.rows == 350
    assert facts.tokens == pytest.approx(3.5 * once.tokens)


def test_rows_over_the_limit_are_truncated_and_counted(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "Q", "completion": "Z " * 500}] * 4)
    facts = dataset_facts(section(path, max_seq_length=32), model)
    assert (facts.tokens, facts.truncated_share) == (4 * 32, 1.0)
    assert facts.max_tokens > 500
    assert facts.notices == ()  # the planner warns of it, with a code


def test_long_texts_are_cut_into_pieces_not_truncated(tmp_path: Path, model: Path) -> None:
    """One book of 1001 tokens is 32 sequences of 32, and no token of it is lost."""
    path = write(tmp_path / "a.jsonl", [{"text": "Q" * 1000}])
    facts = dataset_facts(section(path, max_seq_length=32), model)
    assert (facts.rows, facts.truncated_share, facts.trained_share) == (-(-facts.max_tokens // 32), 0.0, 1.0)
    assert facts.tokens == facts.max_tokens


def test_known_ids_come_from_the_table_and_say_so() -> None:
    data = section("tatsu-lab/alpaca", max_seq_length=2048)
    facts = dataset_facts(data, None)
    assert (facts.rows, facts.basis) == (52002, "hint")
    assert "52,002 rows as published" in facts.notices[0]


def test_the_split_decides_the_hint() -> None:
    source = DataSource(path="HuggingFaceH4/ultrachat_200k", split="train_sft")
    facts = dataset_facts(DataSection(train=(source,), validation=NO_VALIDATION), None)
    assert (facts.rows, facts.basis) == (207865, "hint")


def test_unknown_ids_are_assumed_and_say_so(tmp_path: Path, model: Path) -> None:
    """The weakest source names the basis of the whole."""
    local = tiny.make_chat_rows(tmp_path / "a.jsonl", 10)
    facts = dataset_facts(section("some/thing", local), model)
    assert (facts.rows, facts.basis) == (ASSUMED_ROWS + 10, "assumed")
    assert "some/thing (split train) is neither on this machine nor in the table" in facts.notices[0]


def test_problems_of_all_sources_come_together(tmp_path: Path) -> None:
    """Training, validation and retention data are all looked at before anything is queued."""
    bad = write(tmp_path / "bad.jsonl", [{"messages": []}])
    data = section(
        tmp_path / "missing.jsonl",
        bad,
        validation=ValidationSpec(source=DataSource(path=str(tmp_path / "gone.csv"))),
        retention=DataSource(path=str(tmp_path / "lost.txt")),
    )
    with pytest.raises(DataError) as caught:
        dataset_facts(data, None)
    assert [line.split(":")[0].rpartition("/")[2] for line in caught.value.problems] == [
        "missing.jsonl",
        "bad.jsonl",
        "gone.csv",
        "lost.txt",
    ]


def test_chats_without_a_template_are_refused_before_the_queue(tmp_path: Path) -> None:
    """Naming the key to set; alpaca rows have a plain form and pass; so does a template of one's own."""
    model = tiny.make_model_dir(tmp_path / "model", chat_template=None)
    chats = tiny.make_chat_rows(tmp_path / "a.jsonl", 4)
    with pytest.raises(ModelError, match=r"no chat template; set data\.chat_template"):
        dataset_facts(section(chats), model)
    alpaca = write(tmp_path / "b.jsonl", [{"instruction": "Q", "output": "Z"}])
    assert dataset_facts(section(alpaca), model).rows == 1
    own = tmp_path / "own.jinja"
    own.write_text(tiny.CHAT_TEMPLATE)
    assert dataset_facts(section(chats, chat_template=str(own)), model).basis == "counted"
    with pytest.raises(ModelError, match=r"data\.chat_template: cannot read .*nowhere\.jinja"):
        dataset_facts(section(chats, chat_template=str(tmp_path / "nowhere.jinja")), None)
    own.write_text("{% for m in messages %}")
    with pytest.raises(ModelError, match=r"data\.chat_template: line 1: "):
        dataset_facts(section(chats, chat_template=str(own)), None)


def test_what_the_template_itself_refuses_is_a_data_problem(tmp_path: Path) -> None:
    template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('chats must start with the user') }}{% endif %}"
    )
    model = tiny.make_model_dir(tmp_path / "model", chat_template=template)
    messages = [{"role": "system", "content": "S"}, {"role": "assistant", "content": "Z"}]
    path = write(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template refuses this chat: chats must start"):
        dataset_facts(section(path), model)


def test_counting_loads_nothing_heavy(tmp_path: Path, model: Path) -> None:
    """`plan` has no time to import torch."""
    path = tiny.make_chat_rows(tmp_path / "a.jsonl", 8)
    code = (
        "import sys; from pathlib import Path; from launcher.recipe.schema import *; "
        "from launcher.facts.dataset import dataset_facts; "
        f"f = dataset_facts(DataSection(train=(DataSource(path={str(path)!r}),)), Path({str(model)!r})); "
        "assert f.basis == 'counted'; "
        "print(sorted({'torch', 'transformers', 'datasets', 'peft', 'deepspeed'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
