"""journal: one line on stderr for each request, and counts: who is answered, how long it took, nothing of the texts."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from launcher.serving.guard import App, Message, Receive, Send

NOTE = "launcher.note"
"""Where in a request's scope the endpoint leaves what it knows: model, tokens, how it ended."""
_UNSEEN = ("/health", "/metrics")
"""Paths that are asked every few seconds; only their failures are worth a line."""


class Counts:
    """What has been answered since the start."""

    def __init__(self) -> None:
        self._requests: Counter[int] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()

    def take(self, status: int, note: Mapping[str, Any]) -> None:
        """One request; its tokens where a model was asked that there is."""
        self._requests[status] += 1
        for kind in ("prompt", "completion"):
            if kind in note:
                self._tokens[kind, str(note["model"])] += note[kind]

    def text(self, load: Mapping[str, int]) -> str:
        """For Prometheus (its text format, version 0.0.4); `load`: gauges."""
        lines = ["# TYPE launcher_requests_total counter"]
        for status, count in sorted(self._requests.items()):
            lines.append(f'launcher_requests_total{{status="{status or "none"}"}} {count}')
        for wanted in ("prompt", "completion"):
            lines.append(f"# TYPE launcher_{wanted}_tokens_total counter")
            for (kind, model), count in sorted(self._tokens.items()):
                if kind == wanted:
                    lines.append(f'launcher_{kind}_tokens_total{{model="{_label(model)}"}} {count}')
        for name, value in load.items():
            lines += [f"# TYPE launcher_answers_{name} gauge", f"launcher_answers_{name} {value}"]
        return "\n".join([*lines, ""])


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Journal:
    """Lets everything through to `app`."""

    def __init__(self, app: App, counts: Counts) -> None:
        self._app, self._counts = app, counts

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
                self._counts.take(status, note)
                print(line(scope, status, note, time.monotonic() - began_s), file=sys.stderr, flush=True)


def line(scope: Message, status: int, note: dict[str, Any], taken_s: float) -> str:
    """What is written; a client's words are quoted where they could be taken for ours, or move a terminal's cursor."""
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    facts = "".join(f" {name}={_plain(str(value))}" for name, value in note.items())
    return f"{at} {_plain(scope['method'])} {_plain(scope['path'])} {status or '-'}{facts} {taken_s:.3f}s"


def _plain(text: str) -> str:
    short = text if len(text) <= 200 else f"{text[:200]}..."
    return short if short.isprintable() and not set(short) & set(" \"'=") else ascii(short)
