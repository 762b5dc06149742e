"""The final artifact: what the user takes home, written beside its place, renamed, and proved by loading it again.

Adapters become `adapter/` exactly as PEFT loads it, full fine-tuning becomes `model/` as transformers loads it;
the tokenizer and its chat template lie beside the weights. Both are made from the state the engine gathered, never
from the live module, whose weights may be partitioned.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from launcher.errors import JobFailedError, raise_all
from launcher.facts.fingerprint import model_fingerprint
from launcher.facts.staged import hub_name
from launcher.planning.plan import Candidate
from launcher.recipe.schema import PROMPT_METHODS, Recipe
from launcher.runs.folder import RunFolder, open_folder
from launcher.worker.base import DTYPES, base_bytes, load_base, local_folder, shapes, weight_files, without_zero3

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
LINEAGE = "launcher.lineage"
"""Key of the adapter's lineage in the metadata of its safetensors file."""
SHARD_SIZE = "5GB"
RELOAD_MARGIN = 1.3
"""Memory a reloaded model needs, relative to its weights: activations and logits of a few validation rows."""
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
"""Relative difference between the trained and the reloaded validation loss, per precision."""


def write_artifact(
    state: Mapping[str, Tensor],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    run: RunFolder,
    *,
    data_key: str | None = None,
) -> Path:
    """Write the adapter or the model from the gathered `state` (names as in `named_parameters`); rank 0 only.

    `recipe` is the resolved one, `data_key` the key of the token cache. Returns `run.adapter` or `run.model`, which
    appears complete or not at all.
    """
    target = run.model if recipe.method == "full" else run.adapter
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    open_folder(temporary)
    try:
        if recipe.method == "full":
            _write_model(temporary, state, model, recipe)
        else:
            _write_adapter(temporary, state, model, recipe, lineage(recipe, tokenizer, run, data_key))
        tokenizer.save_pretrained(temporary)
        _settle(temporary)
        _replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _write_model(folder: Path, state: Mapping[str, Tensor], model: Any, recipe: Recipe) -> None:
    dtype = DTYPES.get(recipe.train.precision)
    weights = {name: _for_disk(tensor, dtype) for name, tensor in state.items()}
    numbers = sum(tensor.numel() for tensor in weights.values())
    saved_dtype = next(iter(weights.values())).dtype
    model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE)
    # save_pretrained describes the live module: its dtype (fp32 masters), its sizes (empty under ZeRO-3), and
    # the cache that training switched off. The files must describe the weights written.
    base = AutoConfig.from_pretrained(
        recipe.model.name_or_path,
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    _edit(
        folder / "config.json",
        dtype=str(saved_dtype).removeprefix("torch."),
        use_cache=base.to_dict().get("use_cache", True),
    )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        metadata = json.loads(index.read_text(encoding="utf-8"))["metadata"]
        _edit(index, metadata=metadata | {"total_parameters": numbers})


def _for_disk(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.cpu().contiguous()


def _edit(path: Path, **values: Any) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | values, indent=2) + "\n", encoding="utf-8")


def lineage(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, run: RunFolder, data_key: str | None) -> dict[str, Any]:
    """Where an adapter comes from: base, quantization, template, data, recipe and run; no paths of this machine."""
    folder = local_folder(recipe.model)
    name, revision = recipe.model.name_or_path, recipe.model.revision
    if Path(name).is_dir():
        name, revision = hub_name(Path(name)) or (Path(name).name, revision)
    quantized = recipe.method == "qlora"
    return {
        "schema": 1,
        "run_id": run.run_id,
        "method": recipe.method,
        "base": name,
        "base_revision": revision,
        "base_fingerprint": model_fingerprint(folder) if folder is not None else None,
        "base_dtype": recipe.train.precision,
        "quantization": dataclasses.asdict(recipe.quantization) if quantized else None,
        "chat_template_sha256": _text_sha256(tokenizer.chat_template),
        "data_key": data_key,
        "recipe_sha256": _sha256(run.resolved) if run.resolved.is_file() else None,
    }


def _text_sha256(text: Any) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else None


def _write_adapter(
    folder: Path, state: Mapping[str, Tensor], model: Any, recipe: Recipe, origin: Mapping[str, Any]
) -> None:
    config = model.peft_config["default"]
    if recipe.method in PROMPT_METHODS:
        # PEFT reads these from the live encoder, which ZeRO-3 partitions.
        weights = {"prompt_embeddings": state["prompt_encoder.default.embedding.weight"]}
    else:
        if recipe.method == "adalora":
            config.rank_pattern = _kept_ranks(state)
        weights = peft.get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    save_file(
        {name: _for_disk(tensor, None) for name, tensor in weights.items()},
        folder / ADAPTER_WEIGHTS,
        # In the file's own header: nothing of ours lies in the folder, and it travels with the weights.
        metadata={"format": "pt", LINEAGE: json.dumps(origin, sort_keys=True)},
    )
    training = config.inference_mode
    config.inference_mode = True
    config.base_model_name_or_path = recipe.model.name_or_path
    try:
        config.save_pretrained(folder)
    finally:
        config.inference_mode = training


def _kept_ranks(state: Mapping[str, Tensor]) -> dict[str, list[bool]]:
    """Which ranks of each AdaLoRA matrix hold something: the pattern PEFT slices and rebuilds the matrices by.

    Made from the weights and not from the allocator's last pattern, which is older than they are when
    training stops between two allocations. A matrix that lost every rank keeps one, because a tensor of
    size zero could not be told from a gather that failed.
    """
    pattern = {}
    for name, singular_values in state.items():
        if not name.endswith(".lora_E.default"):
            continue
        kept = (singular_values.reshape(-1) != 0).tolist()
        if not any(kept):
            kept[0] = True
        pattern[name.removeprefix("base_model.model.").removesuffix(".default")] = kept
    return pattern


def _settle(folder: Path) -> None:
    """Give every file the user's umask (safetensors writes 0600) and push it to disk."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(mode)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(temporary: Path, target: Path) -> None:
    """Put the folder in place; one left by an earlier attempt moves aside first and goes afterwards."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def verify_artifact(
    path: Path,
    recipe: Recipe,
    candidate: Candidate,
    *,
    evaluate: Callable[[nn.Module], float],
    expected_loss: float | None,
    device: str,
) -> dict[str, Any]:
    """Prove that what lies in `path` is what was trained, from disk, with plain transformers and PEFT.

    Always: every tensor has a size, is finite, and (low-rank methods) does something. Where the reloaded model fits
    beside the trained one: all tensors load, none is left over, and `evaluate(model)` gives `expected_loss`
    again. `evaluate` runs the same rows under the same autocast as the trained model's evaluation did.

    Returns: facts for result.json: tensors, parameters, bytes, sha256 per file, and what the loss check did.

    Raises:
        JobFailedError: the artifact is not what was trained; every finding, one line each.
    """
    weights = path / ADAPTER_WEIGHTS
    files = [weights] if weights.exists() else weight_files(path)
    found = shapes(files)
    problems = _shape_problems(found) + _value_problems(files, candidate.method)
    raise_all(JobFailedError, [f"artifact {path.name}: {problem}" for problem in problems])
    facts: dict[str, Any] = {
        "path": str(path),
        "tensors": len(found),
        "parameters": sum(math.prod(shape) for shape in found.values()),
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
        "sha256": {file.name: _sha256(file) for file in sorted(path.iterdir())},
    }
    obstacle = _obstacle(path, recipe, candidate, device) if expected_loss is not None else "no validation rows"
    if obstacle is not None:
        return facts | {"loss_check": f"skipped: {obstacle}"}
    return facts | _check_loss(path, recipe, candidate, evaluate, float(expected_loss or 0.0), device)


def _shape_problems(found: Mapping[str, tuple[int, ...]]) -> list[str]:
    if not found:
        return ["holds no tensor at all"]
    empty = [name for name, shape in found.items() if 0 in shape or not shape]
    if empty:
        return [f"{len(empty)} of {len(found)} tensors have size zero, such as {empty[0]}: a gather failed"]
    return []


def _value_problems(files: list[Path], method: str) -> list[str]:
    """Tensors that hold NaN or infinity, and low-rank factors that were never trained (one file at a time)."""
    broken: list[str] = []
    idle: list[str] = []
    trained = 0
    for file in files:
        for name, tensor in load_file(file).items():
            norm = torch.linalg.vector_norm(tensor.float()).item()
            if not math.isfinite(norm):
                broken.append(name)
            elif _starts_at_zero(name, method):
                idle += [] if norm > 0 else [name]
                trained += norm > 0
    problems = [f"{len(broken)} tensors hold NaN or infinity, such as {broken[0]}"] if broken else []
    # AdaLoRA takes ranks away on purpose; the other methods train every matrix.
    if idle and (method != "adalora" or not trained):
        problems.append(f"{len(idle)} low-rank factors are still zero, such as {idle[0]}: they were never trained")
    return problems


def _starts_at_zero(name: str, method: str) -> bool:
    """Factors that PEFT starts at zero, so that a norm above zero is the sign of training."""
    return ".lora_E" in name if method == "adalora" else ".lora_B" in name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _obstacle(path: Path, recipe: Recipe, candidate: Candidate, device: str) -> str | None:
    """Why the model cannot be loaded a second time, or None: it has to fit beside the trained one."""
    if candidate.method == "full":
        weights: int | None = sum(file.stat().st_size for file in weight_files(path))
    else:
        weights = base_bytes(recipe.model, candidate)
    if weights is None:
        return "the size of the base is not known on this machine"
    needed = int(weights * RELOAD_MARGIN)
    free = _free_bytes(device)
    if needed <= free:
        return None
    return f"model larger than the memory left ({needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free on {device})"


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _check_loss(
    path: Path,
    recipe: Recipe,
    candidate: Candidate,
    evaluate: Callable[[nn.Module], float],
    expected_loss: float,
    device: str,
) -> dict[str, Any]:
    with without_zero3():
        if candidate.method == "full":
            model = _reload_model(path, recipe, candidate, device)
        else:
            model = _reload_adapter(path, recipe, candidate, device)
    with torch.no_grad():
        loss = evaluate(model.eval())
    difference = abs(loss - expected_loss) / max(1.0, abs(expected_loss))
    tolerance = LOSS_TOLERANCE[candidate.precision]
    if not difference <= tolerance:
        raise JobFailedError(
            f"artifact {path.name}: reloaded from disk it has validation loss {loss:.6f}, "
            f"the trained model has {expected_loss:.6f} (tolerance {tolerance:g} in {candidate.precision})"
        )
    return {"loss_check": "equal", "reloaded_loss": loss, "expected_loss": expected_loss, "tolerance": tolerance}


def _reload_model(path: Path, recipe: Recipe, candidate: Candidate, device: str) -> nn.Module:
    model, loading = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=DTYPES[candidate.precision],
        attn_implementation=candidate.attn_implementation,
        trust_remote_code=recipe.model.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    problems = [f"{kind.replace('_', ' ')}: {sorted(map(str, names))[:3]}" for kind, names in loading.items() if names]
    raise_all(JobFailedError, [f"artifact {path.name}: {problem}" for problem in problems])
    return model.to(device)


def _reload_adapter(path: Path, recipe: Recipe, candidate: Candidate, device: str) -> nn.Module:
    base = load_base(recipe.model, candidate, device=device)
    base.config.use_cache = False
    with warnings.catch_warnings():
        # What PEFT would only warn of, the comparison below refuses.
        warnings.simplefilter("ignore")
        model: nn.Module = peft.PeftModel.from_pretrained(base, path, torch_device=device)
    on_disk = load_file(path / ADAPTER_WEIGHTS)
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    lost = sorted(on_disk.keys() ^ loaded.keys()) or [
        name for name, tensor in on_disk.items() if not _same(tensor, loaded[name].cpu(), candidate)
    ]
    if lost:
        raise JobFailedError(f"artifact {path.name}: {len(lost)} tensors do not load back, such as {lost[0]}")
    return model


def _same(on_disk: Tensor, loaded: Tensor, candidate: Candidate) -> bool:
    if torch.equal(on_disk.float(), loaded.float()):
        return True
    # PEFT passes AdaLoRA's matrices through the base's dtype when it cuts them to their ranks.
    rounded = on_disk.to(DTYPES[candidate.precision])
    return candidate.method == "adalora" and torch.equal(rounded.float(), loaded.float())
