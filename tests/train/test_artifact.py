"""What a run leaves behind: complete, as PEFT and transformers load it, and proved from disk before it counts."""

from __future__ import annotations

import grp
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.errors import JobFailedError
from launcher.planning.plan import Candidate
from launcher.recipe.schema import METHODS, PROMPT_METHODS, Recipe
from launcher.runs.folder import RunFolder
from launcher.worker import artifact
from launcher.worker.artifact import verify_artifact, write_artifact
from launcher.worker.model import adalora_after_step, adalora_regularize, build_model
from launcher.worker.tokenizer import load_tokenizer
from tests.tiny import VOCAB, make_candidate, make_model_dir, make_recipe

IDS = torch.randint(5, VOCAB, (4, 24), generator=torch.Generator().manual_seed(1))
STEPS = 6


def _loss(model: nn.Module) -> Tensor:
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :].float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def _autocast(candidate: Candidate) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=candidate.precision == "bf16")


def _evaluator(candidate: Candidate) -> Callable[[nn.Module], float]:
    def evaluate(model: nn.Module) -> float:
        with _autocast(candidate):
            return _loss(model).item()

    return evaluate


@dataclass(frozen=True)
class Trained:
    """A tiny run that has just taken its last step."""

    recipe: Recipe
    candidate: Candidate
    model: Any
    loss: float

    @property
    def state(self) -> dict[str, Tensor]:
        """What `engine.full_state()` gathers."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def write(self, folder: Path) -> tuple[RunFolder, Path]:
        run = RunFolder.create(folder, "tiny")
        return run, write_artifact(self.state, self.model, load_tokenizer(self.recipe), self.recipe, run)

    def verify(self, path: Path, **changes: Any) -> dict[str, Any]:
        arguments = {"evaluate": _evaluator(self.candidate), "expected_loss": self.loss, "device": "cpu"}
        return verify_artifact(path, self.recipe, self.candidate, **(arguments | changes))


def _train(folder: Path, method: str, *, precision: str = "fp32", family: str = "llama", steps: int = STEPS) -> Trained:
    base = folder / family
    if not base.exists():
        make_model_dir(base, family=family)
    changes = {"packing": False} if method in PROMPT_METHODS else {}
    candidate = make_candidate(method=method, precision=precision, **changes)
    if candidate.quant is not None:
        candidate = replace(candidate, quant=replace(candidate.quant, compute_dtype=precision))
    recipe = make_recipe(
        folder, method=method, model={"name_or_path": str(base)}, train={"precision": precision, "max_steps": STEPS}
    )
    model = build_model(recipe, candidate, device="cpu", ds_config=None, total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        with _autocast(candidate):
            loss = _loss(model)
        loss.backward()
        adalora_regularize(model)
        optimizer.step()
        adalora_after_step(model, step)
        optimizer.zero_grad()
    with torch.no_grad():
        return Trained(recipe, candidate, model, _evaluator(candidate)(model.eval()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases shared by the tests of this module; read only."""
    return tmp_path_factory.mktemp("artifact")


@pytest.fixture(scope="module")
def lora(folder: Path) -> Trained:
    """One trained LoRA, for the tests that spoil copies of its artifact."""
    return _train(folder, "lora")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_artifact_of_every_method_is_proved(folder: Path, tmp_path: Path, method: str, precision: str) -> None:
    """Written, reloaded from disk by plain libraries, every method has the validation loss it was trained to."""
    trained = _train(folder, method, precision=precision)
    run, path = trained.write(tmp_path)
    facts = trained.verify(path)
    assert path == (run.model if method == "full" else run.adapter)
    assert facts["loss_check"] == "equal"
    assert facts["reloaded_loss"] == pytest.approx(trained.loss, rel=1e-5 if precision == "fp32" else 2e-2)
    assert facts["sha256"].keys() == {file.name for file in path.iterdir()}
    if method not in ("full", "adalora"):
        assert facts["parameters"] == sum(tensor.numel() for tensor in trained.state.values())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_mixture_of_experts_is_proved(folder: Path, tmp_path: Path, method: str) -> None:
    """Experts that transformers fuses in memory are written as the model's own format has them."""
    trained = _train(folder, method, family="mixtral")
    _, path = trained.write(tmp_path)
    assert trained.verify(path)["loss_check"] == "equal"
    if method == "full":
        assert load_file(path / "model.safetensors").keys() == load_file(folder / "mixtral/model.safetensors").keys()


def test_adapter_folder_is_what_peft_loads(lora: Trained, tmp_path: Path) -> None:
    """Two lines of plain PEFT give the trained model; the base's name is the recipe's."""
    _, path = lora.write(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(lora.recipe.model.name_or_path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, path).eval()
    assert _loss(model).item() == pytest.approx(lora.loss, rel=1e-6)
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == lora.recipe.model.name_or_path
    assert config["inference_mode"] is True


def test_tokenizer_and_template_lie_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    """The artifact can be served alone: its tokenizer formats chats with the template of the run."""
    template = tmp_path / "mine.jinja"
    template.write_text("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")
    trained = _train(folder, "lora")
    recipe = replace(trained.recipe, data=replace(trained.recipe.data, chat_template=str(template)))
    _, path = replace(trained, recipe=recipe).write(tmp_path / "runs")
    again = AutoTokenizer.from_pretrained(path)
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"


def test_full_model_describes_itself(folder: Path, tmp_path: Path) -> None:
    """The dtype written is the training precision, the cache is on again, and sizes are those of the files."""
    trained = _train(folder, "full", precision="bf16")
    _, path = trained.write(tmp_path)
    config = json.loads((path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["use_cache"] is True
    assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {torch.bfloat16}
    assert (path / "generation_config.json").exists()


def test_large_models_are_sharded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the shard size there is an index with the true number of weights, and the model loads all the same."""
    monkeypatch.setattr(artifact, "SHARD_SIZE", "200KB")
    trained = _train(folder, "full")
    _, path = trained.write(tmp_path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in trained.state.values())
    assert trained.verify(path)["loss_check"] == "equal"


def test_weights_come_from_the_gathered_state(folder: Path, tmp_path: Path) -> None:
    """A live module whose weights are partitioned (empty here, as under ZeRO-3) does not matter."""
    for method in ("full", "lora", "prompt"):
        trained = _train(folder, method)
        state = {name: tensor.clone() for name, tensor in trained.state.items()}
        for parameter in trained.model.parameters():
            parameter.data = torch.empty(0)
        run = RunFolder.create(tmp_path, method)
        path = write_artifact(state, trained.model, load_tokenizer(trained.recipe), trained.recipe, run)
        assert trained.verify(path)["loss_check"] == "equal"


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    """Set the umask for one test."""
    before = os.umask(0o022)
    yield lambda mask: (os.umask(mask), None)[1]
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_modes_follow_the_umask(
    lora: Trained, tmp_path: Path, umask: Callable[[int], None], mask: int, mode: int
) -> None:
    """A colleague can read what the umask lets them read, although safetensors writes 0600."""
    umask(mask)
    _, path = lora.write(tmp_path)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {mode}


def test_a_group_that_may_read_the_run_may_read_its_adapter(
    lora: Trained, tmp_path: Path, umask: Callable[[int], None]
) -> None:
    """Whatever the job's umask, which is 077 in every job."""
    umask(0o077)
    run = RunFolder.create(tmp_path / "runs", "tiny", group=grp.getgrgid(os.getegid()).gr_name)
    path = write_artifact(lora.state, lora.model, load_tokenizer(lora.recipe), lora.recipe, run)
    assert stat.S_IMODE(path.stat().st_mode) == 0o2750
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


def test_artifact_of_an_earlier_attempt_is_replaced(lora: Trained, tmp_path: Path) -> None:
    """Writing again replaces the folder as a whole and leaves nothing beside it."""
    run, path = lora.write(tmp_path)
    (path / "leftover").write_text("from before")
    write_artifact(lora.state, lora.model, load_tokenizer(lora.recipe), lora.recipe, run)
    assert not (path / "leftover").exists()
    assert not list(run.path.glob(".adapter*"))


class FakeFailingTokenizer:
    """A tokenizer whose files no longer fit on the disk."""

    chat_template = None

    def save_pretrained(self, _: Path) -> None:
        raise OSError("disk full")


def test_failed_write_leaves_the_old_artifact(lora: Trained, tmp_path: Path) -> None:
    """A write that breaks half-way, after the weights, does not touch what was there."""
    run, path = lora.write(tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        write_artifact(lora.state, lora.model, FakeFailingTokenizer(), lora.recipe, run)  # type: ignore[arg-type]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert not list(run.path.glob(".adapter*"))


# --- artifacts that are not what was trained ---------------------------------------------------------------


def _rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _first(tensors: dict[str, Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def _empty(tensors: dict[str, Tensor]) -> None:
    tensors[_first(tensors, "lora_A")] = torch.empty(0, 64)


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors[_first(tensors, "lora_A")][0, 0] = float("nan")


def _zero(tensors: dict[str, Tensor]) -> None:
    tensors[_first(tensors, "lora_B")].zero_()


def _lost(tensors: dict[str, Tensor]) -> None:
    del tensors[_first(tensors, "lora_A")]


def _renamed(tensors: dict[str, Tensor]) -> None:
    name = _first(tensors, "lora_B")
    tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)


def _slightly_off(tensors: dict[str, Tensor]) -> None:
    tensors[_first(tensors, "lora_B")] += 0.01


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_empty, r"1 of 28 tensors have size zero, such as .*lora_A"),
        (_nan, r"1 tensors hold NaN or infinity, such as .*lora_A"),
        (_zero, r"1 low-rank factors are still zero, such as .*lora_B.*never trained"),
        (_lost, r"1 tensors do not load back, such as .*lora_A"),
        (_renamed, r"2 tensors do not load back, such as .*lora_B"),
        (_slightly_off, r"reloaded from disk it has validation loss .*the trained model has"),
    ],
)
def test_wrong_artifact_is_found(lora: Trained, tmp_path: Path, spoil: Any, message: str) -> None:
    """An artifact that is not the trained adapter fails the job and says in what it differs."""
    _, path = lora.write(tmp_path)
    _rewrite(path, spoil)
    with pytest.raises(JobFailedError, match=message):
        lora.verify(path)


def test_full_model_that_lost_a_tensor_is_found(folder: Path, tmp_path: Path) -> None:
    """transformers would fill a missing weight with random numbers and only log it."""
    trained = _train(folder, "full")
    _, path = trained.write(tmp_path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(JobFailedError, match=r"missing keys: .*up_proj"):
        trained.verify(path)


def test_nan_loss_never_passes(lora: Trained, tmp_path: Path) -> None:
    """A comparison with not-a-number is a failure, not a pass."""
    _, path = lora.write(tmp_path)
    with pytest.raises(JobFailedError, match="validation loss nan"):
        lora.verify(path, evaluate=lambda _: float("nan"))


def test_untrained_adapter_fails(folder: Path, tmp_path: Path) -> None:
    """A run of no step leaves every lora_B at zero, which is not a result."""
    trained = _train(folder, "lora", steps=0)
    _, path = trained.write(tmp_path)
    with pytest.raises(JobFailedError, match="14 low-rank factors are still zero"):
        trained.verify(path)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_model_too_large_to_load_twice_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Without room for a second copy nothing is loaded, and the result says which checks ran."""
    trained = _train(folder, method)
    _, path = trained.write(tmp_path)
    monkeypatch.setattr(artifact, "_free_bytes", lambda _device: 500_000)
    facts = trained.verify(path, evaluate=lambda _: pytest.fail("nothing is to be loaded"))
    assert facts["loss_check"].startswith("skipped: model larger than the memory left (0.0 GB needed")
    assert facts["tensors"] == len(trained.state)


def test_run_without_validation_rows_says_so(lora: Trained, tmp_path: Path) -> None:
    """With nothing to compare, the check of the loss is not claimed."""
    _, path = lora.write(tmp_path)
    assert lora.verify(path, expected_loss=None)["loss_check"] == "skipped: no validation rows"


def test_adalora_stopped_between_allocations_is_exact(folder: Path, tmp_path: Path) -> None:
    """Ranks are cut by what the weights hold, so that a run ended early by its time limit loses nothing."""
    for steps in (1, 3, STEPS):
        trained = _train(folder, "adalora", steps=steps)
        _, path = trained.write(tmp_path)
        facts = trained.verify(path)
        assert facts["reloaded_loss"] == pytest.approx(trained.loss, rel=1e-6)
        assert all(tensor.numel() for tensor in load_file(path / "adapter_model.safetensors").values())


def test_verification_loads_whole_models_under_zero3(lora: Trained, tmp_path: Path) -> None:
    """Rank 0 verifies alone while training holds partitioned weights; the loader must not wait for the other ranks."""
    from transformers.integrations.deepspeed import (
        HfDeepSpeedConfig,
        is_deepspeed_zero3_enabled,
        unset_hf_deepspeed_config,
    )

    _, path = lora.write(tmp_path)
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert lora.verify(path)["loss_check"] == "equal"
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
        del alive


def test_base_of_unknown_size_is_not_loaded_blindly(lora: Trained, tmp_path: Path) -> None:
    """An id that is not in this machine's cache cannot be sized, so the result says that its loss was not compared."""
    _, path = lora.write(tmp_path)
    recipe = replace(lora.recipe, model=replace(lora.recipe.model, name_or_path="nobody/no-such-model"))
    facts = replace(lora, recipe=recipe).verify(path)
    assert facts["loss_check"] == "skipped: the size of the base is not known on this machine"
