"""Plans of models that no closed form knows: counted in the real class and measured on fake tensors."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.errors import ModelError
from launcher.facts.model import model_shape
from launcher.facts.site import Site
from launcher.planning.anatomy import measured_shape
from launcher.planning.memory import estimate_memory
from launcher.planning.plan import LoraNumbers
from launcher.planning.trace import model_config, python_of, trace_step
from launcher.planning.traced import traced_memory
from launcher.planning.trainable import trainable_params
from launcher.recipe.schema import ModelSection
from tests.tiny import make_candidate

pytestmark = pytest.mark.filterwarnings("ignore")
GIB = 2**30
SITE = Site(
    name="one",
    executor="local",
    gpu="H100-80GB",
    gpus_per_node=8,
    max_nodes=1,
    cpus_per_node=64,
    mem_bytes_per_node=1000 * GIB,
)
OPT = {
    "model_type": "opt",
    "vocab_size": 4096,
    "hidden_size": 256,
    "ffn_dim": 1024,
    "word_embed_proj_dim": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
FIXED = ("train.per_device_train_batch_size=1", "deepspeed.stage=0", "slurm.nodes=1", "slurm.gpus_per_node=1")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of this module's processes are remembered within it, never beyond."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("LAUNCHER_SITE", raising=False)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(OPT))
    rows = [{"prompt": f"say {number}", "completion": "so " * 20} for number in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("r.yaml").write_text(
        "name: r\nmodel: {name_or_path: ./model}\nmethod: full\nslurm: {site: a100-80gb}\n"
        "data: {train: [{path: rows.jsonl}], max_seq_length: 256}\ntrain: {global_batch_size: 16}\n"
    )
    return "r.yaml"


def plan(*arguments: str):
    return CliRunner().invoke(main, ["plan", *arguments], catch_exceptions=False)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B"])
def test_counts_of_the_real_class_are_the_catalogues(name):
    """Where both are known they agree to the element: parameters, one layer, what LoRA trains, the tied head."""
    section = ModelSection(name_or_path=name)
    known, counted = model_shape(section), measured_shape(model_config(section), name=name, python=python_of(SITE))
    for what in ("params", "layer_params", "layers", "hidden", "vocab", "tied_embeddings", "head_params"):
        assert getattr(counted, what) == getattr(known, what), what
    lora = LoraNumbers(
        r=16, lora_alpha=32.0, lora_dropout=0.0, target_modules="all-linear", use_rslora=False, use_dora=False
    )
    adapter = make_candidate(method="lora", lora=lora)
    assert trainable_params(counted, adapter) == trainable_params(known, adapter)


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "full", "zero_stage": 0},
        {"method": "full", "zero_stage": 3, "nodes": 1, "gpus_per_node": 8},
        {"method": "full", "zero_stage": 2, "gpus_per_node": 8, "gradient_checkpointing": True},
    ],
)
def test_a_known_model_needs_the_same_either_way(fields):
    """The traced estimate of a Llama is the closed form's, term for term within 3 % of the peak."""
    section = ModelSection(name_or_path="meta-llama/Llama-3.1-8B")
    config, known = model_config(section), model_shape(section)
    common = {"precision": "bf16", "gpu": "H100-80GB", "device": "cuda", "seq_len": 2048, "micro_batch": 1,
              "packing": False, "optim": "adamw_torch_fused"}  # fmt: skip
    candidate = make_candidate(**(common | fields))
    counted = measured_shape(config, name="llama", python=python_of(SITE))
    closed = estimate_memory(known, candidate, SITE)
    traced = traced_memory(counted, candidate, trace_step(config, candidate), SITE)
    assert traced.peak_bytes.expected == pytest.approx(closed.peak_bytes.expected, rel=0.03)
    for term in ("weights", "gradients", "optimizer"):
        assert traced.terms_bytes[term] == pytest.approx(closed.terms_bytes[term], rel=0.01)
    assert traced.terms_bytes["runtime"] == closed.terms_bytes["runtime"]


def test_layers_that_differ_are_not_extrapolated():
    """Two and four layers stand for all of them only where they are alike."""
    config = {"model_type": "qwen2_moe", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "num_experts": 4,
              "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]}  # fmt: skip
    with pytest.raises(ModelError, match="layers differ in size"):
        measured_shape(config, name="moe", python=python_of(SITE))


def test_the_refusal_without_a_trace_names_it(recipe):
    """Exit 4, the architecture by name, and the command that works."""
    done = plan(recipe)
    assert done.exit_code == 4
    assert "'opt'" in done.stderr and "--trace" in done.stderr


def test_what_a_trace_cannot_decide_is_listed_at_once(recipe):
    """There is no search: every key that must be fixed is named, with a value that works, in one go (exit 2)."""
    done = plan(recipe, "method=auto", "--trace")
    assert done.exit_code == 2
    for key in ("method", *(each.split("=")[0] for each in FIXED)):
        assert f"error: {key}: auto" in done.stderr
    assert all(each in done.stderr for each in FIXED)


def test_an_unknown_architecture_is_planned_by_trace(recipe):
    """Exit 0, a verdict with the device's bytes, in JSON and in words; what is not known is said to be unknown."""
    done = plan(recipe, "--trace", "--json", *FIXED)
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    memory = document["chosen"]["memory"]
    assert document["basis"] == "trace" and document["chosen"]["fits"] is True
    layer = 4 * 256 * 256 + 4 * 256 + 2 * 256 * 1024 + 1024 + 256 + 4 * 256
    params = 6 * layer + 4096 * 256 + (512 + 2) * 256 + 2 * 256
    assert document["model"]["params"] == params
    assert memory["terms_bytes"]["weights"] == 4 * params
    assert memory["terms_bytes"]["optimizer"] == 8 * params
    assert 0 < memory["peak_bytes"]["expected"] < memory["device_bytes"]["expected"] < memory["usable_bytes"]
    assert document["trace"]["layers"] == 6
    said = plan(recipe, "--trace", *FIXED).stdout
    for words in ("fits", "opt", "traced", "GiB", "not predicted"):
        assert words in said


def test_a_traced_plan_that_does_not_fit_exits_6(recipe):
    """The same document with `fits: false`, and the figure in the error."""
    big = OPT | {"hidden_size": 8192, "word_embed_proj_dim": 8192, "ffn_dim": 32768, "num_hidden_layers": 48}
    Path("model/config.json").write_text(json.dumps(big))
    done = plan(recipe, "--trace", "--json", "method=lora", *FIXED)
    assert done.exit_code == 0, done.stderr
    done = plan(recipe, "--trace", "--json", *FIXED)
    assert done.exit_code == 6
    chosen = json.loads(done.stdout)["chosen"]
    assert chosen["fits"] is False and chosen["gradient_checkpointing"] is True
    assert chosen["rejected_because"] in done.stderr
    assert "the A100-80GB has" in done.stderr


def test_a_trace_counts_what_an_adapter_trains(recipe):
    """LoRA on every linear layer of the real class: rank times inputs and outputs."""
    done = plan(recipe, "--trace", "--json", "method=lora", "lora.r=8", *FIXED)
    assert done.exit_code == 0, done.stderr
    per_layer = 8 * (4 * (256 + 256) + 2 * (256 + 1024))
    assert json.loads(done.stdout)["model"]["trainable_params"] == 6 * per_layer


def test_more_ranks_share_the_states(recipe):
    """ZeRO-3 over eight GPUs holds an eighth of the states; what tokens need stays as traced."""
    alone = json.loads(plan(recipe, "--trace", "--json", *FIXED[:1], "deepspeed.stage=3", *FIXED[2:]).stdout)
    eight = [*FIXED[:1], "deepspeed.stage=3", "slurm.nodes=1", "slurm.gpus_per_node=8"]
    shared = json.loads(plan(recipe, "--trace", "--json", *eight).stdout)
    one, many = (document["chosen"]["memory"]["terms_bytes"] for document in (alone, shared))
    assert many["optimizer"] == pytest.approx(one["optimizer"] / 8, rel=0.01)
    assert many["activations"] == one["activations"] > 0
