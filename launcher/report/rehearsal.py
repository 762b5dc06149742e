"""A rehearsal on a terminal: one line per stage as it is judged, then what it could not show."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from launcher.runs.rehearsal import Rehearsal
from launcher.runs.verdicts import Verdict

Write = Callable[[str], None]
_WIDTH = 110
_INDENT = " " * 34


def verdict_line(verdict: Verdict) -> str:
    """Stage, verdict, seconds and note, as one paragraph."""
    seconds = "" if verdict.seconds is None else f"{verdict.seconds:.1f} s"
    head = f"{verdict.stage:<11} {verdict.verdict:<13} {seconds:>7} "
    return textwrap.fill(verdict.note, _WIDTH, initial_indent=head, subsequent_indent=_INDENT, break_long_words=False)


def print_ending(rehearsal: Rehearsal, write: Write) -> None:
    """What was smaller, what was not exercised, and the last word."""
    if rehearsal.capped:
        write(f"smaller than the recipe: {', '.join(rehearsal.capped)}")
    if rehearsal.not_exercised:
        write("not exercised, and so not known to work:")
        for sentence in rehearsal.not_exercised:
            write(textwrap.fill(sentence, _WIDTH, initial_indent="  - ", subsequent_indent="    "))
    failed = rehearsal.failed
    if failed is None:
        write(f"{rehearsal.recipe}: every stage that was exercised went well")
    else:
        write(f"{rehearsal.recipe}: failed at {failed.stage}")
    if rehearsal.kept is not None:
        write(f"kept: {rehearsal.kept}")
