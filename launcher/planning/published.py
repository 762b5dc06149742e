"""Published: one measured run of any training stack, as what the planner's formulas need to predict it.

A row has the form of `benchmarks/published_runs.jsonl`: `id`, `model`, `setup` (what was run) and `measured`. Nothing
here looks at a measured number to make a prediction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import DataError, LauncherError, ModelError
from launcher.facts.gpu import gpu
from launcher.facts.model import catalogue, model_shape
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.candidates import buckets
from launcher.planning.plan import Buckets, Candidate, LoraNumbers, QuantNumbers
from launcher.planning.speed_profile import OUR_SPEED, SpeedProfile, speed_of
from launcher.planning.stack import StackProfile
from launcher.planning.stacks import stack_of
from launcher.planning.trainable import ALL_LINEAR, lora_params
from launcher.recipe.schema import ModelSection

_STAGES = {
    "none": 0, "ddp": 0, "zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3,
    "fsdp": 3, "fsdp2": 3, "hsdp": 3, "fsdp-full": 3, "fsdp-grad-op": 2,
}  # fmt: skip
"""What is partitioned, in ZeRO's terms: optimizer (1), gradients (2), weights (3)."""
_METHODS = {"full": "full", "sft": "full", "lora": "lora", "qlora": "qlora", "dora": "dora"}
_FLASH = dict.fromkeys(("flash", "flash2", "flash3", "flash_attention_2"), "flash_attention_2")
_ATTENTION = {**_FLASH, **dict.fromkeys(("sdpa", "xformers", "flex"), "sdpa"), "eager": "eager"}
_OFFLOADED = {"params", "parameters", "gradients", "optimizer", "activations"}
_SUFFIX = re.compile(r"(-(gptq|awq|hf|bf16|fp16|unsloth|bnb|4bit|int4|gptq-int4))+$")
"""What mirrors add to a model's name without changing its shape."""
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_DEFAULT_BUCKET, _DEFAULT_LIVE = 500_000_000, 1_000_000_000
_ASSUMED_RANK = 16
"""Adapters are a percent of a model: where a row leaves rank or targets out, 16 and all-linear are close enough."""
_QUANTIZED = ("nf4", "fp4", "gptq-int4", "int8")
_SHOWN = 10
_ASSUMED_GPU = "A100-80GB"
"""Where the row does not name a card: bytes do not depend on it; whether they fit is then not asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a run showed, per GPU."""

    outcome: str
    """ok | oom | max-fit."""
    kind: str | None
    """allocated | reserved | nvidia-smi | unknown; None where no memory was read."""
    memory_gib: float | None
    device_gib: float | None
    """nvidia-smi's reading beside another kind."""
    tokens_per_s_per_gpu: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One published run, ready for the formulas."""

    model: ModelShape
    candidate: Candidate
    site: Site
    stack: StackProfile
    knows_gpu: bool
    """Whether the row names a catalogued GPU; fit and speed are asked only then."""
    speed: SpeedProfile = OUR_SPEED


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One row: what was measured, and the run or why it cannot be predicted."""

    id: str
    model: str
    stack: str
    sharding: str
    complete: bool
    measured: Measured
    run: Run | None
    skipped: str | None


def read_published(path: Path) -> list[Published]:
    """Read a file of rows.

    Raises:
        DataError: unreadable, or lines that are no JSON objects with `id`, `model`, `setup` and `measured`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    problems, rows = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(published(json.loads(line)))
        except (ValueError, KeyError, AttributeError) as error:
            problems.append(f"{path}:{number}: not a row of published runs: {type(error).__name__} {error}")
    if problems:
        more = [f"{path}: and {len(problems) - _SHOWN} more lines"] if len(problems) > _SHOWN else []
        raise DataError(*problems[:_SHOWN], *more)
    return rows


def published(row: Mapping[str, Any]) -> Published:
    """Read one row; what cannot be predicted says why."""
    setup = row["setup"]
    run, skipped = None, _missing(row["model"], setup)
    if skipped is None:
        try:
            run = _run(str(row["model"]), setup)
        except (LauncherError, _UnknownError) as error:
            skipped = str(error)
    return Published(
        id=str(row["id"]),
        model=str(row["model"]),
        stack=str(setup.get("stack") or "unknown"),
        sharding=str(setup.get("sharding") or "none"),
        complete=bool(row.get("complete", True)),
        measured=_measured(row["measured"]),
        run=run,
        skipped=skipped,
    )


class _UnknownError(Exception):
    """A value that the formulas do not know."""


def _measured(measured: Mapping[str, Any]) -> Measured:
    memory = measured.get("memory_gib")
    device = measured.get("nvidia_smi_gib")
    kind = measured.get("memory_kind") if memory is not None else None
    if kind is None and memory is None and device is not None and measured.get("outcome") == "ok":
        kind, memory = "nvidia-smi", device
    return Measured(
        outcome=str(measured.get("outcome") or "ok"),
        kind=(kind or "unknown") if memory is not None else None,
        memory_gib=memory,
        device_gib=device,
        tokens_per_s_per_gpu=measured.get("tokens_per_s_per_gpu"),
    )


def _missing(model: Any, setup: Mapping[str, Any]) -> str | None:
    """Which field must be known and is not: nothing is guessed that the answer hangs on."""
    needed = ["method", "micro_batch", "seq_len", "gpus", "gradient_checkpointing"]
    absent = [] if model else ["model"]
    absent += [f"setup.{key}" for key in needed if setup.get(key) in (None, "", [])]
    return f"missing: {', '.join(absent)}" if absent else None


def _run(model_name: str, setup: Mapping[str, Any]) -> Run:
    model = _shape(model_name)
    card, knows = _gpu_name(setup.get("gpu"))
    nodes = int(setup.get("nodes") or 1)
    per_node = max(1, int(setup["gpus"]) // nodes)
    candidate = _candidate(model, setup, card, nodes, per_node)
    site = Site(
        name="published",
        executor="slurm",
        gpu=card,
        gpus_per_node=per_node,
        max_nodes=nodes,
        cpus_per_node=16 * per_node,
        mem_bytes_per_node=1 << 41,
    )
    return Run(
        model=model,
        candidate=candidate,
        site=site,
        stack=stack_of(setup, model),
        knows_gpu=knows,
        speed=speed_of(setup),
    )


def _shape(name: str) -> ModelShape:
    """The shape of a model or of a mirror of it: the same name under another owner, quantized or converted.

    Raises:
        ModelError: neither is in the catalogue.
    """
    try:
        return model_shape(ModelSection(name_or_path=name))
    except ModelError:
        mirrored = [row["name"] for row in catalogue().values() if _bare(row["name"]) == _bare(name)]
        if not mirrored:
            raise
        return model_shape(ModelSection(name_or_path=mirrored[0]))


def _bare(name: str) -> str:
    return _SUFFIX.sub("", name.rpartition("/")[2].lower()).removeprefix("meta-")


def _gpu_name(name: Any) -> tuple[str, bool]:
    try:
        return gpu(str(name)).name, True
    except LauncherError:
        return _ASSUMED_GPU, False


def _candidate(model: ModelShape, setup: Mapping[str, Any], card: str, nodes: int, per_node: int) -> Candidate:
    method = _known(setup, "method", _METHODS)
    offload = _offloaded(setup)
    return Candidate(
        method=method,
        gpu=card,
        device="cuda",
        nodes=nodes,
        gpus_per_node=per_node,
        zero_stage=_known(setup, "sharding", _STAGES, default="none"),
        offload_optimizer="cpu" if "optimizer" in offload else "none",
        offload_param="cpu" if "params" in offload else "none",
        nvme_path=None,
        micro_batch=int(setup["micro_batch"]),
        gradient_accumulation=int(setup.get("gradient_accumulation") or 1),
        gradient_checkpointing=bool(setup.get("gradient_checkpointing")),
        checkpointing_reentrant=False,
        precision="fp32" if setup.get("weights_dtype") == "fp32" and not setup.get("autocast") else "bf16",
        attn_implementation=_known(setup, "attention", _ATTENTION, default="sdpa"),
        seq_len=int(setup["seq_len"]),
        packing=False,
        optim=str(setup.get("optimizer") or "adamw"),
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lora=None if method == "full" else _lora(model, setup, dora=method == "dora"),
        num_virtual_tokens=None,
        quant=_quant(setup) if setup.get("quantization") or method == "qlora" else None,
        buckets=_buckets(model, setup),
    )


def _offloaded(setup: Mapping[str, Any]) -> set[str]:
    """What leaves the GPU: params, optimizer, activations. FSDP updates offloaded weights where they are."""
    asked = setup.get("offload") or []
    names = set(asked.replace(",", " ").split() if isinstance(asked, str) else map(str, asked))
    if names - _OFFLOADED:
        raise _UnknownError(f"setup.offload is {sorted(names)}; known: {', '.join(sorted(_OFFLOADED))}")
    if "parameters" in names:
        names.add("params")
    if "params" in names and not str(setup.get("sharding")).startswith("zero"):
        names.add("optimizer")
    return names


def _known(setup: Mapping[str, Any], key: str, values: Mapping[str, Any], default: str = "") -> Any:
    value = setup.get(key) or default
    if value not in values:
        raise _UnknownError(f"setup.{key} is {value!r}; known: {', '.join(values)}")
    return values[value]


def _lora(model: ModelShape, setup: Mapping[str, Any], *, dora: bool) -> LoraNumbers:
    lora = LoraNumbers(
        r=int(setup.get("lora_r") or _ASSUMED_RANK),
        lora_alpha=float(setup.get("lora_r") or _ASSUMED_RANK),
        lora_dropout=float(setup.get("lora_dropout") or 0.0),
        target_modules=_targets(model, setup.get("lora_targets") or ALL_LINEAR),
        use_rslora=False,
        use_dora=dora,
    )
    lora_params(model, lora)
    return lora


def _targets(model: ModelShape, targets: str | Sequence[str]) -> str | tuple[str, ...]:
    """Targets as this model names them: rows say q_proj and up_proj also where a model fuses its projections."""
    if targets == ALL_LINEAR:
        return ALL_LINEAR
    listed = targets.replace(",", " ").split() if isinstance(targets, str) else targets
    return tuple(dict.fromkeys(_target(model, str(target)) for target in listed))


def _target(model: ModelShape, target: str) -> str:
    names = [linear.name for linear in model.linears]
    if target in names:
        return target
    mlp = [linear.name for linear in model.linears if "mlp" in linear.block or "ffn" in linear.block]
    attention = [name for name in names if name not in mlp]
    for part, projections in ((attention, _PROJECTIONS), (mlp, _MLP_PROJECTIONS)):
        if target in projections and part:
            return part[-1] if target == projections[-1] else part[0]
    return target


def _quant(setup: Mapping[str, Any]) -> QuantNumbers:
    kind = setup.get("quantization") or "nf4"
    if kind not in _QUANTIZED:
        raise _UnknownError(f"setup.quantization is {kind!r}; known: {', '.join(_QUANTIZED)}")
    return QuantNumbers(quant_type="nf4", double_quant=True, compute_dtype="bf16", storage_dtype="uint8")


def _buckets(model: ModelShape, setup: Mapping[str, Any]) -> Buckets:
    """DeepSpeed's defaults where others' configurations keep them: 5e8 elements a bucket in stages 1 and 2, 1e9 live
    parameters in stage 3, whose other sizes transformers fills in from the model as we do.
    """
    sized = buckets(model)
    if setup.get("sharding") == "zero3":
        return replace(sized, max_live_elements=_DEFAULT_LIVE, max_reuse_elements=_DEFAULT_LIVE)
    return replace(sized, reduce_elements=_DEFAULT_BUCKET, allgather_elements=_DEFAULT_BUCKET)
