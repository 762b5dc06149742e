"""requests: what a client may ask for; what is not honoured is refused by name, never ignored.

Field names are OpenAI's; those of loading and unloading are vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from launcher.serving.problems import ApiError

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields of OpenAI's that are taken with the values (and null) that change nothing; any other value is refused."""
_UNUSED = frozenset({"user", "safety_identifier", "metadata", "prompt_cache_key"})
"""Fields that by their definition do not change an answer."""
_MESSAGE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "reasoning_content": (),
}
"""Fields with which an answer comes back as a message of the next request; the same rule."""
MOST_STOPS = 16
MOST_CHOICES = 128
MOST_LOGPROBS = 20


def _whole_text(value: str) -> str:
    """JSON can spell halves of characters, which no tokenizer takes and no answer could repeat."""
    if not value.isascii() and any("\ud800" <= one <= "\udfff" for one in value):
        raise ValueError("half of a surrogate pair is no character")
    return value


Text = Annotated[str, AfterValidator(_whole_text)]


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """Every form that a prompt has, as a list of prompts; by hand, as a union would report each of a million tokens."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(one) is int for one in value):
            return [value]
        if all(isinstance(one, str) for one in value):
            return value
        if all(isinstance(one, list) and all(type(token) is int for token in one) for one in value):
            return value
    raise ValueError("is a text, a list of texts, a list of tokens, or a list of such lists, and not empty")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False


class _Generation(_Strict):
    """What both ways of asking have in common."""

    model: Text
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    """0: always the likeliest token. null: 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Text | list[Text] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        """Take away what changes nothing, so that what remains is honoured or refused."""
        return _without(values, NEUTRAL, _UNUSED)

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


def _without(values: Any, neutral: Mapping[str, tuple[Any, ...]], unused: frozenset[str] = frozenset()) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {name: value for name, value in values.items() if not _changes_nothing(name, value, neutral, unused)}


def _changes_nothing(name: str, value: Any, neutral: Mapping[str, tuple[Any, ...]], unused: frozenset[str]) -> bool:
    if name in neutral:
        # 0 == False in Python, but presence_penalty: false is a mistake; so types are compared too.
        return value is None or any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral[name]
        )
    return name in unused


class TextPart(_Strict):
    """One part of a message's content; there are no images here."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One message of a chat; the model's template decides which roles it takes."""

    role: Annotated[Text, Field(min_length=1)]
    content: Text | list[TextPart]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        return _without(values, _MESSAGE_NEUTRAL)

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name is not None else {})


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _alternatives_need_their_token(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is allowed only with logprobs: true")
        return self

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

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens are told beside each of the answer; None: no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    # No list in the type: pydantic would look at each of a million tokens again.
    prompt: Annotated[Any, BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_logprobs(cls, values: Any) -> Any:
        """`false` is a chat's word for none, and clients of both send it."""
        return _without(values, {"logprobs": (False,)})

    @field_validator("prompt")
    @classmethod
    def _whole_prompts(cls, value: list[str] | list[list[int]]) -> list[str] | list[list[int]]:
        for one in value:
            if isinstance(one, str):
                _whole_text(one)
        return value

    @model_validator(mode="after")
    def _something_to_answer(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is allowed only with echo: true")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Texts, or tokens."""
        found: list[str] | list[list[int]] = self.prompt
        return found

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens are told beside each of the answer; None: no logprobs at all."""
        return self.logprobs

    @property
    def limit(self) -> int:
        """Tokens of the answer at most; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens


class LoadRequest(_Strict):
    """POST /v1/load_lora_adapter."""

    lora_name: Annotated[Text, Field(min_length=1, max_length=200)]
    lora_path: Annotated[Text, Field(min_length=1)]


class UnloadRequest(_Strict):
    """POST /v1/unload_lora_adapter; vLLM's clients may send the number it gave."""

    lora_name: Text
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
        return f"{_place(error)} is not supported here"
    said = str(error["msg"]).removeprefix("Value error, ")
    if error["loc"] == ("body",) and error["type"] in ("missing", "model_attributes_type"):
        return "the body is empty" if error["type"] == "missing" else "the body is not a JSON object"
    return f"{_place(error)}: {said}" if field else said


def _place(error: Mapping[str, Any]) -> str:
    """Where it is, down to the message and its field; without the names of a union's branches."""
    path = error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"]
    return ".".join(str(part) for part in path if isinstance(part, int) or str(part).isidentifier())
