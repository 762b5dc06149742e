"""loaded: finished runs as models, one after another, each base in memory once for all adapters on it."""

from __future__ import annotations

import dataclasses
import gc
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import psutil
import torch

from launcher.errors import ModelError
from launcher.planning.plan import Candidate, plan_from_json
from launcher.recipe.load import load_recipe
from launcher.recipe.schema import ModelSection, Recipe
from launcher.runs.folder import RunFolder
from launcher.worker.base import base_bytes, load_base

ROOM = 1.3
"""Memory a model needs, relative to its weights: activations and logits of a few rows."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_EVERYWHERE = "sdpa"
"""Attention of another machine than the one that trained: flash attention is not on every one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A finished run."""

    run: RunFolder
    recipe: Recipe
    candidate: Candidate
    other: Path | None = None
    """An adapter folder that is measured in place of the run's own."""

    @property
    def name(self) -> str:
        """What it is called in the comparison."""
        return self.run.run_id if self.other is None else self.other.name

    @property
    def adapter(self) -> Path:
        """What lies on the base."""
        return self.other or self.run.adapter

    @classmethod
    def of(cls, path: Path, device: str) -> Subject:
        """Read a run folder."""
        run = RunFolder(path)
        candidate = plan_from_json(json.loads(run.plan.read_text(encoding="utf-8"))).chosen.candidate
        if device == "cpu":
            candidate = dataclasses.replace(candidate, attn_implementation=_EVERYWHERE)
        return cls(run=run, recipe=load_recipe(run.resolved), candidate=candidate)

    @property
    def model(self) -> ModelSection:
        """What is loaded: the base, or the model of full fine-tuning."""
        if self.other is not None or self.candidate.method != "full":
            return self.recipe.model
        return dataclasses.replace(self.recipe.model, name_or_path=str(self.run.model), revision=None)

    @property
    def base_key(self) -> tuple[Any, ...]:
        """Equal for runs whose base can be shared in memory: same weights, precision and quantization."""
        model, candidate = self.recipe.model, self.candidate
        held = "fp32" if candidate.method == "full" and candidate.zero_stage == 0 else candidate.precision
        return model.name_or_path, model.revision, held, candidate.quant, candidate.attn_implementation

    def arithmetic(self, device: str) -> AbstractContextManager[Any]:
        """Under which the run was evaluated: autocast in plain torch, none where DeepSpeed held 16-bit weights."""
        dtype = _AUTOCAST.get(self.candidate.precision) if self.candidate.zero_stage == 0 else None
        return torch.autocast(device, dtype=dtype) if dtype is not None else nullcontext()


def each_model(subjects: Sequence[Subject], device: str, base_name: str) -> Iterator[tuple[str, Subject, Any]]:
    """(name, whose settings, model in evaluation mode): the base first, then every run; valid until the next one.

    Raises:
        ModelError: weights that are not here or larger than the memory left.
    """
    groups: dict[tuple[Any, ...], list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.base_key, []).append(subject)
    # The plainest base stands for all: one in 4 bits would blame the quantization on the base.
    for number, group in enumerate(sorted(groups.values(), key=lambda group: group[0].candidate.quant is not None)):
        tuned = [subject for subject in group if subject.candidate.method != "full"]
        if number == 0 or tuned:
            yield from _on_one_base(group[0], tuned, device, base_name if number == 0 else None)
        for subject in group:
            if subject.candidate.method == "full":
                yield subject.name, subject, _load(subject, subject.model, device)
                _free()


def _on_one_base(
    first: Subject, tuned: Sequence[Subject], device: str, base_name: str | None
) -> Iterator[tuple[str, Subject, Any]]:
    base = _load(first, first.recipe.model, device)
    if base_name is not None:
        yield base_name, first, base
    for subject in tuned:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a base was wrapped before: it was unwrapped again
            model: Any = peft.PeftModel.from_pretrained(base, str(subject.adapter), torch_device=device)
        yield subject.name, subject, model.eval()
        if hasattr(model.base_model, "unload"):  # low-rank factors sit in the layers; virtual tokens do not
            base = model.unload()
        del model
    del base
    _free()


def _load(subject: Subject, model: ModelSection, device: str) -> Any:
    needed = base_bytes(model, subject.candidate)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if needed is not None and needed * ROOM > free:
        raise ModelError(
            f"{model.name_or_path}: {needed * ROOM / 1e9:.1f} GB are needed to load it on this machine's {device}, "
            f"{free / 1e9:.1f} GB are free; compare where it fits, such as in a job with a GPU"
        )
    return load_base(model, subject.candidate, device=device).eval()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
