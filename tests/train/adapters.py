"""Adapters as runs leave them, made in seconds: a few optimizer steps on one batch, then the worker's own artifact."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from launcher.planning.plan import Candidate
from launcher.recipe.schema import Recipe
from launcher.runs.folder import RunFolder
from launcher.worker.artifact import write_artifact
from launcher.worker.model import adalora_after_step, adalora_regularize, build_model
from launcher.worker.tokenizer import load_tokenizer
from tests.tiny import VOCAB, make_candidate, make_recipe

IDS = torch.randint(5, VOCAB, (4, 24), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Adapted:
    """A trained model, still in memory, and its adapter on disk."""

    recipe: Recipe
    candidate: Candidate
    model: Any
    adapter: Path

    @property
    def base(self) -> Path:
        """Folder of the base."""
        return Path(self.recipe.model.name_or_path)


def train_adapter(folder: Path, method: str, *, steps: int = 8, **changes: Any) -> Adapted:
    """Train a tiny adapter and write it; `changes` are the recipe's fields."""
    recipe = make_recipe(folder, method=method, **changes)
    candidate = make_candidate(method=method, packing=recipe.data.packing)
    if recipe.lora.target_modules != "all-linear" and candidate.lora is not None:
        lora = dataclasses.replace(candidate.lora, target_modules=recipe.lora.target_modules)
        candidate = dataclasses.replace(candidate, lora=lora)
    model: Any = build_model(recipe, candidate, device="cpu", ds_config=None, total_steps=steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(1, steps + 1):
        loss(model).backward()
        adalora_regularize(model)
        optimizer.step()
        adalora_after_step(model, step)
        optimizer.zero_grad()
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    run = RunFolder.create(folder / "runs", method)
    path = write_artifact(state, model, load_tokenizer(recipe), recipe, run, data_key="data")
    return Adapted(recipe, candidate, model.eval(), path)


def of_peft(base: Path, folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """An adapter as another tool would write it: random factors through PEFT, and no lineage."""
    settings = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    torch.manual_seed(seed)
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.05)
    tuned.save_pretrained(folder)
    return folder


def loss(model: nn.Module) -> Tensor:
    """Cross-entropy of one fixed batch."""
    logits = model(input_ids=IDS).logits[:, -IDS.shape[1] :].float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def logits(model: Any) -> Tensor:
    """Logits of the batch, without gradients."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return found
