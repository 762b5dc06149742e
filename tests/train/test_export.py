"""`launcher export`: what engines refuse is refused with the reason, the rest is written, loaded and compared."""

import contextlib
import json
import shutil
import subprocess

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launcher.adapters.export import export
from launcher.adapters.from_checkpoint import export_checkpoint
from launcher.adapters.lineage import read_adapter
from launcher.errors import ConflictError, RecipeError
from launcher.facts.serving import ENGINES, VLLM_RANKS, Served, max_lora_rank, refusals, serve_command
from launcher.worker.saved import open_saved
from tests.tiny import make_recipe
from tests.train.adapters import of_peft, train_adapter
from tests.train.ranks import Ranks
from tests.train.runs import candidate_for, make_run, train_here


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA adapter of rank 8."""
    return train_adapter(tmp_path_factory.mktemp("lora"), "lora")


def ask(adapted, target, engine="vllm", **changes):
    """A request for `export`."""
    base = str(adapted.base)
    return {
        "adapter": str(adapted.adapter),
        "base": base,
        "target": str(target),
        "engine": engine,
        "name": "bot",
    } | changes


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exported_adapter_answers_as_the_original(lora, engine, tmp_path):
    """The command names the adapter, the folder holds PEFT's files and no path of this machine."""
    made = export(ask(lora, tmp_path / "out", engine))
    assert made["round_trip_difference"] == 0.0
    assert "bot=./adapter" in made["command"]
    folder = tmp_path / "out" / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= {
        p.name for p in folder.iterdir()
    }
    for path in [*folder.iterdir(), tmp_path / "out" / "serve.sh"]:
        assert path.suffix == ".safetensors" or "/tmp" not in path.read_text(), path
    assert subprocess.run(["sh", "-n", str(tmp_path / "out" / "serve.sh")], check=False).returncode == 0


@pytest.mark.parametrize(("method", "why"), [("dora", "magnitudes"), ("adalora", "only LoRA is loaded")])
def test_kinds_that_engines_refuse(method, why, tmp_path):
    """DoRA and AdaLoRA, for every engine, with what to do instead; nothing is written."""
    adapted = train_adapter(tmp_path / method, method)
    for engine in ENGINES:
        with pytest.raises(RecipeError, match=why):
            export(ask(adapted, tmp_path / "out", engine))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"bias": "lora_only"}, "trained biases"),
        ({"modules_to_save": ("embed_tokens",)}, "replaces whole modules"),
        ({"fused_experts": True}, "fused experts"),
        ({"target_modules": ("q_proj", "embed_tokens")}, "changes embed_tokens"),
        ({"rank": 1024}, "rank 1024 is over 512"),
    ],
)
def test_properties_that_vllm_refuses(changes, why):
    """Each is named; a plain LoRA of rank 16 is not refused."""
    plain = {"method": "lora", "rank": 16, "target_modules": ("q_proj", "v_proj")}
    assert refusals("vllm", Served(**plain)) == []
    assert any(why in one for one in refusals("vllm", Served(**(plain | changes))))


@given(st.integers(1, 512))
def test_the_rank_step_holds_the_rank_and_is_the_smallest(rank):
    """vLLM takes a few values of --max-lora-rank only."""
    step = max_lora_rank(rank)
    assert step in VLLM_RANKS
    assert step >= rank
    assert all(other < rank for other in VLLM_RANKS if other < step)
    assert str(step) in serve_command("vllm", base="org/base", name="bot", folder="./adapter", rank=rank)


def test_another_base_and_an_existing_folder_are_refused(lora, tmp_path):
    """The comparison is with the adapter's own base only, and nothing is written over."""
    (tmp_path / "out").mkdir()
    with pytest.raises(ConflictError, match="exists already"):
        export(ask(lora, tmp_path / "out"))
    other = AutoModelForCausalLM.from_pretrained(lora.base)
    with torch.no_grad():
        other.model.norm.weight += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConflictError, match="not those that"):
        export(ask(lora, tmp_path / "new", base=str(tmp_path / "other")))


def test_the_verb_prints_the_command_and_tells_what_it_could_not_compare(lora, tmp_path):
    """Without the base on this machine nothing is loaded, and that is said."""
    from launcher.cli import main

    folder = tmp_path / "moved"
    folder.mkdir()
    for path in lora.adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    result = CliRunner().invoke(main, ["export", str(folder), "--for", "vllm", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "not loaded and compared" in result.stdout
    assert 'vllm serve "$BASE" --enable-lora --max-lora-rank 8' in result.stdout
    unset = subprocess.run([tmp_path / "out" / "serve.sh"], capture_output=True, text=True, check=False, env={})
    assert "BASE: must name the folder of the base model, model" in unset.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_and_scalings_of_their_own_are_evened(lora, engine, tmp_path):
    """Engines read one r and one lora_alpha for all modules: the products are kept, the patterns are gone."""
    odd = of_peft(lora.base, tmp_path / "odd", r=6, lora_alpha=12, rank_pattern={"v_proj": 3},
                  alpha_pattern={".*layers.1.*proj": 5})  # fmt: skip
    made = export(ask(lora, tmp_path / "out", engine, adapter=str(odd), trust_base=True))
    assert made["evened"]
    assert made["round_trip_difference"] <= 1e-5
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["lora_alpha"] / config["r"]) == ({}, {}, 1.0)
    assert config["r"] == (8 if engine == "tgi" else 6)
    held = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in held.items() if "lora_A" in name} == {config["r"]}


def test_rank_stabilised_scaling_is_folded_in_where_it_is_not_read(lora, tmp_path):
    """SGLang divides by r whatever the configuration says; the others read it."""
    adapter = of_peft(lora.base, tmp_path / "adapter", r=8, lora_alpha=16, use_rslora=True)
    for engine, folded in (("vllm", False), ("sglang", True)):
        made = export(ask(lora, tmp_path / engine, engine, adapter=str(adapter), trust_base=True))
        config = json.loads((tmp_path / engine / "adapter" / "adapter_config.json").read_text())
        assert (made["evened"], config["use_rslora"]) == (folded, not folded)
        assert made["round_trip_difference"] <= 1e-5


def test_a_pattern_of_modules_is_written_out(lora, tmp_path):
    """Engines do not read PEFT's regular expressions: the modules themselves are named, and judged."""
    adapter = of_peft(lora.base, tmp_path / "adapter", target_modules=r".*\.(q_proj|v_proj)")
    export(ask(lora, tmp_path / "out", "sglang", adapter=str(adapter), trust_base=True))
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "v_proj"}
    head = of_peft(lora.base, tmp_path / "head", target_modules=r".*lm_head")
    with pytest.raises(RecipeError, match="it changes lm_head"):
        export(ask(lora, tmp_path / "head-out", "sglang", adapter=str(head), trust_base=True))


def test_some_layers_only_is_not_for_tgi(lora, tmp_path):
    """Which leaves out a kind of module that is not on every layer; the others take it."""
    first = of_peft(lora.base, tmp_path / "first", target_modules=["q_proj", "v_proj"])
    path = first / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "layers.0.self_attn.v_proj" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="v_proj on some layers only"):
        export(ask(lora, tmp_path / "tgi", "tgi", adapter=str(first), base=None))
    assert export(ask(lora, tmp_path / "vllm", "vllm", adapter=str(first), base=None))["command"]


def renamed(adapter, folder, **changes):
    """A copy of an adapter whose lineage says something else."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    told = json.dumps(read_adapter(folder).lineage | changes)
    save_file(load_file(path), path, metadata={"format": "pt", "launcher.lineage": told})
    return folder


def test_a_base_on_the_hub_is_served_at_its_revision(lora, tmp_path):
    """The id and the commit of the lineage are in the command; another commit would be another base."""
    folder = renamed(lora.adapter, tmp_path / "adapter", base="org/base", base_revision="c0ffee")
    for engine in ENGINES:
        made = export(ask(lora, tmp_path / engine, engine, adapter=str(folder), base=None))
        assert " org/base " in made["command"]
        assert made["command"].endswith("--revision c0ffee")
        assert "base_model: org/base" in (tmp_path / engine / "adapter" / "README.md").read_text()


def test_a_base_that_was_rounded_is_served_rounded_or_that_is_said(tmp_path):
    """vLLM quantizes to nf4 while it loads; for the others the command is given with a warning."""
    adapted = train_adapter(tmp_path, "qlora")
    assert "--quantization bitsandbytes" in export(ask(adapted, tmp_path / "vllm"))["command"]
    assert "launcher merge" in export(ask(adapted, tmp_path / "tgi", "tgi"))["notices"][0]


def test_the_name_of_a_base_runs_nothing(lora, tmp_path):
    """What stands in an adapter's lineage is a stranger's word; serve.sh is a script."""
    folder = renamed(lora.adapter, tmp_path / "adapter", base="x}$(touch ran)`touch ran`")
    export(ask(lora, tmp_path / "out", adapter=str(folder), base=None))
    done = subprocess.run([tmp_path / "out" / "serve.sh"], cwd=tmp_path, env={}, capture_output=True, check=False)
    assert done.returncode != 0
    assert not list(tmp_path.rglob("ran"))


def test_options_that_would_do_nothing_are_refused(lora, tmp_path):
    """--dtype and --whole with an engine that loads adapters; a name that no engine can serve."""
    from launcher.cli import main

    for words, why in ((["--dtype", "bf16"], "--dtype is for merged"), (["--whole"], "--whole is for merged"),
                       (["--name", "a=b"], "cannot serve 'a=b'")):  # fmt: skip
        asked = ["export", str(lora.adapter), "--for", "vllm", "-o", str(tmp_path / "out"), *words]
        done = CliRunner().invoke(main, asked)
        assert (done.exit_code, why in done.stderr) == (2, True), done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_a_checkpoint_of_a_full_run_becomes_a_sharded_model(world, stage, tmp_path):
    """Stopped in the middle: the weights of the files are those the run went on with, and no rank gathered them."""
    saving = {"save_minutes": None, "save_steps": None, "save_total_limit": 2}
    recipe = make_recipe(tmp_path, method="full", train={"max_steps": 6}, checkpoint=saving)
    candidate = candidate_for(world, stage, method="full", lora=None)
    run = make_run(recipe, candidate)
    with contextlib.closing(Ranks(world, tmp_path / "rendezvous")) as ranks:
        ranks.run(train_here, run.path, "job.0", 4)
    checkpoint = max(run.checkpoints.glob("step-*"))
    request = {"checkpoint": str(checkpoint), "base": recipe.model.name_or_path, "target": str(tmp_path / "out"),
               "dtype": "fp32", "shard_bytes": 100_000}  # fmt: skip
    made = export_checkpoint(request)
    assert made["files"] > 2
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    saved = open_saved(checkpoint)
    for name, tensor in exported.items():
        flat = torch.empty(tensor.numel())
        saved.read(name, "master", 0, flat)
        assert torch.equal(flat, tensor.flatten()), name
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path).state_dict()
    assert any(not torch.equal(base[name], tensor) for name, tensor in exported.items()), "it was trained"
