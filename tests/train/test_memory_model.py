"""The closed form against real steps: live tensor bytes of the worker's own loss, forward and backward.

Measured on the CPU with tensors of tens of MB, where the estimate's other terms (weights, gradients) are known
exactly and are taken off. What is compared is the part that depends on tokens.
"""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.facts.model import model_shape
from launcher.planning.activations import layer_activation_bytes_per_token, logits_bytes_per_token
from launcher.planning.memory import moments
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


def measured_peak(model, *, checkpointing, vocab, dtype):
    """Peak bytes of tensors made in one forward and backward; gradients count, weights do not."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = model.to(dtype)
    ids = torch.randint(0, vocab, (MICRO, SEQUENCE))
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    with LiveBytes(model.parameters()) as live:
        summed_token_loss(model, batch).backward()
    model.zero_grad(set_to_none=True)
    return live.peak


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
def test_peak_of_a_full_fine_tuning_step_in_fp32(name, checkpointing, tmp_path):
    """Activations, logits and gradients of a real step are within 6 % of the closed form."""
    model, shape = build(name, tmp_path)
    candidate = make_candidate(
        method="full",
        lora=None,
        micro_batch=MICRO,
        gradient_accumulation=1,
        seq_len=SEQUENCE,
        gradient_checkpointing=checkpointing,
        packing=False,
    )
    found = measured_peak(model, checkpointing=checkpointing, vocab=shape.vocab, dtype=torch.float32)
    assert predicted_peak(shape, candidate) == pytest.approx(found, rel=0.06)


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
    """The per-token figure does not depend on the sequence, except under eager attention."""
    from tests.unit.planning.examples import a_recipe

    shape = model_shape(a_recipe().model)
    short, long = (make_candidate(seq_len=length) for length in (1024, 8192))
    assert layer_activation_bytes_per_token(shape, short) == layer_activation_bytes_per_token(shape, long)
    eager = replace(long, attn_implementation="eager")
    assert layer_activation_bytes_per_token(shape, eager) > 2 * layer_activation_bytes_per_token(shape, long)
