"""The step traced on fake tensors: against real steps, against the closed form, and through its command line.

Trace and closed form share no code, so that neither can drift alone. Compared are the bytes that depend on tokens
(activations, logits, weights made on the way), on shapes of 7 to 9 billion parameters, extrapolated from two and four
layers.
"""

import json
import subprocess
import sys
import time
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import ClusterError, ModelError
from launcher.facts.model import model_shape
from launcher.planning import trace as caller
from launcher.planning.plan import LoraNumbers, QuantNumbers
from launcher.recipe.schema import ModelSection
from launcher.worker import trace as tracer
from launcher.worker.loss import summed_token_loss
from tests.tiny import make_candidate

pytestmark = pytest.mark.filterwarnings("ignore")
LLAMA = "meta-llama/Llama-3.1-8B"
SHAPES = {
    "llama": LLAMA,
    "qwen2": "Qwen/Qwen2.5-7B",
    "qwen3": "Qwen/Qwen3-8B",
    "mistral": "mistralai/Mistral-7B-v0.3",
    "gemma": "google/gemma-7b",
}
LORA = LoraNumbers(
    r=16, lora_alpha=32.0, lora_dropout=0.0, target_modules="all-linear", use_rslora=False, use_dora=False
)
NF4 = QuantNumbers(quant_type="nf4", double_quant=True, compute_dtype="bf16", storage_dtype="uint8")
METHODS = {
    "full under DeepSpeed": {"method": "full", "zero_stage": 2},
    "full in plain torch": {"method": "full", "zero_stage": 0},
    "LoRA under DeepSpeed": {"method": "lora", "lora": LORA, "zero_stage": 2},
    "LoRA in plain torch": {"method": "lora", "lora": LORA, "zero_stage": 0},
    "LoRA with dropout": {"method": "lora", "lora": replace(LORA, lora_dropout=0.1), "zero_stage": 0},
}
CLOSE = 0.03
CAPPED = "google/gemma-2-9b"
"""Scores and logits pass a tanh, and norms follow attention and MLP."""


def a_candidate(**fields):
    """One H100, one micro-batch of 2048 tokens in bf16."""
    return make_candidate(
        **(
            {
                "precision": "bf16",
                "device": "cuda",
                "gpu": "H100-80GB",
                "attn_implementation": "sdpa",
                "packing": False,
                "seq_len": 2048,
                "micro_batch": 1,
                "gradient_checkpointing": False,
                "checkpointing_reentrant": False,
            }
            | fields
        )
    )


def traced(config, candidate, layers=(2, 4)):
    """What trace_step does, without starting a process of its own."""
    request = caller.trace_request(config, candidate, layers)
    answer = {"traces": [tracer.trace(request, count) for count in layers]}
    answer |= {"torch": torch.__version__, "transformers": "", "max_rss_bytes": 0}
    total = config["num_hidden_layers"] if len(layers) > 1 else layers[0]
    return caller._extrapolated(answer, total)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SHAPES)
def test_trace_and_closed_form_agree(family, method, checkpointing):
    """Every moment's bytes, and resident weights, are within 3 % of each other."""
    model = ModelSection(name_or_path=SHAPES[family])
    shape, candidate = model_shape(model), a_candidate(**METHODS[method], gradient_checkpointing=checkpointing)
    found = traced(caller.model_config(model), candidate)
    assert_close(caller.compare(shape, candidate, found), method=method)
    assert abs(caller.compare_weights(shape, candidate, found).error) < 0.001


def assert_close(compared, *, method):
    """All moments within `CLOSE`; under autocast one is larger than traced, because its gradient is no weight's.

    There the closed form counts the fp32 gradient of the MLP's last weight at its layer's backward; the trace leaves
    gradients out.
    """
    for each in compared:
        wide = method == "full in plain torch" and each.moment == "backward of the last layer"
        assert -CLOSE < each.error < (0.15 if wide else CLOSE), each


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", METHODS)
def test_capped_scores_and_logits_agree(method, checkpointing):
    """Gemma 2 with eager attention keeps a tanh of its scores and of its logits; its last norms are in fp32."""
    model = ModelSection(name_or_path=CAPPED)
    candidate = a_candidate(**METHODS[method], attn_implementation="eager", gradient_checkpointing=checkpointing)
    found = traced(caller.model_config(model), candidate)
    assert_close(caller.compare(model_shape(model), candidate, found), method=method)


@pytest.mark.parametrize("method", METHODS)
def test_eager_attention_agrees(method):
    """Without a cap one score-sized tensor less is kept; with one layer at work scores stand three times in fp32."""
    model = ModelSection(name_or_path=LLAMA)
    candidate = a_candidate(**METHODS[method], attn_implementation="eager", gradient_checkpointing=True)
    found = traced(caller.model_config(model), candidate)
    assert_close(caller.compare(model_shape(model), candidate, found), method=method)


@pytest.mark.parametrize("seq_len", [2048, 4096])
@pytest.mark.parametrize("method", METHODS)
def test_packed_rows_agree_at_both_lengths(method, seq_len):
    """Masks and repeated key heads of packed rows under SDPA; the mask's bias grows with the square of the length."""
    model = ModelSection(name_or_path=LLAMA)
    candidate = a_candidate(**METHODS[method], packing=True, seq_len=seq_len)
    found = traced(caller.model_config(model), candidate)
    assert_close(caller.compare(model_shape(model), candidate, found), method=method)


def test_every_moment_is_linear_in_the_layers():
    """Two and four layers say what eight need, to the byte."""
    config = caller.model_config(ModelSection(name_or_path=LLAMA)) | {"num_hidden_layers": 8}
    candidate = a_candidate(method="lora", lora=LORA, zero_stage=0)
    extrapolated, whole = traced(config, candidate), traced(config, candidate, (8,))
    for moment in ("forward", "loss forward", "loss backward", "backward of the last layer"):
        assert extrapolated[moment].peak_bytes == whole[moment].peak_bytes
    assert extrapolated.weights_bytes == whole.weights_bytes


def test_qlora_holds_a_quarter_of_the_weights_and_one_matrix_more():
    """The real 4-bit modules run: 8-bit scales are counted, and one matrix at a time is there in bf16."""
    model = ModelSection(name_or_path=LLAMA)
    candidate = a_candidate(method="qlora", lora=LORA, quant=NF4, zero_stage=0, gradient_checkpointing=True)
    found = traced(caller.model_config(model), candidate)
    shape = model_shape(model)
    assert abs(caller.compare_weights(shape, candidate, found).error) < 0.001
    unquantized = traced(caller.model_config(model), a_candidate(**METHODS["LoRA in plain torch"]))
    assert found.weights_bytes < 0.4 * unquantized.weights_bytes
    *_, peak = caller.compare(shape, candidate, found)
    assert abs(peak.error) < CLOSE, peak


# ---------------------------------------------------------------- against real tensors


class RealBytes(TorchDispatchMode):
    """Live bytes of real tensors, counted here and not in the tracer."""

    def __init__(self, resident):
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in resident}
        self.now, self.peak = 0, 0

    def _gone(self, key, size):
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return result


def small(**changes):
    """A Llama of 5 M parameters: real tensors of tens of MB, where blocks of 512 bytes do not matter."""
    return {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    } | changes


def real_peak(config, candidate):
    """Peak of a real forward and backward whose gradients go as soon as they are made."""
    keys = dict(config)
    built = AutoConfig.for_model(keys.pop("model_type"), **keys)
    model = AutoModelForCausalLM.from_config(built, attn_implementation="sdpa").train()
    if candidate.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forget(parameter):
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(forget)
    ids = torch.randint(0, config["vocab_size"], (candidate.micro_batch, candidate.seq_len))
    with RealBytes([*model.parameters(), *model.buffers(), ids]) as live:
        summed_token_loss(model, {"input_ids": ids, "labels": ids}).backward()
    return live.peak


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_fake_tensors_need_what_real_ones_need(checkpointing):
    """The same step of the same class, on real tensors and on fake ones, within 1 %."""
    config = small()
    candidate = a_candidate(
        method="full",
        zero_stage=2,
        precision="fp32",
        device="cpu",
        seq_len=512,
        micro_batch=2,
        gradient_checkpointing=checkpointing,
    )
    assert traced(config, candidate, (3,)).peak_bytes == pytest.approx(real_peak(config, candidate), rel=0.01)


# ---------------------------------------------------------------- the command and its caller


def test_the_trace_runs_as_a_process_and_is_remembered(tmp_path):
    """The planner's call: a JSON request to another interpreter, and the second time an answer from the cache."""
    config = small()
    candidate = a_candidate(method="full", zero_stage=2, seq_len=256)
    first = caller.trace_step(config, candidate, cache=tmp_path)
    assert first.layers == 3
    assert first.torch == torch.__version__
    assert 0 < first.activations_bytes < first.peak_bytes
    started = time.perf_counter()
    assert caller.trace_step(config, candidate, cache=tmp_path) == first
    assert time.perf_counter() - started < 1.0
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_70b_step_is_traced_within_half_a_gib(tmp_path):
    """Memory of the tracing process, imports included; two and four layers take seconds whatever the depth."""
    config = caller.model_config(ModelSection(name_or_path="meta-llama/Meta-Llama-3-70B"))
    candidate = a_candidate(**METHODS["full under DeepSpeed"], gradient_checkpointing=True, seq_len=4096)
    found = caller.trace_step(config, candidate, cache=tmp_path)
    assert found.layers == 80
    assert found.max_rss_bytes < 2**30 // 2
    assert found.seconds < 15  # two seconds where nobody else uses the machine
    assert found.weights_bytes == pytest.approx(2 * 70.55e9, rel=0.001)


def test_an_unknown_architecture_is_named_by_the_process(tmp_path):
    """What transformers does not know either cannot be traced; its own message is passed on."""
    with pytest.raises(ClusterError, match="no_such_model"):
        caller.trace_step(small(model_type="no_such_model"), a_candidate(), cache=tmp_path)


def test_an_architecture_the_planner_does_not_know_is_traced():
    """The trace needs no closed form: any class transformers has will do, such as OPT with its learned positions."""
    config = {
        "model_type": "opt",
        "vocab_size": 4096,
        "hidden_size": 256,
        "ffn_dim": 1024,
        "word_embed_proj_dim": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
    }
    with pytest.raises(ModelError, match="opt"):
        model_shape_of(config)
    found = traced(config, a_candidate(method="full", zero_stage=2, seq_len=256))
    assert found.layers == 6
    assert 0 < found.activations_bytes < found.peak_bytes


def model_shape_of(config):
    from launcher.facts.architecture import shape_from_config

    return shape_from_config(config, name="opt", source="config.json")


def test_an_interpreter_without_the_train_environment_says_what_to_install(tmp_path):
    """`-S` hides site-packages: what a login node's bare Python looks like."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ClusterError, match="no train environment"):
        caller.trace_step(small(), a_candidate(), python=str(bare), cache=tmp_path)


def test_the_process_answers_on_stdout_alone():
    """Warnings of libraries go to stderr; stdout is one line of JSON."""
    request = caller.trace_request(small(), a_candidate(method="full", zero_stage=2, seq_len=128), (2,))
    done = subprocess.run(
        [sys.executable, "-m", "launcher.worker.trace"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(json.loads(done.stdout)) == {"traces", "torch", "transformers", "max_rss_bytes"}
