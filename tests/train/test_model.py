"""The model every rank builds: tokenizer, base and adapter, and what is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.errors import RecipeError
from launcher.planning.plan import Candidate
from launcher.recipe.schema import METHODS, Recipe
from launcher.worker.model import (
    adalora_after_step,
    adalora_regularize,
    adalora_state,
    build_model,
    count_parameters,
    load_adalora_state,
)
from tests.tiny import VOCAB, make_candidate, make_model_dir, make_recipe

ADAPTERS = tuple(method for method in METHODS if method != "full")
STEPS = 8
IDS = torch.randint(5, VOCAB, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny llama in model/ and a tiny mixtral in mixtral/; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    make_recipe(folder)
    make_model_dir(folder / "mixtral", family="mixtral")
    return folder


def _candidate(method: str = "lora", **overrides: Any) -> Candidate:
    if method in ("prefix", "prompt"):
        overrides.setdefault("packing", False)
    return make_candidate(method=method, **overrides)


def _build(tiny: Path, method: str = "lora", *, base: str = "model", lora: dict | None = None, **overrides: Any) -> Any:
    candidate = _candidate(method, **overrides)
    if lora is not None:
        candidate = dataclasses.replace(candidate, lora=dataclasses.replace(candidate.lora, **lora))
    recipe = make_recipe(tiny, method=method, model={"name_or_path": str(tiny / base)})
    return build_model(recipe, candidate, device="cpu", ds_config=None, total_steps=STEPS)


def _loss(model: nn.Module) -> torch.Tensor:
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def _train(model: nn.Module, steps: int = STEPS, learning_rate: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for step in range(1, steps + 1):
        loss = _loss(model)
        loss.backward()
        adalora_regularize(model)
        optimizer.step()
        adalora_after_step(model, step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# --- methods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_method_trains_only_its_own_weights(tiny: Path, method: str) -> None:
    """The loss falls, and nothing but the method's weights moved."""
    model = _build(tiny, method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = _train(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    # Ranks that AdaLoRA judges useless return to zero, so its trainable weights need not all have moved.
    assert moved <= set(_trainable(model))
    assert moved
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize(
    ("method", "stage", "base", "own"),
    [
        ("full", 0, None, torch.float32),
        ("full", 2, None, torch.bfloat16),
        ("lora", 0, torch.bfloat16, torch.float32),
        ("lora", 2, torch.bfloat16, torch.bfloat16),
        ("dora", 0, torch.bfloat16, torch.float32),
        ("prompt", 0, torch.bfloat16, torch.float32),
        ("prefix", 2, torch.bfloat16, torch.bfloat16),
        ("qlora", 0, torch.bfloat16, torch.float32),
        ("qlora", 2, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_in_bf16(tiny: Path, method: str, stage: int, base: torch.dtype | None, own: torch.dtype) -> None:
    """Plain torch trains fp32 over a frozen bf16 base; DeepSpeed gets one dtype and keeps its own fp32 master."""
    model = _build(tiny, method, precision="bf16", zero_stage=stage)
    parameters = list(model.parameters())
    assert {p.dtype for p in parameters if p.requires_grad} == {own}
    frozen = {p.dtype for p in parameters if not p.requires_grad} - {torch.uint8}
    assert frozen == ({base} if base else set())


def test_residual_stream_of_qlora_stays_in_the_compute_dtype(tiny: Path) -> None:
    """Norms and embeddings of a 4-bit base are not cast to fp32, so checkpoints hold two bytes per number."""
    model = _build(tiny, "qlora", precision="bf16")
    seen = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        _loss(model)
    assert seen == [torch.bfloat16] * 2


def test_target_modules_as_names(tiny: Path) -> None:
    """A list of names puts low-rank matrices there and nowhere else; all-linear leaves the head alone."""
    some = _build(tiny, lora={"target_modules": ("q_proj", "v_proj")})
    places = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in _trainable(some)}
    assert places == {"q_proj", "v_proj"}
    everywhere = _build(tiny, lora={"target_modules": "all-linear"})
    places = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in _trainable(everywhere)}
    assert places == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("targets", [("nope",), ("q_proj", "nope"), ("input_layernorm",)])
def test_targets_that_match_nothing_list_what_there_is(tiny: Path, targets: tuple[str, ...]) -> None:
    """One wrong name among right ones is an error too, with the names the model has."""
    with pytest.raises(RecipeError, match=r"lora\.target_modules: .*(down_proj).*(v_proj)"):
        _build(tiny, lora={"target_modules": targets})


def test_rslora_scales_by_the_root_of_the_rank(tiny: Path) -> None:
    """The flag reaches PEFT: alpha over sqrt(r) in place of alpha over r."""
    for flag, expected in ((False, 16 / 8), (True, 16 / 8**0.5)):
        model = _build(tiny, lora={"use_rslora": flag})
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == pytest.approx(expected)


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapter_starts_the_same_on_every_rank(tiny: Path, method: str) -> None:
    """Initial adapter weights come from train.seed, whatever was drawn before; the caller's own draws are untouched."""
    torch.manual_seed(1)
    first = _trainable(_build(tiny, method))
    after_first = torch.rand(1)
    torch.manual_seed(999)
    second = _trainable(_build(tiny, method))
    torch.manual_seed(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.rand(1), after_first)


def test_counts_see_through_4_bit_storage(tiny: Path) -> None:
    """A 4-bit base has as many weights as its original, although it stores half as many elements."""
    plain, packed = _build(tiny, "lora"), _build(tiny, "qlora")
    assert count_parameters(packed) == count_parameters(plain)
    assert sum(p.numel() for p in packed.parameters()) < count_parameters(plain).total


def test_cache_is_off_in_training(tiny: Path) -> None:
    """No key-value cache is kept for generation while training."""
    model = _build(tiny)
    assert model.config.use_cache is False
    assert model(input_ids=IDS).past_key_values is None


def test_virtual_tokens_stand_on_the_left(tiny: Path) -> None:
    """Prompt tuning adds its tokens' logits before the row's own: the last ones belong to the row."""
    model = _build(tiny, "prompt")
    assert model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.shape[1] == 8 + IDS.shape[1]


# --- gradient checkpointing --------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prompt"])
def test_checkpointing_changes_no_gradient(tiny: Path, method: str, reentrant: bool) -> None:
    """Both forms recompute every block and give the gradients of the plain backward pass."""
    plain = _build(tiny, method)
    saving = _build(tiny, method, gradient_checkpointing=True, checkpointing_reentrant=reentrant)
    blocks = []
    for layer in saving.get_base_model().model.layers if method != "full" else saving.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: blocks.append(1))
    for model in (plain, saving):
        _loss(model).backward()
    assert len(blocks) == 2 * 2, "two layers, each run forward and recomputed"
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in saving.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


# --- refused by name -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("adalora", {"zero_stage": 1}, "adalora cannot run with deepspeed.stage 1"),
        ("adalora", {"zero_stage": 3}, "adalora cannot run with deepspeed.stage 3"),
        ("prefix", {"packing": True}, "prefix cannot use data.packing"),
        ("prompt", {"packing": True}, "prompt cannot use data.packing"),
        ("prefix", {"gradient_checkpointing": True}, "prefix cannot use train.gradient_checkpointing"),
        ("lora", {"zero_stage": 3, "gradient_checkpointing": True}, "re-entrant gradient checkpointing"),
    ],
)
def test_combinations_that_do_not_train(tiny: Path, method: str, overrides: dict[str, Any], message: str) -> None:
    """What is known not to work is refused before anything is loaded, with what to set instead."""
    with pytest.raises(RecipeError, match=message):
        _build(tiny, method, **overrides)


def test_every_problem_is_told_at_once(tiny: Path) -> None:
    """A prefix recipe with two faults shows both."""
    with pytest.raises(RecipeError) as caught:
        _build(tiny, "prefix", packing=True, gradient_checkpointing=True)
    assert len(caught.value.problems) == 2


# --- mixtures of experts ---------------------------------------------------------------------------------


def test_lora_reaches_fused_experts(tiny: Path) -> None:
    """All-linear covers the experts of a mixture, which transformers keeps as one tensor per layer."""
    model = _build(tiny, base="mixtral")
    assert any("experts" in name for name in _trainable(model))
    losses = _train(model)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("method", "lora"), [("lora", {"lora_dropout": 0.1}), ("dora", {})])
def test_what_fused_experts_cannot_take(tiny: Path, method: str, lora: dict[str, Any]) -> None:
    """Dropout and DoRA on experts are refused with the setting that works."""
    with pytest.raises(RecipeError, match=r"fused experts of mixtral .*lora\.lora_dropout: 0"):
        _build(tiny, method, base="mixtral", lora=lora)


def test_unquantized_experts_are_told(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A 4-bit mixture keeps its experts in full precision, and the log says so; a dense model says nothing."""
    with caplog.at_level(logging.WARNING, "launcher"):
        _build(tiny, "qlora")
        assert not caplog.messages
        _build(tiny, "qlora", base="mixtral")
    assert "stay unquantized, such as model.layers.0.mlp.experts.gate_up_proj" in caplog.messages[0]


# --- adalora -----------------------------------------------------------------------------------------------


def test_adalora_needs_the_number_of_steps(tiny: Path) -> None:
    """Its schedule is spread over the run, so a run of unknown length cannot be built."""
    recipe = make_recipe(tiny, method="adalora", train={"max_steps": None})
    with pytest.raises(ValueError, match="number of optimizer steps"):
        build_model(recipe, _candidate("adalora"), device="cpu", ds_config=None)


def test_adalora_takes_ranks_away(tiny: Path) -> None:
    """It starts at r everywhere and ends at two thirds of it on average."""
    model = _build(tiny, "adalora")
    _train(model)
    singular_values = [p for name, p in model.named_parameters() if ".lora_E." in name]
    kept = sum(int((p != 0).sum()) for p in singular_values)
    assert [p.shape[0] for p in singular_values] == [8] * 14
    assert kept == (8 * 2 // 3) * 14


def test_adalora_regularizer_is_pefts_own(tiny: Path) -> None:
    """The gradient we add is that of the term PEFT adds to a loss it computes itself."""
    ours, theirs = _build(tiny, "adalora"), _build(tiny, "adalora")
    labels = IDS
    theirs(input_ids=IDS, labels=labels).loss.backward()
    theirs.base_model.model(input_ids=IDS, labels=labels)  # the bare model's loss has no such term
    ours.base_model.model(input_ids=IDS, labels=labels).loss.backward()
    adalora_regularize(ours)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_adalora_resumes_with_its_importance(tiny: Path) -> None:
    """State saved in mid-schedule and put into a fresh model gives the ranks of an uninterrupted run."""
    whole = _build(tiny, "adalora")
    optimizer = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.5)
    resumed = None
    for step in range(1, STEPS + 1):
        for model, steps in ((whole, optimizer), resumed or (None, None)):
            if model is None:
                continue
            _loss(model).backward()
            steps.step()
            adalora_after_step(model, step)
            steps.zero_grad()
        if step == 3:
            other = _build(tiny, "adalora")
            other.load_state_dict(copy.deepcopy(whole.state_dict()))
            load_adalora_state(other, copy.deepcopy(adalora_state(whole)))
            resumed = (other, torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.5))
    assert resumed is not None
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed[0].parameters(), strict=True))


def test_adalora_hooks_do_nothing_for_others(tiny: Path) -> None:
    """The loop may call them whatever the method."""
    model = _build(tiny, "lora")
    _loss(model).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    adalora_regularize(model)
    adalora_after_step(model, 1)
    load_adalora_state(model, {})
    assert adalora_state(model) == {}
    assert all(torch.equal(before[name], p.grad) for name, p in model.named_parameters() if p.requires_grad)


# --- ZeRO-3, two ranks ------------------------------------------------------------------------------------------

ZERO3_CASES = ("full", "lora", "dora", "qlora", "prompt", "prefix")


@pytest.fixture(scope="module")
def two_ranks(tiny: Path) -> dict[str, dict[str, Any]]:
    """What two ranks saw under ZeRO-3, per method; both are spawned once for all of them."""
    pytest.importorskip("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    ranks = []
    for rank in range(2):
        environ = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.train.test_model", str(tiny)]
        with (tiny / f"rank{rank}.log").open("wb") as log:
            ranks.append(subprocess.Popen(command, env=environ, cwd=root, stdout=log, stderr=log))
    codes = [process.wait(timeout=600) for process in ranks]
    assert codes == [0, 0], (tiny / "rank0.log").read_text()[-4000:]
    return json.loads((tiny / "zero3.json").read_text())


@pytest.mark.parametrize("method", ZERO3_CASES)
def test_zero3_builds_the_same_model(tiny: Path, two_ranks: dict[str, Any], method: str) -> None:
    """Partitioned over two ranks, a model has the loss and the counts of the whole one."""
    model = _build(tiny, method)
    count = count_parameters(model)
    seen = two_ranks[method]
    assert (seen["trainable"], seen["total"]) == (count.trainable, count.total)
    assert seen["losses"][0] == pytest.approx(_loss(model).item(), rel=1e-5)
    assert seen["losses"][-1] < seen["losses"][0] - 1e-3


@pytest.mark.parametrize("method", ("full", "lora"))
def test_zero3_partitions_weights_while_loading(two_ranks: dict[str, Any], method: str) -> None:
    """No rank ever holds the whole base: its weights are empty here before the engine sees them."""
    own = two_ranks[method]["trainable"] if method != "full" else 0
    assert two_ranks[method]["elements_when_built"] == own


def _rank_main(tiny: Path) -> None:
    """One of the two ranks: build each method under ZeRO-3 with re-entrant checkpointing and train three steps."""
    import deepspeed
    import torch.distributed as dist

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    seen = {method: _under_zero3(tiny, method) for method in ZERO3_CASES}
    if dist.get_rank() == 0:
        (tiny / "zero3.json").write_text(json.dumps(seen))


def _under_zero3(tiny: Path, method: str) -> dict[str, Any]:
    import deepspeed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    checkpointing = method != "prefix"
    candidate = _candidate(
        method, zero_stage=3, gradient_checkpointing=checkpointing, checkpointing_reentrant=checkpointing
    )
    ds_config = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0},
    }  # fmt: skip
    torch.manual_seed(int(os.environ["RANK"]))
    recipe: Recipe = make_recipe(tiny, method=method)
    model = build_model(recipe, candidate, device="cpu", ds_config=ds_config)
    elements = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    losses = []
    for _ in range(3):
        loss = _loss(engine)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    count = count_parameters(engine.module)
    unset_hf_deepspeed_config()
    return {
        "losses": losses, "trainable": count.trainable, "total": count.total, "elements_when_built": elements,
    }  # fmt: skip


if __name__ == "__main__":
    _rank_main(Path(sys.argv[1]))
