"""`launcher serve`: a real server process, asked by the real `openai` client."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.adapters import train_adapter
from tests.train.served import LONG, PATIENCE_S, PROMPTS, complete, expected, plain_peft, rest, start, stream_of


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
    assert running.process.wait(timeout=PATIENCE_S) == 0


def test_rows_of_one_batch_answer_as_each_alone(server, trained):
    """Base and adapters of every kind, prompts of different lengths, all at once: PEFT's own generate says the same."""
    asked = [(name, prompt) for prompt in PROMPTS for name in ("base", *trained)]
    with ThreadPoolExecutor(len(asked)) as threads:
        told = list(threads.map(lambda one: complete(server, *one).choices[0].text, asked))
    for (name, prompt), text in zip(asked, told, strict=True):
        assert text == expected(trained, name, prompt, 24), (name, prompt)
    assert len({text for (_, prompt), text in zip(asked, told, strict=True) if prompt == PROMPTS[0]}) >= 4


def test_the_real_client_streams_what_it_would_get_at_once(server):
    """Chat and completion: text, reasons, counts; the base and two adapters answer differently at the same time."""
    client = server.client()
    messages = [{"role": "user", "content": "Repeat: the value"}]

    def both(name):
        asked = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 20}
        at_once = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        assert text == at_once.choices[0].message.content
        assert reasons[-1] == at_once.choices[0].finish_reason == "length"
        assert set(reasons[:-1]) == {None}
        assert chunks[-1].usage == at_once.usage
        assert at_once.usage.completion_tokens == 20
        assert chunks[0].choices[0].delta.role == "assistant"
        assert {chunk.model for chunk in chunks} == {name}
        return text

    with ThreadPoolExecutor(3) as threads:
        texts = list(threads.map(both, ["base", "red", "blue"]))
    assert len(set(texts)) == 3

    at_once = complete(server, "red", "a function")
    streamed = list(complete(server, "red", "a function", stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == at_once.choices[0].text


def test_chat_goes_through_the_template_of_the_run(server, trained):
    """A chat is the completion of the rendered text, without further special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(trained["red"].adapter)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    told = server.client().chat.completions.create(model="red", messages=messages, temperature=0, max_tokens=12)
    assert told.usage.prompt_tokens == len(ids)
    assert told.choices[0].message.content == complete(server, "red", ids, 12).choices[0].text
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}]
    again = server.client().chat.completions.create(
        model="red", messages=[*parts, messages[1]], temperature=0, max_completion_tokens=12
    )
    assert again.choices[0].message.content == told.choices[0].message.content


def test_the_models_are_listed_with_their_parent(server, trained):
    """GET /v1/models, and one of them."""
    listed = {one.id: one for one in server.client().models.list()}
    assert list(listed) == ["base", *trained] == server.models
    assert listed["red"].parent == "base"
    assert server.client().models.retrieve("red").root == str(trained["red"].adapter)
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("green")


def test_sampling_is_the_rows_own(server):
    """The same seed gives the same text whatever else is in the batch; another seed another; a tiny top_p is greedy."""
    asked = {"temperature": 1.5, "top_p": 0.95, "seed": 7}
    alone = complete(server, "red", PROMPTS[0], **asked).choices[0].text
    others = [("blue", {"temperature": 2.0}), ("base", {"seed": 8, "temperature": 1.0})] * 3
    with ThreadPoolExecutor(7) as threads:
        for name, options in others:
            threads.submit(complete, server, name, PROMPTS[2], 64, **options)
        crowded = threads.submit(complete, server, "red", PROMPTS[0], **asked).result().choices[0].text
    assert crowded == alone
    assert complete(server, "red", PROMPTS[0], **(asked | {"seed": 8})).choices[0].text != alone
    greedy = complete(server, "red", PROMPTS[0]).choices[0].text
    assert complete(server, "red", PROMPTS[0], temperature=2.0, top_p=1e-9).choices[0].text == greedy


def test_an_answer_ends_before_a_stop_sequence(server):
    """Streamed or not: nothing of the sequence is sent, though it begins within earlier tokens."""
    text = complete(server, "blue", PROMPTS[0], 32).choices[0].text
    stop = text[5:9]
    told = complete(server, "blue", PROMPTS[0], 32, stop=["never in it", stop])
    assert told.choices[0].text == text[: text.index(stop)]
    assert told.choices[0].finish_reason == "stop"
    assert told.usage.completion_tokens < 32
    streamed = complete(server, "blue", PROMPTS[0], 32, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == told.choices[0].text


BAD = [
    ({"model": "green", "prompt": "x"}, 404, "'green' is not served here"),
    ({"prompt": "x"}, 400, "model"),
    ({"model": "red"}, 400, "prompt"),
    ({"model": "red", "prompt": ""}, 400, "empty"),
    ({"model": "red", "prompt": ["x", ""]}, 400, "empty"),
    ({"model": "red", "prompt": [5, 100_000]}, 400, "no embedding of the token 100000"),
    ({"model": "red", "prompt": [5] * 10_000}, 400, "the prompt has 10000"),
    ({"model": "red", "prompt": "a b" * 100_000}, 400, "the prompt has at least"),
    ({"model": "red", "prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ({"model": "red", "prompt": "x", "max_tokens": 4000}, 400, "context is 2048 tokens"),
    ({"model": "red", "prompt": "x", "temperature": 3}, 400, "temperature"),
    ({"model": "red", "prompt": "x", "temperature": "hot"}, 400, "temperature"),
    ({"model": "red", "prompt": "x", "n": 100}, 400, "one request for 100 answers; this server takes 80 at most"),
    ({"model": "red", "prompt": "x", "best_of": 2}, 400, "best_of=2 is not supported here; only 1, null"),
    ({"model": "red", "prompt": "x", "logprobs": 21}, 400, "logprobs"),
    ({"model": "red", "prompt": "x", "suffix": "y"}, 400, "suffix='y'"),
    ({"model": "red", "prompt": "x", "response_format": {"type": "json_object"}}, 400, "response_format="),
    ({"model": "red", "prompt": "x", "top_k": 5}, 400, "top_k is not supported here"),
    ({"model": "red", "prompt": "x", "stop": [""]}, 400, "stop"),
    ({"model": "red", "prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream: true"),
]


@pytest.mark.parametrize(("body", "status", "words"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_is_refused_by_name(server, body, status, words):
    """OpenAI's form of an error; nothing is ignored."""
    told = server.post("/completions", body)
    assert told.status_code == status
    assert words in told.json()["error"]["message"], told.text
    assert set(told.json()["error"]) == {"message", "type", "param", "code"}


def test_one_request_may_ask_for_several_answers(server):
    """Several prompts, `n` of each: choices in their order, each what it is alone; a prompt's tokens count once."""
    prompts = PROMPTS[:2]
    alone = [complete(server, "red", prompt).choices[0].text for prompt in prompts]
    told = complete(server, "red", prompts, n=2)
    assert [one.index for one in told.choices] == [0, 1, 2, 3]
    assert [one.text for one in told.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert told.usage.completion_tokens == 4 * 24
    assert told.usage.prompt_tokens == sum(complete(server, "red", one).usage.prompt_tokens for one in prompts)

    streamed = {}
    for chunk in complete(server, "red", prompts, n=2, stream=True):
        streamed[chunk.choices[0].index] = streamed.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert [streamed[index] for index in range(4)] == [one.text for one in told.choices]


def test_choices_of_one_request_differ_and_come_again_with_the_seed(server):
    """The first is what the seed gives alone."""
    asked = {"temperature": 1.5, "seed": 7}
    told = [[one.text for one in complete(server, "blue", PROMPTS[0], n=3, **asked).choices] for _ in range(2)]
    assert told[0] == told[1]
    assert len(set(told[0])) == 3
    assert told[0][0] == complete(server, "blue", PROMPTS[0], **asked).choices[0].text


@pytest.mark.parametrize("name", ["base", "red", "prompt", "prefix"])
def test_logprobs_are_those_of_the_model(server, trained, name):
    """Prompt and answer, as evaluation harnesses ask: each token's own, and the likeliest beside it."""
    model, tokenizer = plain_peft(trained, name)
    told = complete(server, name, PROMPTS[0], 6, logprobs=3, echo=True).choices[0]
    assert told.text.startswith(PROMPTS[0])
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -ids.shape[1] :]
    wanted = torch.log_softmax(logits, dim=-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert told.logprobs.token_logprobs[0] is None
    assert torch.tensor(told.logprobs.token_logprobs[1:]) == pytest.approx(wanted, abs=1e-3)
    assert told.logprobs.tokens == [tokenizer.decode([one]) for one in ids[0].tolist()]
    best = max(told.logprobs.top_logprobs[-1].items(), key=lambda one: one[1])
    assert best == (told.logprobs.tokens[-1], told.logprobs.token_logprobs[-1])
    scored = complete(server, name, prompt, 0, logprobs=0, echo=True)
    assert scored.choices[0].logprobs.token_logprobs == told.logprobs.token_logprobs[: len(prompt)]
    assert (scored.usage.completion_tokens, scored.choices[0].finish_reason) == (0, "length")
    streamed = [chunk.choices[0] for chunk in complete(server, name, PROMPTS[0], 6, logprobs=3, echo=True, stream=True)]
    assert "".join(one.text for one in streamed) == told.text
    parts = [one.logprobs for one in streamed if one.logprobs]
    assert [offset for part in parts for offset in part.text_offset] == told.logprobs.text_offset


def test_a_prompt_can_be_repeated_without_an_answer(server):
    """Its text and its tokens, for nothing more than that."""
    told = complete(server, "red", PROMPTS[0], 0, echo=True)
    assert (told.choices[0].text, told.choices[0].finish_reason) == (PROMPTS[0], "length")
    assert (told.usage.completion_tokens, told.usage.prompt_tokens > 0) == (0, True)


def test_a_chats_logprobs_are_the_same_streamed_or_not(server):
    """One entry for each token of the answer, with as many alternatives as were asked for."""
    asked = {"model": "red", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 12}
    asked |= {"logprobs": True, "top_logprobs": 2}
    client = server.client()
    at_once = client.chat.completions.create(**asked).choices[0]
    assert len(at_once.logprobs.content) == 12
    assert {len(one.top_logprobs) for one in at_once.logprobs.content} == {2}
    assert all(one.top_logprobs[0].token == one.token for one in at_once.logprobs.content), "greedy takes the likeliest"
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    streamed = [one for chunk in chunks if chunk.logprobs for one in chunk.logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in at_once.logprobs.content]


def test_an_answer_goes_back_as_a_message(server):
    """How every chat goes on with the real client."""
    client = server.client()
    messages = [{"role": "user", "content": "Hello"}]
    first = client.chat.completions.create(model="red", messages=messages, max_tokens=4).choices[0].message
    messages += [first, {"role": "user", "content": "And then?"}]
    assert client.chat.completions.create(model="red", messages=messages, max_tokens=4).usage.completion_tokens == 4


def test_the_client_raises_its_own_errors(server):
    """The classes that programs already catch."""
    with pytest.raises(openai.NotFoundError) as missing:
        complete(server, "green", "x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        complete(server, "red", "x", max_tokens=5000)
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="image_url"):
        server.client().chat.completions.create(
            model="red", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        )


def test_what_changes_nothing_is_taken(server):
    """Clients send defaults along; those are no reason to refuse."""
    options = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "somebody"}
    plain = complete(server, "red", "a function").choices[0].text
    assert complete(server, "red", "a function", **options).choices[0].text == plain


def test_no_page_of_another_host_gets_in(server):
    """A browser on this machine may be made to send requests here; it cannot choose these headers."""
    url = f"{server.url}/completions"
    text = json.dumps({"model": "red", "prompt": "x"})
    assert httpx.post(url, content=text, headers={"Content-Type": "text/plain"}, timeout=PATIENCE_S).status_code == 415
    assert httpx.get(f"{server.url}/models", headers={"Host": "evil.example"}, timeout=PATIENCE_S).status_code == 400


def test_errors_of_the_protocol_have_the_same_form(server):
    """What is no JSON, and paths that there are not."""
    headers = {"Content-Type": "application/json"}
    torn = httpx.post(f"{server.url}/completions", content="{", headers=headers, timeout=PATIENCE_S)
    assert torn.status_code == 400
    assert torn.json()["error"]["message"].startswith("the body is not JSON")
    half = httpx.post(
        f"{server.url}/completions",
        content=r'{"model": "red", "prompt": "\ud800"}',
        headers=headers,
        timeout=PATIENCE_S,
    )
    assert (half.status_code, half.json()["error"]["param"]) == (400, "prompt")
    wrong = httpx.get(f"{server.url}/completions", timeout=PATIENCE_S)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert httpx.head(server.url.replace("/v1", "/health"), timeout=PATIENCE_S).status_code == 200
    nothing = httpx.get(f"{server.url}/nothing", timeout=PATIENCE_S)
    assert nothing.json()["error"]["message"] == "GET /v1/nothing: Not Found"


def test_a_client_that_leaves_makes_room(server):
    """Streamed or not: its row is dropped at the next step, long before its last token."""
    many = 600
    body = {"model": "red", "prompt": PROMPTS[0], "max_tokens": many, "temperature": 0}
    with httpx.stream("POST", f"{server.url}/completions", json=body | {"stream": True}, timeout=PATIENCE_S) as stream:
        lines = stream.iter_lines()  # kept: with its generator the response is closed
        next(lines)
        assert server.health()["running"] == 1
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/completions", json=body, timeout=0.5)
    began = time.monotonic()
    while server.health()["running"]:
        assert time.monotonic() - began < PATIENCE_S
        time.sleep(0.02)
    left_s, began = time.monotonic() - began, time.monotonic()
    assert complete(server, "red", PROMPTS[0], many).usage.completion_tokens == many
    assert left_s < (time.monotonic() - began) / 2, "it was answered to the end"
    assert re.search(r"POST /v1/completions 200 model=red prompt=\d+ completion=\d+ finish=left", server.log())


def test_each_request_leaves_a_line_and_nothing_of_its_text(server):
    """Who was asked, tokens, how it ended; also of requests that were refused."""
    complete(server, "red", "a very secret prompt", 5)
    list(complete(server, "blue", "a very secret prompt", 7, stream=True))
    server.post("/completions", {"model": "gr\neen", "prompt": "a very secret prompt"})
    wanted = [
        r"POST /v1/completions 200 model=red prompt=\d+ completion=5 finish=length \d+\.\d{3}s",
        r"POST /v1/completions 200 model=blue prompt=\d+ completion=7 finish=length \d+\.\d{3}s",
        r"POST /v1/completions 404 model='gr\\neen' \d+\.\d{3}s",
    ]
    began = time.monotonic()
    while missing := [one for one in wanted if not re.search(rf"(?m)^\S+Z {one}$", server.log())]:
        assert time.monotonic() - began < PATIENCE_S, (missing, server.log())  # a stream's line follows its last event
        time.sleep(0.02)
    assert "secret" not in server.log()
    metrics = httpx.get(server.url.removesuffix("/v1") + "/metrics", timeout=PATIENCE_S).text
    assert "een" not in metrics, "who is not served is no label"
    assert re.search(r'(?m)^launcher_completion_tokens_total\{model="red"\} \d+$', metrics)
    assert "/health" not in server.log()


# ---------------------------------------------------------------- hot swap


def test_adapters_come_and_go_while_others_are_answered(server, trained):
    """Loading disturbs no stream; an unloaded adapter finishes what it began and is 404 for others."""
    long = {name: complete(server, name, PROMPTS[0], LONG).choices[0].text for name in ("red", "blue")}
    with pytest.raises(openai.NotFoundError):
        complete(server, "spare", "x")
    under_way = stream_of(server, "red")
    load = {"lora_name": "spare", "lora_path": str(trained["blue"].adapter)}
    assert server.post("/load_lora_adapter", load).text == "Success: LoRA adapter 'spare' added successfully."
    assert complete(server, "spare", PROMPTS[0], LONG).choices[0].text == long["blue"]
    spare = stream_of(server, "spare")
    assert server.post("/unload_lora_adapter", {"lora_name": "spare"}).status_code == 200
    assert server.health()["running"] > 0, "its stream had ended before it was unloaded: make it longer"
    with pytest.raises(openai.NotFoundError):
        complete(server, "spare", "x")
    assert rest(*spare) == long["blue"]
    assert rest(*under_way) == long["red"]


def test_a_name_may_come_back_as_another_adapter(server, trained):
    """At once, while the old one still answers: each keeps its own weights."""
    load = {"lora_name": "spare", "lora_path": str(trained["red"].adapter)}
    assert server.post("/load_lora_adapter", load).status_code == 200
    again = server.post("/load_lora_adapter", load)
    assert again.status_code == 400
    assert "served already" in again.json()["error"]["message"]
    old = stream_of(server, "spare")
    server.post("/unload_lora_adapter", {"lora_name": "spare"})
    server.post("/load_lora_adapter", {"lora_name": "spare", "lora_path": str(trained["dora"].adapter)})
    new = complete(server, "spare", PROMPTS[0], LONG).choices[0].text
    server.post("/unload_lora_adapter", {"lora_name": "spare"})
    assert rest(*old) == complete(server, "red", PROMPTS[0], LONG).choices[0].text
    assert new == complete(server, "dora", PROMPTS[0], LONG).choices[0].text


def test_adapters_that_do_not_belong_here_are_refused_and_leave_no_trace(server, trained, tmp_path):
    """Another base, another kind, a torn file, another shape: the reason, and the others answer as before."""
    before = complete(server, "red", PROMPTS[0]).choices[0].text
    other = train_adapter(tmp_path / "other", "lora", **{"model.revision": None})
    base = AutoModelForCausalLM.from_pretrained(other.base)
    with torch.no_grad():
        base.model.norm.weight += 1
    base.save_pretrained(other.base)
    foreign = train_adapter(tmp_path / "other", "lora")
    kind = tmp_path / "kind"
    shutil.copytree(trained["red"].adapter, kind)
    config = json.loads((kind / "adapter_config.json").read_text())
    (kind / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))
    torn = tmp_path / "torn"
    shutil.copytree(trained["red"].adapter, torn)
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused = {
        str(foreign.adapter): "weights are not those that",
        str(kind): "its kind is LOHA, which cannot stand beside others",
        str(torn): "adapter_model.safetensors",
        str(tmp_path / "nothing"): "no adapter that can be opened",
    }
    for folder, words in refused.items():
        told = server.post("/load_lora_adapter", {"lora_name": "spare", "lora_path": folder})
        assert told.status_code == 400
        assert words in told.json()["error"]["message"], told.text
    assert server.post("/unload_lora_adapter", {"lora_name": "spare"}).status_code == 404
    assert server.post("/unload_lora_adapter", {"lora_name": "base"}).status_code == 400
    assert complete(server, "red", PROMPTS[0]).choices[0].text == before


USERS_ALONE = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] | trim }}{% endif %}{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + USERS_ALONE


def test_an_adapters_template_and_tokens_are_its_own(server, trained, tmp_path):
    """What its template leaves out is not answered as if it had been read; a token without embedding is refused."""
    client = server.client()
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hello\n"}
    for number, template in enumerate((USERS_ALONE, NO_SYSTEM)):
        folder = tmp_path / str(number)
        shutil.copytree(trained["red"].adapter, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(folder)
        load = {"lora_name": f"own{number}", "lora_path": str(folder)}
        assert server.post("/load_lora_adapter", load).status_code == 200
    for name, words in (
        ("own0", "leaves out messages.0: this model takes no role 'system'"),
        ("own1", "no system role"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(words)):
            client.chat.completions.create(model=name, messages=[system, user], max_tokens=4)
        told = client.chat.completions.create(model=name, messages=[user], max_tokens=4, temperature=0)
        assert told.choices[0].message.content == complete(server, "red", "Hello", 4).choices[0].text
    with pytest.raises(openai.BadRequestError, match="no embedding of the token 512"):
        complete(server, "own0", "a <new> word")
    for name in ("own0", "own1"):
        server.post("/unload_lora_adapter", {"lora_name": name})


def test_the_verb_changes_a_running_server(server, trained):
    """`launcher serve --add` and `--remove`; what the server refuses ends with exit code 2."""

    def verb(*words):
        command = [sys.executable, "-m", "launcher.cli", "serve", "--url", server.url, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert verb("--add", f"green={trained['blue'].adapter}").returncode == 0
    assert complete(server, "green", PROMPTS[0]).choices[0].text == complete(server, "blue", PROMPTS[0]).choices[0].text
    assert verb("--remove", "green").returncode == 0
    gone = verb("--remove", "green")
    assert gone.returncode == 2
    assert "'green' is not served here" in gone.stderr
