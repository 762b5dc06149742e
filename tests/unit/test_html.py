"""The plan as a page: complete, self-contained, readable by people and by machines, and text stays text."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launcher.facts.model import model_shape
from launcher.planning.plan import Plan, Warning_
from launcher.recipe.schema import BudgetSection
from launcher.report.explain import explain
from launcher.report.html import _chart, _price_of, render_plan, write_plan
from launcher.report.text import duration, gib
from tests.unit.planning.examples import A100, CPU, LLAMA_70B, SIX, a_recipe, on, plan_of

_VOID = {"meta", "br", "img", "input", "hr", "link"}


class Page(HTMLParser):
    """Every element with its attributes and its own text; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-3:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = attributes.items()
        return [
            found
            for name, found in self.elements
            if name == tag and all(found.get(key) == value for key, value in wanted)
        ]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(SIX["70b-full-8x8"])


@pytest.fixture(scope="module")
def page(plan: Plan) -> Page:
    return Page(render_plan(plan, recipe_argument="mine.yaml"))


def test_it_needs_no_network_and_no_script(plan: Plan, tmp_path: Path) -> None:
    """One file under 300 kB that can be mailed, archived and opened on a machine without network."""
    path = write_plan(plan, tmp_path / "plan.html")
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 300_000
    assert not re.findall(r"https?:|//[a-z]|@import|url\(", text.replace("<!doctype", ""))
    page = Page(text)
    for tag in ("script", "link", "img", "iframe"):
        assert not page.all(tag)


def test_names_and_paths_stay_text(plan: Plan) -> None:
    """A recipe can come from anywhere; what it says is shown, never run."""
    evil = "</title><script>alert(1)</script>\"' onload=x"
    warning = Warning_(code="x", message="<img src=x onerror=alert(2)>")
    hostile = replace(plan, recipe=evil, model=f"./{evil}", site=evil, warnings=(warning,))
    page = Page(render_plan(hostile, recipe_argument=evil))
    assert not page.all("script")
    assert not page.all("img")
    assert not [1 for _, attributes in page.elements if "onload" in attributes or "onerror" in attributes]
    assert page.text.count(evil) >= 4
    assert warning.message in page.text


def test_it_says_what_the_plan_says(plan: Plan, page: Page) -> None:
    """Terms, alternatives, reasons, warnings and the next command are all there."""
    for term, size in plan.chosen.memory.terms_bytes.items():
        assert not size or (term in page.text and gib(size) in page.text)
    for advice in plan.advice:
        assert advice.reason in page.text
        assert advice.source in page.text
    for each in (*plan.alternatives, *plan.warnings):
        reason = each.message if isinstance(each, Warning_) else each.rejected_because
        assert (reason or "") in page.text
    assert "launcher submit mine.yaml" in page.text
    assert "This fits." in page.text


def test_a_plan_that_does_not_fit_says_so_and_offers_no_submit() -> None:
    """The page of a refusal leads back to the recipe."""
    refused = plan_of(a_recipe(LLAMA_70B, "full", slurm=on(1, 1)))
    assert not refused.chosen.fits
    page = Page(render_plan(refused, recipe_argument="mine.yaml"))
    assert "This does not fit" in page.text
    assert (refused.chosen.rejected_because or "?") in page.text
    assert "launcher submit" not in page.text


def test_a_rejected_way_says_what_would_make_it_fit(plan: Plan, page: Page) -> None:
    """The smallest change, in the table and where its point is hovered over; a refusal has its own at the top."""
    rejected = [each for each in plan_of(SIX["8b-full-1x8"]).alternatives if not each.fits]
    assert rejected and rejected[0].would_fit
    shown = Page(render_plan(replace(plan, alternatives=tuple(rejected))))
    for each in rejected:
        assert f"fits with {each.would_fit}" in shown.text
        assert f"does not fit, but with {each.would_fit}" in shown.text
    refused = plan_of(a_recipe(LLAMA_70B, "full", slurm=on(1, 8)))
    assert f"It fits with {refused.chosen.would_fit}." in Page(render_plan(refused)).text
    assert "GiB per GPU" not in (refused.chosen.would_fit or "")


def test_starts_are_shown_where_slurm_told_them(plan: Plan, page: Page) -> None:
    """A column of its own and the chosen one's result among the facts; neither where nobody was asked."""
    assert "Starts in" not in page.text
    told = replace(
        plan,
        chosen=replace(plan.chosen, start_s=5400.0),
        alternatives=tuple(replace(each, start_s=60.0 * n) for n, each in enumerate(plan.alternatives[:-1], 31))
        + plan.alternatives[-1:],
    )
    shown = Page(render_plan(told))
    assert len(shown.all("th", scope="col")) == len(page.all("th", scope="col")) + 1
    assert f"in 90 min by Slurm's estimate, so the result is there in {duration(told.chosen.result_s)}" in shown.text
    assert "31 min" in shown.text
    assert len(shown.all("td", **{"data-label": "starts in"})) == 1 + len(plan.alternatives)


@pytest.mark.parametrize("spread", [1.0, 3.0, 12.0, 300.0, 50_000.0])
@pytest.mark.parametrize("seconds", [30.0, 4000.0, 400_000.0])
def test_labels_of_an_axis_do_not_touch(plan: Plan, spread: float, seconds: float) -> None:
    """Whatever span of times and costs a plan has, in the narrow drawing too, and an axis has at least one label."""
    ends = [replace(plan.chosen, wall_s=wall_s, gpu_hours=wall_s / 3600) for wall_s in (seconds, seconds * spread)]
    for chart in (_chart(name, ends, ends[0], _price_of(ends)) for name in ("wide", "narrow")):
        assert chart.x_ticks and chart.y_ticks
        assert all(3.7 * len(tick.label) <= tick.at <= chart.width - 3.7 * len(tick.label) for tick in chart.x_ticks)
        for left, right in itertools.pairwise(chart.x_ticks):
            assert right.at - left.at >= 7.4 * (len(left.label) + len(right.label)) / 2
        for lower, upper in itertools.pairwise(chart.y_ticks):
            assert lower.at - upper.at >= 20


def test_every_way_is_a_row_and_a_point_inside_the_drawing(plan: Plan, page: Page) -> None:
    """Chosen and alternatives, in both drawings (screen and phone), each with a title to hover over."""
    ways = 1 + len(plan.alternatives)
    for name in ("wide", "narrow"):
        (chart,) = page.all("svg", **{"class": f"chart {name}"})
        _, _, width, height = (float(number) for number in (chart["viewbox"] or "").split())
        for circle in page.all("circle")[: ways if name == "wide" else None][-ways:]:
            assert 0 < float(circle["cx"] or 0) < width
            assert 0 < float(circle["cy"] or 0) < height
    assert len(page.all("circle")) == 2 * ways
    assert (
        len([1 for tr in page.all("tr") if (tr.get("class") or "").split()[:1] in (["chosen"], ["fits"], ["rejected"])])
        == ways
    )


def test_numbers_in_the_chart_do_not_cover_each_other(page: Page) -> None:
    """Ways that cost and take the same are moved side by side."""
    circles = [(float(c["cx"] or 0), float(c["cy"] or 0)) for c in page.all("circle")]
    for drawing in (circles[: len(circles) // 2], circles[len(circles) // 2 :]):
        for index, (x, y) in enumerate(drawing):
            assert all((x - u) ** 2 + (y - v) ** 2 >= 20**2 for u, v in drawing[:index])


def test_bars_fill_no_more_than_their_width(page: Page) -> None:
    """Segments of a stacked bar are in percent of it."""
    for rect in page.all("rect"):
        assert 0 <= float(rect.get("x") or 0) + float(rect["width"] or 0) <= 100.01


def test_it_can_be_read_without_seeing_it(plan: Plan) -> None:
    """Language, title, labelled drawings, headed tables, no identifier twice; formulas included."""
    lines = explain(plan, model_shape(SIX["70b-full-8x8"].model), A100)
    page = Page(render_plan(plan, explained=lines))
    assert page.all("html", lang="en")
    assert len(page.all("title")) >= 1
    for svg in page.all("svg"):
        labelled = svg.get("aria-label") or svg.get("aria-labelledby") or svg.get("aria-hidden")
        assert labelled, svg
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    named = {name for _, a in page.elements for name in (a.get("aria-labelledby") or "").split()}
    assert named <= set(identifiers)
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))


def test_money_is_on_the_axis_where_a_price_is_known() -> None:
    """The user's own price; without one the axis shows GPU-hours, and hours of ranks on CPUs."""
    priced = plan_of(a_recipe(budget=BudgetSection(gpu_hour_price=2.5)))
    assert "Cost (your currency)" in Page(render_plan(priced)).text
    assert "Cost (GPU-hours)" in Page(render_plan(plan_of(a_recipe()))).text
    assert "hours of CPU ranks" in Page(render_plan(plan_of(a_recipe("Qwen/Qwen2.5-0.5B", "lora"), CPU))).text


def _luminance(colour: str) -> float:
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(plan: Plan, scheme: str) -> None:
    """WCAG AA for text (4.5 to 1), and bars that can be told from the page; each has its name and size beside it."""
    light, dark = re.findall(r":root \{(.*?)\}", render_plan(plan), re.S)[:2]
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", light if scheme == "light" else dark))
    for text in ("ink", "soft", "good", "bad", "accent"):
        assert _contrast(colours[text], colours["page"]) >= 4.5, text
    assert _contrast(colours["warn"], colours["warn-panel"]) >= 4.5
    assert _contrast(colours["ink"], colours["panel"]) >= 4.5
    assert _contrast(colours["on-accent"], colours["accent"]) >= 4.5
    for term in ("weights", "gradients", "optimizer", "activations", "logits", "runtime"):
        assert _contrast(colours[term], colours["page"]) >= 2.5, term


def test_the_same_plan_gives_the_same_page(plan: Plan) -> None:
    """Nothing in it depends on the clock or the machine."""
    assert render_plan(plan, recipe_argument="a") == render_plan(plan, recipe_argument="a")
