"""What a client may ask for: honoured, or refused by name."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from launcher.serving.requests import NEUTRAL, ChatRequest, CompletionRequest, refused

MESSAGES = [{"role": "user", "content": "Hello"}]


def problem(kind: type, **fields: Any) -> str:
    """What is said of a request."""
    with pytest.raises(ValidationError) as found:
        kind.model_validate({"model": "red"} | fields)
    answer = refused(found.value.errors())
    assert answer.status == 400
    return answer.message


@pytest.mark.parametrize("name", NEUTRAL)
def test_values_that_change_nothing_are_taken_and_all_others_refused_by_name(name: str) -> None:
    """Clients send defaults along; a field that is ignored would be an answer to another question."""
    for value in (None, *NEUTRAL[name]):
        ChatRequest.model_validate({"model": "red", "messages": MESSAGES, name: value})
    assert name in problem(ChatRequest, messages=MESSAGES, **{name: ["something else"]})


def test_true_is_not_one() -> None:
    """In Python they are equal; `n: true`, `best_of: true` and a chat's `logprobs: 0` are mistakes all the same."""
    assert "n: Input should be a valid integer" in problem(ChatRequest, messages=MESSAGES, n=True)
    assert "best_of=True is not supported here" in problem(ChatRequest, messages=MESSAGES, best_of=True)
    assert "logprobs: Input should be a valid boolean" in problem(ChatRequest, messages=MESSAGES, logprobs=0)


def test_an_answer_can_be_sent_back_as_a_message() -> None:
    """`messages.append(answer.choices[0].message)` is how a chat goes on; its empty fields are no reason to refuse."""
    message = {"role": "assistant", "content": "Hello", "refusal": None, "annotations": [], "tool_calls": None}
    assert ChatRequest.model_validate({"model": "red", "messages": [message]}).messages[0].content == "Hello"
    assert "messages.0.tool_calls" in problem(ChatRequest, messages=[message | {"tool_calls": [{}]}])


@pytest.mark.parametrize(
    ("prompt", "found"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_has_four_forms(prompt: Any, found: Any) -> None:
    """A text, several, tokens, or several lists of tokens."""
    assert CompletionRequest.model_validate({"model": "red", "prompt": prompt}).prompts == found


@pytest.mark.parametrize("prompt", [None, [], [True], ["a", 1], [1, "a"], [[1], "a"], [[1.0]], {"a": 1}, 5])
def test_what_is_no_prompt_is_said_in_one_sentence(prompt: Any) -> None:
    """Also of a million wrong tokens, which must not be judged one by one."""
    said = problem(CompletionRequest, prompt=prompt)
    assert said == "prompt: is a text, a list of texts, a list of tokens, or a list of such lists, and not empty"


def test_a_million_tokens_are_looked_at_once() -> None:
    """A body at the limit of its size is judged in moments: other requests wait meanwhile."""
    began_s = time.process_time()
    found = CompletionRequest.model_validate({"model": "red", "prompt": [5] * 1_000_000})
    assert len(found.prompts[0]) == 1_000_000
    assert time.process_time() - began_s < 5


@pytest.mark.parametrize(
    "fields",
    [{"prompt": "\ud800"}, {"prompt": ["x", "\udfff"]}, {"prompt": "x", "stop": "\ud800"}],
)
def test_half_a_character_is_refused(fields: dict[str, Any]) -> None:
    """JSON can spell it; tokenizers raise on it."""
    assert "half of a surrogate pair" in problem(CompletionRequest, **fields)


def test_a_problem_within_a_message_is_placed() -> None:
    """Which message, and which of its fields."""
    assert "messages.0.content: Input should be" in problem(ChatRequest, messages=[{"role": "user", "content": None}])
    assert "messages.0.role" in problem(ChatRequest, messages=[{"role": "", "content": "x"}])


def test_nothing_is_generated_only_to_repeat_the_prompt() -> None:
    """max_tokens: 0 asks for the prompt's own scores, with echo; alone it is a mistake."""
    assert "max_tokens: 0 is allowed only with echo" in problem(CompletionRequest, prompt="x", max_tokens=0)
    assert CompletionRequest.model_validate({"model": "red", "prompt": "x", "max_tokens": 0, "echo": True}).limit == 0


def test_alternatives_need_their_token() -> None:
    """A chat says `logprobs: true` first."""
    assert "only with logprobs: true" in problem(ChatRequest, messages=MESSAGES, top_logprobs=2)
    asked = {"model": "red", "messages": MESSAGES, "logprobs": True}
    assert ChatRequest.model_validate(asked).alternatives == 0
    assert ChatRequest.model_validate(asked | {"top_logprobs": 3}).alternatives == 3
    assert CompletionRequest.model_validate({"model": "red", "prompt": "x", "logprobs": False}).alternatives is None


def test_every_problem_is_said_at_once() -> None:
    """One request, one list."""
    said = problem(CompletionRequest, prompt="x", top_k=3, temperature=-1, best_of=4)
    assert all(word in said for word in ("top_k is not supported", "temperature", "best_of=4"))


def test_nested_fields_are_named_by_their_path() -> None:
    """A message's tool calls are refused, not dropped."""
    message = {"role": "assistant", "content": "", "tool_calls": [{}]}
    assert "messages.0.tool_calls is not supported here" in problem(ChatRequest, messages=[message])


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 5, "max_completion_tokens": 5}, 5),
    ],
)
def test_a_chat_is_limited_by_either_name(fields: dict[str, int], limit: int | None) -> None:
    """max_tokens is the old name of max_completion_tokens."""
    assert ChatRequest.model_validate({"model": "red", "messages": MESSAGES} | fields).limit == limit


def test_two_limits_that_differ_are_refused() -> None:
    """Neither is taken by guess."""
    assert "say different things" in problem(ChatRequest, messages=MESSAGES, max_tokens=3, max_completion_tokens=4)


@given(
    st.dictionaries(st.text(max_size=12), st.none() | st.booleans() | st.integers() | st.text(max_size=8), max_size=6)
)
def test_no_body_is_a_bug(body: dict[str, Any]) -> None:
    """Whatever is sent is a request or a 400 with words."""
    for kind in (ChatRequest, CompletionRequest):
        try:
            kind.model_validate(body)
        except ValidationError as error:
            assert refused(error.errors()).message
