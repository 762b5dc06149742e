"""`launcher import`: the tables of docs/import.md hold, key by key; other objectives and damaged files are refused."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from launcher.cli import main
from launcher.errors import RecipeError
from launcher.recipe.foreign import axolotl, llamafactory, llamafactory1, torchtune, trl
from launcher.recipe.foreign.convert import convert_file
from launcher.recipe.foreign.draft import SWITCHED_OFF, Draft, is_off, leaves
from launcher.recipe.foreign.page import page
from launcher.recipe.foreign.source import read

HERE = Path(__file__).parent / "foreign"
PAGE = Path(__file__).resolve().parents[3] / "docs" / "import.md"
MODULES = {
    "axolotl": axolotl,
    "llamafactory": llamafactory,
    "llamafactory1": llamafactory1,
    "trl": trl,
    "torchtune": torchtune,
}
SMALLEST = {
    "axolotl": {
        "base_model": "m", "adapter": "qlora", "datasets": [{"path": "a.jsonl"}], "micro_batch_size": 2,
        "learning_rate": 1e-4,
    },
    "llamafactory": {
        "model_name_or_path": "m", "finetuning_type": "lora", "quantization_bit": 4, "dataset": "a", "template": "t",
    },
    "llamafactory1": {"model": "m", "peft_config": {"name": "lora"}, "train_dataset": "a.jsonl",
                      "quant_config": {"quantization_bit": 4}},
    "trl": {"model_name_or_path": "m", "dataset_name": "org/a", "use_peft": True, "load_in_4bit": True},
    "torchtune": {
        "model": {"_component_": "t.qlora_x", "lora_attn_modules": ["q_proj"], "lora_rank": 8, "lora_alpha": 16},
        "checkpointer": {"checkpoint_dir": "m"}, "dataset": {"_component_": "t.alpaca_dataset"}, "batch_size": 2,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-4}, "epochs": 1,
    },
}  # fmt: skip
WORDS = {
    "model.name_or_path": "m", "model.revision": "v2", "name": "mine", "wandb.entity": "us", "wandb.group": "g",
    "wandb.project": "p", "wandb.mode": "offline", "quantization.bnb_4bit_quant_type": "fp4", "lora.lora_dropout": 0.1,
    "train.warmup_ratio": 0.1, "train.learning_rate": 1e-3,
}  # fmt: skip
"""Values for fields that are no whole number and no switch."""
SWITCHES = ("trust_remote_code", "use_rslora", "double_quant", "gradient_checkpointing")
READ_AS = {
    "axolotl": {
        "adapter": "lora", "load_in_4bit": True, "peft_use_dora": True, "lora_target_linear": True,
        "lora_target_modules": ["q_proj"], "datasets": [{"path": "b.jsonl", "type": "alpaca"}],
        "pretraining_dataset": [{"path": "org/pages"}], "val_set_size": 0.1, "test_datasets": [{"path": "t.jsonl"}],
        "sample_packing": True, "train_on_inputs": True, "chat_template": "x.jinja", "chat_template_jinja": "y.jinja",
        "micro_batch_size": 3, "gradient_accumulation_steps": 4, "batch_size": 8, "max_steps": 9, "bf16": True,
        "fp16": True, "bfloat16": True, "float16": True, "torch_dtype": "float16", "warmup_steps": 0.1,
        "lr_scheduler": "linear", "optimizer": "adamw_bnb_8bit", "gradient_checkpointing": True,
        "attn_implementation": "sdpa", "flash_attention": True, "sdp_attention": True, "eager_attention": True,
        "logging_steps": 5, "eval_steps": 7, "save_steps": 8.0, "deepspeed": "zero2.json", "wandb_project": "p",
        "use_wandb": False,
    },
    "llamafactory": {
        "finetuning_type": "full", "quantization_bit": 4, "use_dora": True, "lora_target": "q_proj,v_proj",
        "dataset": "b", "val_size": 0.1, "eval_dataset": "c", "packing": True, "neat_packing": True, "stage": "pt",
        "train_on_prompt": True, "mask_history": True, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4, "max_steps": 9, "bf16": True, "fp16": True, "pure_bf16": True,
        "warmup_steps": 0.1, "lr_scheduler_type": "cosine", "optim": "adamw_torch", "flash_attn": "fa2",
        "disable_gradient_checkpointing": True, "logging_steps": 5, "eval_steps": 7, "save_steps": 8,
        "deepspeed": {"zero_optimization": {"stage": 2}}, "report_to": "wandb",
    },
    "llamafactory1": {
        "peft_config.name": "lora", "quant_config.quantization_bit": 4, "peft_config.target_modules": "all",
        "train_dataset": "b.jsonl", "batching_strategy": "padding_free", "micro_batch_size": 2,
        "global_batch_size": 8, "max_steps": 9, "bf16": True, "logging_steps": 5, "save_steps": 8,
        "dist_config.config_file": "ds_z3.json",
    },
    "trl": {
        "use_peft": True, "load_in_4bit": True, "use_dora": True, "lora_target_modules": ["q_proj"],
        "dataset_name": "org/b", "dataset_config": "hard", "dataset_configs": ["hard"], "dataset_train_split": "sft",
        "datasets": [{"path": "org/c"}], "dataset_mixer": {"org/d": 0.5}, "dataset_mixture.seed": 3,
        "max_length": 512, "max_seq_length": 512, "packing": True, "assistant_only_loss": True,
        "completion_only_loss": True, "chat_template_path": "x.jinja", "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4, "max_steps": 9, "bf16": True, "fp16": True, "dtype": "bfloat16",
        "torch_dtype": "bfloat16", "warmup_steps": 0.1, "lr_scheduler_type": "cosine", "optim": "adamw_8bit",
        "attn_implementation": "eager", "logging_steps": 5, "eval_steps": 7, "save_steps": 8,
        "deepspeed": "zero3.json", "report_to": ["wandb"],
    },
    "torchtune": {
        "model._component_": "t.lora_x", "model.use_dora": True, "model.quantize_base": True,
        "model.lora_attn_modules": ["k_proj"], "model.apply_lora_to_mlp": True, "dataset": {"_component_": "t.x"},
        "batch_size": 3, "gradient_accumulation_steps": 4, "max_steps_per_epoch": 9, "dtype": "fp32",
        "lr_scheduler._component_": "t.get_cosine_schedule_with_warmup", "lr_scheduler.num_warmup_steps": 0.1,
        "optimizer._component_": "bitsandbytes.optim.PagedAdamW8bit", "optimizer.fused": True,
        "log_every_n_steps": 5, "metric_logger._component_": "t.WandBLogger",
    },
}  # fmt: skip
BESIDE = {
    ("axolotl", "peft_use_dora"): {"adapter": "lora"},
    ("axolotl", "chat_template_jinja"): {"chat_template": "jinja"},
    ("llamafactory", "warmup_steps"): {"max_steps": 100},
    ("trl", "dataset_mixer"): {"dataset_name": None},
    ("trl", "dataset_configs"): {"dataset_name": "org/b"},
    ("trl", "dataset_mixture.seed"): {"dataset_mixture": {"datasets": [{"id": "org/e"}]}},
    ("torchtune", "model.quantize_base"): {"model._component_": "t.lora_x"},
}
"""Keys that count only beside others."""
ACCOUNTED_ELSEWHERE = {
    "ray_num_workers": "the number of GPUs, in a note",
    "dataset_dir": "where the table of data sets is looked up",
    "dataset_mixture": "through its own keys",
    "dataset_splits": "beside dataset_mixer",
    "dataset_test_split": "beside eval_strategy",
    "test_split_size": "beside datasets",
    "dataset.packed": "through dataset",
    "dataset.train_on_input": "through dataset",
}


def with_key(settings, key, value):
    """`settings` with `value` at a dotted key, as text."""
    copy = json.loads(json.dumps(settings))
    *above, last = key.split(".")
    place = copy
    for part in above:
        place = place.setdefault(part, {})
    place[last] = value
    return copy


def carried(tool, settings):
    """Key -> fields, of a file with these settings."""
    draft = Draft(source=settings, folder=HERE, gpus=None)
    MODULES[tool].convert(draft)
    fields = {}
    for one in draft.carried():
        fields.setdefault(one.key, set()).add(one.field)
    return fields


@pytest.mark.parametrize(("tool", "key"), [(tool, key) for tool, module in MODULES.items() for key in module.SAME])
def test_a_key_of_the_same_meaning_sets_its_field(tool, key):
    """The first table of docs/import.md, row by row."""
    field = MODULES[tool].SAME[key]
    value = WORDS.get(field, True if field.endswith(SWITCHES) else 16)
    found = carried(tool, with_key(SMALLEST[tool], key, value))
    assert field in found[key]


@pytest.mark.parametrize(("tool", "key"), [(tool, key) for tool, known in READ_AS.items() for key in known])
def test_a_key_that_is_translated_sets_the_field_of_its_row(tool, key):
    """The rows below: values are read, not copied."""
    rows = {one: field for keys, field in MODULES[tool].READ.items() for one in keys.split(", ")}
    settings = SMALLEST[tool]
    for other, value in BESIDE.get((tool, key), {}).items():
        settings = with_key(settings, other, value)
    found = carried(tool, with_key(settings, key, READ_AS[tool][key]))
    assert rows[key] in found[key]


@pytest.mark.parametrize("tool", READ_AS)
def test_every_row_of_the_page_is_tried(tool):
    """A key that is added to a table and to no test fails here."""
    rows = {one for keys in MODULES[tool].READ for one in keys.split(", ")}
    assert rows == set(READ_AS[tool]) | (rows & set(ACCOUNTED_ELSEWHERE))


@pytest.mark.parametrize("path", sorted(HERE.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_leaf_of_an_example_is_carried_or_listed(path):
    """Nothing falls between: a key sets a field, is listed with a reason, or a note says what it did."""
    made = convert_file(path)
    known = {one.key for one in made.carried} | {one.key.partition("[")[0] for one in made.left_out}
    lost = [
        key
        for key, _ in leaves(read(path).settings)
        if not any(key == one or key.startswith(f"{one}.") for one in known) and key not in " ".join(made.notes)
    ]
    agreed = {"quantization_method", "max_steps", "stage", "dataset_dir"}  # true here anyway
    assert set(lost) <= agreed
    assert all(one.why != SWITCHED_OFF or is_off(one.value) for one in made.left_out)


@pytest.mark.parametrize("path", sorted(HERE.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_an_example_carries_stands_on_the_page(path):
    """The other way round: no key sets a field that the page does not tell of."""
    text = PAGE.read_text()
    for one in convert_file(path).carried:
        assert f"`{one.key}`" in text or f"`{one.key.partition('.')[0]}`" in text


def changed(value):
    """Another value of the same kind; text that no table knows."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 3
    return [*value, "other"] if isinstance(value, list) else f"{value[::-1]}q"


def account(tool, settings):
    """All that is told of a file."""
    draft = Draft(source=settings, folder=HERE, gpus=None)
    try:
        MODULES[tool].convert(draft)
    except ValueError as error:
        return str(error)
    return (draft.recipe, draft.left_out, draft.notes, draft.problems)


NEVER_HEARD = {"load_in_4bit", "metric_logger._component_"}
"""adapter: qlora says the first already; every logger but W&B's leads to wandb.mode: disabled."""


@pytest.mark.parametrize("path", sorted(HERE.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_value_can_change_without_a_word(path):
    """What is dropped in silence is what nobody notices a change of: every value changes the recipe or the account."""
    settings, tool = read(path).settings, path.stem.partition("-")[0]
    tool = "llamafactory1" if path.stem == "llamafactory-v1" else tool
    before = account(tool, settings)
    silent = [
        key
        for key, value in leaves(settings)
        if not is_off(value) and account(tool, with_key(settings, key, changed(value))) == before
    ]
    assert set(silent) <= NEVER_HEARD


def test_the_page_is_what_the_tables_say():
    """docs/import.md is generated; a drift fails here."""
    assert PAGE.read_text() == page()


@pytest.mark.parametrize(
    ("tool", "key", "value"),
    [
        ("axolotl", "rl", "dpo"),
        ("axolotl", "reward_model", True),
        ("axolotl", "processor_type", "AutoProcessor"),
        ("llamafactory", "stage", "dpo"),
        ("llamafactory", "stage", "rm"),
        ("llamafactory", "image_max_pixels", 262144),
        ("llamafactory", "do_predict", True),
        ("trl", "beta", 0.1),
        ("trl", "num_generations", 8),
        ("trl", "loss_type", "apo_zero"),
        ("torchtune", "loss", {"_component_": "torchtune.rlhf.loss.DPOLoss"}),
        ("torchtune", "teacher_model", {"_component_": "t.x"}),
        ("torchtune", "optimizer", None),
        ("torchtune", "dataset", {"_component_": "torchtune.datasets.stack_exchange_paired_dataset"}),
        ("torchtune", "model._component_", "torchtune.models.llama3_2_vision.llama3_2_vision_11b"),
    ],
)
def test_another_objective_never_becomes_a_supervised_run(tool, key, value, tmp_path):
    """Exit 2, with the key that says so; the same file without it is converted."""
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(with_key(SMALLEST[tool], key, value)))
    result = CliRunner().invoke(main, ["import", str(path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert key.split(".")[0] in result.stderr
    path.write_text(yaml.safe_dump(SMALLEST[tool]))
    assert CliRunner().invoke(main, ["import", str(path)]).exit_code == 0


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        ("- base_model\n", "found a list"),
        ("base_model: x\n\tdatasets: y\n", "a tab"),
        ('{"zero_optimization": {"stage": 3}}', "is a DeepSpeed file"),
        ("distributed_type: FSDP\n", "is an Accelerate file"),
        ("name: a\nmodel: {name_or_path: m}\ndata: {train: [a.jsonl]}\n", "is a recipe already"),
        ("model_name_or_path: m\ntemplate: t\ninfer_backend: vllm\n", "is for inference"),
        ("base_model: x\nbase_model: y\ndatasets: [a]\n", "stands twice"),
        ("base_model: x\na: &a {b: *a, <<: *a}\ndatasets: [a]\n", "nested too deeply"),
        ("base_model: !!python/name:os.system x\n", "is not allowed"),
        ("finetuning_type: lora\n", "names no model"),
        ("base_model: x\nmicro_batch_size: 1\n", "names no data to train on"),
    ],
)
def test_a_damaged_file_or_one_of_another_kind_says_what_it_is(content, told, tmp_path):
    """Exit 2 and one line, no traceback."""
    path = tmp_path / "file.yaml"
    path.write_text(content)
    result = CliRunner().invoke(main, ["import", str(path)])
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_binary_file_is_no_configuration(tmp_path):
    """Bytes that are no text."""
    path = tmp_path / "file.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(RecipeError, match="cannot be read"):
        convert_file(path)


def test_merge_keys_count_and_own_keys_win(tmp_path):
    """YAML's <<, which the tools' loader knows and recipes do not."""
    path = tmp_path / "merged.yaml"
    path.write_text(
        "shared: &s {lora_r: 8, lora_alpha: 16}\n<<: *s\nlora_alpha: 32\n"
        "base_model: m\nadapter: lora\ndatasets: [a.jsonl]\n"
    )
    made = convert_file(path)
    assert {one.field: one.value for one in made.carried if one.key.startswith("lora")} == {
        "lora.r": 8,
        "lora.lora_alpha": 32,
    }


@pytest.mark.parametrize("root", ["${model_dir}", "${oc.env:HOME}"])
def test_a_reference_that_leads_nowhere_is_refused(root, tmp_path):
    """A circle, or a function of OmegaConf; a recipe with ${...} in it would fail later and say less."""
    path = tmp_path / "lost.yaml"
    path.write_text((HERE / "torchtune-full.yaml").read_text().replace("root: /models", f"root: {root}"))
    with pytest.raises(RecipeError, match="nothing here resolves"):
        convert_file(path)


def test_files_are_looked_up_above_the_configuration(tmp_path):
    """The tools start at their root: data/dataset_info.json and the DeepSpeed file lie above the example."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"mine": {"hf_hub_url": "org/mine", "split": "train"}}')
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lion"}}')
    path = tmp_path / "examples" / "train" / "one.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(SMALLEST["llamafactory"] | {"dataset": "mine", "deepspeed": "ds.json"}))
    made = convert_file(path)
    assert "path: org/mine" in made.text
    assert "stage: 2" in made.text
    assert "deepspeed[optimizer]" in {one.key for one in made.left_out}


def test_a_secret_in_a_foreign_file_is_shown_nowhere(tmp_path):
    """Tokens for hubs and trackers stand in such files; the recipe's head, stderr and the JSON hide them."""
    path = tmp_path / "keys.yaml"
    secrets = {"hub_token": "abc123", "hf_hub_token": "hf_" + "x" * 30, "env": {"WANDB_API_KEY": "0" * 40}}
    path.write_text(yaml.safe_dump(SMALLEST["trl"] | secrets | {"eos_token": "<|end|>", "odd\x1b[31m": "\x1b[2J"}))
    for words in ([], ["--json"]):
        told = CliRunner().invoke(main, ["import", str(path), *words])
        said = told.stdout + told.stderr
        assert told.exit_code == 0
        assert not any(secret in said for secret in ("abc123", "hf_xxx", "0" * 40, "\x1b"))
        assert "<|end|>" in said
        assert "hf_hub_token" in said


def test_the_json_tells_of_every_key(tmp_path):
    """`carried`, `left_out` and `notes` beside the recipe."""
    told = json.loads(CliRunner().invoke(main, ["import", str(HERE / "trl.yaml"), "--json"]).stdout)
    assert {"key": "lora_r", "value": 16, "field": "lora.r"} in told["carried"]
    assert {"carried", "left_out", "notes", "recipe", "schema", "tool"} == set(told)
