"""guard: what is refused before a request is read: strangers, other hosts' pages, and bodies that are too large.

An ASGI middleware of its own, since a framework's would have read the body first.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from launcher.serving.problems import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What is let through."""

    token: str | None
    """Asked of everybody; None on loopback only."""
    body_bytes: int
    body_s: float = 60.0
    """In which a body must have come: whoever sends it letter by letter holds a connection meanwhile."""


class Guard:
    """Lets a request through to `app`, or answers it."""

    def __init__(self, app: App, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection of the server's."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            body = await self._body(receive) if scope["method"] == "POST" else None
        except ApiError as error:
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive) if body is not None else receive, send)

    async def _body(self, receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(self._rules.body_s):
                return await _read(receive, self._rules.body_bytes)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self._rules.body_s:g} s") from None

    def _check(self, scope: Message, headers: dict[str, str]) -> None:
        if self._rules.token is None:
            _refuse_other_host(headers.get("host", ""))
        elif scope["path"] != "/health":
            _refuse_stranger(headers.get("authorization", ""), self._rules.token)
        if scope["method"] != "POST":
            return
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A web page may send anything else from its reader's browser to this machine without being asked.
            raise ApiError(415, "Content-Type must be application/json")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length) > self._rules.body_bytes:
            raise _too_large(self._rules.body_bytes)


def _refuse_other_host(host: str) -> None:
    """Without a token, a name that somebody else made to mean this machine must not lead here (DNS rebinding)."""
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    if name.lower() not in LOOPBACK:
        raise ApiError(400, f"this server is for this machine alone, not for the host {name!r}")


def _refuse_stranger(authorization: str, token: str) -> None:
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise ApiError(401, "a token is needed: Authorization: Bearer TOKEN", code="invalid_api_key")


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="request_too_large")


async def _read(receive: Receive, most: int) -> bytes:
    """The whole body, as long as it is within the limit (its announced length may be missing)."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ApiError(400, "the request was broken off")
        body += message.get("body", b"")
        if len(body) > most:
            raise _too_large(most)
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
