"""`launcher serve` before anything is loaded: names, the one base, its memory, and the job that runs vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from launcher.cli import main
from launcher.errors import ClusterError, ConflictError, JobFailedError, LauncherError, RecipeError
from launcher.facts.fingerprint import model_fingerprint
from launcher.runs import registry, serving_job
from launcher.runs.folder import RunFolder, write_json
from launcher.runs.serving import Options, find_target, serve_request
from launcher.runs.serving_memory import memory
from tests.tiny import HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCAB, make_model_dir
from tests.unit.runs.material import FakeSlurm, make_run

QLORA = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bf16"}
RANK = 8


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny model folder."""
    return make_model_dir(tmp_path / "model")


def with_adapter(
    parent: Path, model: Path, name: str, config: dict[str, Any] | None = None, **lineage: Any
) -> RunFolder:
    """A finished run with a LoRA adapter of `model`."""
    run = make_run(parent, name)
    run.adapter.mkdir()
    told = {"run_id": run.run_id, "method": "lora", "base": "org/base", "base_fingerprint": model_fingerprint(model),
            "base_dtype": "bf16", "quantization": None} | lineage  # fmt: skip
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{prefix}.lora_A.weight": (RANK, HIDDEN), f"{prefix}.lora_B.weight": (HIDDEN, RANK)}
    metadata = {"format": "pt", "launcher.lineage": json.dumps(told)}
    zeros = {key: np.zeros(shape, np.float32) for key, shape in weights.items()}
    save_file(zeros, run.adapter / "adapter_model.safetensors", metadata=metadata)
    plain = {"peft_type": "LORA", "r": RANK, "target_modules": ["q_proj"], "base_model_name_or_path": str(model)}
    write_json(run.adapter / "adapter_config.json", plain | (config or {}))
    return run


def request(*texts: str, parent: Path, **given: Any) -> dict[str, Any]:
    """What `launcher serve` would start."""
    options = Options(**{key: given.pop(key) for key in list(given) if key in Options.__slots__})
    defaults: dict[str, Any] = {"base": None, "base_name": None, "dtype": "auto"}
    return serve_request(texts, parent, **(defaults | given), options=options)


def test_runs_tags_folders_and_names_of_their_own(base: Path, tmp_path: Path) -> None:
    """Each adapter is called by its run, by the tag it was asked for by, or as the user says."""
    runs = tmp_path / "runs"
    first, second = (with_adapter(runs, base, name) for name in ("one", "two"))
    registry.tag(second.run_id, "best", runs)
    asked = request(first.run_id, "best", f"mine={first.adapter}", parent=runs)
    assert asked["adapters"] == [
        {"name": first.run_id, "folder": str(first.adapter)},
        {"name": "best", "folder": str(second.adapter)},
        {"name": "mine", "folder": str(first.adapter)},
    ]
    assert asked["base"]["name"] == "org/base"
    assert (asked["base"]["folder"], asked["base"]["dtype"]) == (str(base), "bf16")


def test_a_fully_fine_tuned_run_is_a_base(base: Path, tmp_path: Path) -> None:
    """Its model is served under its name; adapters of other weights do not go with it."""
    runs = tmp_path / "runs"
    full = make_run(runs, "full")
    make_model_dir(full.model, seed=5)
    assert request(full.run_id, parent=runs)["base"]["name"] == full.run_id
    adapter = with_adapter(runs, base, "lora")
    with pytest.raises(ConflictError, match="holds other weights"):
        request(full.run_id, adapter.run_id, parent=runs)
    with pytest.raises(RecipeError, match="one server has one base"):
        request(full.run_id, str(base), parent=runs)


def test_runs_of_several_bases_are_refused_with_both_names(base: Path, tmp_path: Path) -> None:
    """By the fingerprint of the weights; name and commit are shown beside it."""
    runs = tmp_path / "runs"
    one = with_adapter(runs, base, "one", base_revision="a" * 40)
    other = with_adapter(runs, base, "other", base="org/other", base_fingerprint="c" * 64)
    with pytest.raises(ConflictError) as found:
        request(one.run_id, other.run_id, parent=runs)
    said = str(found.value)
    assert f"{one.run_id} was trained on org/base @ {'a' * 12} (fingerprint " in said
    assert f"{other.run_id} on org/other (fingerprint {'c' * 12}): other weights" in said


def test_qlora_brings_its_4_bits_and_does_not_mix_with_plain_lora(base: Path, tmp_path: Path) -> None:
    """Unless the user chooses one base for both."""
    runs = tmp_path / "runs"
    rounded = with_adapter(runs, base, "rounded", quantization=QLORA, method="qlora")
    plain = with_adapter(runs, base, "plain")
    assert request(rounded.run_id, parent=runs)["base"]["quantization"] == QLORA
    assert request(plain.run_id, parent=runs)["base"]["quantization"] is None
    with pytest.raises(ConflictError, match="--dtype"):
        request(rounded.run_id, plain.run_id, parent=runs)
    chosen = request(rounded.run_id, plain.run_id, parent=runs, dtype="fp16")["base"]
    assert (chosen["dtype"], chosen["quantization"], chosen["chosen"]) == ("fp16", None, True)
    chosen = request(plain.run_id, rounded.run_id, parent=runs, dtype="4bit")["base"]
    assert (chosen["dtype"], chosen["quantization"]) == ("bf16", QLORA)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("nothing", RecipeError, "no run 'nothing'"),
        ("a b=tiny", RecipeError, "NAME=RUN"),
        ("name=", RecipeError, "NAME=RUN"),
        ("unfinished", JobFailedError, "has nothing to serve"),
    ],
)
def test_what_is_not_there_is_said(text: str, error: type[LauncherError], words: str, tmp_path: Path) -> None:
    """With the exit code of its class."""
    make_run(tmp_path / "runs", "unfinished")
    with pytest.raises(error, match=words):
        find_target(text, tmp_path / "runs")


def test_an_adapter_of_another_tool_needs_a_word_and_names_must_differ(base: Path, tmp_path: Path) -> None:
    """Without lineage nothing says which base it is of."""
    runs = tmp_path / "runs"
    silent = with_adapter(runs, base, "silent", base_fingerprint=None)
    with pytest.raises(ConflictError, match="--trust-base"):
        request(silent.run_id, parent=runs)
    assert request(silent.run_id, parent=runs, trust_base=True)["adapters"]
    with pytest.raises(RecipeError, match="a name of two"):
        request(f"x={silent.run_id}", f"x={silent.run_id}", parent=runs, trust_base=True)
    with pytest.raises(RecipeError, match="a name of two"):
        request(f"x={silent.run_id}", parent=runs, trust_base=True, base_name="x")


def test_the_memory_is_weights_adapters_and_the_longest_answers(base: Path, tmp_path: Path) -> None:
    """Counted by hand for the tiny model, plain and in 4 bits."""
    run = with_adapter(tmp_path / "runs", base, "one")
    told = memory(request(run.run_id, parent=tmp_path / "runs", rows=3, context=100))
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2
    linear = LAYERS * (attention + 3 * HIDDEN * INTERMEDIATE)
    others = 2 * VOCAB * HIDDEN + (2 * LAYERS + 1) * HIDDEN
    assert told["weights_bytes"] == 2 * (linear + others)
    assert told["adapters_bytes"] == 4 * 2 * RANK * HIDDEN
    assert told["kv_bytes_per_token"] == 2 * LAYERS * KV_HEADS * 16 * 2
    assert told["kv_bytes_at_most"] == 3 * 100 * told["kv_bytes_per_token"]
    assert (
        told["total_bytes_at_most"]
        == sum(told[f"{key}_bytes"] for key in ("weights", "adapters")) + told["kv_bytes_at_most"]
    )
    rounded = memory(request(run.run_id, parent=tmp_path / "runs", dtype="4bit"))
    assert rounded["weights_bytes"] == int(linear * (0.5 + (1 + 4 / 256) / 64) + others * 2)


def test_a_dry_run_says_what_would_be_loaded(base: Path, tmp_path: Path) -> None:
    """For people and as JSON; neither starts anything."""
    run = with_adapter(tmp_path / "runs", base, "one")
    words = ["serve", f"bot={run.run_id}", "--runs", str(tmp_path / "runs"), "--dry-run"]
    told = CliRunner().invoke(main, [*words, "--json"])
    document = json.loads(told.stdout)
    assert document["schema"] == 1
    assert document["adapters"] == [{"name": "bot", "folder": str(run.adapter)}]
    assert document["memory"]["weights_bytes"] > 0
    shown = CliRunner().invoke(main, words)
    assert f"adapter  bot  {run.adapter}" in shown.stdout
    assert "Next:" in shown.stderr
    assert CliRunner().invoke(main, [*words, "--host", "0.0.0.0"]).exit_code == 2


def test_an_environment_without_the_server_is_said_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which packages are missing, and how they are installed; not a traceback of the process it would become."""
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # no installed packages
    (venv / "python").chmod(0o755)
    monkeypatch.setenv("LAUNCHER_VENV", str(tmp_path / "venv"))
    told = CliRunner().invoke(main, ["serve", str(base)])
    assert told.exit_code == ClusterError.exit_code
    assert "fastapi, uvicorn" in told.stderr
    assert "finetune-launcher[train,serve]" in told.stderr


# ---------------------------------------------------------------- with vLLM, as a job


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A train environment in which vLLM is installed, and a `vllm` that notes how it was started; its notes."""
    notes, venv = tmp_path / "vllm.json", tmp_path / "venv"
    installed = venv / "site" / "vllm-0.19.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.19.0\n")
    (venv / "bin").mkdir()
    python = f'#!/bin/sh\nPYTHONPATH="{venv / "site"}:$PYTHONPATH" exec {sys.executable} "$@"\n'
    note = (
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump({{'words': sys.argv[1:], 'environment': dict(os.environ)}}, open({str(notes)!r}, 'w'))\n"
    )
    for name, text in (("python", python), ("vllm", note)):
        (venv / "bin" / name).write_text(text)
        (venv / "bin" / name).chmod(0o755)
    monkeypatch.setenv("LAUNCHER_VENV", str(venv))
    return notes


def test_without_vllm_the_job_is_refused_with_what_works(base: Path, tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    """Nothing is submitted."""
    run = with_adapter(tmp_path / "runs", base, "one")
    words = ["serve", run.run_id, "--runs", str(tmp_path / "runs"), "--slurm", "--site", "a100-80gb"]
    told = CliRunner().invoke(main, [*words, "--token-env", "SERVE_TOKEN"], env={"SERVE_TOKEN": "secret"})
    assert told.exit_code == ClusterError.exit_code
    assert "vllm is not in the train environment" in told.stderr
    assert "the embedded server needs no vLLM" in told.stderr
    assert not fake_slurm.calls("sbatch")


def test_vllm_gets_every_adapter_and_the_highest_rank_step(base: Path, tmp_path: Path) -> None:
    """The command of `launcher export`, for several adapters."""
    runs = tmp_path / "runs"
    one, two = (with_adapter(runs, base, name) for name in ("one", "two"))
    command = serving_job.vllm_command(request(f"a={one.run_id}", f"b={two.run_id}", parent=runs, context=512), gpus=2)
    assert command[:9] == ["vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", "8", "--lora-modules",
                           f"a={one.adapter}", f"b={two.adapter}"]  # fmt: skip
    rest = dict(zip(command[9::2], command[10::2], strict=True))
    assert rest == {"--max-loras": "2", "--served-model-name": "org/base", "--host": "0.0.0.0", "--port": "8000",
                    "--dtype": "bfloat16", "--tensor-parallel-size": "2", "--max-model-len": "512"}  # fmt: skip
    alone = serving_job.vllm_command(request(str(base), parent=runs))
    assert alone[:5] == ["vllm", "serve", str(base), "--served-model-name", "model"]
    assert "--enable-lora" not in alone


def test_what_vllm_refuses_is_refused_before_the_queue(base: Path, tmp_path: Path) -> None:
    """Every adapter and every reason; and no port that nobody could know."""
    runs = tmp_path / "runs"
    dora, saved = (
        with_adapter(runs, base, "dora", {"use_dora": True}),
        with_adapter(runs, base, "s", {"modules_to_save": ["x"]}),
    )
    with pytest.raises(RecipeError) as found:
        serving_job.vllm_command(request(dora.run_id, saved.run_id, parent=runs, port=0))
    said = "\n".join(found.value.problems)
    assert f"{dora.run_id}: vLLM would refuse it: it is a DoRA adapter" in said
    assert f"{saved.run_id}: vLLM would refuse it: it replaces whole modules" in said
    assert "--port 0" in said


def test_the_job_keeps_the_token_private_and_becomes_vllm(
    base: Path, tmp_path: Path, fake_slurm: FakeSlurm, fake_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is in no argument, no script and no variable of Slurm's, but vLLM has it."""
    monkeypatch.setenv("LAUNCHER_GATE", "not-for-others")  # of a kind that jobs usually get
    monkeypatch.setenv("LAUNCHER_RUNS", str(tmp_path / "runs"))
    run = with_adapter(tmp_path / "runs", base, "one")
    fake_slurm.say("sbatch", "77\n")
    words = ["serve", f"bot={run.run_id}", "--slurm", "--site", "a100-80gb", "-p", "gpu", "-t", "60"]
    assert CliRunner().invoke(main, words).exit_code == 2, "a token is needed"
    dry = CliRunner().invoke(main, [*words, "--dry-run"])
    assert json.loads(dry.stdout)["vllm"] == "0.19.0"
    assert not fake_slurm.calls("sbatch")
    told = CliRunner().invoke(main, [*words, "--token-env", "LAUNCHER_GATE", "--json"])
    assert told.exit_code == 0, told.output
    folder = Path(json.loads(told.stdout)["folder"])
    (call,) = fake_slurm.calls("sbatch")
    assert {"--partition=gpu", "--time=60", "--nodes=1", "--no-requeue", f"--chdir={folder}"} <= set(call)
    everything = " ".join(call) + fake_slurm.script + (folder / "request.json").read_text()
    assert "not-for-others" not in everything
    assert "LAUNCHER_GATE" not in next(word for word in call if word.startswith("--export="))
    assert (folder / "token.json").stat().st_mode & 0o777 == 0o600

    job = [sys.executable, "-m", "launcher.runs.serving_job", str(folder)]
    path = f"{fake_vllm.parent / 'venv' / 'bin'}:{os.environ['PATH']}"
    subprocess.run(job, check=True, env={"PATH": path, "PYTHONPATH": str(Path(__file__).parents[3])})
    started = json.loads(fake_vllm.read_text())
    assert started["words"] == json.loads((folder / "request.json").read_text())["command"][1:]
    assert started["environment"]["VLLM_API_KEY"] == "not-for-others"
    assert json.loads((folder / "address.json").read_text())["url"].endswith(":8000/v1")
