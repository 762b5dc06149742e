"""What is refused before a request is read, without a server: the guard as ASGI calls it."""

import asyncio
import json
from typing import Any

import pytest

from launcher.serving.guard import Guard, Rules

HEADERS = {"host": "127.0.0.1:8000", "content-type": "application/json"}


def asked(
    bodies: list[bytes], *, more: bool = False, method: str = "POST", rules: Rules | None = None, **headers: str
) -> tuple[int, Any]:
    """Status and body of the answer; `more`: the last part of the body never comes."""
    given = {name.replace("_", "-"): value for name, value in (HEADERS | headers).items()}
    scope = {
        "type": "http",
        "method": method,
        "path": "/v1/completions",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
    }
    parts = [
        {"type": "http.request", "body": body, "more_body": more or number < len(bodies) - 1}
        for number, body in enumerate(bodies)
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        if parts:
            return parts.pop(0)
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"] if method == "POST" else b""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(body.decode()).encode()})

    asyncio.run(Guard(app, rules or Rules(token=None, body_bytes=20))(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_a_body_comes_through_whole() -> None:
    """In one part or in many."""
    assert asked([b"abc"]) == (200, "abc")
    assert asked([b"a", b"", b"bc"]) == (200, "abc")


def test_a_body_that_comes_letter_by_letter_is_not_waited_for() -> None:
    """408: a connection is not held for ever."""
    status, told = asked([b"a", b"b"], more=True, rules=Rules(token=None, body_bytes=20, body_s=0.05))
    assert status == 408
    assert told["error"]["message"] == "the body did not come within 0.05 s"


@pytest.mark.parametrize("length", ["21", "-1", "two", "\xb2", "9" * 30])
def test_a_length_that_is_too_much_or_none_is_refused(length: str) -> None:
    """Before anything is read."""
    assert asked([b"abc"], content_length=length)[0] == 413


def test_a_body_without_a_length_is_counted() -> None:
    """Its announced length may be missing."""
    assert asked([b"x" * 15, b"x" * 15])[0] == 413


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "[::2]:80", "localhost.:80"])
def test_a_name_that_somebody_else_may_own_is_refused(host: str) -> None:
    """A web page may have its name mean this machine."""
    status, told = asked([], method="GET", host=host)
    assert status == 400
    assert "for this machine alone" in told["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "[::1]", "[::1]:8000"])
def test_this_machines_names_are_taken(host: str) -> None:
    """With or without a port."""
    assert asked([], method="GET", host=host)[0] == 200


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", "Basic token", "token", "Bearer tok\xe9n"])
def test_with_a_token_everything_else_is_a_stranger(given: str) -> None:
    """Any host's name is right then."""
    rules = Rules(token="token", body_bytes=20)
    assert asked([], method="GET", rules=rules, host="evil.example", authorization=given)[0] == 401
    assert asked([], method="GET", rules=rules, host="evil.example", authorization="bearer token ")[0] == 200
