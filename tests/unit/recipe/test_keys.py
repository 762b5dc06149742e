"""Keys: unknown ones, those of other tools, and overrides."""

from __future__ import annotations

import pytest

from launcher.recipe.aliases import ALIASES, REFUSED, VALUES
from launcher.recipe.build import field_paths
from launcher.recipe.load import recipe_from_text
from tests.unit.recipe.material import GOOD, problems


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train: {learnin_rate: 1}", "r.yaml:4:9: train.learnin_rate: unknown key; did you mean train.learning_rate?"),
        ("learnin_rate: 1", "r.yaml:4:1: learnin_rate: unknown key; did you mean train.learning_rate?"),
        ("metod: lora", "r.yaml:4:1: metod: unknown key; did you mean method?"),
        (
            "slurm: {gpus-per-node: 1}",
            "r.yaml:4:9: slurm.gpus-per-node: unknown key; did you mean slurm.gpus_per_node?",
        ),
        ("lora: {seed: 1}", "r.yaml:4:8: lora.seed: unknown key; did you mean train.seed?"),
        ("stage: 3", "r.yaml:4:1: stage: unknown key; did you mean deepspeed.stage?"),
        ("task: {zzzz: 1}", "r.yaml:4:8: task.zzzz: unknown key; task has goal or kind"),
    ],
)
def test_an_unknown_key_names_the_nearest_field_with_its_section(line: str, message: str) -> None:
    """Trainers that drop unknown keys train with defaults for days."""
    assert problems(GOOD + line + "\n") == (message,)


def test_every_alias_leads_to_a_field() -> None:
    """The table and the schema cannot drift apart."""
    assert {alias.target for alias in ALIASES} <= set(field_paths())
    assert {path.replace("data.train.format", "data.train") for path in VALUES} <= set(field_paths())
    assert not {alias.name for alias in ALIASES} & set(REFUSED)


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("lora_r: 8", "lora.r", 8),
        ("lora: {rank: 8}", "lora.r", 8),
        ("lora_rank: 8", "lora.r", 8),
        ("lora_target_linear: true", "lora.target_modules", "all-linear"),
        ("lora_target: all", "lora.target_modules", "all-linear"),
        ("lora_target_modules: [q_proj]", "lora.target_modules", ("q_proj",)),
        ("micro_batch_size: 2", "train.per_device_train_batch_size", 2),
        ("train: {micro_batch_size: 2}", "train.per_device_train_batch_size", 2),
        ("sequence_len: 512", "data.max_seq_length", 512),
        ("cutoff_len: 512", "data.max_seq_length", 512),
        ("max_seq_len: 512", "data.max_seq_length", 512),
        ("max_length: 512", "data.max_seq_length", 512),
        ("model_max_length: 512", "data.max_seq_length", 512),
        ("num_epochs: 2", "train.num_train_epochs", 2.0),
        ("epochs: 2", "train.num_train_epochs", 2.0),
        ("sample_packing: false", "data.packing", False),
        ("enable_activation_checkpointing: true", "train.gradient_checkpointing", True),
        ("train: {activation_checkpointing: true}", "train.gradient_checkpointing", True),
        ("val_set_size: 0.1", "data.validation.share", 0.1),
        ("val_size: 100", "data.validation.count", 100),
        ("adapter: qlora", "method", "qlora"),
        ("train_on_inputs: true", "data.loss_on", "all"),
        ("torch_dtype: bfloat16", "train.precision", "bf16"),
        ("wandb_project: p", "wandb.project", "p"),
        ("learning_rate: 1e-4", "train.learning_rate", 1e-4),
    ],
)
def test_names_of_other_tools_are_read_with_one_notice(line: str, path: str, value: object) -> None:
    """Accepted, and said, so that people learn the field's name here."""
    loaded = recipe_from_text(GOOD + line + "\n", "r.yaml")
    found: object = loaded.recipe
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert loaded.notices and loaded.notices[0].startswith("r.yaml:4:")


def test_model_and_data_may_carry_foreign_names_too() -> None:
    """A flat file of another tool, with nothing of ours but the name."""
    text = "run_name: x\nbase_model: m/m\ndatasets: [{path: a.jsonl, type: alpaca}]\n"
    loaded = recipe_from_text(text, "r.yaml")
    assert loaded.recipe.model.name_or_path == "m/m"
    assert (loaded.recipe.data.train[0].path, loaded.recipe.data.train[0].format) == ("a.jsonl", "alpaca")
    assert loaded.notices == (
        "r.yaml:1:1: run_name is read as name",
        "r.yaml:2:1: base_model is read as model.name_or_path",
        "r.yaml:3:1: datasets is read as data.train",
        "r.yaml:3:28: type is read as format",
    )


def test_our_own_names_give_no_notice() -> None:
    """Notices are for surprises."""
    assert recipe_from_text(GOOD + "train: {learning_rate: 1e-4}\n", "r.yaml").notices == ()


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("lora: {r: 8}\nlora_r: 16\n", "lora_r", "lora.r"),
        ("lora_r: 8\nlora_rank: 16\n", "lora_rank", "lora_r"),
        ("method: lora\nadapter: qlora\n", "adapter", "method"),
    ],
)
def test_two_names_for_one_field_are_refused(text: str, first: str, second: str) -> None:
    """Nobody can say which one was meant; both places are shown."""
    (problem,) = problems(GOOD + text)
    assert f"{first} and {second} (r.yaml:4:" in problem and "both set" in problem


@pytest.mark.parametrize("line", ["batch_size: 8", "train: {batch_size: 8}"])
def test_a_bare_batch_size_is_refused_with_both_meanings(line: str) -> None:
    """It is the whole batch in one tool and one GPU's share in another."""
    (problem,) = problems(GOOD + line + "\n")
    assert "train.global_batch_size" in problem and "train.per_device_train_batch_size" in problem


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_foreign_names_without_one_meaning_here_say_what_to_write(name: str) -> None:
    """Refused with a way out, never dropped."""
    (problem,) = problems(GOOD + f"{name}: 1\n")
    assert problem == f"r.yaml:4:1: {name}: {REFUSED[name]}"


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize("override", ["train.learning_rate=1e-4", "--train.learning_rate=1e-4", "lr=1e-4"])
def test_overrides_win_over_the_file(override: str) -> None:
    """With dashes or without, by our name or a rival's."""
    text = GOOD + "train: {learning_rate: 5e-5, seed: 7}\n"
    train = recipe_from_text(text, "r.yaml", [override]).recipe.train
    assert (train.learning_rate, train.seed) == (1e-4, 7)


def test_the_last_override_wins() -> None:
    """As everywhere on a command line."""
    assert recipe_from_text(GOOD, "r.yaml", ["method=lora", "method=full"]).recipe.method == "full"


def test_overrides_reach_into_lists() -> None:
    """By index; one past the end appends; the short form of an entry is written out first."""
    overrides = ["data.train.0.weight=2", "data.train.1.path=b.jsonl", "data.train.2=c.jsonl"]
    train = recipe_from_text(GOOD, "r.yaml", overrides).recipe.data.train
    assert [(source.path, source.weight) for source in train] == [("a.jsonl", 2.0), ("b.jsonl", 1.0), ("c.jsonl", 1.0)]


def test_an_override_may_replace_a_list_or_a_section() -> None:
    """Lists are replaced, sections are merged, null resets."""
    overrides = ["data.train=[x.jsonl, y.jsonl]", "train={seed: 3}", "data.validation=null", "wandb.tags=a,b"]
    recipe = recipe_from_text(GOOD + "train: {max_steps: 5}\n", "r.yaml", overrides).recipe
    assert [source.path for source in recipe.data.train] == ["x.jsonl", "y.jsonl"]
    assert (recipe.train.seed, recipe.train.max_steps) == (3, 5)
    assert recipe.data.validation.share is None
    assert recipe.wandb.tags == ("a", "b")


def test_a_value_with_an_equals_sign_or_a_colon_is_plain_text() -> None:
    """Only the first = counts, and `a: b` is not a mapping."""
    recipe = recipe_from_text(GOOD, "r.yaml", ["slurm.constraint=a=b", "output_dir=/x/y: z"]).recipe
    assert (recipe.slurm.constraint, recipe.output_dir) == ("a=b", "/x/y: z")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=lroa", "override 'method=lroa': method: did you mean lora? expected auto, full, lora"),
        ("train.lerning_rate=1", "override 'train.lerning_rate=1': train.lerning_rate: unknown key; did you mean"),
        ("train.seed=x", "override 'train.seed=x': train.seed: expected a whole number, found 'x'"),
        ("seed", "override 'seed': expected key=value"),
        ("=3", "override '': expected key=value"),
        ("a..b=3", "override 'a..b': expected key=value"),
        ("data.train.5.path=x", "override 'data.train.5.path=x': data.train: expected a list"),
        ("wandb.tags=[a", "override 'wandb.tags=…': the value is not valid YAML"),
        ("name=a\nb", "override 'name=…': name: control character U+000A"),
        ("batch_size=3", "override 'batch_size=3': batch_size: means the whole batch"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    """The same checks as in the file; the place is the override."""
    found = problems(GOOD, override)
    assert any(problem.startswith(message) for problem in found), found
