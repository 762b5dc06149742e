"""names: what a client may call a model, and what each name stands for."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.serving.problems import ApiError, no_such_model

BASE = "__base__"
"""PEFT's name for no adapter at all, in a batch of several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One model that can be asked for."""

    name: str
    key: str
    """Its name inside the model: BASE, or one that was never used before (a name may come back as another adapter)."""
    tokenizer: Any
    """Its own, as its template may differ from the base's."""
    folder: str
    longest_token: int = 1
    """Characters of the longest token: but for unknown words, no token stands for more of a text."""
    created_s: int = field(default_factory=lambda: int(time.time()))


def new_entry(name: str, key: str, tokenizer: Any, folder: Path) -> Entry:
    """An entry as its tokenizer has it."""
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    return Entry(name=name, key=key, tokenizer=tokenizer, folder=str(folder), longest_token=longest)


class Names:
    """The table of served models; any thread may read it."""

    def __init__(self, base: Entry) -> None:
        self._lock = threading.Lock()
        self._base = base
        self._entries = {base.name: base}
        self._taken = 0

    @property
    def base(self) -> Entry:
        """The model without any adapter."""
        return self._base

    def new_key(self) -> str:
        """A name for inside: no dots, which module names must not have, and never one of before."""
        with self._lock:
            self._taken += 1
            return f"adapter_{self._taken}_"

    def find(self, name: str) -> Entry:
        """Who is meant.

        Raises:
            ApiError: 404; nobody.
        """
        with self._lock:
            found = self._entries.get(name)
            there = list(self._entries)
        if found is None:
            raise no_such_model(name, there)
        return found

    def refuse_taken(self, name: str) -> None:
        """Refuse a name that is used.

        Raises:
            ApiError: 400, as vLLM answers.
        """
        with self._lock:
            taken = self._entries.get(name)
        if taken is not None:
            raise ApiError(
                400,
                f"{name!r} is served already ({taken.folder}); unload it first, or choose another name",
                param="lora_name",
            )

    def add(self, entry: Entry) -> None:
        """Serve one more.

        Raises:
            ApiError: 400; its name was taken meanwhile.
        """
        self.refuse_taken(entry.name)
        with self._lock:
            self._entries[entry.name] = entry

    def remove(self, name: str) -> Entry:
        """Serve it no longer; who is being answered goes on.

        Raises:
            ApiError: 404; there is none. 400: it is the base.
        """
        entry = self.find(name)
        if entry is self._base:
            raise ApiError(400, f"{name!r} is the base and stays", param="lora_name")
        with self._lock:
            del self._entries[name]
        return entry

    def listed(self) -> list[dict[str, Any]]:
        """GET /v1/models."""
        with self._lock:
            entries = list(self._entries.values())
        return [self.told(entry) for entry in entries]

    def told(self, entry: Entry) -> dict[str, Any]:
        """GET /v1/models/NAME."""
        parent = None if entry is self._base else self._base.name
        return {
            "id": entry.name,
            "object": "model",
            "created": entry.created_s,
            "owned_by": "launcher",
            "root": entry.folder,
            "parent": parent,
        }
