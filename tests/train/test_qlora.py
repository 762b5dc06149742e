"""QLoRA, measured on CPU: the base really is 4-bit, the adapter trains, and merging keeps what was trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn

from launcher.adapters.merge import dequantized_base
from launcher.planning.plan import Candidate, QuantNumbers
from launcher.recipe.schema import Recipe
from launcher.runs.folder import RunFolder
from launcher.worker.artifact import write_artifact
from launcher.worker.base import load_base
from launcher.worker.model import build_model
from launcher.worker.tokenizer import load_tokenizer
from tests.tiny import VOCAB, make_candidate, make_recipe

IDS = torch.randint(5, VOCAB, (4, 24), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Trained:
    """A tiny QLoRA run and its artifact."""

    recipe: Recipe
    candidate: Candidate
    model: Any
    losses: list[float]
    adapter: Path


def _loss(model: nn.Module) -> Tensor:
    logits = model(input_ids=IDS).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Twenty steps on one batch, fp32 compute, then the artifact as every run writes it."""
    folder = tmp_path_factory.mktemp("qlora")
    recipe = make_recipe(folder, method="qlora")
    candidate = make_candidate(method="qlora")
    model: Any = build_model(recipe, candidate, device="cpu", ds_config=None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = _loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    run = RunFolder.create(folder / "runs", "qlora")
    adapter = write_artifact(state, model, load_tokenizer(recipe), recipe, run)
    return Trained(recipe, candidate, model.eval(), losses, adapter)


def _tensors(state: Any) -> Iterator[Tensor]:
    """Everything a quantization state keeps, nested states included."""
    for value in vars(state).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, bnb.functional.QuantState):
            yield from _tensors(value)


def _bytes_per_weight(layer: bnb.nn.Linear4bit) -> float:
    """Bytes of the storages behind one layer over the weights they stand for.

    The two code books (16 and 256 numbers) do not grow with the layer and are left out; a layer of the size of
    a real model's has 10^5 times as many weights as they have entries.
    """
    state = layer.weight.quant_state
    books = {id(state.code), *([id(state.state2.code)] if state.nested else [])}
    kept = [layer.weight.data, *(tensor for tensor in _tensors(state) if id(tensor) not in books)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(storages.values()) / (layer.in_features * layer.out_features)


@pytest.mark.parametrize(("double", "limit"), [(True, 0.53), (False, 0.5625)])
def test_base_is_really_4_bit(tmp_path: Path, double: bool, limit: float) -> None:
    """Weights, scales and their own scales take 0.516 bytes per weight (0.5625 without double quantization)."""
    layer = _quantized_layer(tmp_path, double=double, size=1024)
    assert 0.5 < _bytes_per_weight(layer) <= limit


def _quantized_layer(tmp_path: Path, *, double: bool, size: int) -> bnb.nn.Linear4bit:
    """A layer of a base loaded as training loads it, wide enough for a block of scales to be full."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=size, intermediate_size=size, num_hidden_layers=1, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    candidate = make_candidate(method="qlora")
    assert candidate.quant is not None
    candidate = replace(candidate, quant=replace(candidate.quant, double_quant=double))
    recipe = make_recipe(tmp_path, model={"name_or_path": str(tmp_path / "wide")})
    base: Any = load_base(recipe.model, candidate, device="cpu")
    return base.model.layers[0].self_attn.q_proj


def test_every_linear_layer_but_the_head_is_quantized(trained: Trained) -> None:
    """Seven layers per block are 4-bit; embeddings, norms and the head are not."""
    modules = dict(trained.model.get_base_model().named_modules())
    quantized = {name for name, module in modules.items() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(quantized) == 14
    assert type(modules["lm_head"]) is nn.Linear


def test_adapter_trains_and_the_base_does_not(trained: Trained) -> None:
    """The loss falls by half a nat, and the packed weights are those of a fresh load."""
    assert trained.losses[-1] < trained.losses[0] - 0.5
    fresh = load_base(trained.recipe.model, trained.candidate, device="cpu")
    packed = {n: p for n, p in fresh.named_parameters() if isinstance(p, bnb.nn.Params4bit)}
    kept = {
        name.replace("base_layer.", ""): parameter
        for name, parameter in trained.model.get_base_model().named_parameters()
        if isinstance(parameter, bnb.nn.Params4bit)
    }
    assert packed.keys() == kept.keys()
    assert all(torch.equal(packed[name].data, kept[name].data) for name in packed)


def test_reloaded_adapter_has_the_same_loss(trained: Trained) -> None:
    """The adapter folder on a freshly quantized base gives the trained loss again."""
    base = load_base(trained.recipe.model, trained.candidate, device="cpu")
    again = peft.PeftModel.from_pretrained(base, trained.adapter).eval()
    with torch.no_grad():
        assert _loss(again).item() == pytest.approx(_loss(trained.model).item(), rel=1e-6)


def _merged(base: Any, adapter: Path) -> Tensor:
    """Logits of the adapter merged into `base`."""
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)
    with torch.no_grad():
        return merged.eval()(input_ids=IDS).logits


def test_merging_keeps_the_logits_only_on_the_dequantized_base(trained: Trained) -> None:
    """Dequantized first, the merged model agrees with the trained one; the original base is off a thousandfold."""
    with torch.no_grad():
        expected = trained.model(input_ids=IDS).logits
    quantized = load_base(trained.recipe.model, trained.candidate, device="cpu")
    right = (_merged(dequantized_base(quantized), trained.adapter) - expected).abs().max().item()
    plain = replace(trained.candidate, method="lora", quant=None)
    original = load_base(trained.recipe.model, plain, device="cpu")
    wrong = (_merged(original, trained.adapter) - expected).abs().max().item()
    assert right < 1e-4
    assert wrong > 1000 * right
    assert wrong > 0.01 * expected.std().item()


def test_dequantized_base_is_the_model_it_was(trained: Trained) -> None:
    """Without an adapter, the plain fp32 base computes what the 4-bit one does, and saves as any model."""
    quantized: Any = load_base(trained.recipe.model, trained.candidate, device="cpu")
    with torch.no_grad():
        expected = quantized(input_ids=IDS).logits
        plain = dequantized_base(quantized)
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    folder = trained.adapter.parent / "plain"
    plain.save_pretrained(folder)
    assert b"quantization" not in (folder / "config.json").read_bytes()


def test_only_a_4_bit_base_can_be_dequantized(trained: Trained) -> None:
    """A base that is not quantized is refused in place of being copied for nothing."""
    plain = replace(trained.candidate, method="lora", quant=None)
    with pytest.raises(ValueError, match="no 4-bit layer"):
        dequantized_base(load_base(trained.recipe.model, plain, device="cpu"))


def test_bf16_storage_changes_no_value(trained: Trained) -> None:
    """Packed into bf16 for ZeRO-3 to shard, the weights are the same and stored in half as many elements."""
    quant: QuantNumbers = copy.copy(trained.candidate.quant)
    narrow: Any = load_base(trained.recipe.model, trained.candidate, device="cpu")
    wide: Any = load_base(
        trained.recipe.model, replace(trained.candidate, quant=replace(quant, storage_dtype="bf16")), device="cpu"
    )
    a, b = (model.model.layers[0].mlp.up_proj.weight for model in (narrow, wide))
    assert b.dtype == torch.bfloat16
    assert b.numel() * 2 == a.numel()
    with torch.no_grad():
        torch.testing.assert_close(wide(input_ids=IDS).logits, narrow(input_ids=IDS).logits)
