"""Rules a recipe must keep beyond its types: ranges, choices, and fields that contradict each other."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from launcher.recipe.build import Built
from launcher.recipe.problems import Findings, nearest, one_of
from launcher.recipe.schema import (
    AUTO,
    EXPORT_ENGINES,
    FORMATS,
    LORA_METHODS,
    METHODS,
    PROMPT_METHODS,
    SCHEDULES,
    DataSource,
    LoraSection,
    PromptSection,
    QuantizationSection,
    Recipe,
)
from launcher.recipe.slurm_extra import check_extra
from launcher.recipe.tree import Where

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

CHOICES: dict[str, tuple[str, ...]] = {
    "model.attn_implementation": (AUTO, "eager", "sdpa", "flash_attention_2"),
    "method": (AUTO, *METHODS),
    "task.kind": (AUTO, "style", "instruction", "domain", "reasoning"),
    "task.goal": ("adaptation", "knowledge"),
    "quantization.bnb_4bit_quant_type": ("nf4", "fp4"),
    "quantization.bnb_4bit_compute_dtype": (AUTO, "bf16", "fp16", "fp32"),
    "data.loss_on": ("assistant", "completion", "all"),
    "train.lr_scheduler_type": SCHEDULES,
    "train.precision": (AUTO, "bf16", "fp16", "fp32"),
    "train.optim": (AUTO, "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"),
    "deepspeed.offload_optimizer": (AUTO, "none", "cpu", "nvme"),
    "deepspeed.offload_param": (AUTO, "none", "cpu", "nvme"),
    "survival.on_out_of_memory": ("smaller_micro_batch", "stop"),
    "wandb.mode": (AUTO, "online", "offline", "disabled"),
    "export.engine": EXPORT_ENGINES,
}

Test = Callable[[Any], bool]
_POSITIVE: tuple[Test, str] = (lambda x: math.isfinite(x) and x > 0, "a number above 0")
_NOT_NEGATIVE: tuple[Test, str] = (lambda x: math.isfinite(x) and x >= 0, "0 or more")
_COUNT: tuple[Test, str] = (lambda x: x >= 1, "1 or more")
_SHARE: tuple[Test, str] = (lambda x: 0 < x < 1, "a share above 0 and below 1, or a number of rows")
_BELOW_ONE: tuple[Test, str] = (lambda x: 0 <= x < 1, "0 or more and below 1")
RANGES: dict[str, tuple[Test, str]] = {
    "lora.r": _COUNT,
    "lora.lora_alpha": _POSITIVE,
    "lora.lora_dropout": _BELOW_ONE,
    "prompt.num_virtual_tokens": _COUNT,
    "data.validation.share": _SHARE,
    "data.validation.count": _COUNT,
    "data.retention_max_rise": _POSITIVE,
    "data.split_seed": (lambda x: 0 <= x < 2**32, "0 to 4294967295"),
    "data.max_seq_length": (lambda x: 8 <= x <= 10_000_000, "8 to 10,000,000 tokens"),
    "train.global_batch_size": _COUNT,
    "train.per_device_train_batch_size": _COUNT,
    "train.num_train_epochs": _POSITIVE,
    "train.max_steps": _COUNT,
    "train.learning_rate": _POSITIVE,
    "train.warmup_ratio": _BELOW_ONE,
    "train.weight_decay": _NOT_NEGATIVE,
    "train.max_grad_norm": _NOT_NEGATIVE,
    "train.seed": (lambda x: 0 <= x < 2**32, "0 to 4294967295"),
    "train.eval_steps": _COUNT,
    "train.logging_steps": _COUNT,
    "deepspeed.stage": (lambda x: x in (0, 1, 2, 3), "0, 1, 2 or 3"),
    "checkpoint.save_minutes": _POSITIVE,
    "checkpoint.save_steps": _COUNT,
    "checkpoint.save_total_limit": _COUNT,
    "survival.hang_minutes": _POSITIVE,
    "survival.attempts_without_progress": _COUNT,
    "survival.node_strikes": _COUNT,
    "survival.strike_hours": _POSITIVE,
    "survival.min_nodes": _COUNT,
    "slurm.nodes": _COUNT,
    "slurm.gpus_per_node": _COUNT,
    "slurm.cpus_per_task": _COUNT,
    "slurm.max_restarts": (lambda x: x >= 0, "0 or more"),
    "budget.gpu_hour_price": _NOT_NEGATIVE,
    "budget.max_gpu_hours": _POSITIVE,
}
"""Field -> (test, what is expected); null and auto always pass."""

_READ_BY: tuple[tuple[str, tuple[str, ...], Any], ...] = (
    ("lora", LORA_METHODS, LoraSection()),
    ("prompt", PROMPT_METHODS, PromptSection()),
    ("quantization", ("qlora",), QuantizationSection()),
)
"""Section, the methods that read it, and what it holds when nobody wrote it."""


def check(built: Built, origin: str, findings: Findings) -> Recipe:
    """Add every broken rule of the recipe to `findings`; returns it with slurm.extra in sbatch's spelling."""
    checker = _Checker(built, origin, findings)
    checker.choices()
    checker.ranges()
    checker.words()
    checker.sources()
    checker.batch()
    checker.zero()
    checker.method()
    checker.notices()
    slurm = built.recipe.slurm
    extra = check_extra(slurm.extra, checker.refuse)
    return dataclasses.replace(built.recipe, slurm=dataclasses.replace(slurm, extra=extra))


class _Checker:
    """One recipe under test; every method adds the problems of one subject."""

    def __init__(self, built: Built, origin: str, findings: Findings) -> None:
        self.recipe = built.recipe
        self.places = built.places
        self.origin = origin
        self.findings = findings

    def place(self, path: str) -> Where:
        """Where `path` was written, or the nearest thing above it."""
        while path:
            if path in self.places:
                return self.places[path]
            path = path.rpartition(".")[0]
        return Where(self.origin)

    def refuse(self, path: str, message: str) -> None:
        self.findings.refuse(self.place(path), message, path=path)

    def value(self, path: str) -> Any:
        found: Any = self.recipe
        for name in path.split("."):
            found = getattr(found, name)
        return found

    def choices(self) -> None:
        for path, allowed in CHOICES.items():
            value = self.value(path)
            if value is not None:  # an optional choice that was not made
                self.choice(path, value, allowed)

    def choice(self, path: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            near = nearest(value, allowed)
            guess = f"did you mean {near[0]}? " if near else ""
            self.refuse(path, f"{guess}expected {one_of(allowed)}, found {value!r}")

    def ranges(self) -> None:
        for path, (test, expected) in RANGES.items():
            value = self.value(path)
            if value is not None and value != AUTO and not test(value):
                shown = path.removesuffix(".share").removesuffix(".count")
                self.refuse(shown, f"expected {expected}, found {value}")

    def words(self) -> None:
        """Text fields with a form of their own."""
        recipe = self.recipe
        if not NAME.fullmatch(recipe.name):
            form = "a letter or digit, then up to 62 letters, digits, dots, dashes or underscores"
            self.refuse("name", f"expected {form}; found {recipe.name[:80]!r}")
        if recipe.slurm.mem is not None and not re.fullmatch(r"[0-9]+[KMGT]?", recipe.slurm.mem):
            self.refuse("slurm.mem", f"expected a size per node such as 500G, found {recipe.slurm.mem!r}")
        targets = recipe.lora.target_modules
        for target in () if targets == "all-linear" else targets:
            if not re.fullmatch(r"\w[\w.-]*", target):
                self.refuse("lora.target_modules", f"expected module names such as q_proj, found {target!r}")
        if not targets:
            self.refuse("lora.target_modules", "expected all-linear or at least one module name")
        if recipe.output_group is not None and not re.fullmatch(r"[A-Za-z_][\w.-]{0,31}", recipe.output_group):
            self.refuse("output_group", f"expected the name of a Unix group, found {recipe.output_group!r}")
        for path in ("model.name_or_path", "data.chat_template", "output_dir", "slurm.site"):
            if not self.value(path).strip():
                self.refuse(path, "expected text, found nothing")

    def sources(self) -> None:
        data = self.recipe.data
        named = [(f"data.train.{index}", source) for index, source in enumerate(data.train)]
        named += [("data.retention", data.retention)] if data.retention else []
        named += [("data.validation", data.validation.source)] if data.validation.source else []
        for path, source in named:
            self.source(path, source)
        held_out = data.validation.source or data.validation.share or data.validation.count
        if isinstance(self.recipe.train.eval_steps, int) and not (held_out or data.retention or data.retention_builtin):
            steps = self.recipe.train.eval_steps
            self.findings.note(
                self.place("train.eval_steps"),
                f"train.eval_steps: {steps}, and no rows to evaluate on; set data.validation, or leave it out",
            )
        if data.retention is not None and data.retention_builtin:
            self.refuse("data.retention_builtin", "data.retention names rows of your own; choose one of both")

    def source(self, path: str, source: DataSource) -> None:
        self.choice(f"{path}.format", source.format, FORMATS)
        if not source.path.strip():
            self.refuse(f"{path}.path", "expected a file, a folder or a data-set id, found nothing")
        for key in ("revision", "config"):
            value = getattr(source, key)
            if value is not None and not value.strip():
                self.refuse(f"{path}.{key}", "expected a name, found nothing; leave it out")
        if not _POSITIVE[0](source.weight):
            self.refuse(f"{path}.weight", f"expected {_POSITIVE[1]}, found {source.weight}")

    def batch(self) -> None:
        """The global batch must be whole micro-batches on every rank, as far as the recipe fixes them."""
        train, slurm = self.recipe.train, self.recipe.slurm
        parts = {
            "train.per_device_train_batch_size": train.per_device_train_batch_size,
            "slurm.nodes": slurm.nodes,
            "slurm.gpus_per_node": slurm.gpus_per_node,
        }
        fixed = {path: size for path, size in parts.items() if isinstance(size, int) and size >= 1}
        together, whole = math.prod(fixed.values()), train.global_batch_size
        if whole < 1 or whole % together == 0:
            return
        below, above = whole // together * together, -(-whole // together) * together
        near = f"{below} or {above}" if below else f"{above}"
        terms = " x ".join(f"{path.rpartition('.')[2]} {size}" for path, size in fixed.items())
        self.refuse("train.global_batch_size", f"{whole} does not divide by {terms} = {together}; nearest: {near}")

    def zero(self) -> None:
        zero = self.recipe.deepspeed
        if not isinstance(zero.stage, int):
            return
        if zero.stage == 0 and zero.offload_optimizer in ("cpu", "nvme"):
            self.refuse("deepspeed.offload_optimizer", "needs deepspeed.stage 1, 2 or 3; stage 0 is plain torch")
        if zero.stage in (1, 2) and zero.offload_optimizer == "nvme":
            reason = "below it DeepSpeed keeps the states in CPU memory, whatever is asked"
            self.refuse(
                "deepspeed.offload_optimizer", f"nvme needs deepspeed.stage 3 ({reason}); write cpu or stage: 3"
            )
        if zero.stage in (0, 1, 2) and zero.offload_param in ("cpu", "nvme"):
            self.refuse("deepspeed.offload_param", f"needs deepspeed.stage 3, found stage {zero.stage}")

    def method(self) -> None:
        zero = self.recipe.deepspeed
        if self.recipe.method != "adalora":
            return
        if zero.stage in (1, 2, 3):
            reason = {3: "its rank allocation crashes on sharded weights"}.get(
                int(zero.stage), "ZeRO frees the gradients that its rank allocation reads"
            )
            self.refuse("deepspeed.stage", f"adalora runs at stage 0 only ({reason}), found {zero.stage}")
        elif zero.offload_optimizer in ("cpu", "nvme") or zero.offload_param in ("cpu", "nvme"):
            self.refuse("deepspeed", "adalora runs at stage 0 only, and stage 0 offloads nothing")

    def notices(self) -> None:
        """Settings that were written and have no effect."""
        method = self.recipe.method
        if method in PROMPT_METHODS and self.recipe.data.packing and "data.packing" in self.places:
            self.note("data.packing", f"{method} tuning cannot keep packed rows apart; rows will not be packed")
        if self.recipe.train.max_steps is not None and "train.num_train_epochs" in self.places:
            self.note("train.max_steps", "overrides train.num_train_epochs")
        for section, methods, default in _READ_BY:
            if getattr(self.recipe, section) != default and method != AUTO and method not in methods:
                self.note(section, f"not read by method {method}; only by {one_of(methods)}")

    def note(self, path: str, message: str) -> None:
        self.findings.note(self.place(path), f"{path}: {message}")
