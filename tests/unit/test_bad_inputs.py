"""Sixty inputs that must never reach a queue, and what `launcher submit --dry-run` says to each.

One table. A row is a number, what is wrong, the exit code, the words that must be in the message (what to do among
them), and how to make it wrong; 0 is a notice. Rows that need ranks, another verb or a real Slurm name the test that
holds them. Slurm is a fake here that takes every job; tests/cluster/test_bad_inputs.py asks a real one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import main
from tests.unit import bad_inputs
from tests.unit.bad_inputs import (
    GOOD,
    NODES,
    Bench,
    Wrong,
    answers,
    chat,
    empty_venv,
    few,
    index,
    long_prompts,
    old_python,
    pickled,
    qos,
    refused_by_test_only,
    repeated,
    reservation,
    same_rows_twice,
    section,
    slurm_says,
    small_disk,
    some_long,
    text,
    weights,
    without,
)
from tests.unit.runs import conftest

ROOT = Path(__file__).resolve().parents[2]
no_slurm, fake_slurm = conftest.no_slurm, conftest.fake_slurm
material, bench = bad_inputs.material, bad_inputs.bench
REFUSED, DATA, MODEL, CLUSTER = 2, 3, 4, 5


def test_the_recipe_is_accepted_when_nothing_is_wrong(bench: Bench) -> None:
    """Otherwise every refusal below might be of something else."""
    result = bench.submit()
    assert (result.exit_code, result.stderr) == (0, "")


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """One bad input."""

    number: int
    what: str
    code: int = 0
    words: tuple[str, ...] = ()
    overrides: str = ""
    wrong: Wrong | None = None
    elsewhere: str | None = None
    """FILE::TEST that holds it."""


RECIPE_TESTS, PLAN_TESTS, RUN_TESTS, TRAIN = (
    "tests/unit/recipe",
    "tests/unit/planning",
    "tests/unit/runs",
    "tests/train",
)
TABLE = (
    Row(1, "a key stands twice", REFUSED, ("recipe.yaml:", "name", "twice"), wrong=text("name: again\n")),
    Row(1, "a tab", REFUSED, ("recipe.yaml:", "tab"), wrong=text("task:\n\tkind: style\n")),
    Row(2, "a tag that would build objects", REFUSED, ("recipe.yaml:", "tag"),
        wrong=text("output_dir: !!python/object/apply:os.system [ls]\n")),
    Row(3, "a misspelt key", REFUSED, ("unknown key", "did you mean train.learning_rate"),
        "train.learing_rate=1"),
    Row(4, "a number that is none", REFUSED, ("train.learning_rate", "1e-4x"), "train.learning_rate=1e-4x"),
    Row(4, "base 60 of YAML 1.1", REFUSED, ("train.seed", "1:30"), "train.seed=1:30"),
    Row(4, "yes for a number", REFUSED, ("train.max_steps", "yes"), "train.max_steps=yes"),
    Row(5, "a learning rate below 0", REFUSED, ("above 0", "-1"), "train.learning_rate=-1"),
    Row(5, "a learning rate that is no number", REFUSED, ("above 0", "nan"), "train.learning_rate=nan"),
    Row(6, "a batch that does not divide", REFUSED, ("9 does not divide", "8 or 12"),
        "train.global_batch_size=9 slurm.nodes=2 slurm.gpus_per_node=2"),
    Row(7, "rank 0", REFUSED, ("lora.r", "1 or more"), "lora.r=0"),
    Row(7, "adapters on modules that are not there", REFUSED, ("q_prj", "did you mean q_proj"),
        "lora.target_modules=q_prj"),
    Row(7, "two precisions", REFUSED, ("precision",), "train.bf16=true train.fp16=true"),
    Row(8, "flash attention on a CPU", CLUSTER, ("flash_attention_2", "use sdpa"),
        "model.attn_implementation=flash_attention_2"),
    Row(8, "fp16 on a CPU", CLUSTER, ("fp16", "use fp32 or bf16"), "train.precision=fp16"),
    Row(9, "a preemption would lose everything",
        elsewhere=f"{PLAN_TESTS}/test_job.py::test_a_preemption_must_not_lose_everything"),
    Row(10, "no time left to save after the warning",
        elsewhere=f"{PLAN_TESTS}/test_job.py::test_a_limit_without_time_to_save_is_refused"),
    Row(11, "longer than the partition allows", CLUSTER, ("2-00:00:00", "1-00:00:00", "set slurm.time"),
        "slurm.time=2-0"),
    Row(12, "time 0", REFUSED, ("slurm.time", "24:00:00"), "slurm.time=0"),
    Row(12, "a negative time", REFUSED, ("slurm.time", "24:00:00"), "slurm.time=-1"),
    Row(12, "a time nobody writes", REFUSED, ("slurm.time", "24:00:00"), "slurm.time=soon"),
    Row(13, "an unknown partition", CLUSTER, ("'mian' does not exist", "did you mean main", "long"),
        "slurm.partition=mian"),
    Row(14, "a partition that is DOWN", CLUSTER, ("not UP", "slurm.partition"),
        wrong=lambda bench: bench.partition(State="DOWN")),
    Row(15, "a partition that is drained", CLUSTER, ("not UP", "slurm.partition"),
        wrong=lambda bench: bench.partition(State="DRAIN")),
    Row(16, "an unknown account", CLUSTER, ("'nobody' is not yours", "yours: dev"), "slurm.account=nobody"),
    Row(16, "a partition for other accounts", CLUSTER, ("is for physics", "not dev"),
        wrong=lambda bench: bench.partition(AllowAccounts="physics")),
    Row(16, "a partition that denies the account", CLUSTER, ("does not take dev", "another"),
        wrong=lambda bench: bench.partition("DenyAccounts=dev")),
    Row(17, "an unknown QOS", CLUSTER, ("no QOS 'golden'", "yours: normal"), "slurm.qos=golden"),
    Row(17, "a QOS that was not granted", CLUSTER, ("'gold' is not yours", "yours: normal"), "slurm.qos=gold"),
    Row(18, "a wckey in the recipe", REFUSED, ("wckey", "SBATCH_WCKEY"), "slurm.extra.wckey=submitit"),
    Row(18, "submitit's own wckey",
        elsewhere="tests/unit/runs/test_sbatch.py::test_no_wckey_is_sent"),
    Row(19, "more nodes than the partition has", CLUSTER, ("8 nodes asked", "at most 4"), "slurm.nodes=8"),
    Row(20, "more GPUs than any node has", CLUSTER, ("slurm.gpus_per_node", "has 4"), "slurm.gpus_per_node=8",
        wrong=lambda bench: bench.nodes(NODES.replace("a100:8", "a100:4"))),
    Row(20, "GPUs of another name", CLUSTER, ("gpu_type", "'a100'", "has h100"),
        wrong=lambda bench: bench.nodes(NODES.replace("gpu:a100", "gpu:h100"))),
    Row(21, "more CPUs than a node has", CLUSTER, ("64 CPUs", "has 16", "slurm.cpus_per_task=16"),
        "slurm.cpus_per_task=64"),
    Row(21, "more memory than a node has", CLUSTER, ("900G", "has 64G"), "slurm.mem=900G"),
    Row(21, "more memory than the partition gives", CLUSTER, ("8G asked", "gives a job 4G"), "slurm.mem=8G",
        wrong=lambda bench: bench.partition("MaxMemPerNode=4096")),
    Row(22, "a feature no node has", CLUSTER, ("'a101'", "did you mean a100", "ib"), "slurm.constraint=a101"),
    Row(23, "nodes that do not exist", CLUSTER, ("node9", "Invalid node name specified", "sinfo -N"),
        "slurm.extra.nodelist=node9", wrong=refused_by_test_only("Invalid node name specified")),
    Row(23, "too few nodes are left", CLUSTER, ("node[1-3]", "Requested node configuration is not available"),
        "slurm.extra.exclude=node[1-3] slurm.nodes=2",
        wrong=refused_by_test_only("Requested node configuration is not available")),
    Row(24, "all nodes are drained", CLUSTER, ("all 4 nodes of main are down or drained", "sinfo -R"),
        wrong=lambda bench: bench.nodes(NODES.replace("idle", "drain"))),
    Row(24, "some nodes are drained", 0, ("2 nodes asked", "1 of partition main are up", "slurm.nodes=1"),
        "slurm.nodes=2",
        wrong=lambda bench: bench.nodes(NODES.replace("4|idle", "3|drain") + NODES.replace("4|idle", "1|idle"))),
    Row(25, "maintenance before the job could end", 0, ("maintenance service", "may have to wait", "slurm.time=00:1"),
        wrong=lambda bench: (reservation(bench), bench.site.update(account_limits=[{"account": "dev"}]))),
    Row(26, "an unknown reservation", CLUSTER, ("reservation=nope", "Requested reservation is invalid"),
        "slurm.extra.reservation=nope", wrong=refused_by_test_only("Requested reservation is invalid")),
    Row(27, "an array", REFUSED, ("slurm.extra.array", "one run is one job"), "slurm.extra.array=0-9"),
    Row(27, "a trial of more runs than an array may have",
        elsewhere=f"{RUN_TESTS}/test_trial_candidates.py::test_more_runs_than_an_array_may_have_are_refused"),
    Row(28, "as many jobs as may wait already", CLUSTER, ("2 of your jobs", "account dev allows 2", "launcher status"),
        wrong=lambda bench: (bench.account(submit="2"), bench.slurm.say("squeue", "11\n12\n"))),
    Row(29, "more than the account may ever have", CLUSTER, ("4 of gres/gpu", "account dev allows 2"),
        "slurm.gpus_per_node=4", wrong=lambda bench: bench.account(tres="gres/gpu=2")),
    Row(29, "longer than the account may", CLUSTER, ("00:20:00 asked", "account dev allows 00:10:00"),
        wrong=lambda bench: bench.account(wall="00:10:00")),
    Row(29, "more than the QOS gives all its jobs", CLUSTER, ("slurm.nodes", "QOS normal allows 1"), "slurm.nodes=2",
        wrong=qos(GrpTRES="node=1")),
    Row(29, "less than the QOS takes", CLUSTER, ("slurm.gpus_per_node", "less than 4"),
        wrong=qos(MinTRES="gres/gpu=4")),
    Row(29, "a QOS of the partition that lets nothing run", CLUSTER, ("no job run",),
        wrong=lambda bench: (bench.partition("QoS=normal"), qos(MaxJobsPU="0")(bench))),
    Row(29, "a limit that nobody enforces", 0, (),
        wrong=lambda bench: (bench.account(wall="00:10:00"),
                             answers("scontrol", "config", "AccountingStorageEnforce = none\n")(bench))),
    Row(30, "a dependency on a job that never was", CLUSTER, ("dependency", "no job 99999", "Leave it out"),
        "slurm.extra.dependency=afterok:99999",
        wrong=slurm_says("squeue", stderr="slurm_load_jobs error: Invalid job id specified\n", status=1)),
    Row(31, "no sbatch", elsewhere="tests/unit/runs/test_submission.py::test_without_sbatch_another_machine_is_named"),
    Row(32, "no controller",
        elsewhere="tests/unit/runs/test_submission.py::test_an_unreachable_controller_is_try_again_later"),
    Row(33, "a run folder in memory", CLUSTER, ("output_dir", "/dev/shm", "no other node sees", "LAUNCHER_RUNS"),
        "output_dir=/dev/shm/runs", wrong=lambda bench: bench.site.update(file_systems=[])),
    Row(33, "a run folder on one machine's disk", CLUSTER, ("output_dir", "a disk of this machine alone"),
        wrong=lambda bench: bench.site.update(file_systems=[{"name": "home", "path": "/", "shared": False}])),
    Row(33, "nobody knows who sees the run folder", 0, ("output_dir", "compute nodes must see it", "--probe-job"),
        wrong=lambda bench: bench.site.update(file_systems=[])),
    Row(34, "an output folder that cannot be written", CLUSTER, ("output_dir", "/proc/runs", "cannot be written"),
        "output_dir=/proc/runs"),
    Row(35, "the working folder is gone",
        elsewhere="tests/unit/test_bad_inputs.py::test_the_working_folder_is_gone"),
    Row(36, "no space for the checkpoints", CLUSTER, ("output_dir", "need", "save_total_limit"),
        "checkpoint.save_total_limit=5 method=full", wrong=small_disk(free=4 * 2**20)),
    Row(36, "no files left", CLUSTER, ("room for 50 more files",), wrong=small_disk(files=50)),
    *(Row(37, f"the name {name!r}", REFUSED, ("name", "letter or digit"), f"name={name}")
      for name in ("a/b", "../up", "-x", "%j", ".", "x" * 101, "é", "\U0001f600")),
    Row(38, "quotes and substitutions in a path", REFUSED, ("output_dir", "not allowed"), "output_dir=$(touch x)"),
    Row(38, "paths with spaces and hashes work",
        elsewhere="tests/unit/test_bad_inputs.py::test_paths_with_spaces_and_hashes_work"),
    Row(39, "a control character on its way to sbatch", REFUSED, ("U+000A",), "slurm.extra.comment=a\nb"),
    Row(40, "no such data file", DATA, ("chat.jsonl", "did you mean", "chats.jsonl"),
        wrong=section("data", train=[{"path": "chat.jsonl"}])),
    Row(40, "an empty data file", DATA, ("chats.jsonl", "no rows"), wrong=lambda bench: bench.rows()),
    Row(40, "a folder without data", DATA, ("model/empty", "no data file"),
        wrong=lambda bench: ((bench.home / "model/empty").mkdir(),
                             section("data", train=[{"path": "./model/empty"}])(bench))),
    Row(41, "a line that is not JSON", DATA, ("chats.jsonl:2", "not JSON"),
        wrong=lambda bench: bench.rows(GOOD, '{"messages": [],}', GOOD)),
    Row(41, "bytes that are not UTF-8", DATA, ("bad.jsonl:1", "not UTF-8"),
        wrong=lambda bench: bench.raw(b'{"text": "\xff"}\n', "bad.jsonl")),
    Row(41, "six bad lines", DATA, ("chats.jsonl:5", "6 bad rows in all"), wrong=lambda bench: bench.rows(*["{"] * 6)),
    Row(42, "another schema", DATA, ("chats.jsonl:1", "no format has these columns"),
        wrong=lambda bench: bench.rows({"question": "a"})),
    Row(42, "an unknown role", DATA, ("chats.jsonl:1", "unknown role 'bot'"),
        wrong=lambda bench: bench.rows(chat(("user", "a"), ("bot", "b")))),
    Row(42, "content that is no text", DATA, ("chats.jsonl:1", "must be text"),
        wrong=lambda bench: bench.rows(chat(("user", 1), ("assistant", "b")))),
    Row(42, "nothing but user turns", DATA, ("chats.jsonl:1", "nothing to train on"),
        wrong=lambda bench: bench.rows(chat(("user", "a")))),
    Row(43, "every answer is behind the cut", DATA, ("no token of all rows", "100% of the rows are cut",
        "data.max_seq_length"), wrong=long_prompts),
    Row(43, "some answers are behind the cut", 0, ("20% of the rows are longer", "data.max_seq_length 256"),
        "data.max_seq_length=256", wrong=some_long),
    Row(44, "rows that repeat others", 0, ("50% of the rows repeat an earlier one",), wrong=repeated),
    Row(44, "evaluations of nothing", 0, ("train.eval_steps: 5", "set data.validation"),
        "train.eval_steps=5 data.validation=null"),
    Row(44, "validation rows are trained on", 0, ("data.validation", "64 of the 64", "take them out"),
        wrong=same_rows_twice),
    Row(45, "fewer rows than a batch", DATA, ("one step takes 8", "train.global_batch_size="), wrong=few),
    Row(46, "a truncated gzip file", DATA, ("cut.jsonl.gz", "gzip"),
        wrong=lambda bench: bench.raw(b"\x1f\x8b\x08\x00", "cut.jsonl.gz")),
    Row(46, "a truncated parquet file", DATA, ("cut.parquet", "parquet"),
        wrong=lambda bench: bench.raw(b"PAR1xx", "cut.parquet")),
    Row(46, "a data-set script", DATA, ("load.py", "cannot read this kind of file"),
        wrong=lambda bench: bench.raw(b"raise SystemExit(99)", "load.py")),
    Row(47, "no config.json", MODEL, ("config.json",), wrong=without("config.json")),
    Row(47, "no tokenizer", MODEL, ("no tokenizer", "tokenizer.json"),
        wrong=without("tokenizer.json", "tokenizer_config.json")),
    Row(47, "no weights", MODEL, ("no *.safetensors",), wrong=without("model.safetensors")),
    Row(48, "a shard is missing", MODEL, ("1 of 2", "model-2.safetensors"), wrong=index()),
    Row(48, "a truncated shard", MODEL, ("truncated", "copy it again"), wrong=weights(lambda whole: whole[:-10])),
    Row(48, "bytes behind the last tensor", MODEL, ("more than its header", "copy it again"),
        wrong=weights(lambda whole: whole + b"xx")),
    Row(48, "a git-lfs pointer", MODEL, ("git lfs pull",),
        wrong=weights(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")),
    Row(49, "pickled weights alone", MODEL, ("pytorch_model.bin", "save_pretrained"), wrong=pickled),
    Row(50, "code of its own", MODEL, ("modeling_x.py", "model.trust_remote_code: true"),
        wrong=lambda bench: bench.config(auto_map={"AutoModelForCausalLM": "modeling_x.Model"})),
    Row(51, "a tokenizer of another model", MODEL, ("token number 511", "have 400 rows", "another model"),
        wrong=lambda bench: bench.config(vocab_size=400)),
    Row(51, "a classifier", MODEL, ("LlamaForSequenceClassification", "not a causal language model"),
        wrong=lambda bench: bench.config(architectures=["LlamaForSequenceClassification"])),
    Row(51, "quantized already", MODEL, ("already quantized (gptq)", "method: qlora"),
        wrong=lambda bench: bench.config(quantization_config={"quant_method": "gptq", "bits": 4})),
    Row(51, "chats without a template",
        elsewhere="tests/unit/facts/test_dataset.py::test_chats_without_a_template_are_refused_before_the_queue"),
    Row(52, "an id, and nodes without network", MODEL, ("meta-llama/Llama-3.1-8B", "launcher stage"),
        "model.name_or_path=meta-llama/Llama-3.1-8B train.precision=bf16 slurm.mem=60G",
        wrong=lambda bench: bench.site.update(internet_on_nodes=False)),
    Row(52, "a gated id", elsewhere=f"{RUN_TESTS}/test_staging.py::test_a_gated_model_says_which_token_is_missing"),
    Row(52, "a branch of a data set",
        elsewhere=f"{RUN_TESTS}/test_staging_revisions.py::test_a_revision_of_a_data_set_is_pinned"),
    Row(53, "an adapter with another base", elsewhere=f"{TRAIN}/test_merge.py::test_another_base_is_refused"),
    Row(53, "adapters of different bases",
        elsewhere=f"{TRAIN}/test_combine.py::test_adapters_of_different_bases_are_refused"),
    Row(53, "an adapter for a base", MODEL, ("is an adapter", "owner/base"),
        wrong=lambda bench: (without("config.json")(bench), (bench.home / "model/adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": "owner/base"})))),
    Row(54, "more than the memory",
        elsewhere=f"{PLAN_TESTS}/test_search.py::test_70b_full_on_one_node_is_refused_with_what_would_fit"),
    Row(55, "another training under an old name",
        elsewhere=f"{RUN_TESTS}/test_resume.py::test_what_makes_another_training_is_refused"),
    Row(55, "other data under an old name", elsewhere=f"{RUN_TESTS}/test_resume.py::test_other_data_is_refused"),
    Row(56, "a run that lives", elsewhere=f"{RUN_TESTS}/test_resume.py::test_a_living_job_is_never_joined_by_another"),
    Row(56, "a run that somebody submits now",
        elsewhere=f"{RUN_TESTS}/test_submission.py::test_a_run_that_somebody_submits_is_left_to_them"),
    Row(56, "a run that a newer launcher wrote",
        elsewhere=f"{RUN_TESTS}/test_resume.py::test_a_run_of_a_newer_launcher_is_refused"),
    Row(56, "a lock, its holder and its age",
        elsewhere=f"{RUN_TESTS}/test_lock.py::test_a_second_submitter_is_told_who_holds_it"),
    Row(57, "a finished run whose job is requeued",
        elsewhere=f"{RUN_TESTS}/test_aftermath.py::test_a_finished_run_is_not_trained_again"),
    Row(57, "a finished run", elsewhere=f"{RUN_TESTS}/test_resume.py::test_a_finished_run_is_left_alone"),
    Row(58, "W&B online without a key", CLUSTER, ("wandb.mode", "no key", "wandb login", "offline"),
        "wandb.mode=online"),
    Row(58, "W&B online from nodes without network", CLUSTER, ("no network", "launcher sync"), "wandb.mode=online",
        wrong=lambda bench: (bench.site.update(internet_on_nodes=False), bench.patch.setenv("WANDB_API_KEY", "x"))),
    Row(58, "a project name W&B refuses", CLUSTER, ("wandb.project", "'a/b'"), "wandb.mode=offline wandb.project=a/b"),
    Row(59, "a token of the hub", REFUSED, ("looks like a secret", "HF_TOKEN"), "output_dir=hf_" + "a" * 30),
    Row(59, "a key under its name", REFUSED, ("looks like a secret",), "wandb.api_key=" + "f" * 40),
    Row(60, "an environment without torch", CLUSTER, ("venv", "no torch", "finetune-launcher[train]"),
        wrong=lambda bench: bench.site.update(venv=str(empty_venv(bench.home / "venv")))),
    Row(60, "a Python that is too old", CLUSTER, ("Python 3.9", "3.11 or newer"), wrong=old_python),
    Row(60, "other packages on one host",
        elsewhere=f"{TRAIN}/test_checks.py::test_other_packages_on_one_host_end_the_attempt_there"),
    Row(60, "no Python where the site says", CLUSTER, ("venv: no Python",),
        wrong=lambda bench: bench.site.update(venv="/nonexistent")),
)  # fmt: skip
"""Every number of the matrix, in order."""


HERE = [row for row in TABLE if row.elsewhere is None]


@pytest.mark.parametrize("row", HERE, ids=[f"{row.number}-{row.what}"[:60] for row in HERE])
def test_a_bad_input_is_refused_with_what_to_do(row: Row, bench: Bench) -> None:
    """The exit code and the words of the table, no traceback, and nothing submitted."""
    if row.wrong is not None:
        row.wrong(bench)
    overrides = [row.overrides] if " " in row.overrides and row.overrides.count("=") == 1 else row.overrides.split(" ")
    result = bench.submit(*filter(None, overrides))
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == row.code, result.stderr
    missing = [word for word in row.words if word not in result.stderr]
    assert not missing, result.stderr
    assert all("--test-only" in call for call in bench.slurm.calls("sbatch"))
    assert not (bench.home / "runs").exists()


def test_the_table_has_every_number() -> None:
    """1 to 60; rows held elsewhere name a test that exists."""
    assert {row.number for row in TABLE} == set(range(1, 61))
    for row in TABLE:
        if row.elsewhere is not None:
            file, _, name = row.elsewhere.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), row.elsewhere


def test_the_working_folder_is_gone(bench: Bench) -> None:
    """Row 35: sbatch would take the job, which would end in a second without a log."""
    bench.recipe["model"]["name_or_path"] = str(bench.home / "model")
    bench.recipe["data"]["train"] = [{"path": str(bench.home / "chats.jsonl")}]
    bench.recipe["slurm"]["site"] = str(bench.home / "site.yaml")
    bench.recipe["output_dir"] = str(bench.home / "out")
    bench.submit()
    gone = bench.home / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    result = CliRunner().invoke(main, ["submit", str(bench.home / "recipe.yaml"), "--dry-run"])
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == CLUSTER
    assert "working folder" in result.stderr and "cd to one that exists" in result.stderr


def test_paths_with_spaces_and_hashes_work(bench: Bench) -> None:
    """Row 38: what sbatch can be told safely is no mistake."""
    (bench.home / "my runs #1;2").mkdir()
    result = bench.submit("output_dir=my runs #1;2")
    assert result.exit_code == 0, result.stderr
    assert "my runs #1;2" in json.loads(result.stdout)["run_dir"]


def test_all_mistakes_before_the_plan_come_at_once(bench: Bench) -> None:
    """Data, model and site in one answer; the first gives the exit code."""
    bench.rows(GOOD, "{")
    without("config.json")(bench)
    result = bench.submit("slurm.site=nowhere")
    assert result.exit_code == DATA
    assert_each_has_a_line(result.stderr, "chats.jsonl:2", "no config.json", "'nowhere'")


def test_all_mistakes_after_the_plan_come_at_once(bench: Bench) -> None:
    """Model, files, tracking and cluster in one answer, one line each."""
    pickled(bench)
    bench.partition("DenyAccounts=dev")
    result = bench.submit("wandb.mode=online", "slurm.cpus_per_task=64", "output_dir=/proc/runs")
    assert result.exit_code == MODEL
    assert_each_has_a_line(result.stderr, "pickled", "/proc/runs", "wandb login", "does not take dev", "64 CPUs")


def assert_each_has_a_line(answer: str, *words: str) -> None:
    lines = [line for line in answer.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(words)
    assert all(any(word in line for line in lines) for word in words), answer


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("slurm.constraint=a100", "slurm.extra.nodelist=node1"),
        ("slurm.extra.dependency=afterok:5", "slurm.extra.exclude=node1"),
    ],
)
def test_slurm_is_asked_five_times_at_most(bench: Bench, overrides: tuple[str, ...]) -> None:
    """Controllers count every call against a user's rate; what is asked first decides most."""
    bench.account(submit="50", tres="node=100")
    bench.slurm.say("squeue", "5|5\n")
    assert bench.submit("--no-queue", *overrides).exit_code == 0
    programs = ("sbatch", "squeue", "scontrol", "sinfo", "sacctmgr", "sacct")
    calls = [[program, *words] for program in programs for words in bench.slurm.calls(program)]
    assert 3 <= len(calls) <= 5, calls
