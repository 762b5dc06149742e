"""`launcher serve`: a real server process, asked by the real `openai` client."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.adapters import train_adapter

START_S = 180
TOKEN = "a-token-for-the-test"


@dataclass
class Server:
    """One server process."""

    process: subprocess.Popen
    url: str
    models: list[str]

    def client(self, **options):
        """The real client; by default it must not hide a refusal by trying again."""
        return openai.OpenAI(**({"base_url": self.url, "api_key": "none", "max_retries": 0, "timeout": 120} | options))

    def post(self, path, body=None, **options):
        """A plain request."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **options)


def start(*arguments, env=None):
    """`launcher serve`, up to the line that says where it is."""
    words = [sys.executable, "-m", "launcher.cli", "serve", *map(str, arguments), "--port", "0", "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | (env or {}))
    lines = queue.Queue()
    threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()
    try:
        told = json.loads(lines.get(timeout=START_S))
    except (queue.Empty, ValueError):
        process.kill()
        raise AssertionError(f"the server did not start: exit code {process.wait()}") from None
    return Server(process, told["url"], told["models"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Adapters of one base that answer differently: two LoRA, one DoRA, one of each kind of virtual tokens."""
    folder = tmp_path_factory.mktemp("serve")
    plain = {"data.packing": False}
    return {
        "red": train_adapter(folder, "lora", steps=6),
        "blue": train_adapter(folder, "lora", steps=12),
        "dora": train_adapter(folder, "dora", steps=9),
        "prompt": train_adapter(folder, "prompt", **plain),
        "prefix": train_adapter(folder, "prefix", **plain),
    }


@pytest.fixture(scope="module")
def server(trained):
    """One server with all of them; `spare` is loaded by tests."""
    named = [f"{name}={one.adapter}" for name, one in trained.items()]
    running = start(*named, "--base-name", "base", "--max-rows", "16")
    yield running
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(timeout=60) == 0


PROMPTS = ["the value of the object is", "a function", "if the name of a class begins with two underscores then the"]


def expected(trained, name, prompt, tokens):
    """Greedy text by plain PEFT, this row alone."""
    base = trained["red"].base
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if name != "base":
        model = PeftModel.from_pretrained(model, trained[name].adapter)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.eval().generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def complete(server, name, prompt, tokens=24, **options):
    """One greedy completion."""
    options = {"temperature": 0, "max_tokens": tokens} | options
    return server.client().completions.create(model=name, prompt=prompt, **options)


def test_rows_of_one_batch_answer_as_each_alone(server, trained):
    """Base and adapters of every kind, prompts of different lengths, all at once: PEFT's own generate says the same."""
    asked = [(name, prompt) for prompt in PROMPTS for name in ("base", *trained)]
    with ThreadPoolExecutor(len(asked)) as threads:
        told = list(threads.map(lambda one: complete(server, *one).choices[0].text, asked))
    for (name, prompt), text in zip(asked, told, strict=True):
        assert text == expected(trained, name, prompt, 24), (name, prompt)
    assert len({text for (_, prompt), text in zip(asked, told, strict=True) if prompt == PROMPTS[0]}) >= 4
