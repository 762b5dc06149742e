"""`launcher report`: one page that tells a run's whole story and needs nothing but a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launcher.cli import main
from launcher.report.curves import Line, chart, thinned
from launcher.report.run_page import RunPage, render_run
from launcher.runs.attempts import attempts
from launcher.runs.folder import RunFolder, append_json_line, read_json_lines, write_json
from tests.unit.runs.material import make_run
from tests.unit.runs.story import Story
from tests.unit.test_html import Page


def logged(run: RunFolder, steps: range, *, evaluated: range) -> None:
    """Metrics as a worker writes them."""
    for step in steps:
        append_json_line(run.metrics, {"step": step, "loss": 3.0 - 0.01 * step, "learning_rate": 1e-4,
                                       "tokens_per_s": 100.0, "host_bytes": 10**9})  # fmt: skip
    for step in evaluated:
        append_json_line(run.metrics, {"step": step, "validation_loss": 2.5, "retention_loss": 2.0 + 0.01 * step})


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    """A run that was stopped at step 20, came back and finished; it forgot a third."""
    run = make_run(tmp_path)
    story = Story(run, world_size=2).starts().stops(20)
    story.restart = 1
    story.starts(resumed=20).tell("completed", job_id="5", attempt=story.attempt, step=60)
    logged(run, range(1, 61), evaluated=range(0, 61, 20))
    warning = {"code": "retention", "message": "the loss on the retention set rose", "step": 60}
    write_json(run.result, {"method": "lora", "step": 60, "train_s": 30.0, "tokens": 1, "warnings": [warning]})
    return run


def invoke(run: RunFolder, *words: str) -> Result:
    """`launcher report` of a run."""
    return CliRunner().invoke(main, ["report", run.run_id, "--runs", str(run.path.parent), *words])


def test_it_needs_no_network_and_no_script(finished: RunFolder) -> None:
    """One small file that can be mailed and archived."""
    done = invoke(finished)
    assert done.exit_code == 0, done.output
    path = Path(done.stdout.strip())
    text = path.read_text(encoding="utf-8")
    assert path == finished.path / "report.html"
    assert path.stat().st_size < 300_000
    assert not re.findall(r"https?:|@import|url\(", text)
    page = Page(text)
    for tag in ("script", "link", "img", "iframe"):
        assert not page.all(tag)


def test_it_tells_the_whole_story(finished: RunFolder) -> None:
    """Losses, curves, attempts, what was forgotten, and what to do next."""
    page = Page(render_run(RunPage.of(finished)))
    for said in ("2.5000 before, 2.5000 after", "perplexity +82 % (limit +20 %)", "the loss on the retention set rose",
                 "Predicted and measured", "stopped (SIGUSR2), saved", "20 to 60", "launcher compare"):  # fmt: skip
        assert said in page.text, said
    kinds = [str(attributes.get("class")) for attributes in page.all("polyline")]
    for kind in ("train", "validation", "retention", "rate", "memory", "host"):
        assert kinds.count(f"curve {kind}") == 2, "one for the screen, one for the phone"
    assert len(page.all("line", **{"class": "mark"})) == 2 * 4, "where the second attempt goes on, in every chart"


def test_a_failed_run_says_what_ended_it_and_what_helps(tmp_path: Path) -> None:
    """The diagnosis of `launcher why`, with its evidence and command."""
    run = make_run(tmp_path)
    story = Story(run).starts()
    story.reports(1, "JobFailedError", "the loss became nan; step 3")
    story.tell("failed", job_id="5", attempt=story.attempt, rank=1, error="JobFailedError: the loss became nan")
    story.tell("decided", attempt=story.attempt, cause="nan_loss", action="stop", reason="it would come again",
               sentence="the loss became NaN")  # fmt: skip
    found = RunPage.of(run)
    page = Page(render_run(found))
    assert "No step was logged." in page.text
    assert "the loss became NaN" in page.text
    assert found.next_steps() == [found.explanation.command]


def test_what_a_run_says_of_itself_stays_text(finished: RunFolder) -> None:
    """Errors, prompts and names can hold anything; they are shown, never run."""
    evil = "</title><script>alert(1)</script>\"' onload=x"
    append_json_line(finished.attempts, {"event": "failed", "attempt": "5.1", "time_s": 2000.0, "error": evil})
    finished.resolved.write_text(evil, encoding="utf-8")
    page = Page(render_run(RunPage.of(finished)))
    assert not page.all("script")
    assert page.text.count(evil) >= 2


def test_json_and_dry_run_write_nothing(finished: RunFolder) -> None:
    """What the page says, for scripts; and where it would be."""
    told = json.loads(invoke(finished, "--json").stdout)
    assert told["schema"] == 1
    assert [one["from_step"] for one in told["attempts"]] == [0, 20]
    assert invoke(finished, "--dry-run").stdout.startswith("would write ")
    assert not (finished.path / "report.html").exists()
    assert invoke(finished, "--html", "nowhere/page.html").exit_code == 2


def test_attempts_are_told_from_the_ledger(finished: RunFolder) -> None:
    """Ranks, hosts, first and last step, and the end of each."""
    first, second = attempts(list(read_json_lines(finished.attempts)))
    assert (first.ranks, first.hosts, first.from_step, first.to_step) == (2, ("node1", "node2"), 0, 20)
    assert (second.from_step, second.to_step, second.end) == (20, 60, "finished")
    assert first.ended_s > first.began_s


@pytest.mark.parametrize("points", [[(0, 1.0)], [(0, 2.0), (5, 2.0)], [(0, -1.0), (1, 1.0)], [(3, 1e-9), (4, 1e9)]])
def test_any_numbers_can_be_drawn(points: Any) -> None:
    """One point, equal points, signs, eighteen decades: every place is inside the drawing."""
    found = chart("x", "X", [Line(kind="train", label="x", points=points)], str, whole=True, log=True)
    assert found is not None
    for drawing in found.drawings:
        for place in drawing.lines[0].path.split():
            x, y = map(float, place.split(","))
            assert drawing.left <= x <= drawing.right
            assert 0 <= y <= drawing.floor
        assert drawing.x_ticks and drawing.y_ticks


def test_long_curves_are_thinned_to_what_can_be_seen() -> None:
    """A million steps become some hundred means; the last value is the last value."""
    points = [(step, float(step % 7)) for step in range(1_000_000)]
    thin = thinned(points)
    assert len(thin) <= 402
    assert thin[-1] == points[-1]
    assert all(abs(value - 3.0) < 0.1 for _, value in thin[:-1])


def test_ticks_are_round_in_the_unit_of_their_labels() -> None:
    """Half a GiB, not 0.93 of one."""
    points = [(1, 0.9 * 2**30), (2, 1.6 * 2**30)]
    line = Line(kind="memory", label="memory", points=points)
    found = chart("m", "M", [line], lambda value: f"{value / 2**30:g}", from_zero=True, unit=2**30)
    assert found is not None
    assert [tick.label for tick in found.drawings[0].y_ticks] == ["0", "0.5", "1", "1.5"]
