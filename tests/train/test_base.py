"""Tokenizer and base model: what is loaded, and which folders are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from launcher.errors import ModelError, RecipeError
from launcher.worker.model import build_model, count_parameters
from launcher.worker.tokenizer import load_tokenizer
from tests.tiny import VOCAB, make_candidate, make_recipe

# --- tokenizer -------------------------------------------------------------------------------------


def _set_tokens(folder: Path, **tokens: str | None) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.update(tokens)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("tokens", "pad"),
    [
        ({}, "<pad>"),
        ({"pad_token": None}, "</s>"),
        ({"pad_token": None, "eos_token": None, "unk_token": "<s>"}, "<s>"),
        ({"pad_token": "<a new token>"}, "</s>"),
    ],
)
def test_pad_token_has_an_embedding(tmp_path: Path, tokens: dict[str, str | None], pad: str) -> None:
    """Padding uses the tokenizer's own token, else end-of-sequence, else unknown: one the model has a row for."""
    recipe = make_recipe(tmp_path)
    _set_tokens(tmp_path / "model", **tokens)
    tokenizer = load_tokenizer(recipe)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id < VOCAB
    assert tokenizer.padding_side == "right"


def test_tokenizer_without_any_usable_token_is_refused(tmp_path: Path) -> None:
    """Without pad, end-of-sequence or unknown token the user has to choose one."""
    recipe = make_recipe(tmp_path)
    _set_tokens(tmp_path / "model", pad_token=None, eos_token=None)
    with pytest.raises(ModelError, match="no pad, end-of-sequence or unknown token"):
        load_tokenizer(recipe)


def test_folder_without_tokenizer_names_what_is_there(tmp_path: Path) -> None:
    """A model folder whose tokenizer was not copied says which files it has."""
    recipe = make_recipe(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer .*found config\.json"):
        load_tokenizer(recipe)


def test_chat_template_file_is_used(tmp_path: Path) -> None:
    """`data.chat_template` replaces the tokenizer's own template."""
    template = tmp_path / "mine.jinja"
    template.write_text("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")
    tokenizer = load_tokenizer(make_recipe(tmp_path, **{"data.chat_template": str(template)}))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"


def test_missing_chat_template_is_a_recipe_error(tmp_path: Path) -> None:
    """A template file that is not there is named."""
    with pytest.raises(RecipeError, match=r"data.chat_template: .*nowhere.jinja"):
        load_tokenizer(make_recipe(tmp_path, **{"data.chat_template": str(tmp_path / "nowhere.jinja")}))


# --- bases that are refused --------------------------------------------------------------------------


def _shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    half = len(names) // 2
    index = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _lose_shard(folder: Path) -> None:
    _shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _tear(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _become_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def _hold_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _become_encoder(folder: Path) -> None:
    _config(folder, model_type="bert", architectures=["BertForMaskedLM"])


def _already_quantized(folder: Path) -> None:
    _config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def _own_code(folder: Path) -> None:
    _config(folder, model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_lose_config, r"has no config\.json; found generation_config\.json"),
        (_lose_weights, r"has no weights .*found config\.json"),
        (_pickle_only, r"only pickled weights \(pytorch_model\.bin\)"),
        (_lose_shard, r"model-00002-of-00002\.safetensors, which the folder lacks \(1 of 2\)"),
        (_tear, r"model\.safetensors is not a whole safetensors file"),
        (_become_adapter, "is an adapter, not a base model"),
        (_hold_adapter, "holds an adapter beside the model"),
        (_become_encoder, "is a BertForMaskedLM, not a causal language model"),
        (_already_quantized, r"already quantized \(gptq\)"),
        (_own_code, "cannot be loaded"),
    ],
)
def test_unusable_base_is_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    """Whatever is wrong with a model folder is a ModelError that names the file or the architecture."""
    recipe = make_recipe(tmp_path)
    spoil(tmp_path / "model")
    with pytest.raises(ModelError, match=message):
        build_model(recipe, make_candidate(), device="cpu", ds_config=None)


def test_sharded_base_loads(tmp_path: Path) -> None:
    """Weights in several files with an index are one model."""
    recipe = make_recipe(tmp_path, method="full")
    _shard(tmp_path / "model")
    model = build_model(recipe, make_candidate(method="full"), device="cpu", ds_config=None)
    assert count_parameters(model).total == 139_584
