"""Data on a terminal: rows with trained, masked and end-of-sequence tokens told apart, counts, and the token cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_BAR = 40


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def print_rows(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Each row: where it stands, its counts, and its text: trained green, masked grey, EOS boxed.

    Without colours (a file, NO_COLOR) trained text stands between « and », so that nothing is lost.
    """
    from rich.text import Text

    console = console or _console()
    plain = console.no_color or not console.is_terminal
    legend = Text.assemble(("trained", "green"), "  ", ("masked", "bright_black"), "  ", ("[EOS]", "black on yellow"))
    console.print("trained text stands between « and »" if plain else legend)
    for row in rows:
        cut = ", cut to data.max_seq_length" if row["truncated"] else ""
        console.print(f"\n{row['where']}: {row['trained_tokens']} of {row['tokens']} tokens trained{cut}", style="bold",
                      markup=False)  # fmt: skip
        if not row["documents"]:
            console.print("nothing of this row is trained; it is left out")
        for document in row["documents"]:
            console.print(_plain(document) if plain else _coloured(document))


def _coloured(pieces: Sequence[dict[str, Any]]) -> Text:
    from rich.text import Text

    text = Text()
    for piece in pieces:
        if piece["eos"]:
            text.append("[EOS]", "black on yellow" if piece["trained"] else "bright_black on grey23")
        else:
            text.append(piece["text"], "green" if piece["trained"] else "bright_black")
    return text


def _plain(pieces: Sequence[dict[str, Any]]) -> Text:
    from rich.text import Text

    shown = [(piece["trained"], "[EOS]" if piece["eos"] else piece["text"]) for piece in pieces]
    return Text("".join(f"«{text}»" if trained else text for trained, text in shown))


def print_stats(stats: dict[str, Any], console: Console | None = None) -> None:
    """Counts of each source, the histogram of its lengths, and sentences about what should be looked at."""
    console = console or _console()
    for one in stats["sources"]:
        length = one["length"]
        console.print(f"{one['path']} ({one['used_for']})", style="bold", markup=False)
        console.print(
            f"  {one['rows']:,} rows, {one['tokens']:,} tokens, {one['trained_tokens']:,} trained "
            f"({one['trained_share']:.1%}); lengths: mean {length['mean']:.0f}, median {length['p50']}, "
            f"95 % up to {length['p95']}, longest {length['max']}"
        )
        most = max((entry["rows"] for entry in one["histogram"]), default=1)
        for entry in one["histogram"]:
            bar = "█" * max(1, round(_BAR * entry["rows"] / most))
            console.print(f"  up to {entry['up_to']:>7,} tokens {entry['rows']:>9,} {bar}")
        for line in _remarks(one):
            console.print(f"  ! {line}", style="yellow", markup=False)
    if stats["validation_rows_also_trained"]:
        told = f"! {stats['validation_rows_also_trained']} validation rows are also in the training data, word for word"
        console.print(told, style="yellow")


def _remarks(one: dict[str, Any]) -> list[str]:
    """What a careful reader would ask about."""
    rows = max(1, one["rows"])
    found = [
        ("truncated_rows", "are cut to data.max_seq_length"),
        ("rows_without_trained_tokens", "have nothing to train on and are left out"),
        ("rows_without_trained_eos", "never train an end-of-sequence token: the model may not learn to stop"),
        ("repeated_rows", "repeat an earlier row"),
    ]
    lines = [f"{one[key]:,} rows ({one[key] / rows:.1%}) {words}" for key, words in found if one[key]]
    return lines + ([f"{one['empty_turns']:,} turns are empty"] if one["empty_turns"] else [])


def print_prepared(made: dict[str, Any], console: Console | None = None) -> None:
    """Where the cache is, and what it holds."""
    console = console or _console()
    if "would" in made:
        console.print(f"would {made['would']}: {made['cache']}", markup=False)
        return
    counts = made["stats"]
    word = "found" if made["reused"] else "made"
    console.print(f"{word} {made['path']}", markup=False)
    console.print(
        f"  {counts['read_rows']:,} rows read, {counts['sequences']:,} sequences, {counts['tokens']:,} tokens "
        f"({counts['trained_tokens']:,} trained), {counts['fill']:.0%} of each sequence filled"
    )
    for notice in counts["notices"]:
        console.print(f"  ! {notice}", style="yellow", markup=False)
