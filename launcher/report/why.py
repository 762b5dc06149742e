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


_MOST_LINES = 40


def _shown(found: Explanation) -> list[str]:
    """The line that shows it, or all of an error that has several."""
    if not found.message:
        return [found.evidence] if found.evidence else []
    left = len(found.message) - _MOST_LINES
    return [*found.message[:_MOST_LINES], *([f"... and {left} more lines"] if left > 0 else [])]


def print_explanation(found: Explanation, write: Callable[[str], None]) -> None:
    """Print an explanation line by line; `write` takes one line."""
    write(f"{found.run} {found.sentence}")
    for line in _shown(found):
        write(f"  {line}")
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
