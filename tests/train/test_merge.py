"""`launcher merge`: the merged model is base and adapter together, in bounded memory, and of no other base."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from launcher.adapters.lineage import read_adapter
from launcher.adapters.merging import merge
from launcher.errors import ClusterError, ConflictError, JobFailedError, ModelError, RecipeError
from tests.train.adapters import logits, of_peft, train_adapter

MIB = 2**20


def ask(adapted, target, **changes):
    """A request for `merge`."""
    return {"adapter": str(adapted.adapter), "base": str(adapted.base), "target": str(target)} | changes


def share(found, expected):
    """Largest difference as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module", params=["lora", "dora", "qlora"])
def adapted(request, tmp_path_factory):
    """A trained adapter of each kind that is merged matrix by matrix."""
    targets = {"lora.target_modules": ("q_proj", "v_proj", "down_proj")} if request.param == "qlora" else {}
    return train_adapter(tmp_path_factory.mktemp(request.param), request.param, **targets)


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_the_merged_model_answers_as_the_trained_one(adapted, dtype, limit, tmp_path):
    """Against the model still in memory: for QLoRA that is bitsandbytes' own 4-bit base, not our rounding of it."""
    made = merge(ask(adapted, tmp_path / "merged", dtype=dtype))
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert share(logits(alone), logits(adapted.model)) <= limit
    assert made["proof"]["difference"] <= made["proof"]["limit"] == limit


def test_a_merge_into_the_original_weights_would_not_be_qlora(tmp_path):
    """The sceptic's check of the test above: without rounding the base first the difference is far larger."""
    adapted = train_adapter(tmp_path, "qlora")
    path = adapted.adapter / "adapter_model.safetensors"
    told = read_adapter(adapted.adapter).lineage | {"quantization": None}
    save_file(load_file(path), path, metadata={"format": "pt", "launcher.lineage": json.dumps(told)})
    merge(ask(adapted, tmp_path / "merged", dtype="fp32"))
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert share(logits(alone), logits(adapted.model)) > 1e-2


def test_another_base_is_refused(adapted, tmp_path):
    """One changed matrix is another base; nothing is written."""
    other = tmp_path / "other"
    base = AutoModelForCausalLM.from_pretrained(adapted.base)
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight += 1e-3
    base.save_pretrained(other)
    with pytest.raises(ConflictError, match="not those that"):
        merge(ask(adapted, tmp_path / "merged", base=str(other)))
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_differs_is_not_kept(adapted, tmp_path, monkeypatch):
    """A matrix merged wrongly is found by the proof, by whole logits and by single matrices alike."""
    from launcher.adapters.shards import Merging

    right = Merging.merged
    monkeypatch.setattr(Merging, "merged", lambda self, module, weight: right(self, module, weight) * 1.5)
    for number, proof_bytes in enumerate((None, 0)):
        with pytest.raises(JobFailedError, match="not kept"):
            merge(ask(adapted, tmp_path / str(number), proof_bytes=proof_bytes))
    assert list(tmp_path.iterdir()) == []


def test_kinds_that_need_the_whole_model_say_so_and_work_with_it(tmp_path):
    """AdaLoRA: refused matrix by matrix with the way out, merged in memory by PEFT; prompts cannot be merged at all."""
    adapted = train_adapter(tmp_path / "adalora", "adalora")
    with pytest.raises(RecipeError, match="--whole"):
        merge(ask(adapted, tmp_path / "merged"))
    merge(ask(adapted, tmp_path / "merged", whole=True, dtype="fp32"))
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert share(logits(alone), logits(adapted.model)) <= 1e-4
    prompt = train_adapter(tmp_path / "prompt", "prompt", **{"data.packing": False})
    with pytest.raises(RecipeError, match="virtual tokens"):
        merge(ask(prompt, tmp_path / "prompts", whole=True))


def test_the_folder_says_what_is_true_and_no_path(adapted, tmp_path):
    """Card with base, rank and hashes; tokenizer and template as trained; nothing of this machine."""
    merge(ask(adapted, tmp_path / "merged"))
    folder = tmp_path / "merged"
    card = (folder / "README.md").read_text()
    assert "| rank | 8 |" in card
    assert read_adapter(adapted.adapter).lineage["base_fingerprint"] in card
    for path in folder.iterdir():
        assert path.suffix == ".safetensors" or str(tmp_path.parent) not in path.read_text(), path
    assert (folder / "chat_template.jinja").read_text() == (adapted.adapter / "chat_template.jinja").read_text()


def make_wide_base(folder: Path, shard: str) -> Path:
    """A Llama of 150 MiB in fp32 whose files hold 10 MiB each."""
    config = LlamaConfig(vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=11,
                         num_attention_heads=8, num_key_value_heads=4)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    return folder


MEASURE = """
import json, resource, sys
from launcher.adapters.merging import merge
import peft, transformers.models.llama.modeling_llama
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = merge(json.load(sys.stdin))
print(json.dumps({"grown_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, **made}))
"""


def test_memory_is_bounded_by_a_shard_and_not_by_the_model(tmp_path):
    """A sharded model is merged with less than half of it in memory: one output shard and copies of one matrix."""
    import peft

    base = make_wide_base(tmp_path / "base", "10MB")
    total = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    model = LlamaForCausalLM.from_pretrained(base)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.02)
    tuned.save_pretrained(tmp_path / "adapter")
    request = {"adapter": str(tmp_path / "adapter"), "base": str(base), "target": str(tmp_path / "merged"),
               "trust_base": True, "proof_bytes": 0}  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(MEASURE)], input=json.dumps(request), text=True,
                         capture_output=True, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    largest = max(path.stat().st_size for path in base.glob("*.safetensors"))
    assert len(list(base.glob("*.safetensors"))) >= 12
    assert told["grown_kib"] * 1024 < min(total / 2, 3 * largest + 30 * MIB), (told["grown_kib"], largest, total)
    assert told["proof"]["compared"] == "matrices"
    assert told["matrices"] == 7 * 11
    weights = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    assert weights == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    alone = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert share(logits(alone), logits(tuned.eval())) <= 1e-4


# ---------------------------------------------------------------- bases and adapters as they come

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}


def random_base(folder, kind, **changes):
    """A model of a family with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | FAMILIES.get(kind, {}) | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def together(base, adapter):
    """Logits of base and adapter as PEFT loads them."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(model, str(adapter)).eval())


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_merges_matrix_by_matrix(kind, tmp_path):
    """Tied embeddings, biases, fused and transposed matrices: fp32 within 1e-4, bf16 within 2e-2, by both proofs."""
    base = random_base(tmp_path / "base", kind)
    adapter = of_peft(base, tmp_path / "adapter")
    request = {"adapter": str(adapter), "base": str(base), "trust_base": True}
    expected = together(base, adapter)
    for dtype, limit, proof_bytes in (("fp32", 1e-4, None), ("bf16", 2e-2, None), ("fp32", 1e-4, 0)):
        target = tmp_path / f"{dtype}-{proof_bytes}"
        made = merge(request | {"target": str(target), "dtype": dtype, "proof_bytes": proof_bytes})
        assert made["proof"]["difference"] <= limit
        assert (
            share(logits(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()), expected) <= limit
        )


def test_a_base_of_another_size_is_said_before_anything_is_written(tmp_path):
    """Where the adapter does not say its base, the sizes of the matrices do."""
    adapter = of_peft(random_base(tmp_path / "base", "llama"), tmp_path / "adapter")
    other = random_base(tmp_path / "other", "llama", intermediate_size=160)
    request = {"adapter": str(adapter), "base": str(other), "target": str(tmp_path / "new" / "merged")}
    with pytest.raises(ModelError, match=r"down_proj.weight is \[64, 160\].*\[64, 128\].*\(6 of 14 matrices differ\)"):
        merge(request | {"trust_base": True})
    with pytest.raises(ModelError, match="PEFT cannot put it on"):
        merge(request | {"trust_base": True, "whole": True})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("torn", ["base", "adapter"])
def test_torn_files_are_named(torn, tmp_path):
    """A copy that stopped half-way is a model error with the file and its length, and no half of a merge."""
    base = random_base(tmp_path / "base", "llama")
    adapter = of_peft(base, tmp_path / "adapter")
    path = next((tmp_path / torn).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1000])
    request = {"adapter": str(adapter), "base": str(base), "target": str(tmp_path / "merged"), "trust_base": True}
    with pytest.raises(ModelError, match=f"{path.name}: truncated: "):
        merge(request)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_files_of_a_second_format_are_no_part_of_the_model(tmp_path):
    """Published folders may hold the same weights twice: what transformers does not load is not merged and written."""
    base = random_base(tmp_path / "base", "llama")
    adapter = of_peft(base, tmp_path / "adapter")
    save_file({"layers.0.attention.wq.weight": torch.zeros(64, 64)}, base / "consolidated.safetensors")
    merge({"adapter": str(adapter), "base": str(base), "target": str(tmp_path / "merged"), "trust_base": True})
    assert [path.name for path in (tmp_path / "merged").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_more_than_factors_is_merged_whole(settings, tmp_path):
    """Replaced modules and biases: refused matrix by matrix with the way out, which writes what its config says."""
    base = random_base(tmp_path / "base", "llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    adapter = of_peft(base, tmp_path / "adapter", **settings)
    request = {"adapter": str(adapter), "base": str(base), "target": str(tmp_path / "merged"), "trust_base": True}
    with pytest.raises(RecipeError, match="--whole"):
        merge(request)
    made = merge(request | {"whole": True, "dtype": "bf16"})
    assert made["proof"]["difference"] <= 2e-2
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_peft_does_not_merge_is_refused_in_its_words(tmp_path):
    """A bias of the factors has nowhere to go where the layer has none: exit 2, with the way that is left."""
    base = random_base(tmp_path / "base", "llama")
    adapter = of_peft(base, tmp_path / "adapter", lora_bias=True)
    request = {"adapter": str(adapter), "base": str(base), "target": str(tmp_path / "merged"), "trust_base": True}
    with pytest.raises(RecipeError, match=r"PEFT does not merge it \(.*lora_bias.*serve it on its base"):
        merge(request | {"whole": True})
    assert not (tmp_path / "merged").exists()


def test_too_little_memory_is_not_the_adapters_fault(tmp_path, monkeypatch):
    """torch says it with a plain RuntimeError, too: it is raised as it is."""
    base = random_base(tmp_path / "base", "llama", attention_bias=True)
    adapter = of_peft(base, tmp_path / "adapter", bias="lora_only")
    request = {"adapter": str(adapter), "base": str(base), "target": str(tmp_path / "merged"), "trust_base": True}

    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr("peft.PeftModel.merge_and_unload", no_memory, raising=False)
    monkeypatch.setattr("peft.tuners.tuners_utils.BaseTuner.merge_and_unload", no_memory)
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        merge(request | {"whole": True})
    assert not isinstance(caught.value, RecipeError)


def test_a_target_that_cannot_be_written_is_an_error_of_the_place(adapted, tmp_path):
    """A file where a folder would have to be: exit 5 with its name, and no folder that was made on the way."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match=r"file/deeper/merged: was not written \(Not a directory\).*with -o"):
        merge(ask(adapted, tmp_path / "file" / "deeper" / "merged"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
