"""The log: one line a request, nothing of its texts, and nothing that a client could make of it."""

import pytest

from launcher.serving.journal import Counts, line


def written(path: str = "/v1/completions", status: int = 200, **note: object) -> str:
    """A line without its time."""
    return line({"method": "POST", "path": path}, status, note, 0.25).partition(" ")[2]


def test_a_line_says_what_was_asked_of_whom_and_how_it_ended() -> None:
    """In the order in which one looks for it."""
    told = written(model="red", prompt=3, completion=20, finish="length")
    assert told == "POST /v1/completions 200 model=red prompt=3 completion=20 finish=length 0.250s"


@pytest.mark.parametrize("words", ["a\nb", "a b", "\x1b[31m", "x=1", "\u202eabc", '"'])
def test_a_clients_words_are_quoted(words: str) -> None:
    """They end no line, colour no terminal and invent no field."""
    told = written(model=words)
    assert told.isprintable()
    assert f"model={words} " not in told
    assert written(path=f"/{words}").isprintable()


def test_who_leaves_before_an_answer_has_no_status() -> None:
    """Nothing was sent."""
    assert written(status=0).startswith("POST /v1/completions - ")


def test_long_names_are_cut() -> None:
    """A log is no place for megabytes."""
    assert len(written(model="x" * 10**6)) < 300


def test_counts_are_in_prometheus_form() -> None:
    """Requests by status, tokens by model, and what is done now; a name ends no label."""
    counts = Counts()
    counts.take(200, {"model": 'r"ed', "prompt": 3, "completion": 20, "finish": "length"})
    counts.take(200, {"model": 'r"ed', "prompt": 4, "completion": 1, "finish": "left"})
    counts.take(404, {"model": "green"})
    assert counts.text({"running": 1, "waiting": 0}).splitlines() == [
        "# TYPE launcher_requests_total counter",
        'launcher_requests_total{status="200"} 2',
        'launcher_requests_total{status="404"} 1',
        "# TYPE launcher_prompt_tokens_total counter",
        'launcher_prompt_tokens_total{model="r\\"ed"} 7',
        "# TYPE launcher_completion_tokens_total counter",
        'launcher_completion_tokens_total{model="r\\"ed"} 21',
        "# TYPE launcher_answers_running gauge",
        "launcher_answers_running 1",
        "# TYPE launcher_answers_waiting gauge",
        "launcher_answers_waiting 0",
    ]
