"""attempts: the ledger told attempt by attempt: where each ran, from which step to which, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

Event = Mapping[str, Any]
_STEPS = ("saved", "stopped", "completed", "resumed", "decided")
"""Events whose step says how far the attempt was at the least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of the ranks."""

    name: str
    began_s: float
    """Epoch seconds."""
    ended_s: float
    ranks: int | None = None
    hosts: tuple[str, ...] = ()
    from_step: int = 0
    to_step: int | None = None
    """Of the newest event that tells one; a rank that died took its later steps with it."""
    end: str = "no last words"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def attempts(events: Sequence[Event]) -> list[Attempt]:
    """Every attempt of a ledger, in the order of their starts."""
    found: dict[str, Attempt] = {}
    for event in events:
        name, time_s = event.get("attempt"), event.get("time_s")
        if isinstance(name, str) and isinstance(time_s, int | float):
            known = found.get(name) or Attempt(name=name, began_s=float(time_s), ended_s=float(time_s))
            found[name] = _after(known, event, float(time_s))
    return list(found.values())


def _after(attempt: Attempt, event: Event, time_s: float) -> Attempt:
    """What is known once this event is read."""
    kind, step = event.get("event"), event.get("step")
    if kind in _STEPS and isinstance(step, int):
        attempt = replace(attempt, to_step=max(step, attempt.to_step or 0))
    if kind == "started":
        return replace(attempt, ranks=event.get("world_size"), hosts=tuple(event.get("hosts") or ()))
    if kind == "joined":
        return replace(attempt, hosts=tuple(event.get("hosts") or ()))
    if kind == "resumed" and isinstance(step, int):
        return replace(attempt, from_step=step)
    ended = _end(event)
    if ended is None:
        return attempt if kind == "decided" else replace(attempt, ended_s=max(attempt.ended_s, time_s))
    return replace(attempt, end=ended, ended_s=attempt.ended_s if kind == "decided" else time_s)


def _end(event: Event) -> str | None:
    """How an event says that the attempt ended."""
    kind = event.get("event")
    if kind == "completed":
        return "finished"
    if kind == "stopped":
        return f"stopped ({event.get('reason')}), saved"
    if kind == "failed":
        return str(event.get("error") or "failed").splitlines()[0]
    if kind == "decided" and event.get("cause") not in ("finished", "stopped"):
        return str(event.get("sentence") or event.get("reason") or "") or None
    return None
