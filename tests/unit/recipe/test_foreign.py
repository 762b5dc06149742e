"""`launcher import`: configurations of other tools become recipes, and every key of them is accounted for."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cli import main
from launcher.errors import LauncherError
from launcher.recipe.foreign.convert import TOOLS, convert_file
from launcher.recipe.load import load_recipe

HERE = Path(__file__).parent / "foreign"
EXPECTED = {
    "axolotl": {
        "method": "qlora",
        "lora.r": 32,
        "lora.lora_alpha": 16,
        "lora.target_modules": "all-linear",
        "data.packing": True,
        "data.max_seq_length": 4096,
        "data.validation.share": 0.05,
        "train.global_batch_size": 8,
        "train.learning_rate": 2e-4,
        "train.optim": "paged_adamw_8bit",
        "deepspeed.stage": 2,
        "wandb.project": "tuning",
        "model.attn_implementation": "flash_attention_2",
    },
    "llamafactory": {
        "method": "lora",
        "lora.r": 8,
        "lora.target_modules": "all-linear",
        "data.packing": False,
        "data.max_seq_length": 2048,
        "data.validation.share": 0.1,
        "train.global_batch_size": 8,
        "train.precision": "bf16",
        "deepspeed.stage": 3,
        "deepspeed.offload_optimizer": "cpu",
        "checkpoint.save_steps": 500,
        "model.trust_remote_code": True,
    },
    "trl": {
        "method": "qlora",
        "lora.target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "data.loss_on": "assistant",
        "data.validation.source.split": "test_sft",
        "train.global_batch_size": 8,
        "train.precision": "bf16",
        "train.max_steps": None,
        "checkpoint.save_total_limit": 1,
    },
    "torchtune": {
        "method": "lora",
        "lora.r": 8,
        "lora.target_modules": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "data.max_seq_length": 8192,
        "data.loss_on": "all",
        "train.global_batch_size": 16,
        "train.optim": "adamw_torch_fused",
        "train.weight_decay": 0.01,
        "train.learning_rate": 3e-4,
        "train.max_grad_norm": 0,
        "train.warmup_ratio": 0.03,
        "data.validation.share": None,
    },
    "axolotl-full": {
        "method": "full",
        "lora.r": "auto",
        "data.validation.share": None,
        "train.global_batch_size": 16,
        "train.max_steps": 400,
        "train.warmup_ratio": 0.1,
        "checkpoint.save_steps": 100,
        "train.precision": "fp32",
        "train.lr_scheduler_type": "cosine",
        "wandb.mode": "disabled",
        "model.attn_implementation": "auto",
    },
    "llamafactory-pretrain": {
        "method": "qlora",
        "lora.r": 8,
        "lora.lora_alpha": 16,
        "lora.lora_dropout": 0,
        "data.loss_on": "all",
        "data.packing": True,
        "train.per_device_train_batch_size": 8,
        "train.global_batch_size": 32,
        "train.num_train_epochs": 3,
        "train.lr_scheduler_type": "linear",
        "train.learning_rate": 5e-5,
        "train.warmup_ratio": 0.03,
        "train.precision": "bf16",
        "train.gradient_checkpointing": False,
        "train.max_steps": None,
        "wandb.mode": "disabled",
        "model.attn_implementation": "eager",
    },
    "llamafactory-v1": {
        "method": "qlora",
        "lora.r": 16,
        "lora.target_modules": "all-linear",
        "train.global_batch_size": 16,
        "train.max_steps": 10,
        "deepspeed.stage": 3,
        "train.lr_scheduler_type": "constant",
        "train.weight_decay": 0.01,
        "data.packing": True,
    },
    "trl-mixture": {
        "method": "full",
        "data.validation.count": 1000,
        "data.split_seed": 7,
        "train.num_train_epochs": 3,
        "train.lr_scheduler_type": "cosine",
        "data.max_seq_length": 4096,
        "train.max_steps": None,
        "data.loss_on": "all",
        "train.warmup_ratio": 0,
        "wandb.mode": "auto",
    },
    "torchtune-full": {
        "method": "qlora",
        "model.name_or_path": "/models/phi-4",
        "data.loss_on": "assistant",
        "data.packing": True,
        "lora.target_modules": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        "train.max_steps": 100,
        "train.global_batch_size": 4,
        "train.optim": "paged_adamw_8bit",
        "train.lr_scheduler_type": "constant",
        "train.max_grad_norm": 0,
        "train.weight_decay": 0.01,
        "wandb.project": "tuning",
    },
}
SOURCES = {
    "axolotl-full": [("org/chats", "sharegpt", 0.2), ("one.jsonl", "text", 1), ("two.jsonl", "text", 1)],
    "llamafactory": [("identity.json", "alpaca", 1), ("alpaca_en_demo.json", "auto", 1)],
    "llamafactory-v1": [("rows.jsonl", "auto", 1)],
    "trl-mixture": [("org/mix", "auto", 0.5), ("org/code", "auto", 1)],
    "torchtune-full": [("chats.jsonl", "messages", 1), ("org/pages", "text", 0.05)],
}  # fmt: skip
NOT_CARRIED = {
    "axolotl": {"warmup_steps", "loraplus_lr_ratio", "special_tokens.pad_token", "datasets[1].roles_to_train"},
    "llamafactory": {"dataset[alpaca_en_demo]", "template", "max_samples", "ddp_timeout"},
    "trl": {"lora_modules_to_save", "neftune_noise_alpha", "push_to_hub"},
    "torchtune": {"lr_scheduler.num_warmup_steps", "device", "shuffle"},
    "axolotl-full": {
        "lora_r", "lora_alpha", "attn_implementation", "optimizer", "lr_scheduler", "gradient_checkpointing",
        "fsdp_config", "context_parallel_size", "chat_template", "adam_beta2", "plugins",
    },
    "llamafactory-pretrain": {"dataset[pages]", "warmup_steps", "use_badam", "report_to[tensorboard]"},
    "llamafactory-v1": {"kernel_config", "dist_config.name", "template"},
    "trl-mixture": {
        "chat_template", "lr_scheduler_type", "lr_scheduler_kwargs.min_lr_rate", "save_steps", "max_length",
        "dataset_mixture.datasets[0].columns", "hub_strategy",
    },
    "torchtune-full": {"dataset[1].column", "tokenizer.max_seq_len", "profiler", "optimizer_in_bwd", "share"},
}  # fmt: skip


def field(recipe, path):
    """A field by its dotted name."""
    for part in path.split("."):
        recipe = getattr(recipe, part)
    return recipe


@pytest.mark.parametrize("tool", EXPECTED)
def test_an_example_becomes_a_recipe_that_loads(tool, tmp_path):
    """What both sides can say is carried over with its value."""
    path = tmp_path / "made.yaml"
    path.write_text(convert_file(HERE / f"{tool}.yaml").text)
    recipe = load_recipe(path)
    assert {name: field(recipe, name) for name in EXPECTED[tool]} == EXPECTED[tool]


@pytest.mark.parametrize("tool", NOT_CARRIED)
def test_what_cannot_be_carried_over_is_listed(tool):
    """In the account, and in the recipe's head for whoever reads it later."""
    made = convert_file(HERE / f"{tool}.yaml")
    listed = {one.key for one in made.left_out}
    assert listed >= NOT_CARRIED[tool]
    assert all(f"#   {key}:" in made.text for key in NOT_CARRIED[tool])
    assert all(one.why for one in made.left_out)


@pytest.mark.parametrize("tool", SOURCES)
def test_every_data_set_is_carried_over_with_its_format_and_weight(tool, tmp_path):
    """One of several files makes several sources; a slice or a share of a mixture is a weight."""
    path = tmp_path / "made.yaml"
    path.write_text(convert_file(HERE / f"{tool}.yaml").text)
    sources = load_recipe(path).data.train
    assert [(one.path.removeprefix(f"{HERE}/"), one.format, one.weight) for one in sources] == SOURCES[tool]


@pytest.mark.parametrize("tool", EXPECTED)
@pytest.mark.parametrize("key", ["quite_new_option", "another.nested_one"])
def test_an_unknown_key_is_never_dropped_silently(tool, key, tmp_path):
    """A key nobody knows appears in the account under its dotted name."""
    outer, _, inner = key.partition(".")
    extra = f"\n{outer}: {{{inner}: 7}}\n" if inner else f"\n{outer}: 7\n"
    path = tmp_path / "foreign.yaml"
    path.write_text((HERE / f"{tool}.yaml").read_text() + extra)
    assert key in {one.key for one in convert_file(path).left_out}


def test_configuration_and_revision_of_a_data_set_are_carried_over(tmp_path):
    """Axolotl's name and revision, TRL's dataset_config, LLaMA-Factory's subset: `config` and `revision` here."""
    configs = {
        "axolotl": (HERE / "axolotl.yaml").read_text().replace(
            "datasets:\n", "datasets:\n  - {path: org/rows, name: hard, revision: v2, type: chat_template}\n"
        ),
        "trl": (HERE / "trl.yaml").read_text() + "\ndataset_config: hard\n",
        "llamafactory": (HERE / "llamafactory.yaml").read_text(),
    }  # fmt: skip
    info = {name: {"hf_hub_url": "org/rows", "subset": "hard"} for name in ("identity", "alpaca_en_demo")}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    for tool, text in configs.items():
        path = tmp_path / f"{tool}.yaml"
        path.write_text(text)
        made = tmp_path / f"{tool}-recipe.yaml"
        made.write_text(convert_file(path).text)
        first = load_recipe(made).data.train[0]
        assert first.config == "hard", tool
        assert first.revision == ("v2" if tool == "axolotl" else None)


def test_the_number_of_gpus_makes_the_global_batch():
    """Their batch is per device; ours is of all."""
    assert "global_batch_size: 64" in convert_file(HERE / "axolotl.yaml", gpus=8).text


def test_the_verb_writes_once_and_never_over_a_file(tmp_path):
    """-o writes; a second time is a conflict; --dry-run writes nothing."""
    out = tmp_path / "recipe.yaml"
    words = ["import", str(HERE / "trl.yaml"), "-o", str(out)]
    runner = CliRunner()
    assert runner.invoke(main, [*words, "--dry-run"]).exit_code == 0
    assert not out.exists()
    assert runner.invoke(main, words).exit_code == 0
    assert load_recipe(out).method == "qlora"
    assert runner.invoke(main, words).exit_code == 7
    told = json.loads(runner.invoke(main, ["import", str(HERE / "trl.yaml"), "--json"]).stdout)
    assert told["tool"] == "trl"


def test_a_file_of_no_known_tool_is_refused(tmp_path):
    """Exit 2, with the tools that are known."""
    path = tmp_path / "other.yaml"
    path.write_text("learning_rate: 1e-4\n")
    result = CliRunner().invoke(main, ["import", str(path)])
    assert result.exit_code == 2
    assert "axolotl" in result.stderr


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=40)
@given(tool=st.sampled_from(sorted(TOOLS)), key=st.integers(0, 60), value=_VALUES)
def test_odd_values_make_an_error_and_no_traceback(tool, key, value, tmp_path_factory):
    """Whatever stands behind a known key, the answer is a recipe or a LauncherError."""
    import yaml

    path = HERE / {"llama-factory": "llamafactory.yaml"}.get(tool, f"{tool}.yaml")
    source = yaml.safe_load(path.read_text())
    source[sorted(source)[key % len(source)]] = value
    changed = tmp_path_factory.mktemp("odd") / "odd.yaml"
    changed.write_text(yaml.safe_dump(source))
    try:
        convert_file(changed, tool=tool)
    except LauncherError as error:
        assert error.problems
