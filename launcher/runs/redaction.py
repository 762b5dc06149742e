"""redaction: text without secrets, for everything that is written down or shown: logs, tracebacks, records, diffs.

Two ways to know one: it is the value of an environment variable whose name says so, or it has the form of a well-known
token. Light: no torch.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO, cast

REDACTED = "[redacted]"
_SECRET_NAME = re.compile(
    r"(^|_)(API_?KEY|ACCESS_KEY|PRIVATE_KEY|KEY|KEY_ID|TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIALS?)"
    r"(_|$)",
    re.IGNORECASE,
)
_SHORTEST = 8
"""A shorter value is mostly a word or a number: blanking it everywhere would spoil a log and hide nothing."""
_FORMS = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    re.compile(r"\b(?:gh[oprsu]|github_pat)_[A-Za-z0-9_]{16,}"),
    re.compile(r"\bwandb_v\d_\w{16,}"),
    re.compile(r"\bAKIA[A-Z0-9]{16}\b"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"(?i)(?<=key[ =:'\"])\s*['\"]?[0-9a-f]{32,}"),
    re.compile(r"\b[0-9a-f]{40}\b(?=['\"])"),
)
_SIGNS = ("hf_", "sk-", "gh", "wandb_v", "AKIA", "://", "key", "KEY", "Key", "'", '"')
"""A text without any of these holds none of the forms; most lines of a log are passed on after this look."""


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret: WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, DB_PASSWORD."""
    return _SECRET_NAME.search(name) is not None


def has_secret_form(text: str) -> bool:
    """Whether a token, or user:password@ in an address, stands in `text`."""
    return any(form.search(text) for form in _FORMS)


def secret_values(environ: Mapping[str, str] | None = None) -> list[str]:
    """Values of secret-looking variables, longest first; `environ`: this process's own where none is given."""
    named = os.environ if environ is None else environ
    found = {value for name, value in named.items() if is_secret_name(name) and len(value) >= _SHORTEST}
    return sorted((value for value in found if not value.startswith("/")), key=len, reverse=True)  # a path is no secret


def redact(text: str, values: list[str] | None = None) -> str:
    """`text` without the values of secret-looking environment variables and without token-shaped words."""
    for value in secret_values() if values is None else values:
        if value in text:
            text = text.replace(value, REDACTED)
    if any(sign in text for sign in _SIGNS):
        for form in _FORMS:
            text = form.sub(REDACTED, text)
    return text


def redact_all(value: Any) -> Any:
    """A JSON value with every string in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_all(item) for key, item in value.items()}
    return [redact_all(item) for item in value] if isinstance(value, list | tuple) else value


class Redacted:
    """A text stream that redacts what passes through it; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._values = secret_values()

    def write(self, text: str) -> int:
        """Write `text` without secrets. A secret written in two pieces is not recognised."""
        self._stream.write(redact(text, self._values))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write all lines."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_output() -> None:
    """From now on nothing that Python code of this process prints shows a secret."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Redacted):
            setattr(sys, name, cast(TextIO, Redacted(stream)))
