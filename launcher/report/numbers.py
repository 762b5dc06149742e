"""Numbers as words, for tables and pages about runs; what is not known is a dash."""

from __future__ import annotations

from launcher.report.status import duration

GIB, MIB = 2**30, 2**20
DASH = "-"


def loss(value: float | None, *, digits: int = 4) -> str:
    """Such as 2.3456."""
    return DASH if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A relative change (0.1) as +10 %; one decimal below ten per cent."""
    if value is None:
        return DASH
    return f"{100 * value:+.{1 if abs(value) < 0.0995 else 0}f} %"


def bytes_(value: float | None) -> str:
    """Such as 12.34 GiB or 5.6 MiB."""
    if value is None:
        return DASH
    if value >= 0.1 * GIB:
        return f"{value / GIB:.2f} GiB"
    return f"{value / MIB:.1f} MiB" if value >= 0.1 * MIB else f"{value / 1024:.1f} KiB"


def seconds(value: float | None) -> str:
    """Such as 0.25s, 45s, 3h05m."""
    return f"{value:.3g}s" if value is not None and value < 10 else duration(value)


def count(value: float | None, *, digits: int = 0) -> str:
    """Such as 1,234; `digits` decimals, more below one."""
    if value is None:
        return DASH
    return f"{value:.2g}" if 0 < value < 1 else f"{value:,.{digits}f}"


def money(value: float | None) -> str:
    """In the user's currency."""
    return DASH if value is None else f"{value:,.2f}"
