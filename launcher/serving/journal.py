"""journal: one line on stderr for each request: who is answered what, how long it took, and nothing of the texts."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import Any

from launcher.serving.guard import App, Message, Receive, Send

NOTE = "launcher.note"
"""Where in a request's scope the endpoint leaves what it knows: model, tokens, how it ended."""
_UNSEEN = ("/health",)
"""Paths that are asked every few seconds; only their failures are worth a line."""


class Journal:
    """Lets everything through to `app`."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, status = time.monotonic(), 0
        note: dict[str, Any] = {}
        scope[NOTE] = note

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if scope["path"] not in _UNSEEN or status >= 400:
                print(line(scope, status, note, time.monotonic() - began_s), file=sys.stderr, flush=True)


def line(scope: Message, status: int, note: dict[str, Any], taken_s: float) -> str:
    """What is written; a client's words are quoted where they could be taken for ours, or move a terminal's cursor."""
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    facts = "".join(f" {name}={_plain(str(value))}" for name, value in note.items())
    return f"{at} {_plain(scope['method'])} {_plain(scope['path'])} {status or '-'}{facts} {taken_s:.3f}s"


def _plain(text: str) -> str:
    short = text if len(text) <= 200 else f"{text[:200]}..."
    return short if short.isprintable() and not set(short) & set(" \"'=") else ascii(short)
