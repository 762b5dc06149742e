"""Tiny but real material for tests: tokenizer, model folder, rows and recipe, made in milliseconds without torch.

The text is Python's own documentation (`pydoc_data.topics`), which is on every machine that runs the tests.
Weights are written with safetensors' numpy side, so that light tests can have a complete model folder too.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np

from launcher.planning.plan import Buckets, Candidate, LoraNumbers, QuantNumbers
from launcher.recipe.schema import LORA_METHODS, PROMPT_METHODS, DataSection, DataSource, ModelSection, Recipe

VOCAB = 512
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 64, 2, 4, 2, 128
SPECIALS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Prefix-preserving, without generation markers: what most published models carry."""

CHAT_TEMPLATE_WITH_MARKERS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The same text, with the assistant's part marked."""


def words() -> list[str]:
    """Lower-case words of Python's documentation, in order of appearance."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics)[:20])
    return re.findall(r"[a-z]{2,}", text.lower())


def make_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Train a 512-entry byte-level BPE and save it to `folder` as transformers reads it; returns `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words())], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder


def make_model_dir(
    folder: Path, *, seed: int = 0, family: str = "llama", chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """Save config.json, random fp32 weights and the tokenizer to `folder`.

    `family`: llama, mistral, qwen2 (biases on q, k and v) or mixtral (4 experts, 2 active).
    """
    from safetensors.numpy import save_file

    make_tokenizer(folder, chat_template=chat_template)
    (folder / "config.json").write_text(json.dumps(_config(family), indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    save_file(_weights(family, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _config(family: str) -> dict[str, Any]:
    classes = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "mixtral": "MixtralForCausalLM",
    }
    config: dict[str, Any] = {
        "architectures": [classes[family]],
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    if family in ("mistral", "mixtral"):
        config["sliding_window"] = None
    if family == "mixtral":
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    return config


def _weights(family: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    kv = HIDDEN // HEADS * KV_HEADS
    weights = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN), "lm_head.weight": normal(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            weights[f"{at}.self_attn.{name}_proj.weight"] = normal(rows, HIDDEN)
            if family == "qwen2" and name != "o":
                weights[f"{at}.self_attn.{name}_proj.bias"] = normal(rows)
        weights |= _mlp(at, family, normal)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{norm}.weight"] = np.ones(HIDDEN, np.float32)
    weights["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    return weights


def _mlp(at: str, family: str, normal: Any) -> dict[str, np.ndarray]:
    if family != "mixtral":
        return {
            f"{at}.mlp.gate_proj.weight": normal(INTERMEDIATE, HIDDEN),
            f"{at}.mlp.up_proj.weight": normal(INTERMEDIATE, HIDDEN),
            f"{at}.mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE),
        }
    moe = {f"{at}.block_sparse_moe.gate.weight": normal(4, HIDDEN)}
    for expert in range(4):
        moe[f"{at}.block_sparse_moe.experts.{expert}.w1.weight"] = normal(INTERMEDIATE, HIDDEN)
        moe[f"{at}.block_sparse_moe.experts.{expert}.w2.weight"] = normal(HIDDEN, INTERMEDIATE)
        moe[f"{at}.block_sparse_moe.experts.{expert}.w3.weight"] = normal(INTERMEDIATE, HIDDEN)
    return moe


def make_chat_rows(path: Path, n: int = 64, seed: int = 0) -> Path:
    """Write `n` chats of one or two turns ("Repeat: ..." and the words) as JSONL with a `messages` column."""
    rng = random.Random(seed)
    pool = words()[:400]

    def turn() -> list[dict[str, str]]:
        said = " ".join(rng.choices(pool, k=rng.randint(2, 8)))
        return [{"role": "user", "content": f"Repeat: {said}"}, {"role": "assistant", "content": said}]

    rows = [{"messages": turn() + (turn() if rng.random() < 0.25 else [])} for _ in range(n)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_recipe(tmp: Path, **overrides: Any) -> Recipe:
    """A LoRA recipe over a tiny llama and 64 chats below `tmp` (made when missing).

    A section takes a mapping of its fields, a scalar its value, and dotted keys work too:
    `make_recipe(tmp, method="full", train={"max_steps": 3}, **{"data.packing": False})`.
    """
    if not (tmp / "model" / "config.json").exists():
        make_model_dir(tmp / "model")
    if not (tmp / "chats.jsonl").exists():
        make_chat_rows(tmp / "chats.jsonl")
    recipe = Recipe(
        name="tiny",
        model=ModelSection(name_or_path=str(tmp / "model")),
        data=DataSection(train=(DataSource(path=str(tmp / "chats.jsonl")),), max_seq_length=128),
        method="lora",
        output_dir=str(tmp / "runs"),
    )
    base = {"train": {"global_batch_size": 8, "max_steps": 4, "learning_rate": 1e-3, "precision": "fp32"}}
    for key, value in [*base.items(), *overrides.items()]:
        section, _, name = key.partition(".")
        if name:
            value = {name: value}
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(recipe, section), **value)
        recipe = dataclasses.replace(recipe, **{section: value})
    return recipe


def make_candidate(**overrides: Any) -> Candidate:
    """One CPU rank, fp32, LoRA, packed rows of 128 tokens; `overrides` are fields of Candidate."""
    method = overrides.get("method", "lora")
    tuned = method in LORA_METHODS
    values: dict[str, Any] = {
        "method": method,
        "gpu": "cpu",
        "device": "cpu",
        "nodes": 1,
        "gpus_per_node": 1,
        "zero_stage": 0,
        "offload_optimizer": "none",
        "offload_param": "none",
        "nvme_path": None,
        "micro_batch": 2,
        "gradient_accumulation": 4,
        "gradient_checkpointing": False,
        "checkpointing_reentrant": False,
        "precision": "fp32",
        "attn_implementation": "sdpa",
        "seq_len": 128,
        "packing": True,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lora": LoraNumbers(
            r=8,
            lora_alpha=16.0,
            lora_dropout=0.0,
            target_modules="all-linear",
            use_rslora=False,
            use_dora=method == "dora",
        )
        if tuned
        else None,
        "num_virtual_tokens": 8 if method in PROMPT_METHODS else None,
        "quant": QuantNumbers(quant_type="nf4", double_quant=True, compute_dtype="fp32", storage_dtype="uint8")
        if method == "qlora"
        else None,
        "buckets": Buckets(
            reduce_elements=100_000,
            allgather_elements=100_000,
            prefetch_elements=50_000,
            persistence_elements=1_000,
            max_live_elements=1_000_000,
            max_reuse_elements=1_000_000,
            sub_group_elements=1_000_000,
        ),
    }
    return Candidate(**(values | overrides))
