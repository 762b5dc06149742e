"""Parameter counts from config.json equal those of the real model classes, built without memory."""

import json

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.facts.model import model_shape
from launcher.planning.plan import LoraNumbers
from launcher.planning.trainable import lora_params
from launcher.recipe.schema import ModelSection

SMALL = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEAD_16 = {"head_dim": 16}
FAMILIES = {
    "llama": SMALL,
    "llama tied": SMALL
    | {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": SMALL | {"head_dim": 32},
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 32},
    "gemma": SMALL | HEAD_16,
    "gemma2": SMALL | HEAD_16,
    "gemma3_text": SMALL | HEAD_16,
    "granite": SMALL,
    "smollm3": SMALL | {"pad_token_id": 0},
    "olmo": SMALL,
    "olmo2": SMALL,
    "stablelm": SMALL,
    "starcoder2": SMALL,
    "phi": SMALL | {"num_key_value_heads": 6},
    "phi3": SMALL | {"pad_token_id": 0},
    "gpt_neox": SMALL,
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": SMALL
    | HEAD_16
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": []},
    "gpt2": {"vocab_size": 1000, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 64},
    "gpt_bigcode": {"vocab_size": 1000, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 64},
    "falcon": {"vocab_size": 1000, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6},
    "falcon new": {
        "model_type": "falcon",
        "vocab_size": 1000,
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "mpt": {"vocab_size": 1000, "d_model": 96, "n_layers": 3, "n_heads": 6, "max_seq_len": 64},
}


def build(name, folder):
    """The real model on the meta device, and the shape planned from its saved config.json."""
    keys = {"model_type": name} | FAMILIES[name]
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, model_shape(ModelSection(name_or_path=str(folder)))


@pytest.mark.parametrize("name", FAMILIES)
def test_parameter_counts_are_exact(name, tmp_path):
    """Total and embedding parameters are those of transformers' own class, to the element."""
    model, shape = build(name, tmp_path)
    assert shape.params == sum(parameter.numel() for parameter in model.parameters())
    assert shape.vocab == model.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_modules_are_those_lora_would_find(name, tmp_path):
    """Names and sizes of the linear modules of one layer match the model's; experts are no linear modules."""
    model, shape = build(name, tmp_path)
    head = model.get_output_embeddings()
    found = sorted(
        (path.split(".")[-1], module.weight.numel())
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not head
    )
    planned = sorted((each.name, each.in_features * each.out_features) for each in shape.linears) * shape.layers
    assert found == sorted(planned)


def test_a_saved_config_of_today_is_read(tmp_path):
    """The keys this transformers writes are the ones the planner reads (no silent default)."""
    _, shape = build("llama", tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (shape.hidden, shape.layers, shape.kv_heads) == (
        written["hidden_size"],
        written["num_hidden_layers"],
        written["num_key_value_heads"],
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_adapters_on_mixtures_have_the_planned_size(name, targets, tmp_path):
    """PEFT's all-linear adapts fused experts and router too; naming attention layers leaves them alone."""
    model, shape = build(name, tmp_path)
    lora = LoraNumbers(r=4, lora_alpha=8.0, lora_dropout=0.0, target_modules=targets, use_rslora=False, use_dora=False)
    config = peft.LoraConfig(r=4, target_modules=targets if isinstance(targets, str) else list(targets))
    adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    assert lora_params(shape, lora) == sum(each.numel() for each in adapted.parameters() if each.requires_grad)
