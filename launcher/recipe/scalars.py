"""From the text of a scalar to the value its field wants.

YAML 1.1 reads `24:00:00` as 86400, `1e-4` as a string, `no` as False and `0123` as octal, whatever the
field. Here the field's type decides; OmegaConf then judges whether the value has that type.
"""

from __future__ import annotations

import math
import re
import types
import typing
from typing import Any, Literal

_NULL = ("", "null", "~")
_TRUE = ("true", "yes", "on")
_FALSE = ("false", "no", "off")
_INT = re.compile(r"[+-]?\d+(_\d{3})*")
_FLOAT = re.compile(r"[+-]?(\d+(_\d{3})*\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOT_FINITE = re.compile(r"(?i)([+-]?)\.?(inf|infinity|nan)")

TIME_FORMS = "24:00:00, 1-00:00:00, 1-12, 90m, 2h, 2d or whole minutes"
_LONGEST_TIME = 30
_UNITS_MIN = {"m": 1, "min": 1, "h": 60, "d": 24 * 60}


class UnreadableError(ValueError):
    """The text does not name a value of the wanted kind; the message says what is expected."""


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a field's type: `int | Literal["auto"]` gives (int, "auto")."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in kinds_of(part))
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return (hint,)


def read_scalar(text: str, *, quoted: bool, hint: Any) -> Any:
    """The value of `text` for a field of type `hint`; the text itself where no reading applies."""
    kinds = kinds_of(hint)
    for kind in (type(None), "auto", bool, int, float):
        if kind in kinds and not (quoted and str in kinds):
            value = _READERS[kind](text)
            if value is not _NO:
                return value
    if not quoted and str in kinds and text.lower() in _NULL:
        return None  # OmegaConf refuses it where the field needs a value
    return text


def read_any(text: str, *, quoted: bool) -> Any:
    """The value of `text` where nothing says what is wanted: null, true, false, a number, else a string.

    Leading zeros, `yes`, `no`, dates and times stay strings.
    """
    if quoted:
        return text
    if text in _NULL:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?0\d+.*", text) or _NOT_FINITE.fullmatch(text):
        return text
    number = _read_int(text) if _INT.fullmatch(text) else _read_float(text)
    return text if number is _NO else number


def read_minutes(text: str) -> int:
    """Whole minutes of a time limit, rounded up; a bare number is minutes, as for sbatch.

    Raises:
        UnreadableError: none of TIME_FORMS, or not positive.
    """
    minutes = _clock_minutes(text.strip()) if len(text) <= _LONGEST_TIME else None
    if minutes is None or minutes <= 0:
        raise UnreadableError(f"expected a time such as {TIME_FORMS}")
    return math.ceil(minutes)


def format_minutes(minutes: int) -> str:
    """Slurm's own writing: `1-00:00:00`, `02:30:00`."""
    days, rest = divmod(minutes, 24 * 60)
    clock = f"{rest // 60:02d}:{rest % 60:02d}:00"
    return f"{days}-{clock}" if days else clock


def _clock_minutes(text: str) -> float | None:
    if re.fullmatch(r"\d+", text):
        return int(text)
    unit = re.fullmatch(r"(\d+)\s*(min|[mhd])", text)
    if unit:
        return int(unit[1]) * _UNITS_MIN[unit[2]]
    days = re.fullmatch(r"(\d+)-(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2}))?", text)
    if days:
        return _total(int(days[1]), int(days[2]), int(days[3] or 0), int(days[4] or 0), hours_below=24)
    clock = re.fullmatch(r"(\d+):(\d{1,2})(?::(\d{1,2}))?", text)
    if clock and clock[3] is not None:
        return _total(0, int(clock[1]), int(clock[2]), int(clock[3]))
    if clock:  # MM:SS, as for sbatch
        return int(clock[1]) + int(clock[2]) / 60 if int(clock[2]) < 60 else None
    return None


def _total(days: int, hours: int, minutes: int, seconds: int, hours_below: int | None = None) -> float | None:
    if minutes >= 60 or seconds >= 60 or (hours_below is not None and hours >= hours_below):
        return None
    return days * 24 * 60 + hours * 60 + minutes + seconds / 60


class _No:
    """No reading of this kind (None is a value)."""


_NO = _No()


def _read_null(text: str) -> Any:
    return None if text.lower() in _NULL else _NO


def _read_auto(text: str) -> Any:
    return "auto" if text.lower() == "auto" else _NO


def _read_bool(text: str) -> Any:
    word = text.lower()
    return True if word in _TRUE else False if word in _FALSE else _NO


def _read_int(text: str) -> Any:
    if _INT.fullmatch(text) and len(text) <= 300:
        return int(text)
    number = _read_float(text)  # 1e3 and 3.0 are whole numbers too
    return int(number) if isinstance(number, float) and number.is_integer() and abs(number) < 2**53 else _NO


def _read_float(text: str) -> Any:
    if _FLOAT.fullmatch(text):
        return float(text)
    special = _NOT_FINITE.fullmatch(text)
    return float(special[1] + special[2]) if special else _NO


_READERS: dict[Any, typing.Callable[[str], Any]] = {
    type(None): _read_null,
    "auto": _read_auto,
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
}
