"""Why on a terminal: the sentence, what shows it, what was decided, one command."""

from __future__ import annotations

from collections.abc import Callable

from launcher.runs.explanation import Explanation

_WORDS = {
    "finish": "done",
    "stop": "not started again",
    "wait": "comes back by itself",
    "requeue": "started again",
    "follow_up": "goes on in a new job",
}


def print_explanation(found: Explanation, write: Callable[[str], None]) -> None:
    """Print an explanation line by line; `write` takes one line."""
    write(f"{found.run} {found.sentence}")
    if found.evidence:
        write(f"  {found.evidence}")
    if found.where:
        write(f"  in {found.where}" if found.evidence else f"  see {found.where}")
    if found.decision:
        action, _, reason = found.decision.partition(": ")
        write(f"  {_WORDS.get(action, action)}: {reason}")
    if len(found.history) > 1:
        write("  attempts:")
        for past in found.history:
            step = f", checkpoint of step {past.step}" if past.step else ""
            write(f"    {past.attempt}  {past.cause} -> {_WORDS.get(past.action, past.action)}{step}")
