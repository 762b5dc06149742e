"""requests: what a client may ask for; what is not honoured is refused by name, never ignored.

Field names are OpenAI's; those of loading and unloading are vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from launcher.serving.problems import ApiError

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields of OpenAI's that are taken with the values (and null) that change nothing; any other value is refused."""
_UNUSED = frozenset({"user", "safety_identifier"})
"""Fields that by their definition do not change an answer."""
MOST_STOPS = 16


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False


class _Generation(_Strict):
    """What both ways of asking have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    """0: always the likeliest token. null: 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        """Take away what changes nothing, so that what remains is honoured or refused."""
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if not _changes_nothing(name, value)}

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        found = [value] if isinstance(value, str) else value or []
        if not all(found):
            raise ValueError("a stop sequence must not be empty")
        if len(found) > MOST_STOPS:
            raise ValueError(f"{len(found)} stop sequences are more than {MOST_STOPS}")
        return value

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which the answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


def _changes_nothing(name: str, value: Any) -> bool:
    if name in NEUTRAL:
        # 1 == True in Python, but logprobs: 1 is not logprobs: true's opposite; so types are compared too.
        return value is None or any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[name]
        )
    return name in _UNUSED


class TextPart(_Strict):
    """One part of a message's content; there are no images here."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a chat; the model's template decides which roles it takes."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name is not None else {})


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError(f"max_tokens ({both[0]}) and max_completion_tokens ({both[1]}) say different things")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most; None: whatever the context leaves."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Generation):
    """POST /v1/completions; one prompt a request."""

    prompt: str | list[str] | list[int] | list[list[int]]

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and value and not isinstance(value[0], int):
            if len(value) > 1:
                raise ValueError(f"{len(value)} prompts in one request; send a request for each, they are batched here")
            return value[0]
        return value

    @property
    def limit(self) -> int:
        """Tokens of the answer at most; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens


class LoadRequest(_Strict):
    """POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1)]


class UnloadRequest(_Strict):
    """POST /v1/unload_lora_adapter; vLLM's clients may send the number it gave."""

    lora_name: str
    lora_int_id: int | None = None


def refused(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """pydantic's findings as one answer, every problem in it."""
    found = [_sentence(error) for error in errors]
    return ApiError(400, "; ".join(dict.fromkeys(found)), param=_param(errors[0]) if errors else None)


def _param(error: Mapping[str, Any]) -> str | None:
    """The field as the client wrote it; the names of a union's branches, which pydantic adds, begin no field."""
    path = [part for part in error["loc"] if part != "body"]
    return str(path[0]) if path and error["type"] != "json_invalid" else None


def _sentence(error: Mapping[str, Any]) -> str:
    field = _param(error)
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error.get('ctx', {}).get('error', error['msg'])}"
    if error["type"] == "extra_forbidden":
        if field is not None and field in NEUTRAL:
            allowed = ", ".join([*map(repr, NEUTRAL[field]), "null"])
            return f"{field}={error['input']!r:.60} is not supported here; only {allowed}"
        return f"{'.'.join(str(part) for part in error['loc'] if part != 'body')} is not supported here"
    return f"{field}: {error['msg']}" if field else str(error["msg"])
