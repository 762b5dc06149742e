"""Proof: the merged model does what base and adapter do together, as far as this machine can compute it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from launcher.adapters.files import opened
from launcher.adapters.shards import Merging, weight_files
from launcher.errors import JobFailedError, ModelError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest difference of logits, as a share of the largest logit, per dtype of the merged weights."""
_ROWS, _TOKENS = 2, 32
_MATRICES = 64
_REASON = 300
"""Characters of a library's own message; a mismatch of sizes lists every tensor."""
_COPIES = 3.0
"""Models in fp32 that the comparison of logits holds at once, activations included."""


def prove(merging: Merging, base: Path, merged: Path, *, memory_bytes: int | None = None) -> dict[str, Any]:
    """Compare and bound; facts for people: what was compared, the largest difference and its limit.

    With enough memory the logits of whole models, else the outputs of single matrices on random inputs.

    Raises:
        JobFailedError: the merged model is another one.
    """
    weights = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    dtype = written_dtype(merged)
    fp32_bytes = weights * 4 // dtype.itemsize
    free = psutil.virtual_memory().available if memory_bytes is None else memory_bytes
    if fp32_bytes * _COPIES <= free:
        what, difference = "logits", _logits(merging, base, merged)
    else:
        what, difference = "matrices", _matrices(merging, base, merged)
    limit = TOLERANCE[dtype]
    if not difference <= limit:
        raise JobFailedError(
            f"{merged}: {what} of the merged model differ by {difference:.2e} of the largest one from base and adapter "
            f"together (limit {limit:g} in {dtype}); it was not kept"
        )
    return {"compared": what, "difference": difference, "limit": limit, "dtype": str(dtype).removeprefix("torch.")}


def written_dtype(folder: Path) -> torch.dtype:
    """The floating-point type that most matrices have."""
    with opened(weight_files(folder)[0]) as file:
        kinds = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return names.get(max(set(kinds), key=kinds.count), torch.float32)


def _logits(merging: Merging, base: Path, merged: Path) -> float:
    """Largest difference of logits of one short batch, as a share of the largest logit; both sides compute in fp32."""
    together = _base_as_trained(merging, base)
    with torch.no_grad():
        together = with_adapter(together, merging.adapter.folder)
        expected = probe(together)
        del together
        alone = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, use_safetensors=True).eval()
        found = probe(alone)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def with_adapter(base: Any, folder: Path) -> Any:
    """A loaded base with an adapter on it, as PEFT loads them, in evaluation mode.

    Raises:
        ModelError: they do not belong together, or PEFT does not know such an adapter.
    """
    try:
        return peft.PeftModel.from_pretrained(base, str(folder)).eval()
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:_REASON]
        raise ModelError(f"{folder}: PEFT cannot put it on {base.config.name_or_path}: {reason}") from error


def probe(model: Any) -> Tensor:
    """Logits of a short batch of random tokens, the same for every model of the vocabulary; fp32."""
    ids = torch.randint(0, model.config.vocab_size, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _base_as_trained(merging: Merging, base: Path) -> nn.Module:
    """The base in fp32, its 4-bit layers rounded as they were."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    for name, module in model.named_modules():
        if name in merging.rounded and isinstance(module, nn.Linear):
            module.weight.data = merging.as_trained(name, module.weight.data)
    return model


def _matrices(merging: Merging, base: Path, merged: Path) -> float:
    """Largest relative difference of outputs of up to 64 merged matrices, spread over the model, on random inputs."""
    chosen = sorted(merging.factors)[:: max(1, len(merging.factors) // _MATRICES)]
    worst = 0.0
    for path in weight_files(base):
        with opened(path) as before, opened(merged / path.name) as after:
            for module in chosen:
                if f"{module}.weight" in before.keys():  # noqa: SIM118
                    weight, new = before.get_tensor(f"{module}.weight"), after.get_tensor(f"{module}.weight")
                    worst = max(worst, _difference(merging, module, weight, new))
    return worst


def _difference(merging: Merging, module: str, weight: Tensor, new: Tensor) -> float:
    layer = merging.layer(module, merging.as_trained(module, weight).float())
    new = merging.turned(module, new)
    inputs = torch.randn(8, new.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer(inputs)
        found = inputs @ new.float().T
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
