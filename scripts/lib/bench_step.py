"""One rank of a measured point: the worker's own model and engine, three optimizer steps, the peak of live bytes.

A request as JSON on stdin, the answer as JSON on stdout. On a GPU the caching allocator's own counters are read; on the
CPU, whose allocator keeps none, every storage of a real tensor is counted from its creation to its end.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STEPS = 3


class CpuCounter(TorchDispatchMode):
    """Bytes of all live storages, and their peak; what exists already is found by the garbage collector."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        gc.collect()
        for found in gc.get_objects():
            if type(found) in (torch.Tensor, torch.nn.Parameter):
                self._add(found)
        self.resident = self.now

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return result


def make_model(request: dict[str, Any]) -> None:
    """Write config.json and random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = dict(request["config"])
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    dtype = torch.bfloat16 if request["device"] == "cuda" else torch.float32
    with torch.device(request["device"]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(request["make"])


def batch_of(candidate: Any, vocab: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Full rows of random tokens (B, L), with what the worker's collate adds to packed and to padded ones."""
    shape = (candidate.micro_batch, candidate.seq_len)
    ids = torch.randint(0, vocab, shape)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if candidate.packing:
        half = torch.arange(candidate.seq_len // 2).repeat(2)
        batch["position_ids"] = half.expand(shape).contiguous()
    else:
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def build(request: dict[str, Any], candidate: Any, device: torch.device) -> Any:
    """The engine as a rank of a job has it."""
    from launcher.recipe.schema import DataSection, DataSource, ModelSection, Recipe
    from launcher.worker.engine import make_engine
    from launcher.worker.model import build_model

    recipe = Recipe(
        name="bench",
        model=ModelSection(name_or_path=request["model"]),
        data=DataSection(train=(DataSource(path="random/tokens"),)),
        method=candidate.method,
    )
    if candidate.zero_stage:
        from launcher.worker.engine_deepspeed import prepare_deepspeed

        prepare_deepspeed()
    model = build_model(recipe, candidate, device=str(device), ds_config=request["ds_config"], total_steps=STEPS)
    return make_engine(model, candidate, device=device, ds_config=request["ds_config"])


def train(engine: Any, candidate: Any, vocab: int, device: torch.device) -> None:
    """Three optimizer steps: the second is the first that starts with optimizer states."""
    tokens = candidate.global_batch * (candidate.seq_len - 1)
    for step in range(1, STEPS + 1):
        batches = [batch_of(candidate, vocab, device) for _ in range(candidate.gradient_accumulation)]
        engine.train_step(batches, trained_tokens=tokens, learning_rate=1e-4, step=step)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Build, train, count."""
    from launcher.planning.plan import _candidate_from_json

    candidate = _candidate_from_json(request["candidate"])
    on_gpu = request["device"] == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    engine = build(request, candidate, device)
    found: dict[str, Any]
    if on_gpu:
        loaded = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        train(engine, candidate, request["vocab"], device)
        free, total = torch.cuda.mem_get_info(device)
        found = {
            "counter": "torch.cuda.max_memory_allocated",
            "peak_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.max_memory_reserved(device),
            "device_bytes": total - free,
            "loading_bytes": loaded,
        }
    else:
        counter = CpuCounter()
        with counter:
            train(engine, candidate, request["vocab"], device)
        found = {
            "counter": "live storages of real tensors",
            "peak_bytes": counter.peak,
            "resident_bytes": counter.resident,
        }
    dist.destroy_process_group()
    names = ("torch", "transformers", "peft", "deepspeed")
    return found | {"versions": {name: version(name) for name in names}}


def main() -> int:
    """Answer the request on stdin; whatever libraries print goes to stderr."""
    request = json.load(sys.stdin)
    answer = os.dup(1)
    os.dup2(2, 1)
    if "make" in request:
        make_model(request)
        return 0
    with os.fdopen(answer, "w") as out:
        print(json.dumps(measure(request)), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
