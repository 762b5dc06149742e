"""stream: answers as they come from the model's thread to the client, whole or piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from launcher.serving.problems import ApiError
from launcher.serving.replies import Choice, Form, Usage
from launcher.serving.rows import Broken, Event, Finished, Piece, Row

_GONE = 499
"""Nobody reads it but the log, where 500 would be our fault (nginx's number for this)."""


class Answer:
    """Events of one request's rows; the model's thread calls the sinks, the endpoint waits for the events."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def sink(self, index: int) -> Callable[[Event], None]:
        """Where the row of one choice hands over its events, from any thread."""

        def take(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return take

    async def events(self, rows: int) -> AsyncIterator[tuple[int, Piece | Finished]]:
        """Choices and their events, up to the last of every row.

        Raises:
            ApiError: 500; the model failed. 503; the server ends.
        """
        while rows:
            index, event = await self._events.get()
            if isinstance(event, Broken):
                raise ApiError(event.status, event.why)
            yield index, event
            rows -= isinstance(event, Finished)


@dataclass(kw_only=True)
class Asked:
    """One request: its rows, one for each choice, and what is told of them."""

    rows: list[Row]
    answer: Answer
    form: Form
    prompt_tokens: int
    """Of every prompt once, however many answers it has."""
    echoes: list[str]
    """What each choice's text begins with: its prompt, or nothing."""
    note: dict[str, Any]
    """For the log."""
    completion_tokens: int = 0
    reasons: list[str] = field(default_factory=list)

    async def events(self) -> AsyncIterator[tuple[int, Piece | Finished]]:
        """The answer's events; counted."""
        async for index, event in self.answer.events(len(self.rows)):
            if isinstance(event, Finished):
                self.completion_tokens += event.completion_tokens
                self.reasons.append(event.reason)
            yield index, event

    @property
    def usage(self) -> Usage:
        """Tokens that it took."""
        return Usage(prompt=self.prompt_tokens, completion=self.completion_tokens)

    def leave(self) -> None:
        """Nobody waits any more: rows that are not complete are dropped at the next step."""
        for row in self.rows:
            row.cancelled = True
        made = sum(row.tokens for row in self.rows)
        reasons = dict.fromkeys(self.reasons if len(self.reasons) == len(self.rows) else ["left"])
        self.note |= {"prompt": self.prompt_tokens, "completion": made, "finish": "+".join(reasons)}


async def whole(request: Request, asked: Asked) -> dict[str, Any]:
    """The complete answer; a client that leaves ends it.

    Raises:
        ApiError: 500; the model failed. 503; the server ends.
    """
    choices = [Choice(text=echo) for echo in asked.echoes]
    watching = asyncio.create_task(_cancel_when_gone(request, asked))
    try:
        async for index, event in asked.events():
            choice = choices[index]
            if isinstance(event, Piece):
                choice.text += event.text
                choice.scored += event.scored
            else:
                choice.reason = event.reason
        return asked.form.whole(choices, asked.usage)
    finally:
        watching.cancel()
        asked.leave()


async def _cancel_when_gone(request: Request, asked: Asked) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    asked.answer.sink(0)(Broken("the client has gone", status=_GONE))


class Stream(StreamingResponse):
    """Server-sent events; a client that leaves ends the answer, also one that leaves before its first event."""

    def __init__(self, asked: Asked, *, with_usage: bool) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(asked, with_usage=with_usage), media_type="text/event-stream", headers=headers)
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; the generator alone would not end its rows, as one that was never begun runs no `finally`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._asked.leave()


async def _events(asked: Asked, *, with_usage: bool) -> AsyncIterator[str]:
    """Ended by [DONE]."""
    filler = {"usage": None} if with_usage else {}
    form = asked.form
    offsets = [0] * len(asked.rows)
    try:
        for index, echo in enumerate(asked.echoes):
            for chunk in form.first(index, echo):
                yield _event(chunk | filler)
        async for index, event in asked.events():
            if isinstance(event, Piece):
                yield _event(form.piece(index, event.text, event.scored, offsets[index]) | filler)
                offsets[index] += form.width(event.scored)
            else:
                yield _event(form.last(index, event.reason) | filler)
        if with_usage:
            yield _event(form.usage(asked.usage))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        # The status has been sent long ago; OpenAI's clients raise on this.
        yield _event(error.body())


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
