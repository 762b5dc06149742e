"""story: what the ledger tells about the last start of a run, in the words of whoever saw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Events = Sequence[Mapping[str, Any]]
_BEGINNINGS = ("submitted", "started")


def restarts(events: Events) -> int:
    """How often the ranks were started again, over requeues, follow-up jobs and resumes alike."""
    starts = [f"{event.get('job_id')} {event.get('attempt')}" for event in events if event.get("event") == "started"]
    return max(0, len(dict.fromkeys(starts)) - 1)


def since_last_start(events: Events) -> Events:
    """The events since the job was last submitted or its ranks last started."""
    first = max((at for at, event in enumerate(events) if event.get("event") in _BEGINNINGS), default=-1)
    return events[first + 1 :]


def trouble(events: Events) -> str | None:
    """What went wrong since the last start; None when nothing was written down.

    The decision's own words first: it has weighed the others. Then the rank that hung, the one that was killed (its
    peers fail a moment later, with less telling words), and the first that failed.
    """
    recent = since_last_start(events)
    for told in (_decided, _hung, _killed, _failed):
        found = next((words for event in recent if (words := told(event))), None)
        if found is not None:
            return _line(found)
    return None


def decision(events: Events) -> str | None:
    """Why the run is not started again; None unless that was decided since the last start."""
    for event in since_last_start(events)[::-1]:
        if event.get("event") == "decided":
            stops = event.get("action") == "stop" and event.get("reason")
            return f"not started again: {_line(event['reason'])}" if stops else None
    return None


def coming_back(events: Events) -> str | None:
    """Why the job waits once more, as "41.0 lost a node"; None where no decision about an earlier start is known."""
    for event in events[::-1]:
        if event.get("event") == "submitted" and event.get("purpose") == "resume":
            return None
        if event.get("event") == "decided" and event.get("sentence"):
            return _line(f"attempt {event.get('attempt')} {event['sentence']}")
    return None


def _decided(event: Mapping[str, Any]) -> str | None:
    if event.get("event") != "decided" or event.get("cause") in ("finished", "stopped", "cancelled"):
        return None
    return _line(event["sentence"]) if event.get("sentence") else None


def _hung(event: Mapping[str, Any]) -> str | None:
    if event.get("event") != "hung":
        return None
    step = f" after step {event['step']}" if event.get("step") else ""
    return f"rank {event.get('rank')} on {event.get('host')} was hung{step}{_because(event.get('why'))}"


def _killed(event: Mapping[str, Any]) -> str | None:
    if event.get("event") != "died" or not event.get("signal"):
        return None
    return f"rank {event.get('rank')} on {event.get('host')} was killed by {event['signal']}"


def _failed(event: Mapping[str, Any]) -> str | None:
    if event.get("event") == "failed":
        return f"rank {event.get('rank')}: {_line(event.get('error'))}"
    if event.get("event") == "died":
        return f"rank {event.get('rank')} on {event.get('host')} ended with exit code {event.get('exit_code')}"
    return None


def _because(why: Any) -> str:
    return f": {_line(why)}" if why else ""


def _line(value: Any) -> str:
    """The first line, shortened; a dying process may write anything."""
    return next(iter(str(value).splitlines()), "")[:400]
