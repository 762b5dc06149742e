"""stream: an answer as it comes from the model's thread to the client, whole or piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request

from launcher.serving.problems import ApiError
from launcher.serving.replies import Form, Usage
from launcher.serving.rows import Broken, Event, Finished, Piece, Row


class Answer:
    """Events of one row; the model's thread calls it, the endpoint waits for it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def __call__(self, event: Event) -> None:
        """Hand over an event, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Piece | Finished]:
        """Events up to the last.

        Raises:
            ApiError: 500; the model failed.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, Broken):
                raise ApiError(500, event.why)
            yield event
            if isinstance(event, Finished):
                return


async def whole(request: Request, row: Row, answer: Answer, form: Form) -> dict[str, Any]:
    """The complete answer; a client that leaves ends it.

    Raises:
        ApiError: 500; the model failed.
    """
    text: list[str] = []
    watching = asyncio.create_task(_cancel_when_gone(request, row))
    try:
        async for event in answer.events():
            if isinstance(event, Piece):
                text.append(event.text)
            else:
                usage = Usage(prompt=len(row.prompt), completion=event.completion_tokens)
                return form.whole("".join(text), event.reason, usage)
    finally:
        row.cancelled = True
        watching.cancel()
    raise ApiError(500, "the answer has no end")


async def _cancel_when_gone(request: Request, row: Row) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    row.cancelled = True
    row.sink(Broken("the client has gone"))


async def pieces(row: Row, answer: Answer, form: Form, *, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events, ended by [DONE]; a client that leaves ends the answer."""
    filler = {"usage": None} if with_usage else {}
    try:
        for chunk in form.first():
            yield _event(chunk | filler)
        async for event in answer.events():
            if isinstance(event, Piece):
                yield _event(form.piece(event.text) | filler)
                continue
            yield _event(form.last(event.reason) | filler)
            if with_usage:
                yield _event(form.usage(Usage(prompt=len(row.prompt), completion=event.completion_tokens)))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        # The status has been sent long ago; OpenAI's clients raise on this.
        yield _event(error.body())
    finally:
        row.cancelled = True


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
