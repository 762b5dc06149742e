"""The serving engine without HTTP: every kind of attention and of base gives in a batch what each row gives alone."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launcher.adapters.lineage import WEIGHTS
from launcher.serving.engine import Engine, Limits
from launcher.serving.model import Served, load_base
from launcher.serving.names import BASE, Entry
from launcher.serving.opened import BaseFacts, open_adapter
from launcher.serving.rows import Broken, Finished, Piece, Row
from launcher.serving.sampling import Sampling
from launcher.serving.text import Pieces
from tests.tiny import make_model_dir
from tests.train.adapters import train_adapter

VOCAB = 128
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16,
         "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
           "shared_expert_intermediate_size": 32}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "eos_token_id": None}
EVERY_OTHER = ["sliding_attention", "full_attention"] * 2
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "mistral, window 8": lambda: transformers.MistralConfig(**SIZES, sliding_window=8),
    "gemma3, window 8": lambda: transformers.Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=EVERY_OTHER),
    "gemma2, window 8": lambda: transformers.Gemma2Config(**SIZES, sliding_window=8, layer_types=EVERY_OTHER),
    "qwen3, window 8": lambda: transformers.Qwen3Config(
        **SIZES, use_sliding_window=True, sliding_window=8, layer_types=EVERY_OTHER
    ),
    "phi3, window 8": lambda: transformers.Phi3Config(**SIZES, sliding_window=8),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SIZES, hidden_dropout=0.0),
    "qwen3-next": lambda: transformers.Qwen3NextConfig(**SIZES, **LINEAR, **EXPERTS),
}


class FakeDecoder:
    """Writes the number of each token, so that texts are equal only where tokens are."""

    def decode(self, token_ids, **_):
        return "".join(f"{token} " for token in token_ids)


class Told:
    """One row's sink."""

    def __init__(self):
        self.text, self.last, self.done = "", None, threading.Event()

    def __call__(self, event):
        if isinstance(event, Piece):
            self.text += event.text
        else:
            self.last = event
            self.done.set()

    @property
    def tokens(self):
        return [int(word) for word in self.text.split()]


def row(entry, prompt, tokens=20, **sampling):
    """A greedy row."""
    greedy_or = Sampling(**({"temperature": 0.0} | sampling))
    return Row(entry=entry, prompt=list(prompt), most_tokens=tokens, sampling=greedy_or, ends=frozenset(),
               pieces=Pieces(FakeDecoder(), [], ()), sink=Told())  # fmt: skip


def answered(engine, rows):
    """The rows' sinks when all have their answers."""
    for one in rows:
        engine.submit(one)
    for one in rows:
        assert one.sink.done.wait(600)
    return [one.sink for one in rows]


def entry(name="base", key=BASE, **facts):
    """A name and what it stands for."""
    return Entry(name=name, key=key, tokenizer=None, folder="", **facts)


def prompts():
    """Prompts of different lengths, one longer than the windows."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, VOCAB, (length,), generator=generator).tolist() for length in (3, 21, 11, 1)]


@pytest.mark.parametrize("family", MODELS)
def test_rows_of_different_lengths_answer_as_alone(family):
    """Whole attention, learned positions, windows, and states that no padding can be put before."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[family]()).eval()
    served = Served(model, "cpu")
    assert served.can_join == (family != "qwen3-next")
    engine = Engine(served, Limits(rows=3, waiting=8))
    rows = [row(entry(), prompt, tokens) for prompt, tokens in zip(prompts(), (30, 20, 5, 25), strict=True)]
    engine.start()
    try:
        told = answered(engine, rows)
    finally:
        engine.stop()
    for one, sink in zip(rows, told, strict=True):
        ids = torch.tensor([one.prompt])
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=one.most_tokens, do_sample=False
        )
        assert sink.tokens == alone[0, ids.shape[1] :].tolist()
        assert sink.last == Finished("length", one.most_tokens)


def test_a_qlora_adapter_answers_on_its_4_bit_base(tmp_path):
    """Held in 4 bits as in training, beside rows of the 4-bit base itself; on a plain base it is refused."""
    trained = train_adapter(tmp_path, "qlora")
    quantization = open_lineage(trained.adapter)["quantization"]
    base = load_base(trained.base, dtype="fp32", quantization=quantization, device="cpu")
    facts = BaseFacts(folder=trained.base, quantization=quantization, any_rounding=False)
    served = Served(base, "cpu")
    served.add("adapter_1_", open_adapter(trained.adapter, facts, trusted=False))
    engine = Engine(served, Limits(rows=4, waiting=8))
    rows = [row(named, prompt) for prompt in prompts()[:2] for named in (entry(), entry("bot", "adapter_1_"))]
    engine.start()
    try:
        told = answered(engine, rows)
    finally:
        engine.stop()
    alone = load_base(trained.base, dtype="fp32", quantization=quantization, device="cpu")
    plain = [greedy(alone, one.prompt) for one in rows]
    tuned = PeftModel.from_pretrained(alone, trained.adapter).eval()
    for one, sink, base_alone in zip(rows, told, plain, strict=True):
        assert sink.tokens == (base_alone if one.entry.key == BASE else greedy(tuned, one.prompt))
    from launcher.errors import ConflictError

    with pytest.raises(ConflictError, match="in 4 bits"):
        open_adapter(
            trained.adapter, BaseFacts(folder=trained.base, quantization=None, any_rounding=False), trusted=False
        )


def open_lineage(folder):
    """What an adapter says of itself."""
    from launcher.facts.adapters import read_adapter_facts

    return read_adapter_facts(folder).lineage


def greedy(model, prompt, tokens=20):
    """Tokens by the library's own generate."""
    ids = torch.tensor([prompt])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return made[0, ids.shape[1] :].tolist()


def peft_adapter(base, folder, **config):
    """An adapter made by PEFT alone, with weights that do something; saved to `folder`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(len(str(config)))
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **config))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "modules_to_save" in name):
                parameter.add_(0.3 * torch.randn_like(parameter))
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


EXPERTS_OF = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "llama": {"plain": {"target_modules": ["q_proj", "v_proj"]},
              "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
              "other head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
              "embedding": {"target_modules": ["embed_tokens", "q_proj"]}},
    "mixtral": {"plain": {"target_modules": ["q_proj", "v_proj"]},
                "experts": {"target_modules": ["q_proj"], "target_parameters": EXPERTS_OF},
                "other experts": {"target_modules": ["v_proj"], "target_parameters": EXPERTS_OF}},
}  # fmt: skip


@pytest.mark.parametrize("family", KINDS)
def test_kinds_that_peft_does_not_mix_answer_beside_those_that_it_does(family, tmp_path):
    """Replaced heads, adapted embeddings, fused experts: in turn with plain rows and the base, each as alone."""
    base = make_model_dir(tmp_path / "model", family=family)
    facts = BaseFacts(folder=base, quantization=None, any_rounding=False)
    served, names = Served(load_base(base, dtype="fp32", quantization=None, device="cpu"), "cpu"), [entry()]
    folders = {name: peft_adapter(base, tmp_path / name, **config) for name, config in KINDS[family].items()}
    for number, (name, folder) in enumerate(folders.items()):
        opened = open_adapter(folder, facts, trusted=True)
        served.add(f"adapter_{number}_", opened)
        names.append(entry(name, f"adapter_{number}_"))
    engine = Engine(served, Limits(rows=16, waiting=16))
    rows = [row(named, prompt, 12) for prompt in prompts()[:2] for named in names]
    engine.start()
    try:
        told = answered(engine, rows)
    finally:
        engine.stop()
    for one, sink in zip(rows, told, strict=True):
        alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if one.entry.key != BASE:
            alone = PeftModel.from_pretrained(alone, folders[one.entry.name])
        assert sink.tokens == greedy(alone.eval(), one.prompt, 12), one.entry.name
    assert len({sink.text for sink in told[: len(names)]}) == len(names)


@pytest.fixture
def ending(tmp_path):
    """A base and a plain adapter that PEFT mixes, and another adapter that ends this for all."""
    base = make_model_dir(tmp_path / "model")
    facts = BaseFacts(folder=base, quantization=None, any_rounding=False)
    plain, head = (peft_adapter(base, tmp_path / name, **KINDS["llama"][name]) for name in ("plain", "head"))
    served = Served(load_base(base, dtype="fp32", quantization=None, device="cpu"), "cpu")
    served.add("adapter_1_", open_adapter(plain, facts, trusted=True))
    engine = Engine(served, Limits(rows=16, waiting=16))
    rows = [row(entry(), prompts()[0]), row(entry("plain", "adapter_1_"), prompts()[1])]
    ending = Ending(served, engine, rows, lambda: served.add("adapter_2_", open_adapter(head, facts, trusted=True)))
    engine.start()
    yield ending
    engine.stop()
    alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert rows[0].sink.tokens == greedy(alone, rows[0].prompt)
    assert rows[1].sink.tokens == greedy(PeftModel.from_pretrained(alone, plain).eval(), rows[1].prompt)


@dataclass
class Ending:
    """What `ending` is made of; in the end its rows, of the base and of the plain adapter, are answered as alone."""

    served: Served
    engine: Engine
    rows: list
    end_mixing: Callable

    def wait(self):
        """Until both rows are answered."""
        assert all(one.sink.done.wait(600) for one in self.rows)


def test_an_adapter_that_ends_mixing_may_come_into_a_batch_under_way(ending):
    """Rows that were read together go on apart, each as alone; also when it has gone, as PEFT leaves its wrappers."""
    first, second = ending.rows
    groups = []

    class Watching(Told):
        """Brings the other adapter in at the row's first token and sends it away at its tenth."""

        def __call__(self, event):
            super().__call__(event)
            groups.append(ending.served.group(first.entry))
            if len(groups) == 1:
                ending.engine.call(ending.end_mixing)
            if len(groups) == 10:
                ending.engine.retire("adapter_2_")

    first.sink = Watching()
    for one in (second, first):
        ending.engine.submit(one)
    ending.wait()
    assert groups[0] is None
    assert groups[-1] == BASE


def test_rows_that_wait_while_mixing_ends_are_not_read_together(ending):
    """The adapter and the rows come at the same moment: each row has the weights it asked for."""

    def at_one_moment():
        ending.engine.submit(*ending.rows)
        ending.engine.call(ending.end_mixing)

    ending.engine.call(at_one_moment)
    ending.wait()
    assert ending.served.group(ending.rows[0].entry) == BASE


def test_an_adalora_adapter_answers_in_a_batch_as_the_lora_that_it_is(tmp_path):
    """Folded when it is opened: its logits are PEFT's own for AdaLoRA, and it stands beside others and the base."""
    trained = train_adapter(tmp_path, "adalora", steps=20)
    ranks = {len(one) for name, one in load_file(trained.adapter / WEIGHTS).items() if "lora_A" in name}
    assert len(ranks) > 1, "none of its matrices lost a rank: train it longer"
    facts = BaseFacts(folder=trained.base, quantization=None, any_rounding=False)
    opened = open_adapter(trained.adapter, facts, trusted=False)
    alone, again = (AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32) for _ in range(2))
    tuned = PeftModel.from_pretrained(alone, trained.adapter).eval()
    folded = PeftModel.from_pretrained(again, opened.readable).eval()
    assert type(folded.base_model) is peft.LoraModel
    ids = torch.tensor([prompts()[1]])
    with torch.no_grad():
        wanted, found = tuned(input_ids=ids).logits, folded(input_ids=ids).logits
        with tuned.disable_adapter():
            assert (tuned(input_ids=ids).logits - wanted).abs().max() > 0.1, "it changes nothing: train it longer"
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)

    served = Served(load_base(trained.base, dtype="fp32", quantization=None, device="cpu"), "cpu")
    served.add("adapter_1_", opened)
    engine = Engine(served, Limits(rows=8, waiting=8))
    rows = [row(named, prompt) for prompt in prompts()[:2] for named in (entry("bot", "adapter_1_"), entry())]
    assert {served.group(one.entry) for one in rows} == {None}
    engine.start()
    try:
        told = answered(engine, rows)
    finally:
        engine.stop()
    assert told[0].tokens == greedy(tuned, rows[0].prompt)
    assert told[2].tokens == greedy(tuned, rows[2].prompt)
    with tuned.disable_adapter():
        assert told[1].tokens == greedy(tuned, rows[1].prompt)


REFUSED = {
    "init_lora_weights": ("pissa", "changes the base's own weights when it is loaded"),
    "use_qalora": (True, "variant of LoRA that is not served here (use_qalora)"),
    "alora_invocation_tokens": ([5], "alora_invocation_tokens"),
    "task_type": ("SEQ_CLS", "its task is SEQ_CLS"),
    "bias": ("all", "trained biases"),
    "peft_type": ("LOHA", "its kind is LOHA"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_adapters_that_would_change_the_base_for_all_are_refused(field, tmp_path):
    """Or that PEFT answers otherwise than by adding a product: said before the model is touched."""
    from launcher.errors import RecipeError

    base = make_model_dir(tmp_path / "model")
    folder = peft_adapter(base, tmp_path / "adapter", **KINDS["llama"]["plain"])
    config = json.loads((folder / "adapter_config.json").read_text())
    value, words = REFUSED[field]
    (folder / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(RecipeError, match=re.escape(words)):
        open_adapter(folder, BaseFacts(folder=base, quantization=None, any_rounding=False), trusted=True)


def test_an_adapter_whose_numbers_overflow_ends_its_own_answers_alone(tmp_path):
    """NaN in one row of a batch is no reason to end the others."""
    base = make_model_dir(tmp_path / "model")
    facts = BaseFacts(folder=base, quantization=None, any_rounding=False)
    good, bad = (peft_adapter(base, tmp_path / name, **KINDS["llama"]["plain"]) for name in ("good", "bad"))
    weights = load_file(bad / WEIGHTS)
    save_file({name: tensor * torch.inf for name, tensor in weights.items()}, bad / WEIGHTS, metadata={"format": "pt"})
    served = Served(load_base(base, dtype="fp32", quantization=None, device="cpu"), "cpu")
    for number, folder in enumerate((good, bad)):
        served.add(f"adapter_{number}_", open_adapter(folder, facts, trusted=True))
    engine = Engine(served, Limits(rows=8, waiting=8))
    names = entry("good", "adapter_0_"), entry("bad", "adapter_1_"), entry()
    rows = [row(named, prompts()[1], temperature=temperature, seed=3) for named in names for temperature in (0.0, 1.0)]
    engine.start()
    try:
        engine.call(lambda: engine.submit(*rows))  # all of them in one batch
        assert all(one.sink.done.wait(600) for one in rows)
        alone = answered(engine, [row(one.entry, one.prompt, temperature=1.0, seed=3) for one in (rows[1], rows[5])])
    finally:
        engine.stop()
    told = [one.sink for one in rows]
    assert {type(told[n].last) for n in (0, 1, 4, 5)} == {Finished}
    assert [told[n].last for n in (2, 3)] == [Broken("bad: its numbers overflow (NaN)")] * 2
    assert [told[1].tokens, told[5].tokens] == [one.tokens for one in alone], "sampled as alone, with the same seed"


def test_a_base_with_two_scales_of_positions_is_answered_within_the_first():
    """longrope turns every row of a batch by the longest one: what each would give alone ends there."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64}  # fmt: skip
    config = transformers.Phi3Config(**SIZES, rope_parameters=rope, original_max_position_embeddings=64)
    assert Served(AutoModelForCausalLM.from_config(config), "cpu").context == 64
    assert Served(AutoModelForCausalLM.from_config(MODELS["phi3, window 8"]()), "cpu").context == 256


def test_a_file_with_weights_of_the_base_is_refused(tmp_path):
    """PEFT saves embeddings along where they are adapted; loaded, they would be everybody's."""
    from launcher.errors import ModelError

    base = make_model_dir(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"]))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    facts = BaseFacts(folder=base, quantization=None, any_rounding=False)
    with pytest.raises(ModelError, match=r"weights of the base itself, such as .*embed_tokens"):
        open_adapter(tmp_path / "adapter", facts, trusted=True)


def test_a_failure_ends_the_rows_it_hits_and_no_others(tmp_path):
    """A prompt that the model cannot read; the engine goes on, and PEFT's hooks of the failed pass are gone."""
    base = make_model_dir(tmp_path / "model")
    facts = BaseFacts(folder=base, quantization=None, any_rounding=False)
    served = Served(load_base(base, dtype="fp32", quantization=None, device="cpu"), "cpu")
    adapter = peft_adapter(base, tmp_path / "adapter", **KINDS["llama"]["plain"])
    served.add("adapter_1_", open_adapter(adapter, facts, trusted=True))
    engine = Engine(served, Limits(rows=1, waiting=8))
    bad, good = row(entry("bot", "adapter_1_"), [10**6]), row(entry("bot", "adapter_1_"), prompts()[0])
    engine.start()
    try:
        told = answered(engine, [bad, good])
    finally:
        engine.stop()
    assert isinstance(told[0].last, Broken)
    assert told[1].last == Finished("length", 20)


def test_who_has_gone_makes_room():
    """A cancelled row leaves at the next step, and one that waits is never begun."""
    torch.manual_seed(0)
    served = Served(AutoModelForCausalLM.from_config(MODELS["llama"]()).eval(), "cpu")
    engine = Engine(served, Limits(rows=1, waiting=8))
    endless, waiting, last = (row(entry(), prompts()[0], tokens) for tokens in (10**9, 10**9, 3))
    engine.start()
    try:
        for one in (endless, waiting, last):
            engine.submit(one)
        waiting.cancelled = endless.cancelled = True
        assert last.sink.done.wait(600)
    finally:
        engine.stop()
    assert waiting.sink.text == ""


def test_the_last_adapter_leaves_the_base_as_it_was(tmp_path):
    """Added and dropped again, twice: no wrapper and no weight of it stays."""
    trained = train_adapter(tmp_path, "lora")
    base = load_base(trained.base, dtype="fp32", quantization=None, device="cpu")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    facts = BaseFacts(folder=trained.base, quantization=None, any_rounding=False)
    served = Served(base, "cpu")
    for key in ("adapter_1_", "adapter_2_"):
        served.add(key, open_adapter(trained.adapter, facts, trusted=False))
        assert any("lora_A" in name for name in base.state_dict())
        served.drop(key)
        after = base.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_of_another_shape_is_refused_and_undone(tmp_path):
    """An adapter without lineage, trusted by the user, whose factors fit no module here."""
    from launcher.errors import ModelError

    trained = train_adapter(tmp_path, "lora")
    path = trained.adapter / "adapter_model.safetensors"
    weights = load_file(path)
    odd = next(name for name in weights if "down_proj.lora_A" in name)
    save_file(weights | {odd: weights[odd][:, :-1].contiguous()}, path, metadata={"format": "pt"})
    base = load_base(trained.base, dtype="fp32", quantization=None, device="cpu")
    names = list(base.state_dict())
    served = Served(base, "cpu")
    facts = BaseFacts(folder=trained.base, quantization=None, any_rounding=False)
    with pytest.raises(ModelError, match="fit no module of this base, such as"):
        served.add("adapter_1_", open_adapter(trained.adapter, facts, trusted=True))
    config = json.loads((trained.adapter / "adapter_config.json").read_text())
    save_file({name: tensor for name, tensor in weights.items() if name != odd}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors do not load"):
        served.add("adapter_2_", open_adapter(trained.adapter, facts, trusted=True))
    assert config["r"] == 8
    assert list(base.state_dict()) == names
