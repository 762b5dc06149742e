"""What a client may ask for: honoured, or refused by name."""

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
    """In Python they are equal; `n: true` and `logprobs: 0` are mistakes all the same."""
    assert "n=True is not supported here" in problem(ChatRequest, messages=MESSAGES, n=True)
    assert "logprobs=0 is not supported here" in problem(ChatRequest, messages=MESSAGES, logprobs=0)


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
