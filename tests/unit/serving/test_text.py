"""Tokens become pieces of text: nothing torn, nothing lost, nothing of a stop sequence."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from launcher.serving.text import Pieces


class FakeBytes:
    """A tokenizer with one token per byte, and 256 as a special token."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Bytes as text."""
        assert skip_special_tokens
        return bytes(token for token in token_ids if token < 256).decode("utf-8", errors="replace")


def sent(text: str, stops: Sequence[str] = ()) -> tuple[list[str], Pieces]:
    """What is sent for each byte, and at the end."""
    pieces = Pieces(FakeBytes(), [], stops)
    found = []
    for byte in text.encode():
        found.append(pieces.add(byte))
        if pieces.stopped:
            return found, pieces
    return [*found, pieces.rest()], pieces


@given(st.text(max_size=40))
def test_the_pieces_are_the_text_and_no_character_is_torn(text: str) -> None:
    """Characters of up to four bytes; a replacement character is only sent where the text has one."""
    found, _ = sent(text)
    assert "".join(found) == text
    assert all("\ufffd" not in piece for piece in found) or "\ufffd" in text


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_sequence(text: str, stops: list[str]) -> None:
    """As if it had been searched after every character; what cannot begin one is not held back."""
    found, pieces = sent(text, stops)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert ("".join(found), pieces.stopped) == (text, False)
        return
    upto = text[: ends[0]]
    assert pieces.stopped
    assert "".join(found) == upto[: min(upto.find(stop) for stop in stops if stop in upto)]


def test_what_cannot_begin_a_stop_sequence_is_sent_at_once() -> None:
    """A stream does not wait for the end because there are stop sequences."""
    found, _ = sent("hello wor", ["world"])
    assert found == ["h", "e", "l", "l", "o", " ", "", "", "", "wor"]


def test_a_continuation_is_decoded_with_what_it_continues() -> None:
    """The prompt's last tokens are known, and are not sent again."""
    pieces = Pieces(FakeBytes(), list("né".encode())[:-1], ())
    assert pieces.add("é".encode()[1]) == "é"
