"""The closed form against real steps: live tensor bytes of the worker's own loss, forward and backward.

Measured on the CPU with tensors of tens of MB, where the estimate's other terms (weights, gradients) are known
exactly and are taken off. What is compared is the part that depends on tokens.
"""

import weakref
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.facts.model import model_shape
from launcher.planning.activations import (
    layer_activation_bytes_per_token,
    logits_bytes_per_token,
    stored_bytes_per_token,
)
from launcher.planning.memory import moments
from launcher.planning.plan import LoraNumbers
from launcher.planning.stack import OUR_STACK
from launcher.planning.states import states
from launcher.recipe.schema import ModelSection
from launcher.worker.loss import summed_token_loss
from tests.tiny import make_candidate

SEQUENCE, MICRO, LAYERS = 256, 2, 4
TOKENS = SEQUENCE * MICRO
CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": SEQUENCE,
    "tie_word_embeddings": False,
}
MODELS = {
    "llama": CONFIG,
    "llama, large vocabulary": CONFIG | {"model_type": "llama", "vocab_size": 32_768},
    "mistral": CONFIG | {"sliding_window": None},
    "qwen2": CONFIG,
    "qwen3": CONFIG | {"head_dim": 32},
}


class LiveBytes(TorchDispatchMode):
    """Adds up the storages alive, and remembers the peak."""

    def __init__(self, resident=()):
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata: 0 for tensor in resident}
        self.now, self.peak = 0, 0

    def _forget(self, key):
        self.now -= self.seen.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    self.seen[key] = storage.nbytes()
                    self.now += self.seen[key]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, key)
        return result


def build(name, folder):
    keys = {"model_type": name} | MODELS[name]
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.train(), model_shape(ModelSection(name_or_path=str(folder)))


def candidate_of(*, method="full", precision="fp32", dropout=0.0, **fields):
    """One rank, one micro-batch, so that every byte but weights and optimizer belongs to this one step."""
    lora = None
    if method == "lora":
        lora = LoraNumbers(
            r=8, lora_alpha=16.0, lora_dropout=dropout, target_modules="all-linear", use_rslora=False, use_dora=False
        )
    return make_candidate(
        method=method,
        lora=lora,
        precision=precision,
        micro_batch=MICRO,
        gradient_accumulation=1,
        seq_len=SEQUENCE,
        **({"packing": False} | fields),
    )


def as_trained(model, candidate):
    """The model in the dtypes and with the adapter the worker gives it."""
    plain = candidate.zero_stage == 0
    if candidate.precision == "bf16" and not (candidate.method == "full" and plain):
        model = model.to(torch.bfloat16)
    if candidate.lora is not None:
        config = LoraConfig(
            r=candidate.lora.r,
            lora_dropout=candidate.lora.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config, autocast_adapter_dtype=plain)
    if candidate.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def a_batch(vocab, *, packed):
    ids = torch.randint(0, vocab, (MICRO, SEQUENCE))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if packed:
        return batch | {"position_ids": torch.arange(SEQUENCE // 2).repeat(2).expand(MICRO, -1)}
    return batch | {"attention_mask": torch.ones_like(ids)}


def measure(model, candidate, vocab):
    """Bytes alive after forward, and at the peak of forward and backward; gradients count, weights do not."""
    model = as_trained(model, candidate)
    autocast = candidate.zero_stage == 0 and candidate.precision == "bf16"
    with LiveBytes(model.parameters()) as live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = summed_token_loss(model, a_batch(vocab, packed=candidate.packing))
        saved = live.now
        loss.backward()
    return saved, live.peak


def predicted_peak(shape, candidate):
    """The same part of the estimate: all moments of forward and backward without resident weights and optimizer."""
    state = states(shape, candidate)
    return max(
        moment.total_bytes - state.weights - state.optimizer
        for moment in moments(shape, candidate)
        if moment.name != "optimizer step"
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", MODELS)
def test_peak_of_a_full_fine_tuning_step(name, checkpointing, tmp_path):
    """Activations, logits and gradients of a real fp32 step are within 2 % of the closed form."""
    model, shape = build(name, tmp_path)
    candidate = candidate_of(gradient_checkpointing=checkpointing)
    _, peak = measure(model, candidate, shape.vocab)
    assert predicted_peak(shape, candidate) == pytest.approx(peak, rel=0.02)


CASES = {
    "fp32 weights under bf16 autocast": {"precision": "bf16"},
    "packed rows": {"packing": True},
    "LoRA in fp32": {"method": "lora"},
    "LoRA in fp32 with dropout": {"method": "lora", "dropout": 0.1},
    "LoRA on a bf16 base": {"method": "lora", "precision": "bf16"},
    "LoRA on a bf16 base with dropout": {"method": "lora", "precision": "bf16", "dropout": 0.1},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_peak_of_other_steps_in_plain_torch(case, checkpointing, tmp_path):
    """Autocast, packing masks and adapters with their casts and dropout masks are within 3 %."""
    model, shape = build("llama", tmp_path)
    candidate = candidate_of(**CASES[case], gradient_checkpointing=checkpointing)
    _, peak = measure(model, candidate, shape.vocab)
    assert predicted_peak(shape, candidate) == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("case", [{"method": "full"}, {"method": "lora"}, {"method": "lora", "dropout": 0.1}], ids=str)
def test_bytes_kept_by_a_bf16_forward_under_deepspeed(case, tmp_path):
    """With bf16 weights and adapters (what DeepSpeed trains), layers keep what the closed form says.

    The log-softmax, fp32, is alive as well when forward has ended.
    """
    model, shape = build("llama", tmp_path)
    candidate = candidate_of(**case, precision="bf16", zero_stage=2)
    saved, _ = measure(model, candidate, shape.vocab)
    layers = stored_bytes_per_token(shape, candidate, OUR_STACK)
    assert TOKENS * (layers + 4 * shape.vocab) == pytest.approx(saved, rel=0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_cost_what_the_stack_profile_says(dtype):
    """Bytes per token and vocabulary entry at the loss, from a model that is nothing but its logits."""
    vocab = 20_000
    logits = torch.zeros(1, SEQUENCE, vocab, dtype=dtype, requires_grad=True)

    class Output:
        def __init__(self, tensor):
            self.logits = tensor

    labels = torch.randint(0, vocab, (1, SEQUENCE))
    with LiveBytes([logits]) as live:
        summed_token_loss(lambda **_: Output(logits * 1), {"labels": labels}).backward()
    per_token = live.peak / SEQUENCE
    precision = "bf16" if dtype is torch.bfloat16 else "fp32"
    shape = replace(_logits_only(), vocab=vocab)
    candidate = make_candidate(precision=precision)
    both = [logits_bytes_per_token(shape, candidate, OUR_STACK, backward=side) for side in (False, True)]
    assert per_token == pytest.approx(max(both), rel=0.05)


def _logits_only():
    from tests.unit.planning.examples import a_recipe

    return replace(model_shape(a_recipe().model), hidden=0)


def test_one_layer_is_linear_in_tokens():
    """The per-token figure does not depend on the sequence, except where scores or a mask of them are kept."""
    from tests.unit.planning.examples import a_recipe

    shape = model_shape(a_recipe().model)
    short, long = (make_candidate(seq_len=length, packing=False) for length in (1024, 8192))
    assert layer_activation_bytes_per_token(shape, short) == layer_activation_bytes_per_token(shape, long)
    one, other = (
        layer_activation_bytes_per_token(shape, replace(each, packing=True, precision="bf16")) for each in (short, long)
    )
    assert other - one == 2 * (8192 - 1024)
    eager = replace(long, attn_implementation="eager")
    assert layer_activation_bytes_per_token(shape, eager) > 2 * layer_activation_bytes_per_token(shape, long)
