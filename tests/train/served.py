"""A real `launcher serve` process, and what the libraries alone would answer."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from typing import IO

import httpx
import openai
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PATIENCE_S = 600
LONG = 400
"""Tokens of an answer that is still being made when something else has been done."""
PROMPTS = ["the value of the object is", "a function", "if the name of a class begins with two underscores then the"]


@dataclass
class Server:
    """One server process."""

    process: subprocess.Popen
    url: str
    models: list[str]
    stderr: IO[str]

    def log(self):
        """What it has written to stderr so far."""
        return os.pread(self.stderr.fileno(), 1 << 24, 0).decode()

    def client(self, **options):
        """The real client; by default it must not hide a refusal by trying again."""
        usual = {"base_url": self.url, "api_key": "none", "max_retries": 0, "timeout": PATIENCE_S}
        return openai.OpenAI(**(usual | options))

    def health(self):
        """What the server says of itself."""
        return httpx.get(self.url.removesuffix("/v1") + "/health", timeout=PATIENCE_S).json()

    def post(self, path, body=None, **options):
        """A plain request."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE_S, **options)


def start(*arguments, env=None):
    """`launcher serve`, up to the line that says where it is."""
    words = [sys.executable, "-m", "launcher.cli", "serve", *map(str, arguments), "--port", "0", "--json"]
    stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the server
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=stderr, text=True, env=os.environ | (env or {}))
    lines = queue.Queue()
    threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()
    try:
        told = json.loads(lines.get(timeout=PATIENCE_S))
    except (queue.Empty, ValueError):
        process.kill()
        code, said = process.wait(), os.pread(stderr.fileno(), 1 << 24, 0).decode()
        raise AssertionError(f"the server did not start: exit code {code}: {said}") from None
    return Server(process, told["url"], told["models"], stderr)


def plain_peft(trained, name):
    """Base and adapter, loaded by the libraries alone."""
    model = AutoModelForCausalLM.from_pretrained(trained["red"].base, dtype=torch.float32)
    if name != "base":
        model = PeftModel.from_pretrained(model, trained[name].adapter)
    return model.eval(), AutoTokenizer.from_pretrained(trained["red"].base)


def expected(trained, name, prompt, tokens):
    """Greedy text by plain PEFT, this row alone."""
    model, tokenizer = plain_peft(trained, name)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def complete(server, name, prompt, tokens=24, **options):
    """One greedy completion."""
    options = {"temperature": 0, "max_tokens": tokens} | options
    return server.client().completions.create(model=name, prompt=prompt, **options)


def stream_of(server, name, tokens=LONG):
    """A long greedy stream: its first piece has come when this returns."""
    chunks = complete(server, name, PROMPTS[0], tokens, stream=True)
    first = next(chunks).choices[0].text
    return first, chunks


def rest(first, chunks):
    """The whole text of a stream."""
    return first + "".join(chunk.choices[0].text for chunk in chunks)
