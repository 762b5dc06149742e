"""curves: numbers over steps as inline SVG: which lines, which ticks, where each stands; the markup is a template's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[int, float]]
"""(optimizer step, value), in order."""
_SIZES = {"wide": (1040, 320), "half": (520, 260), "narrow": (360, 250)}
"""Width and height, in CSS pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 44
_MOST_POINTS = 400
"""More are averaged: a curve is some hundred pixels wide, and a page should stay small enough to mail."""
_DOTS = 60
"""So many points or fewer get a dot each, to be pointed at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve before it is drawn."""

    kind: str
    """Class of the style sheet: train | validation | retention | rate | memory | host."""
    label: str
    points: Points


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """One curve in the drawing's units."""

    kind: str
    path: str
    """The `points` of a polyline."""
    dots: tuple[tuple[float, float, str], ...]
    """x, y and what it says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """One mark of an axis."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """All curves of one chart for one width of screen."""

    size: str
    """wide | half | narrow."""
    width: int
    height: int
    left: float
    right: float
    floor: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Drawn, ...]
    marks: tuple[Tick, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One figure."""

    id: str
    title: str
    whole: bool
    """Whether it takes the page's whole width."""
    legend: tuple[Line, ...]
    text: str
    """What it shows, for those who do not see it."""
    drawings: tuple[Drawing, ...]


def chart(
    id_: str,
    title: str,
    lines: Sequence[Line],
    said: Callable[[float], str],
    *,
    whole: bool = False,
    from_zero: bool = False,
    marks: Sequence[tuple[int, str]] = (),
    log: bool = False,
    unit: float = 1.0,
) -> Chart | None:
    """A figure of the lines that have points; None where none has.

    `marks`: (step, label) of upright lines. `unit`: what values are labelled in, so that ticks are round in it.
    """
    shown = [line for line in lines if line.points]
    if not shown:
        return None
    thin = [Line(kind=line.kind, label=line.label, points=thinned(line.points)) for line in shown]
    text = "; ".join(
        f"{line.label} from {said(line.points[0][1])} at step {line.points[0][0]} "
        f"to {said(line.points[-1][1])} at step {line.points[-1][0]}"
        for line in shown
    )
    sizes = ("wide" if whole else "half", "narrow")
    drawings = [_draw(size, thin, said, from_zero=from_zero, marks=marks, log=log, unit=unit) for size in sizes]
    return Chart(id=id_, title=title, whole=whole, legend=tuple(shown), text=text, drawings=tuple(drawings))


def thinned(points: Points) -> list[tuple[int, float]]:
    """At most so many points as can be told apart: means of neighbours; the last one is kept as it is."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    width = math.ceil(len(points) / _MOST_POINTS)
    found = []
    for first in range(0, len(points) - 1, width):
        part = points[first : first + width]
        found.append((part[len(part) // 2][0], math.fsum(value for _, value in part) / len(part)))
    return [*found, points[-1]]


def _draw(
    size: str,
    lines: Sequence[Line],
    said: Callable[[float], str],
    *,
    from_zero: bool,
    marks: Sequence[tuple[int, str]],
    log: bool,
    unit: float,
) -> Drawing:
    width, height = _SIZES[size]
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    x = _Scale.over(min(0, *steps), max(1, *steps), _LEFT, width - _RIGHT)
    low, high = (0.0 if from_zero else min(values)), max(values)
    y = _Scale.over(low, high, height - _BOTTOM, _TOP, pad=not from_zero, log=log and low > 0 and high / low > 8)
    return Drawing(
        size=size,
        width=width,
        height=height,
        left=_LEFT,
        right=width - _RIGHT,
        floor=height - _BOTTOM,
        x_ticks=tuple(Tick(at=x.place(step), label=f"{step:,.0f}") for step in x.ticks(80, whole=True)),
        y_ticks=tuple(Tick(at=y.place(value), label=said(value)) for value in y.ticks(34, unit=unit)),
        lines=tuple(_drawn(line, x, y, said) for line in lines),
        marks=tuple(Tick(at=x.place(step), label=label) for step, label in marks if step >= x.low),
    )


def _drawn(line: Line, x: _Scale, y: _Scale, said: Callable[[float], str]) -> Drawn:
    places = [(x.place(step), y.place(value)) for step, value in line.points]
    few = len(places) <= _DOTS
    dots = tuple(
        (at, up, f"{line.label} {said(value)} after step {step:,}")
        for (at, up), (step, value) in zip(places, line.points, strict=True)
        if few
    )
    return Drawn(kind=line.kind, path=" ".join(f"{at:g},{up:g}" for at, up in places), dots=dots)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scale:
    """Maps values to positions."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(cls, low: float, high: float, start: float, end: float, *, pad: bool = False, log: bool = False) -> _Scale:
        if log:
            return cls(low=low / 1.2, high=high * 1.2, start=start, end=end, log=True)
        room = 0.06 * (high - low) if pad else 0.0
        if high <= low:
            room = abs(high) * 0.1 or 1.0
        return cls(low=low - room * pad, high=high + room, start=start, end=end, log=False)

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, room: float, *, whole: bool = False, unit: float = 1.0) -> list[float]:
        """Values round in `unit` whose labels are `room` apart at least."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            return [value for value in found if self.low <= value <= self.high]
        step = unit * _round_up((self.high - self.low) / unit * room / abs(self.end - self.start))
        step = max(1.0, step) if whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * index for index in range(first, last + 1)]


def _round_up(step: float) -> float:
    """The next larger of 1, 2, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= step * 0.999)
