"""What Slurm's commands print, read defensively: records of scontrol, its configuration, rows of sacctmgr, amounts.

Nothing here runs a command, expands a host list or raises: text that says nothing is left out. The forms are those of
Slurm 20.11 to 25.11 (tests/unit/facts/slurm_samples holds outputs of each).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from launcher.recipe.scalars import UnreadableError, read_minutes

MIB = 2**20
_KEY = re.compile(r"(?:^|\s)([A-Z][A-Za-z_:/]*)=")
_SETTING = re.compile(r"^([A-Za-z_]+(?:\[\d+\])?)\s+=[ \t]?(.*)$", re.MULTILINE)
_NOTHING = ("", "(null)", "N/A", "NONE", "None", "none", "UNLIMITED", "NO_VAL", "n/a")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_AMOUNT = re.compile(r"(\d{1,18})(?:\.\d+)?([KMGTP]?)")
_LONGEST_NUMBER = 18
"""Digits of the largest number that is taken for one."""


def records(text: str, first_key: str) -> Iterator[dict[str, str]]:
    """The records of `scontrol show KIND`, with --oneliner or without; each starts with `first_key`=.

    A value ends where the next key or the line does, so names and operating systems with spaces stay whole.
    """
    for block in re.split(rf"^(?={re.escape(first_key)}=)", text, flags=re.MULTILINE):
        if block.startswith(f"{first_key}="):
            yield dict(_fields(block))


def _fields(block: str) -> Iterator[tuple[str, str]]:
    found = list(_KEY.finditer(block))
    ends = [match.start() for match in found[1:]] + [len(block)]
    for match, end in zip(found, ends, strict=True):
        yield match[1], block[match.end() : end].split("\n", 1)[0].strip()


def settings(text: str) -> dict[str, str]:
    """`scontrol show config` as name -> value; "(null)" and its like are left out."""
    return {name: value.strip() for name, value in _SETTING.findall(text) if value.strip() not in ("", "(null)")}


def rows(text: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of `sacctmgr --noheader --parsable2` with these columns; pipes in the last column stay part of it."""
    for line in text.splitlines():
        words = line.split("|", len(columns) - 1)
        if len(words) == len(columns):
            yield dict(zip(columns, (word.strip() for word in words), strict=True))


def whole(text: str | None) -> int | None:
    """A whole number; None for UNLIMITED, nothing, or more digits than any machine has of anything."""
    return int(text) if text and text.isdecimal() and len(text) <= _LONGEST_NUMBER else None


def minutes(text: str | None) -> int | None:
    """Minutes of Slurm's time limit; None for UNLIMITED, INFINITE and NONE."""
    with contextlib.suppress(UnreadableError):
        return read_minutes(text or "")
    return None


def seconds(text: str | None) -> int | None:
    """Seconds of `30 sec`, `120` or `00:01:00`."""
    words = (text or "").split()
    clock = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,6}):(\d\d):(\d\d)", words[0]) if words else None
    if clock:
        days, hours, minute, second = (int(part or 0) for part in clock.groups())
        return ((days * 24 + hours) * 60 + minute) * 60 + second
    return whole(words[0]) if words else None


def names(text: str | None) -> tuple[str, ...]:
    """The names of a comma-separated list, each once; empty for ALL and for nothing."""
    if text is None or text in (*_NOTHING, "ALL"):
        return ()
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def word(text: str | None) -> str | None:
    """A value; None where Slurm writes that there is none."""
    return None if text is None or text in _NOTHING else text


def flag(text: str | None) -> bool | None:
    """1, yes, true and their opposites, in any case."""
    known = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}
    return known.get((text or "").lower())


def tres(text: str | None) -> dict[str, int]:
    """Amounts of `cpu=640,mem=10G,gres/gpu:a100=8` by name, mem in bytes; without a unit mem counts MiB."""
    found = {}
    for name, _, amount in (part.partition("=") for part in (text or "").split(",")):
        match = _AMOUNT.fullmatch(amount.strip())
        if match:
            unit = _UNITS[match[2]] if match[2] else MIB if name.strip() == "mem" else 1
            found[name.strip()] = int(match[1]) * unit
    return found


def gpus(gres: str) -> list[tuple[str, int]]:
    """Type ("" where untyped) and number of each kind of GPU in a node's GRES, such as `gpu:a100:8(S:0-1)`."""
    found = re.findall(r"(?:^|,)gpu(?::(?!no_consume)([^:(,\s]+))??(?::no_consume)?:(\d{1,6})(?![\w.])", gres)
    return [(kind, int(count)) for kind, count in found]
