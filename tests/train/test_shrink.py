"""The tiny stand-in of a model: every architecture the catalogue knows can be shrunk, and stays what it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import DataError
from launcher.facts.model import catalogue
from launcher.recipe.schema import DataSource, ModelSection
from launcher.worker import shrink
from launcher.worker.shrunk_config import shrunk_config
from launcher.worker.tokenizer import load_tokenizer
from tests.tiny import make_recipe

OWN_CODE = {"qwen", "baichuan", "chatglm"}
"""Architectures that live on the hub as code of their own, which is not on this machine."""
ROWS = {row["model_type"]: row for row in catalogue().values()}
SMALL = 12_000_000
"""Parameters of the largest of them apart from its vocabulary."""


def small_of(config: Any, seq_len: int = 256) -> Any:
    """The shrunk configuration as the class it belongs to."""
    return type(config).from_dict(shrunk_config(config, seq_len=seq_len))


def config_of(model_type: str, **values: Any) -> Any:
    """A configuration with transformers' defaults."""
    return AutoConfig.for_model(model_type, **values)


@pytest.mark.parametrize("model_type", sorted(set(ROWS) - OWN_CODE))
def test_every_architecture_of_the_catalogue_can_be_built_small_and_run(model_type: str) -> None:
    """A forward pass gives a logit per entry of the vocabulary, which keeps its size."""
    row = ROWS[model_type]
    config = small_of(shrink.known_config(row))
    model = AutoModelForCausalLM.from_config(config)
    logits = model(torch.arange(8)[None], use_cache=False).logits
    assert logits.shape == (1, 8, row["vocab_size"])
    assert torch.isfinite(logits).all()
    embedded = sum(p.numel() for p in model.parameters() if row["vocab_size"] in p.shape)
    assert sum(p.numel() for p in model.parameters()) - embedded < SMALL


def test_grouped_heads_stay_grouped_and_single_ones_single() -> None:
    """Llama's 32 query heads over 8 key heads become 8 over 2; one key head for all stays one; equal stays equal."""
    sizes = {"num_attention_heads": 32, "hidden_size": 4096}
    grouped, single, equal = (small_of(config_of("llama", num_key_value_heads=n, **sizes)) for n in (8, 1, 32))
    assert (grouped.num_attention_heads, grouped.num_key_value_heads) == (8, 2)
    assert single.num_key_value_heads == 1 < single.num_attention_heads
    assert equal.num_key_value_heads == equal.num_attention_heads


def test_heads_wider_than_their_share_stay_wider() -> None:
    """Qwen3's query heads together are wider than the hidden size; so are the small ones."""
    small = small_of(config_of("qwen3", hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128))
    assert small.head_dim * small.num_attention_heads > small.hidden_size


def test_every_kind_of_layer_is_kept() -> None:
    """Gemma 3 mixes layers with a sliding window and without: one of each remains, and the window is a real one."""
    large = config_of("gemma3_text")
    small = small_of(large, seq_len=128)
    assert set(small.layer_types) == set(large.layer_types)
    assert len(small.layer_types) == small.num_hidden_layers == 2
    assert small.sliding_window < 128


def test_experts_stay_experts() -> None:
    """Fewer of them, and fewer than all are active."""
    small = small_of(config_of("mixtral"))
    assert 1 < small.num_experts_per_tok < small.num_local_experts


def test_tied_embeddings_stay_tied() -> None:
    """One matrix at both ends, or two, as in the model."""
    for tied in (True, False):
        model = AutoModelForCausalLM.from_config(small_of(config_of("llama", tie_word_embeddings=tied)))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_a_model_that_is_not_here_gets_a_stand_in_tokenizer_and_says_so(tmp_path: Path) -> None:
    """A catalogued id without files: the planner's sizes, single bytes for a tokenizer, and a sentence about it."""
    recipe = dataclasses.replace(make_recipe(tmp_path), model=ModelSection(name_or_path="nobody/Llama-3.1-8B"))
    told = shrink.answer(request(recipe, tmp_path, config=ROWS["llama"]))
    assert "nobody/Llama-3.1-8B" in told["tokenizer_stand_in"]
    small = dataclasses.replace(recipe, model=ModelSection(name_or_path=str(tmp_path / "made" / "model")))
    tokenizer = load_tokenizer(small)
    assert tokenizer.decode(tokenizer("any text: ü", add_special_tokens=False).input_ids) == "any text: ü"
    assert told["sources"][0]["trained_tokens"] > 0


def test_the_real_tokenizer_and_the_head_of_the_data_are_taken_as_they_are(tmp_path: Path) -> None:
    """The same tokenizer.json, and the first rows unchanged."""
    recipe = make_recipe(tmp_path)
    told = shrink.answer(request(recipe, tmp_path, rows=10))
    assert told["tokenizer_stand_in"] is None
    original = tmp_path / "model" / "tokenizer.json"
    assert (tmp_path / "made" / "model" / "tokenizer.json").read_bytes() == original.read_bytes()
    kept = [json.loads(line) for line in Path(told["paths"][0]).read_text().splitlines()]
    rows = [json.loads(line) for line in Path(recipe.data.train[0].path).read_text().splitlines()]
    assert kept == rows[:10]


def test_a_bad_row_among_the_first_is_refused_and_a_later_one_not_read(tmp_path: Path) -> None:
    """The rehearsal reads the head of the data alone, and what is wrong there is told with its place."""
    recipe = make_recipe(tmp_path)
    path = Path(recipe.data.train[0].path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:20], "not JSON", *lines[20:]]) + "\n")
    assert len(shrink.read_heads(recipe, 10)[0].rows) == 10
    with pytest.raises(DataError, match=r"chats.jsonl:21"):
        shrink.read_heads(recipe, 30)


def test_rows_whose_answer_comes_late_are_rehearsed_at_full_length(tmp_path: Path) -> None:
    """Truncation for speed must not mask the answers of most rows."""
    recipe = make_recipe(tmp_path, **{"data.max_seq_length": 1024})
    long_ask = {"role": "user", "content": "word " * 300}
    row = {"messages": [long_ask, {"role": "assistant", "content": "yes"}]}
    path = tmp_path / "late.jsonl"
    path.write_text((json.dumps(row) + "\n") * 8)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=(DataSource(path=str(path)),)))
    heads, tokenizer = shrink.read_heads(recipe, 8), load_tokenizer(recipe)
    short = shrink.rehearsed_length(heads, tokenizer, recipe, vocab=512 * 2**10, micro=2)
    assert short > 300
    paths = shrink.write_heads(heads, tokenizer, recipe, tmp_path / "data", length=short)
    assert len(Path(paths[0]).read_text().splitlines()) == 8


def request(recipe: Any, tmp_path: Path, *, rows: int = 300, config: Any = None) -> dict[str, Any]:
    """What runs/rehearsal.py would ask."""
    from launcher.recipe.dump import recipe_to_yaml

    folder = tmp_path / "made"
    folder.mkdir()
    return {"recipe": recipe_to_yaml(recipe), "config": config, "folder": str(folder), "rows": rows, "micro_batch": 2}
