"""Rows into documents: which tokens are trained, for every format, template and choice of loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.errors import DataError, ModelError
from launcher.facts.formats import to_example
from launcher.facts.rows import Located
from launcher.worker.packing import IGNORED
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
