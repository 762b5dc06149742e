"""Rules beyond types: ranges, choices, contradictions; all problems of a recipe at once."""

from __future__ import annotations

import pytest

from launcher.recipe.load import recipe_from_text
from tests.unit.recipe.material import GOOD, problems


@pytest.mark.parametrize(
    "override",
    [
        "train.learning_rate=0",
        "train.learning_rate=-1e-4",
        "train.learning_rate=nan",
        "train.learning_rate=inf",
        "train.num_train_epochs=0",
        "train.num_train_epochs=.inf",
        "train.max_steps=0",
        "train.warmup_ratio=1",
        "train.warmup_ratio=-0.1",
        "train.weight_decay=-1",
        "train.max_grad_norm=nan",
        "train.global_batch_size=0",
        "train.per_device_train_batch_size=0",
        "train.seed=-1",
        "train.eval_steps=0",
        "train.logging_steps=0",
        "lora.r=0",
        "lora.r=-8",
        "lora.lora_alpha=0",
        "lora.lora_dropout=1",
        "lora.target_modules=[]",
        "lora.target_modules=.*proj",
        "prompt.num_virtual_tokens=0",
        "data.max_seq_length=0",
        "data.max_seq_length=4",
        "data.train.0.weight=0",
        "deepspeed.stage=4",
        "deepspeed.stage=-1",
        "checkpoint.save_minutes=0",
        "checkpoint.save_steps=0",
        "checkpoint.save_total_limit=0",
        "slurm.nodes=0",
        "slurm.gpus_per_node=0",
        "slurm.max_restarts=-1",
        "slurm.mem=lots",
        "budget.gpu_hour_price=-1",
        "budget.max_gpu_hours=0",
    ],
)
def test_numbers_outside_their_range_are_refused(override: str) -> None:
    """Refused where they are read, not by a library an hour into the job."""
    found = problems(GOOD, override)
    assert len(found) == 1 and found[0].startswith(f"override '{override}': {override.partition('=')[0]}"), found


@pytest.mark.parametrize(
    ("override", "guess"),
    [
        ("method=qlor", "qlora"),
        ("model.attn_implementation=flash_atention_2", "flash_attention_2"),
        ("data.train.0.format=alpacca", "alpaca"),
        ("data.loss_on=asistant", "assistant"),
        ("train.lr_scheduler_type=cosin", "cosine"),
        ("train.optim=adamw_torc", "adamw_torch"),
        ("quantization.bnb_4bit_quant_type=nf", "nf4"),
        ("deepspeed.offload_param=cpuu", "cpu"),
        ("wandb.mode=ofline", "offline"),
        ("task.goal=adaption", "adaptation"),
    ],
)
def test_a_misspelt_choice_names_the_nearest_one(override: str, guess: str) -> None:
    """With all choices behind it."""
    (problem,) = problems(GOOD, override)
    assert f"did you mean {guess}?" in problem and "expected" in problem


@pytest.mark.parametrize("name", ["a/b", "..", "-x", ".x", "%j", "a b", "über", "a" * 64, "''"])
def test_names_that_break_paths_or_slurm_patterns_are_refused(name: str) -> None:
    """The name becomes a folder, a job name and a W&B id."""
    assert any("name:" in problem for problem in problems(GOOD, f"name={name}"))


@pytest.mark.parametrize("name", ["a", "Llama-3.1_8B.lora", "7b", "a" * 63])
def test_ordinary_names_pass(name: str) -> None:
    """Letters, digits, dots, dashes, underscores."""
    assert recipe_from_text(GOOD, "r.yaml", [f"name={name}"]).recipe.name == name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adalora_is_refused_above_stage_0(stage: int) -> None:
    """Its rank allocation reads gradients that ZeRO frees; at stage 3 it crashes."""
    (problem,) = problems(GOOD, "method=adalora", f"deepspeed.stage={stage}")
    assert "adalora runs at stage 0 only" in problem and str(stage) in problem


def test_adalora_is_refused_with_offload() -> None:
    """Offloading needs ZeRO, whatever the planner would choose."""
    (problem,) = problems(GOOD, "method=adalora", "deepspeed.offload_optimizer=cpu")
    assert "adalora" in problem


@pytest.mark.parametrize("stage", ["0", "auto"])
def test_adalora_passes_at_stage_0(stage: str) -> None:
    """The planner settles auto."""
    recipe = recipe_from_text(GOOD, "r.yaml", ["method=adalora", f"deepspeed.stage={stage}"]).recipe
    assert recipe.method == "adalora"


@pytest.mark.parametrize(
    ("stage", "field", "device"),
    [
        (0, "offload_optimizer", "cpu"),
        (0, "offload_optimizer", "nvme"),
        (1, "offload_optimizer", "nvme"),
        (2, "offload_optimizer", "nvme"),
        (0, "offload_param", "cpu"),
        (2, "offload_param", "cpu"),
        (2, "offload_param", "nvme"),
    ],
)
def test_offload_needs_a_stage_that_can(stage: int, field: str, device: str) -> None:
    """DeepSpeed ignores some of these in silence."""
    (problem,) = problems(GOOD, f"deepspeed.stage={stage}", f"deepspeed.{field}={device}")
    assert f"deepspeed.{field}: " in problem and "stage" in problem


@pytest.mark.parametrize(
    ("stage", "field", "device"),
    [
        (1, "offload_optimizer", "cpu"),
        (2, "offload_optimizer", "cpu"),
        (3, "offload_optimizer", "nvme"),
        (3, "offload_param", "cpu"),
        (3, "offload_param", "nvme"),
        ("auto", "offload_param", "cpu"),
        (0, "offload_param", "none"),
    ],
)
def test_offload_that_works_passes(stage: int | str, field: str, device: str) -> None:
    """The other half of the table."""
    recipe = recipe_from_text(GOOD, "r.yaml", [f"deepspeed.stage={stage}", f"deepspeed.{field}={device}"]).recipe
    assert getattr(recipe.deepspeed, field) == device


def test_a_global_batch_that_does_not_divide_names_the_nearest_that_do() -> None:
    """Micro-batch x GPUs x nodes must go into it a whole number of times."""
    sizes = ["train.per_device_train_batch_size=2", "slurm.nodes=2", "slurm.gpus_per_node=3"]
    (problem,) = problems(GOOD, "train.global_batch_size=32", *sizes)
    assert (
        "32 does not divide by per_device_train_batch_size 2 x nodes 2 x gpus_per_node 3 = 12; nearest: 24 or 36"
        in problem
    )


def test_a_micro_batch_above_the_global_batch_is_refused() -> None:
    """Nearest is one micro-batch."""
    (problem,) = problems(GOOD, "train.global_batch_size=4", "train.per_device_train_batch_size=8")
    assert problem.endswith("nearest: 8")


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_packing_with_virtual_tokens_is_said_to_have_no_effect(method: str) -> None:
    """PEFT ignores position_ids there, so the planner does not pack; said only to whoever asked for packing."""
    assert recipe_from_text(GOOD, "r.yaml", [f"method={method}"]).notices == ()
    (notice,) = recipe_from_text(GOOD, "r.yaml", [f"method={method}", "data.packing=true"]).notices
    assert "will not be packed" in notice


def test_settings_nobody_reads_are_noticed() -> None:
    """A LoRA rank in a full fine-tuning is a misunderstanding, not an error."""
    (notice,) = recipe_from_text(GOOD + "method: full\nlora: {r: 8}\n", "r.yaml").notices
    assert notice.startswith("r.yaml:5:7: lora: not read by method full")


def test_max_steps_beside_epochs_is_noticed() -> None:
    """Steps win; whoever wrote both should know."""
    (notice,) = recipe_from_text(GOOD + "train: {max_steps: 5, num_train_epochs: 2}\n", "r.yaml").notices
    assert notice.endswith("train.max_steps: overrides train.num_train_epochs")


# ---------------------------------------------------------------- slurm.extra


def test_extra_options_take_sbatch_spelling() -> None:
    """Underscores or dashes, with or without the leading two."""
    text = (
        GOOD + "slurm: {extra: {mail_type: END, --mail-user: me@x, reservation: r1, nodelist: 'n[1-4]', switches: 1}}\n"
    )
    assert recipe_from_text(text, "r.yaml").recipe.slurm.extra == {
        "mail-type": "END",
        "mail-user": "me@x",
        "reservation": "r1",
        "nodelist": "n[1-4]",
        "switches": 1,
    }


@pytest.mark.parametrize(
    "option",
    [
        *("wrap", "export", "export-file", "export_file", "output", "error", "input", "chdir", "wckey", "array"),
        *("signal", "open-mode", "ntasks", "ntasks_per_node", "gres", "test-only", "uid", "--wrap", "WRAP", "o", ""),
    ],
)
def test_extra_options_that_run_leak_or_fight_the_launcher_are_refused(option: str) -> None:
    """Each with its reason."""
    (problem,) = problems(GOOD + f"slurm: {{extra: {{'{option}': x}}}}\n")
    assert problem.startswith("r.yaml:4:") and f"slurm.extra.{option}: " in problem


@pytest.mark.parametrize(
    ("option", "field"), [("job_name", "name"), ("partition", "slurm.partition"), ("mem_per_cpu", "slurm.mem")]
)
def test_extra_options_with_a_field_of_their_own_name_it(option: str, field: str) -> None:
    """Two ways to say one thing would contradict each other one day."""
    (problem,) = problems(GOOD + f"slurm: {{extra: {{{option}: x}}}}\n")
    assert problem.endswith(f"has a field of its own: {field}")


def test_an_option_in_two_spellings_is_refused() -> None:
    """mail_type and mail-type are one option."""
    (problem,) = problems(GOOD + "slurm: {extra: {mail_type: END, mail-type: ALL}}\n")
    assert "stands twice" in problem


def test_every_problem_is_shown_at_once_in_the_order_of_the_file() -> None:
    """Types, unknown keys, ranges, choices and cross rules together."""
    text = (
        "name: a/b\nmodel: {name_or_path: m/m, revison: x}\nmethod: lroa\n"
        "data: {train: [{path: a, wieght: 2}, {format: x}]}\n"
        "train: {learning_rate: abc, seed: -1}\ndeepspeed: {stage: 2, offload_param: cpu}\nslurm: {time: never}\n"
    )
    found = problems(text)
    assert [problem.split(": ")[1] for problem in found] == [
        *("name", "model.revison", "method", "data.train.0.wieght", "data.train.1.path", "data.train.1.format"),
        *("train.learning_rate", "train.seed", "deepspeed.offload_param", "slurm.time"),
    ]
