"""`launcher serve` at its doors: who is let in, how many, what is refused before anything is loaded, and the end."""

import itertools
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.train.adapters import train_adapter
from tests.train.served import LONG, PATIENCE_S, PROMPTS, complete, expected, rest, start, stream_of

TOKEN = "a-token-for-the-test"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two adapters of one base that answer differently."""
    folder = tmp_path_factory.mktemp("serve")
    return {"red": train_adapter(folder, "lora", steps=6), "blue": train_adapter(folder, "lora", steps=12)}


@pytest.fixture
def narrow(trained):
    """A server for one answer at a time, with a token."""
    env = {"SERVE_TEST_TOKEN": TOKEN}
    options = ["--token-env", "SERVE_TEST_TOKEN", "--max-rows", "1", "--max-waiting", "1", "--max-body", "10000"]
    options += ["--grace", str(PATIENCE_S)]
    running = start(f"red={trained['red'].adapter}", *options, env=env)
    yield running
    running.process.kill()
    running.process.wait()


def test_a_token_is_needed_limits_hold_and_the_end_is_orderly(narrow):
    """401 for strangers, 413 and 429 for what is too much; SIGTERM lets the answer under way finish, exit code 0."""
    assert narrow.models == ["model", "red"]
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
        told = narrow.post("/completions", {"model": "red", "prompt": "x"}, headers=headers)
        assert told.status_code == 401
        assert told.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        narrow.client().models.list()
    assert narrow.health() == {"status": "ok", "running": 0, "waiting": 0}

    client = narrow.client(api_key=TOKEN)
    asked = {"model": "red", "prompt": PROMPTS[0], "temperature": 0}
    whole = client.completions.create(**asked, max_tokens=LONG).choices[0].text
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(**(asked | {"prompt": "x" * 20_000}))
    assert large.value.status_code == 413

    chunks = client.completions.create(**asked, max_tokens=LONG, stream=True)
    first = next(chunks).choices[0].text
    with ThreadPoolExecutor(4) as threads:
        crowd = [threads.submit(client.completions.create, **asked, max_tokens=1) for _ in range(4)]
        refused = [one.exception() for one in itertools.islice(as_completed(crowd), 3)]
        assert {error.status_code for error in refused} == {429}
        assert narrow.health() == {"status": "ok", "running": 1, "waiting": 1}
        narrow.process.send_signal(signal.SIGTERM)
        assert rest(first, chunks) == whole
        assert sum(one.exception() is None for one in crowd) == 1, "who waited is answered, too"
    assert narrow.process.wait(timeout=PATIENCE_S) == 0


def test_a_whole_model_is_served_alone_and_ctrl_c_ends_it(trained):
    """No adapter at first, one later; Ctrl-C has the exit code of an interruption, and who is cut off is told."""
    running = start(f"whole={trained['red'].base}", "--grace", "0")
    try:
        assert running.models == ["whole"]
        assert complete(running, "whole", PROMPTS[1]).choices[0].text == expected(trained, "base", PROMPTS[1], 24)
        load = {"lora_name": "blue", "lora_path": str(trained["blue"].adapter)}
        assert running.post("/load_lora_adapter", load).status_code == 200
        assert complete(running, "blue", PROMPTS[1]).choices[0].text == expected(trained, "blue", PROMPTS[1], 24)
        first, chunks = stream_of(running, "blue", 1500)
        with ThreadPoolExecutor(1) as threads:
            whole = threads.submit(complete, running, "blue", PROMPTS[0], 1500)
            while running.health()["running"] < 2:
                time.sleep(0.02)
            running.process.send_signal(signal.SIGINT)
            with pytest.raises(openai.APIError, match="the server ended before the answer was complete"):
                rest(first, chunks)
            assert whole.exception(timeout=PATIENCE_S).status_code == 503
        assert running.process.wait(timeout=PATIENCE_S) == 130
    finally:
        running.process.kill()
        running.process.wait()


def test_what_cannot_be_served_is_said_before_anything_is_loaded(trained, tmp_path):
    """Exit codes of the interface: no token, no such variable, another base, an answer of two names."""

    def refused(*words):
        command = [sys.executable, "-m", "launcher.cli", "serve", "--port", "0", *map(str, words)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        return ran.returncode, ran.stderr

    red = trained["red"].adapter
    assert refused(f"red={red}", "--host", "0.0.0.0")[0] == 2
    code, said = refused(f"red={red}", "--token-env", "NOT_SET_ANYWHERE")
    assert (code, "NOT_SET_ANYWHERE is not set" in said) == (2, True)
    other = train_adapter(tmp_path, "lora", **{"model.revision": None})
    base = AutoModelForCausalLM.from_pretrained(other.base)
    with torch.no_grad():
        base.model.norm.weight += 1
    base.save_pretrained(other.base)
    foreign = train_adapter(tmp_path, "lora")
    code, said = refused(f"red={red}", f"foreign={foreign.adapter}")
    assert code == 7
    assert "red was trained on model (fingerprint" in said
    assert "foreign on model (fingerprint" in said
