"""Data formats: a row as its author wrote it becomes an Example that training understands.

| format            | columns                                                                                 |
|-------------------|-----------------------------------------------------------------------------------------|
| messages          | messages (or conversations): [{"role", "content"}]; optional tools                       |
| sharegpt          | conversations: [{"from", "value"}]; optional system                                      |
| alpaca            | instruction, output; optional input, system                                              |
| prompt_completion | prompt, completion: both text, or both lists of messages                                 |
| text              | text                                                                                     |

`auto` decides by the columns of the first row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import DataError
from launcher.facts.rows import Located, Problems, describe, read_rows
from launcher.recipe.schema import AUTO, FORMATS, DataSource

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
COLUMNS = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction, output",
    "prompt_completion": "prompt, completion",
    "text": "text",
}
"""Columns each format needs, as written in messages."""

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row to train on: a chat, a prompt with its completion, or a text.

    An alpaca row is a chat *and* a prompt with its completion: the second is for tokenizers without a chat template.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tool schemas handed to the chat template."""
    first_trained: int = 0
    """Index of the first message that may be trained on; messages before it are the prompt."""
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None

    @property
    def only_chat(self) -> bool:
        """Whether a chat template is the only way to make text of it."""
        return bool(self.messages) and self.prompt is None


class _UnusableRowError(Exception):
    """Why one row cannot be used; becomes a line of a DataError with the row's place."""


def read_examples(source: DataSource, rows: Iterable[Located] | None = None) -> Iterator[tuple[Located, Example]]:
    """Every usable row of the source with its example; problems of all rows are reported together at the end.

    `rows` replaces reading the source (for data-set ids, which only the job can read).

    Raises:
        DataError: what `read_rows` raises, or rows that do not have the format (first five and the total).
    """
    problems = Problems()
    chosen = source.format
    for located in read_rows(source, problems) if rows is None else rows:
        if chosen == AUTO:
            chosen = detect_format([located])
        try:
            yield located, _convert(located.row, chosen)
        except _UnusableRowError as error:
            problems.add(located.where, str(error))
    problems.raise_if_any()


def detect_format(rows: Iterable[Located]) -> str:
    """The format whose columns the first row has.

    Raises:
        DataError: there is no row, or no format has these columns.
    """
    first = next(iter(rows), None)
    if first is None:
        raise DataError("no rows to tell the format from")
    columns = {name for name, value in first.row.items() if value is not None}
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        return "messages" if _has_roles(first.row["conversations"]) else "sharegpt"
    for name, needed in (
        ("alpaca", {"instruction", "output"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("text", {"text"}),
    ):
        if needed <= columns:
            return name
    expected = "; ".join(f"{name}: {needed}" for name, needed in COLUMNS.items())
    found = ", ".join(sorted(map(str, first.row))) or "none"
    raise DataError(f"{first.where}: no format has these columns: {found}. Expected columns: {expected}")


def to_example(located: Located, format: str) -> Example:
    """The row as an example of `format` (one of FORMATS; auto looks at this row alone).

    Raises:
        DataError: the row does not have the format; the message says where and why.
    """
    try:
        return _convert(located.row, detect_format([located]) if format == AUTO else format)
    except _UnusableRowError as error:
        raise DataError(f"{located.where}: {error}") from None


def _has_roles(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and "role" in turns[0]


def _convert(row: Mapping[str, Any], format: str) -> Example:
    converters: dict[str, Callable[[Mapping[str, Any]], Example]] = {
        "messages": _from_messages,
        "sharegpt": _from_sharegpt,
        "alpaca": _from_alpaca,
        "prompt_completion": _from_prompt_completion,
        "text": _from_text,
    }
    if format not in converters:
        raise DataError(f"unknown data format {format!r}; expected one of {', '.join(FORMATS)}")
    return converters[format](row)


def _from_messages(row: Mapping[str, Any]) -> Example:
    column = "messages" if "messages" in row or "conversations" not in row else "conversations"
    messages = _messages(_column(row, column, "messages"), column)
    _require_assistant(messages, 0)
    return Example(messages=messages, tools=_tools(row.get("tools")))


def _from_sharegpt(row: Mapping[str, Any]) -> Example:
    turns = _column(row, "conversations", "sharegpt")
    messages = list(_messages(turns, "conversations", keys=("from", "value"), roles=SHAREGPT_ROLES))
    if isinstance(row.get("system"), str) and row["system"]:
        messages.insert(0, {"role": "system", "content": row["system"]})
    _require_assistant(messages, 0)
    return Example(messages=tuple(messages), tools=_tools(row.get("tools")))


def _from_alpaca(row: Mapping[str, Any]) -> Example:
    instruction = _text(row, "instruction", "alpaca")
    output = _text(row, "output", "alpaca")
    extra = row.get("input") or ""
    if not isinstance(extra, str):
        raise _UnusableRowError(f"'input' must be text, found {describe(extra)}")
    messages = [
        {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction},
        {"role": "assistant", "content": output},
    ]
    if isinstance(row.get("system"), str) and row["system"]:
        messages.insert(0, {"role": "system", "content": row["system"]})
    context = f"### Input:\n{extra}\n\n" if extra else ""
    prompt = f"### Instruction:\n{instruction}\n\n{context}### Response:\n"
    return Example(messages=tuple(messages), prompt=prompt, completion=output)


def _from_prompt_completion(row: Mapping[str, Any]) -> Example:
    prompt = _column(row, "prompt", "prompt_completion")
    completion = _column(row, "completion", "prompt_completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        head, tail = _messages(prompt, "prompt"), _messages(completion, "completion")
        _require_assistant(head + tail, len(head))
        return Example(messages=head + tail, first_trained=len(head), tools=_tools(row.get("tools")))
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise _UnusableRowError("'completion' is empty: nothing to train on")
        return Example(prompt=prompt, completion=completion)
    raise _UnusableRowError(
        "'prompt' and 'completion' must be both text or both lists of messages, "
        f"found {describe(prompt)} and {describe(completion)}"
    )


def _from_text(row: Mapping[str, Any]) -> Example:
    return Example(text=_text(row, "text", "text"))


def _column(row: Mapping[str, Any], name: str, format: str) -> Any:
    if row.get(name) is not None:
        return row[name]
    found = ", ".join(sorted(map(str, row))) or "none"
    state = "is null" if name in row else "is missing"
    raise _UnusableRowError(f"column {name!r} {state} (format {format} needs {COLUMNS[format]}; found: {found})")


def _text(row: Mapping[str, Any], name: str, format: str) -> str:
    value = _column(row, name, format)
    if not isinstance(value, str):
        raise _UnusableRowError(f"{name!r} must be text, found {describe(value)}")
    if not value.strip():
        raise _UnusableRowError(f"{name!r} is empty")
    return value


def _messages(
    turns: Any,
    column: str,
    *,
    keys: tuple[str, str] = ("role", "content"),
    roles: Mapping[str, str] = ROLES,
) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise _UnusableRowError(f"{column!r} must be a list of messages, found {describe(turns)}")
    if not turns:
        raise _UnusableRowError(f"{column!r} is an empty list")
    return tuple(_message(turn, f"{column}[{index}]", keys, roles) for index, turn in enumerate(turns))


def _message(turn: Any, where: str, keys: tuple[str, str], roles: Mapping[str, str]) -> Message:
    role_key, content_key = keys
    if not isinstance(turn, Mapping):
        raise _UnusableRowError(
            f"{where} must be an object with {role_key!r} and {content_key!r}, found {describe(turn)}"
        )
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in roles:
        raise _UnusableRowError(f"{where}: unknown {role_key} {role!r}; expected one of {', '.join(roles)}")
    content = turn.get(content_key)
    if content is None and roles[role] == "assistant" and turn.get("tool_calls"):
        content = ""  # OpenAI writes null beside tool calls
    if not isinstance(content, str):
        raise _UnusableRowError(f"{where}: {content_key!r} must be text, found {describe(content)}")
    # Columnar files (parquet, arrow) fill absent keys with null.
    kept = {key: value for key, value in turn.items() if key not in keys and value is not None}
    return {"role": roles[role], "content": content} | kept


def _require_assistant(messages: Iterable[Message], first_trained: int) -> None:
    candidates = [message for message in list(messages)[first_trained:] if message["role"] == "assistant"]
    if not candidates:
        raise _UnusableRowError("no assistant turn: nothing to train on")
    if not any(message["content"].strip() or message.get("tool_calls") for message in candidates):
        raise _UnusableRowError("every assistant turn is empty: nothing to train on")


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Tool schemas: a list, or the same as JSON text (columnar files cannot hold mixed objects)."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _UnusableRowError(f"'tools' is not JSON: {error}") from None
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise _UnusableRowError(f"'tools' must be a list of objects, found {describe(value)}")
    return tuple(value)
