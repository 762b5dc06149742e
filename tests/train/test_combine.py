"""`launcher adapters combine` and `reduce`: PEFT's own answer without the base, and what a lower rank loses."""

import json

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launcher.adapters.combine import combine
from launcher.adapters.export import export
from launcher.adapters.lineage import read_adapter
from launcher.adapters.merging import merge
from launcher.adapters.reduce import reduce
from launcher.cli import main
from launcher.errors import ConflictError, RecipeError
from launcher.facts.adapters import FACTORWISE, PRODUCTWISE, WAYS
from tests.tiny import make_model_dir
from tests.train.adapters import logits, of_peft, train_adapter

WEIGHTS = [0.7, -0.4]
SEED = 11


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two adapters that training left, of one base and different in everything else but the rank."""
    folder = tmp_path_factory.mktemp("pair")
    return [train_adapter(folder, "lora", steps=steps, **{"train.seed": steps}) for steps in (5, 9)]


@pytest.fixture(scope="module")
def base(pair):
    """The folder of their base."""
    return pair[0].base


def ask(adapters, target, how="linear", **changes):
    """A request for `combine`."""
    density = 0.6 if how not in ("linear", "cat", "svd") else None
    return {
        "adapters": [str(one) for one in adapters],
        "weights": WEIGHTS,
        "how": how,
        "density": density,
        "seed": SEED,
        "target": str(target),
        "trust_base": True,
    } | changes


def in_order(model):
    """The model with its modules sorted by name: PEFT draws what DARE drops module by module, in their order."""
    for module in model.modules():
        module._modules = dict(sorted(module._modules.items()))
    return model


def in_memory(base, adapters, how, *, rank=None, weights=WEIGHTS):
    """Logits of PEFT's own combination inside the loaded base."""
    model = in_order(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    tuned = peft.PeftModel.from_pretrained(model, str(adapters[0]), adapter_name="0")
    tuned.load_adapter(str(adapters[1]), adapter_name="1")
    density = 0.6 if how not in ("linear", "cat", "svd") else None
    torch.manual_seed(SEED)
    tuned.add_weighted_adapter(["0", "1"], weights, "both", combination_type=how, density=density, svd_rank=rank)
    tuned.set_adapter("both")
    return logits(tuned.eval())


def on_disk(base, folder):
    """Logits of an adapter folder, loaded as anybody would."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(model, str(folder)).eval())


@pytest.mark.parametrize("how", WAYS)
def test_the_result_is_pefts_own(how, pair, base, tmp_path):
    """Every way, logits within 1e-5 of those of PEFT's combination in the loaded model; and not those of a parent."""
    folders = [one.adapter for one in pair]
    combine(ask(folders, tmp_path / "both", how))
    found = on_disk(base, tmp_path / "both")
    assert float((found - in_memory(base, folders, how)).abs().max()) <= 1e-5
    assert float((found - on_disk(base, folders[0])).abs().max()) > 1e-3


@pytest.mark.parametrize("how", ["cat", *PRODUCTWISE])
def test_ranks_and_places_that_differ(how, base, tmp_path):
    """Rank 4 everywhere and rank 12 with a pattern in some modules: the ways that look at products take both."""
    one = of_peft(base, tmp_path / "one", r=4, seed=1)
    other = of_peft(base, tmp_path / "other", r=12, rank_pattern={"v_proj": 6}, alpha_pattern={"v_proj": 3},
                    target_modules=["q_proj", "v_proj", "down_proj"], seed=2)  # fmt: skip
    made = combine(ask([one, other], tmp_path / "both", how))
    assert made["rank"] == (16 if how == "cat" else 12)
    found = on_disk(base, tmp_path / "both")
    assert float((found - in_memory(base, [one, other], how)).abs().max()) <= 1e-5


def test_rank_stabilised_adapters_keep_their_scale(base, tmp_path):
    """alpha / sqrt(r) of the parents is in the result, which PEFT's own combination scales once more by sqrt(r)."""
    parents = [of_peft(base, tmp_path / str(n), use_rslora=True, lora_alpha=16, seed=n) for n in (1, 2)]
    combine(ask(parents, tmp_path / "both", "cat"))
    assert float((on_disk(base, tmp_path / "both") - in_memory(base, parents, "cat")).abs().max()) > 1e-2
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layer = model.model.layers[1].self_attn.q_proj
    expected = layer.weight.detach().clone()
    for folder, weight in zip(parents, WEIGHTS, strict=True):
        held = load_file(folder / "adapter_model.safetensors")
        a, b = (held[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
        expected += weight * 16 / 8**0.5 * b @ a
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "both")).merge_and_unload()
    torch.testing.assert_close(merged.model.layers[1].self_attn.q_proj.weight, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", FACTORWISE)
def test_other_ranks_are_refused_with_a_way_that_takes_them(how, base, tmp_path):
    """Factors of different shapes cannot be added; nothing is written."""
    parents = [of_peft(base, tmp_path / str(r), r=r) for r in (4, 8)]
    wider = "svd" if how == "linear" else f"{how}_svd"
    with pytest.raises(RecipeError, match=f"rank 8.* 4 .*--how {wider} takes"):
        combine(ask(parents, tmp_path / "both", how))
    assert not (tmp_path / "both").exists()


def other_base(folder):
    """A base of the same shapes with other weights."""
    return make_model_dir(folder, seed=5)


def test_adapters_of_different_bases_are_refused(pair, tmp_path):
    """By the fingerprints in their lineage; trusting is about adapters that say nothing, not about these."""
    other = train_adapter(tmp_path, "lora", **{"model.name_or_path": str(other_base(tmp_path / "other-base"))})
    with pytest.raises(RecipeError, match="trained on other weights"):
        combine(ask([pair[0].adapter, other.adapter], tmp_path / "both"))


def test_an_adapter_that_does_not_say_its_base_is_refused(pair, base, tmp_path):
    """Unless somebody who knows says that it is the same."""
    foreign = of_peft(base, tmp_path / "foreign")
    with pytest.raises(RecipeError, match="--trust-base"):
        combine(ask([pair[0].adapter, foreign], tmp_path / "both", trust_base=False))


def test_a_rounded_base_is_another_base(pair, tmp_path):
    """LoRA and QLoRA correct different weights; a DoRA adapter is no sum of factors: both said at once for each."""
    qlora = train_adapter(tmp_path / "q", "qlora")
    path = qlora.adapter / "adapter_model.safetensors"
    told = read_adapter(qlora.adapter).lineage
    told["base_fingerprint"] = read_adapter(pair[0].adapter).lineage["base_fingerprint"]
    save_file(load_file(path), path, metadata={"format": "pt", "launcher.lineage": json.dumps(told)})
    with pytest.raises(RecipeError, match="rounded otherwise"):
        combine(ask([pair[0].adapter, qlora.adapter], tmp_path / "both", "svd"))
    dora = train_adapter(tmp_path / "d", "dora")
    with pytest.raises(RecipeError, match="DoRA magnitudes"):
        combine(ask([pair[0].adapter, dora.adapter], tmp_path / "both", "svd"))


def test_the_result_goes_on_as_any_adapter(pair, base, tmp_path):
    """It merges, exports and says who its parents are; another base is refused for it, too."""
    folder = tmp_path / "both"
    combine(ask([one.adapter for one in pair], folder, "ties", trust_base=False))
    told = read_adapter(folder).lineage["made"]
    assert [(one["weight"], len(one["sha256"])) for one in told["parents"]] == [(0.7, 64), (-0.4, 64)]
    merged = merge({"adapter": str(folder), "base": str(base), "target": str(tmp_path / "merged"), "dtype": "fp32"})
    assert merged["proof"]["difference"] <= 1e-4
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert float((logits(alone) - on_disk(base, folder)).abs().max()) <= 1e-4
    made = export({"adapter": str(folder), "base": str(base), "target": str(tmp_path / "vllm"), "engine": "vllm",
                   "name": "bot"})  # fmt: skip
    assert made["round_trip_difference"] == 0.0
    with pytest.raises(ConflictError, match="not those that"):
        merge({"adapter": str(folder), "base": str(other_base(tmp_path / "x")), "target": str(tmp_path / "no")})
    card = (folder / "README.md").read_text()
    assert "ties (density 0.6) of" in card
    assert str(tmp_path) not in card


def test_qlora_adapters_stay_with_their_rounded_base(tmp_path):
    """Combined and reduced, they still say how their base was rounded: a merge and a proof round it first."""
    pair = [train_adapter(tmp_path, "qlora", steps=steps, **{"train.seed": steps}) for steps in (4, 7)]
    combine(ask([one.adapter for one in pair], tmp_path / "both", "svd", trust_base=False))
    told = read_adapter(tmp_path / "both").lineage
    assert told["method"] == "qlora"
    assert told["quantization"] == read_adapter(pair[0].adapter).lineage["quantization"]
    merged = merge({"adapter": str(tmp_path / "both"), "base": str(pair[0].base), "target": str(tmp_path / "merged"),
                    "dtype": "fp32"})  # fmt: skip
    assert merged["proof"]["difference"] <= 1e-4
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert float((logits(rounded) - on_disk(pair[0].base, tmp_path / "both")).abs().max()) > 1e-3
    small = reduce({"adapter": str(pair[0].adapter), "rank": 7, "target": str(tmp_path / "small"),
                    "base": str(pair[0].base)})  # fmt: skip
    again = reduce({"adapter": str(pair[0].adapter), "rank": 1, "target": str(tmp_path / "tiny"),
                    "base": str(pair[0].base)})  # fmt: skip
    assert small["relative_error"] < again["relative_error"]
    assert small["proof"]["logits_difference"] < again["proof"]["logits_difference"]


def test_the_base_is_not_needed_and_no_memory_of_its_size(tmp_path):
    """Layers of 70B's width (8192 x 28672 and back) are combined in a fraction of one of them: 0.9 GiB in fp32."""
    import resource

    names = [f"base_model.model.model.layers.0.mlp.{name}" for name in ("up_proj", "down_proj")]
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.manual_seed(number)
        tensors = {}
        for name, (rows, columns) in zip(names, [(28672, 8192), (8192, 28672)], strict=True):
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns)
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = peft.LoraConfig(r=4, target_modules=["up_proj", "down_proj"], base_model_name_or_path="org/large")
        config.save_pretrained(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for how in ("linear", "ties", "svd"):
        combine(ask([tmp_path / "0", tmp_path / "1"], tmp_path / how, how))
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 8192 * 28672 * 4 / 2**20 / 4


# ---------------------------------------------------------------- reduce


def test_a_reduced_adapter_is_the_nearest_of_its_rank(pair, base, tmp_path):
    """The error said of each module is that of the products on disk, and a full SVD of the product finds no better."""
    made = reduce({"adapter": str(pair[0].adapter), "rank": 3, "target": str(tmp_path / "small"), "base": str(base)})
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (pair[0].adapter, tmp_path / "small")
    )
    scale = read_adapter(pair[0].adapter).config["lora_alpha"] / 8
    for module, error in made["modules"].items():
        a, b = (f"base_model.model.{module}.lora_{side}.weight" for side in "AB")
        whole, kept = scale * before[b].double() @ before[a].double(), after[b].double() @ after[a].double()
        assert float((whole - kept).norm() / whole.norm()) == pytest.approx(error, abs=1e-6)
        best = torch.linalg.svdvals(whole)[3:].norm() / whole.norm()
        assert float(best) == pytest.approx(error, abs=1e-6)
    difference = float((on_disk(base, tmp_path / "small") - on_disk(base, pair[0].adapter)).abs().max())
    assert 0 < made["relative_error"] < 1
    assert 0.2 * difference < made["proof"]["logits_difference"] < 5 * difference


def test_an_adapter_whose_rank_was_too_high_loses_nothing(base, tmp_path):
    """Factors that only fill four directions are the same at rank 4: logits within 1e-5, and engines load it."""
    wide = of_peft(base, tmp_path / "wide", r=16)
    path = wide / "adapter_model.safetensors"
    held = load_file(path)
    save_file({name: _first_four(name, tensor) for name, tensor in held.items()}, path, metadata={"format": "pt"})
    made = reduce({"adapter": str(wide), "rank": 4, "target": str(tmp_path / "small")})
    assert made["relative_error"] < 1e-6
    assert float((on_disk(base, tmp_path / "small") - on_disk(base, wide)).abs().max()) <= 1e-5
    with safe_open(tmp_path / "small" / "adapter_model.safetensors", framework="pt") as file:
        assert {min(file.get_slice(name).get_shape()) for name in file.keys()} == {4}  # noqa: SIM118


def _first_four(name, tensor):
    kept = tensor.clone()
    (kept[4:] if "lora_A" in name else kept[:, 4:]).zero_()
    return kept


def test_a_rank_that_is_none_lower_is_refused(pair, tmp_path):
    """With the rank it has."""
    with pytest.raises(RecipeError, match="has rank 8"):
        reduce({"adapter": str(pair[0].adapter), "rank": 8, "target": str(tmp_path / "small")})


# ---------------------------------------------------------------- the verbs


@pytest.fixture
def launcher(monkeypatch):
    """The command line, with a train environment that is this process."""
    from launcher.adapters import job
    from launcher.runs import adapters as asked

    def here(_module, request, **_settings):
        return job.ASKED[request["ask"]](dict(request))

    monkeypatch.setattr(asked, "ask", here)
    return lambda *words: CliRunner().invoke(main, ["adapters", *map(str, words)])


def test_the_verbs_combine_reduce_and_compare(launcher, pair, tmp_path):
    """combine, reduce and diff in a row; a dry run writes nothing; --json is one document of schema 1."""
    folders = [one.adapter for one in pair]
    words = ["combine", *folders, "--weights", "0.5,0.5", "--how", "ties", "--density", "0.5", "--to", tmp_path / "ab"]
    dry = launcher(*words, "--dry-run")
    assert json.loads(dry.stdout)["how"] == "ties"
    assert not (tmp_path / "ab").exists()
    made = launcher(*words, "--json")
    assert json.loads(made.stdout)["schema"] == 1
    assert "Next: " in made.stderr
    small = launcher("reduce", tmp_path / "ab", "--rank", "2", "--to", tmp_path / "small", "--prove")
    assert small.exit_code == 0, small.output
    assert "largest difference of logits" in small.stdout
    told = json.loads(launcher("diff", tmp_path / "ab", tmp_path / "small", "--json").stdout)["different"]
    assert told["rank"] == [8, 2]
    assert told["made"][0].startswith("ties (density 0.5) of ")
    assert told["made"][1] == "rank 8 cut to 2 of ab"


def test_what_is_made_has_a_name_and_goes_on_by_it(launcher, pair, tmp_path, monkeypatch):
    """Made of two with --name, tagged, reduced and merged by tag: listed with parents, told by the name in its card."""
    runs = tmp_path / "runs"
    runs.mkdir()
    monkeypatch.setenv("LAUNCHER_RUNS", str(runs))
    folders = [one.adapter for one in pair]
    done = launcher("combine", *folders, "--weights", "0.5,0.5", "--name", "both")
    assert "Next: launcher merge both " in done.stderr, done.output
    assert launcher("tag", "both", "best").exit_code == 0
    small = launcher("reduce", "best", "--rank", "2", "--name", "small", "--to", tmp_path / "elsewhere")
    assert small.exit_code == 0, small.output
    listed = {one["name"]: one for one in json.loads(launcher("--json").stdout)["adapters"]}
    assert listed["both"]["tags"] == ["best"]
    assert [one["weight"] for one in listed["both"]["parents"]] == [0.5, 0.5]
    assert listed["small"]["made"] == "rank 8 cut to 2 of both"
    assert "\n# small\n" in (tmp_path / "elsewhere" / "README.md").read_text()
    merged = CliRunner().invoke(main, ["merge", "small", "-o", str(tmp_path / "merged")])
    assert merged.exit_code == 0, merged.output
    assert launcher("reduce", "both", "--rank", "3", "--name", "small").exit_code == 7


def test_every_problem_of_a_command_line_at_once(launcher, pair, tmp_path):
    """Exit 2 with weights, density and rank named together."""
    folders = [one.adapter for one in pair]
    done = launcher("combine", *folders, "--weights", "1,0,2", "--how", "ties", "--rank", 4, "--to", tmp_path / "ab")
    assert done.exit_code == 2
    for words in ("3 numbers for 2 adapters", "other than 0", "needs --density", "--rank: 4"):
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_ended_combination_leaves_nothing(tmp_path):
    """SIGTERM while the result is being written: the folder it was writing goes with it."""
    import signal
    import subprocess
    import sys
    import time

    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        name = "base_model.model.model.layers.0.mlp.up_proj"
        tensors = {f"{name}.lora_A.weight": torch.randn(64, 200_000), f"{name}.lora_B.weight": torch.randn(200_000, 64)}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        peft.LoraConfig(r=64, target_modules=["up_proj"], base_model_name_or_path="org/large").save_pretrained(folder)
    request = ask([tmp_path / "0", tmp_path / "1"], tmp_path / "new" / "both", "cat") | {"ask": "combine"}
    with subprocess.Popen([sys.executable, "-m", "launcher.adapters.job"], stdin=subprocess.PIPE, text=True) as job:
        job.stdin.write(json.dumps(request))
        job.stdin.close()
        until = time.monotonic() + 120
        while not list((tmp_path / "new").glob(".both.*")) and job.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        job.send_signal(signal.SIGTERM)
    assert job.returncode == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
