"""The plan as one self-contained HTML page: no network, no script, inline SVG, light and dark.

Python decides what is shown and where it stands in the drawings; `templates/plan.html.j2` holds the markup. Jinja2
escapes every value, so that a model's path or a recipe's name is text whatever it contains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.planning.plan import Estimate, Plan
from launcher.report.curves import Tick
from launcher.report.pages import environment
from launcher.report.text import (
    _value,
    batch_sentence,
    count,
    duration,
    gib,
    method_sentence,
    sharding_sentence,
    step_time,
    where_sentence,
    within_with,
)

TERMS = {
    "weights": "Weights as they are held",
    "gradients": "Gradients alive at the peak",
    "optimizer": "Optimizer states and masters",
    "activations": "What layers keep for backward",
    "logits": "Copies of the logits in the loss",
    "gathered": "Whole weights made on the way",
    "buffers": "Communication buffers",
    "runtime": "Context and NCCL, outside the allocator",
}
"""Term -> what it is, in a few words."""
_SIZES = {"wide": (720, 380), "narrow": (360, 340)}
"""Width and height of the chart on a screen and on a phone, in CSS pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 36, 16, 46
"""Margins; half of the longest label of the time axis stands in the right one."""
_TIME_STEPS_H = (
    *(seconds / 3600 for seconds in (1, 2, 5, 10, 15, 30)),
    1 / 60,
    2 / 60,
    5 / 60,
    10 / 60,
    0.25,
    0.5,
    1,
    2,
    3,
    4,
    6,
    12,
    24,
    48,
    96,
    168,
    336,
    672,
)
"""Steps of the time axis: what clocks and calendars are divided into."""
_LOG_FROM = 8.0
"""Axes spanning more than this factor are logarithmic."""
_TICK_ROOM = {"x": 66, "y": 30}
"""Least distance of two labels of an axis, in the drawing's units: the longest labels are as wide as "12.0 days"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One term in a stacked bar; x and width in percent of the bar."""

    term: str
    x: float
    width: float
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """Memory of one candidate against its device."""

    segments: tuple[Segment, ...]
    limit_x: float
    """Where the device's memory ends, in percent."""
    label: str
    """The whole bar in one sentence, for those who do not see it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way to run the recipe: a line of the table and a point of the chart."""

    number: int
    kind: str
    """chosen | fits | rejected."""
    method: str
    where: str
    how: str
    peak: str
    bar: Bar
    time: str
    start: str
    """How long Slurm would let it wait; empty where it was not asked."""
    price: str
    because: str
    way_out: str
    """The smallest change of the recipe that would end the rejection, as a clause; empty where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A row in the chart; x and y in the drawing's units."""

    number: int
    kind: str
    x: float
    y: float
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Time against cost of every row."""

    name: str
    """wide | narrow."""
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    y_title: str
    points: tuple[Point, ...]


def write_plan(plan: Plan, path: Path, *, recipe_argument: str | None = None, explained: Sequence[Any] = ()) -> Path:
    """Write the page to `path` and return it.

    Args:
        plan: what was decided.
        path: file to write; its folder must exist.
        recipe_argument: what the user typed, for the next command.
        explained: rows of `explain.explain`, shown folded.
    """
    path.write_text(render_plan(plan, recipe_argument=recipe_argument, explained=explained), encoding="utf-8")
    return path


def render_plan(plan: Plan, *, recipe_argument: str | None = None, explained: Sequence[Any] = ()) -> str:
    """The page as text."""
    estimates = [plan.chosen, *plan.alternatives]
    price = _price_of(estimates)
    return (
        environment()
        .get_template("plan.html.j2")
        .render(
            plan=plan,
            version=__version__,
            facts=_facts(plan, price),
            terms=_terms(plan.chosen),
            bar=_bar(plan.chosen),
            memory=_memory_sentences(plan.chosen),
            rows=[_row(number, each, plan.chosen, price) for number, each in enumerate(estimates, start=1)],
            charts=[_chart(name, estimates, plan.chosen, price) for name in _SIZES],
            starts_known=any(each.start_s is not None for each in estimates),
            cost_title=price.title,
            value=_value,
            next_command=f"launcher {'submit' if plan.chosen.fits else 'plan'} {recipe_argument or 'RECIPE'}",
            explained=explained,
        )
    )


# ---------------------------------------------------------------- sentences


def _facts(plan: Plan, price: _Price) -> list[tuple[str, str]]:
    """What a reader looks for first, as name and value."""
    chosen, candidate = plan.chosen, plan.chosen.candidate
    share = chosen.trainable_params / plan.params
    trained = f"{count(chosen.trainable_params)} trained ({share:.2%})" if share < 1 else "all trained"
    start = [("Start", _start(chosen.start_s, chosen.result_s))] if chosen.start_s is not None else []
    return [
        ("Model", f"{plan.model}, {count(plan.params)} parameters, {trained}"),
        ("Method", f"{method_sentence(candidate)}, {sharding_sentence(candidate)}"),
        ("Where", f"{where_sentence(candidate)} on {plan.site}"),
        ("Batch", batch_sentence(candidate)),
        ("Data", f"{plan.data.rows:,} rows, {count(plan.data.tokens)} tokens ({plan.data.basis})"),
        (
            "Step",
            f"{step_time(chosen)}, {chosen.tokens_per_s_per_gpu:,.0f} tokens/s per rank",
        ),
        ("Run", f"{chosen.steps:,} steps, {duration(chosen.wall_s)}, {price.said(chosen)}"),
        *start,
        ("Job", f"time limit {plan.job.time_limit_min:,} min, {plan.job.cpus_per_task} CPUs per rank"),
    ]


def _start(start_s: float, result_s: float) -> str:
    return f"in {duration(start_s)} by Slurm's estimate, so the result is there in {duration(result_s)}"


def _memory_sentences(chosen: Estimate) -> list[str]:
    memory = chosen.memory
    peak, device = memory.peak_bytes, memory.device_bytes
    return [
        f"Peak {gib(peak.expected)} (between {gib(peak.low)} and {gib(peak.high)}), set by: {memory.binding}.",
        f"The device will show about {gib(device.expected)} of {gib(memory.usable_bytes)}.",
        f"Host memory {gib(chosen.host_ram_bytes_per_node)} per node; one checkpoint takes "
        f"{gib(chosen.checkpoint_bytes)}.",
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Price:
    """What the cost axis shows: money where a price is known, else GPU-hours, else hours of CPU ranks."""

    title: str
    unit: str

    def of(self, each: Estimate) -> float:
        if self.unit == "money":
            return each.cost.amount or 0.0
        return each.wall_s / 3600 * each.candidate.world_size if self.unit == "rank-hours" else each.gpu_hours

    def said(self, each: Estimate) -> str:
        if self.unit == "money":
            return f"{self.of(each):,.2f} in your currency ({each.gpu_hours:,.1f} GPU-hours)"
        return f"{_number(self.of(each))} {self.unit}"


def _price_of(estimates: Sequence[Estimate]) -> _Price:
    if all(each.cost.amount is not None for each in estimates) and any(each.cost.amount for each in estimates):
        return _Price(title="Cost (your currency)", unit="money")
    if any(each.gpu_hours for each in estimates):
        return _Price(title="Cost (GPU-hours)", unit="GPU-hours")
    return _Price(title="Cost (hours of CPU ranks)", unit="rank-hours")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


# ---------------------------------------------------------------- memory


def _terms(chosen: Estimate) -> list[dict[str, Any]]:
    """Every term with its bytes, its share of what is needed and the length of its bar in percent."""
    terms = {name: size for name, size in chosen.memory.terms_bytes.items() if size}
    total, largest = sum(terms.values()), max(terms.values(), default=1)
    return [
        {
            "name": name,
            "what": TERMS.get(name, ""),
            "size": gib(size),
            "share": f"{size / total:.0%}",
            "width": round(100 * size / largest, 2),
        }
        for name, size in terms.items()
    ]


def _bar(each: Estimate) -> Bar:
    """A stacked bar whose full width is the device, or what is needed where that is more."""
    memory = each.memory
    needed = sum(memory.terms_bytes.values())
    whole = max(memory.usable_bytes, needed) or 1
    segments, x = [], 0.0
    for name, size in memory.terms_bytes.items():
        if size:
            width = 100 * size / whole
            segments.append(Segment(term=name, x=round(x, 3), width=round(width, 3), label=f"{name}: {gib(size)}"))
            x += width
    label = f"{gib(needed)} needed of {gib(memory.usable_bytes)}: " + ", ".join(each.label for each in segments)
    return Bar(segments=tuple(segments), limit_x=round(100 * memory.usable_bytes / whole, 3), label=label)


# ---------------------------------------------------------------- alternatives


def _kind(each: Estimate, chosen: Estimate) -> str:
    if each.rejected_because is not None:
        return "rejected"
    return "chosen" if each is chosen else "fits"


def _role(each: Estimate, chosen: Estimate) -> str:
    """What the first row is: the choice, or the nearest miss of a refusal."""
    if each is not chosen:
        return ""
    return " (chosen)" if each.fits else " (closest)"


def _row(number: int, each: Estimate, chosen: Estimate, price: _Price) -> Row:
    return Row(
        number=number,
        kind=_kind(each, chosen),
        method=each.candidate.method + _role(each, chosen),
        where=where_sentence(each.candidate),
        how=_how(each),
        peak=gib(each.memory.peak_bytes.expected),
        bar=_bar(each),
        time=duration(each.wall_s),
        start="" if each.start_s is None else duration(each.start_s),
        price=_number(price.of(each)),
        because=_because(each),
        way_out=f"{within_with(each)} {each.would_fit}" if each.would_fit else "",
    )


def _how(each: Estimate) -> str:
    candidate = each.candidate
    checkpointing = ", recomputed" if candidate.gradient_checkpointing else ""
    return f"{sharding_sentence(candidate)}, micro-batch {candidate.micro_batch}{checkpointing}"


def _chart(name: str, estimates: Sequence[Estimate], chosen: Estimate, price: _Price) -> Chart:
    """Places every estimate by wall time and cost; what does not fit is drawn too, dashed."""
    width, height = _SIZES[name]
    hours = [each.wall_s / 3600 for each in estimates]
    costs = [price.of(each) for each in estimates]
    x, y = _Axis.over(hours, _LEFT, width - _RIGHT), _Axis.over(costs, height - _BOTTOM, _TOP)
    points = [
        Point(
            number=number,
            kind=_kind(each, chosen),
            x=x.place(hour),
            y=y.place(cost),
            label=f"{number}: {each.candidate.method} on {where_sentence(each.candidate)}, {_how(each)}: "
            f"{duration(each.wall_s)}, {price.said(each)}{_aside(each)}",
        )
        for number, (each, hour, cost) in enumerate(zip(estimates, hours, costs, strict=True), start=1)
    ]
    return Chart(
        name=name,
        width=width,
        height=height,
        left=_LEFT,
        right=_RIGHT,
        top=_TOP,
        bottom=_BOTTOM,
        x_ticks=tuple(
            Tick(at=x.place(value), label=duration(value * 3600))
            for value in x.ticks(_time_step, _round_times(x.low, x.high), _TICK_ROOM["x"])
        ),
        y_ticks=tuple(
            Tick(at=y.place(value), label=f"{value:,g}")
            for value in y.ticks(_nice, _round_numbers(y.low, y.high), _TICK_ROOM["y"])
        ),
        y_title=price.title,
        # The chosen one last: it is drawn over the others.
        points=tuple(sorted(_apart(points, width), key=lambda point: (point.kind == "chosen", -point.number))),
    )


def _because(each: Estimate) -> str:
    if each.rejected_because is None:
        return ""
    return each.rejected_because if each.fits else f"does not fit: {each.rejected_because}"


def _aside(each: Estimate) -> str:
    """What a point's label adds: when it would start, or that it does not fit and what would."""
    if each.rejected_because is not None:
        what = "over the budget" if each.fits else "does not fit"
        return f"; {what}" + (f", but with {each.would_fit}" if each.would_fit else "")
    return "" if each.start_s is None else f"; starts in {duration(each.start_s)}"


def _apart(points: Sequence[Point], width: int) -> list[Point]:
    """Moves a point aside where another one already stands, so that every number can be read and pointed at."""
    placed: list[Point] = []
    for point in points:
        while any(math.hypot(point.x - other.x, point.y - other.y) < 21 for other in placed):
            room = point.x + 14 < width - _RIGHT
            point = replace(point, x=point.x + 7) if room else replace(point, x=point.x - 3, y=point.y - 7)
        placed.append(point)
    return placed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """Maps values to positions, linearly from zero or logarithmically where values span decades."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        positive = [value for value in values if value > 0] or [1.0]
        low, high = min(positive), max(positive)
        if high / low > _LOG_FROM and len(positive) == len(values):
            return cls(low=low / 1.5, high=high * 1.5, start=start, end=end, log=True)
        return cls(low=0.0, high=high * 1.15, start=start, end=end, log=False)

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, nice: Callable[[float], float], round_values: Sequence[float], room: float) -> list[float]:
        """Values `nice` apart, or on a logarithmic axis those of `round_values`; labels are `room` apart at least."""
        if not self.log:
            step = nice(self.high * room / abs(self.end - self.start))
            return [step * index for index in range(1, int(self.high / step) + 1)]
        found: list[float] = []
        for value in round_values:
            if not found or abs(self.place(value) - self.place(found[-1])) >= room:
                found.append(value)
        return found


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in a range; the powers alone where it spans many."""
    if low <= 0:
        return []
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 200 else (1,)
    return [factor * 10.0**power for power in decades for factor in factors if low <= factor * 10.0**power <= high]


def _round_times(low_h: float, high_h: float) -> list[float]:
    """What clocks and calendars are divided into, in hours; round numbers where that gives none to compare."""
    found = [step for step in _TIME_STEPS_H if low_h <= step <= high_h]
    return found if len(found) > 1 else _round_numbers(low_h, high_h)


def _nice(step: float) -> float:
    """The next larger of 1, 2, 5, 10 times a power of ten."""
    power = 10 ** math.floor(math.log10(step))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999))


def _time_step(hours: float) -> float:
    return next((step for step in _TIME_STEPS_H if step >= hours * 0.999), _nice(hours))
