"""One training step of the real model class on fake tensors: how many bytes are alive when, without hardware.

Run as `python -m launcher.worker.trace` in the train environment: a request as JSON on stdin, the answer as JSON on
stdout (`launcher.planning.trace` writes the one and reads the other). A process of its own, because the stack takes
seconds to import and a planner must stay light.

The model is built on the meta device, its tensors are replaced by fake ones, and one forward and backward of the
worker's own loss runs under a tracker that adds up live storages. What is counted: everything but weights, inputs and
gradients, of one rank and one micro-batch; what a data-parallel engine adds (buckets, gathered shards) is not traced.
Shapes: B sequences, S tokens each, H heads, D head width.
"""

from __future__ import annotations

import json
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import repeat_kv

from launcher.worker.loss import summed_token_loss

_BLOCK_BYTES = 512
"""The CUDA allocator's smallest block; sizes are rounded up to it."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PLAIN, _MASKED = "traced_plain", "traced_masked"
"""Attention under our own name: transformers takes fake tensors for a compiler's and would build masks and repeat
key heads that real steps do not have (+9 % activations)."""


class Timeline(TorchDispatchMode):
    """Records every storage that appears and disappears, and the moments of a step in between."""

    def __init__(self, resident: list[Tensor], tied: torch.Size | None = None) -> None:
        super().__init__()
        self.tied = tied
        """Shape of a weight used twice: its first gradient waits in autograd's buffer for the second one."""
        self.events: list[tuple[str, int, int]] = []
        """("alive" | "gone", storage number, bytes) and (name of the moment, -1, 0), in order."""
        self.numbers: dict[int, int] = {_key(tensor): -1 for tensor in resident}
        """Storage -> its number; resident storages are not counted."""
        self.gradients: set[int] = set()
        self._in_backward = False
        self._next = 0

    def moment(self, name: str) -> None:
        """What follows belongs to the moment `name`."""
        self.events.append((name, -1, 0))
        self._in_backward |= "backward" in name

    def gradient(self, parameter: nn.Parameter) -> None:
        """Let go of a parameter's gradient: resident gradients are another term of the estimate."""
        if parameter.grad is not None:
            self.gradients.add(self.numbers.get(_key(parameter.grad), -1))
            parameter.grad = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self.numbers:
            return
        number, size = self._next, _rounded(tensor.untyped_storage().nbytes())
        self._next += 1
        self.numbers[key] = number
        if self._in_backward and tensor.shape == self.tied:
            self.gradients.add(number)
        self.events.append(("alive", number, size))
        weakref.finalize(tensor.untyped_storage(), self._forget, key, number, size)

    def _forget(self, key: int, number: int, size: int) -> None:
        self.numbers.pop(key, None)
        self.events.append(("gone", number, size))


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _rounded(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def peaks_by_moment(timeline: Timeline) -> dict[str, dict[str, int]]:
    """Moment -> bytes alive at its start and at its peak, weight gradients left out."""
    found: dict[str, dict[str, int]] = {}
    now, moment = 0, "forward"
    for name, number, size in timeline.events:
        before = now
        if name == "alive" and number not in timeline.gradients:
            now += size
        elif name == "gone" and number not in timeline.gradients:
            now -= size
        elif number == -1:
            moment = name
        entry = found.setdefault(moment, {"start_bytes": before, "peak_bytes": before})
        entry["peak_bytes"] = max(entry["peak_bytes"], now)
    return found


# ---------------------------------------------------------------- attention


def _plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention that keeps q, k, v, the output and one fp32 statistic per row, as flash kernels do."""
    del module, attention_mask, dropout
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2).contiguous(), None


def _masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """SDPA with a mask, as transformers calls it for packed rows.

    Key heads are repeated, for no grouped kernel takes a mask, and every layer keeps the mask as a bias of the compute
    dtype.
    """
    del module, dropout
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _row_mask(batch_size: int, q_length: int, kv_length: int, *_: Any, **__: Any) -> Tensor:
    """Which token may see which (B, 1, S, S): the documents of a packed row stay apart."""
    return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)


AttentionInterface.register(_PLAIN, _plain_attention)
AttentionInterface.register(_MASKED, _masked_attention)
AttentionMaskInterface.register(_PLAIN, _no_mask)
AttentionMaskInterface.register(_MASKED, _row_mask)


class GpuDropout(nn.Module):
    """Dropout as the GPU computes it: one fused kernel that keeps a mask of booleans, not of the input's type."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop `p` of the elements of x (any shape)."""
        return torch.native_dropout(x, self.p, self.training)[0]


# ---------------------------------------------------------------- the model


def build(request: Mapping[str, Any], layers: int) -> nn.Module:
    """The model of the request with so many layers, on the meta device, in the dtypes the worker trains it in."""
    config = layered_config(request, layers)
    dtype = torch.float32 if _fp32_masters(request) else _DTYPES[request["precision"]]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if request["quant"] is not None:
        _quantize(model, request)
    if request["lora"] is not None:
        model = _with_adapter(model, request)
    if request["checkpointing"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": request["reentrant"]})
    return model.train()


def layered_config(request: Mapping[str, Any], layers: int) -> Any:
    """The class's own configuration with so many layers and the attention that is traced."""
    values = dict(request["config"])
    kind = values.pop("model_type")
    for key in ("architectures", "torch_dtype", "dtype", "transformers_version", "quantization_config", "auto_map"):
        values.pop(key, None)
    config = AutoConfig.for_model(kind, **values)
    text = config.get_text_config()
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    name = next(name for name in names if hasattr(text, name))
    setattr(text, name, layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    attention = request["attention"]
    config._attn_implementation = attention if attention == "eager" else _MASKED if _needs_mask(request) else _PLAIN
    config.use_cache = False
    return config


def _needs_mask(request: Mapping[str, Any]) -> bool:
    return bool(request["attention"] == "sdpa" and request["packing"])


def _fp32_masters(request: Mapping[str, Any]) -> bool:
    """Plain torch trains fp32 weights under autocast; DeepSpeed and adapters hold the base in the compute dtype."""
    return bool(request["method"] == "full" and request["zero_stage"] == 0)


def _with_adapter(model: nn.Module, request: Mapping[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    numbers = request["lora"]
    targets = numbers["target_modules"]
    config = LoraConfig(
        r=numbers["r"],
        lora_alpha=numbers["lora_alpha"],
        lora_dropout=numbers["lora_dropout"],
        target_modules=targets if targets == "all-linear" else [targets] if isinstance(targets, str) else targets,
        use_rslora=numbers["use_rslora"],
        use_dora=numbers["use_dora"],
        task_type="CAUSAL_LM",
    )
    plain = request["zero_stage"] == 0
    adapted = get_peft_model(model, config, autocast_adapter_dtype=plain, low_cpu_mem_usage=True)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            dtype = torch.float32 if plain else _DTYPES[request["precision"]]
            parameter.data = parameter.data.to(dtype)
    if request["device"] == "cuda":
        _use_gpu_dropout(adapted)
    return adapted


def _use_gpu_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout) and child.p > 0:
                setattr(module, name, GpuDropout(child.p))


def _quantize(model: nn.Module, request: Mapping[str, Any]) -> None:
    """Put bitsandbytes' 4-bit modules where loading in 4 bits puts them: every linear layer but the head."""
    import bitsandbytes as bnb

    quant = request["quant"]
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                packed = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=_DTYPES[quant["compute_dtype"]],
                    compress_statistics=quant["double_quant"],
                    quant_type=quant["quant_type"],
                    device="meta",
                )
                setattr(module, name, packed)
    model.is_loaded_in_4bit = True
    for parameter in model.parameters():
        parameter.requires_grad_(False)


# ---------------------------------------------------------------- fake tensors


def to_fake(model: nn.Module, mode: FakeTensorMode, request: Mapping[str, Any]) -> None:
    """Replace every parameter and buffer by a fake CPU tensor (a fake GPU tensor aborts where torch has no CUDA)."""
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                replaced[id(parameter)] = _fake_parameter(module, name, parameter, mode, request)
            module._parameters[name] = replaced[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _fake(buffer.shape, buffer.dtype, mode)


def _fake(shape: Any, dtype: torch.dtype, mode: FakeTensorMode) -> Tensor:
    return FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))


def _fake_parameter(
    module: nn.Module, name: str, parameter: nn.Parameter, mode: FakeTensorMode, request: Mapping[str, Any]
) -> nn.Parameter:
    if request["quant"] is not None and name == "weight" and type(module).__name__ == "Linear4bit":
        return _fake_packed(module, mode, request)
    return nn.Parameter(_fake(parameter.shape, parameter.dtype, mode), requires_grad=parameter.requires_grad)


def _fake_packed(module: Any, mode: FakeTensorMode, request: Mapping[str, Any]) -> nn.Parameter:
    """A 4-bit weight: two values per byte, one scale per 64 of them, 8-bit scales with fp32 scales of their own."""
    from bitsandbytes.functional import QuantState

    quant, elements = request["quant"], module.in_features * module.out_features
    weight = nn.Parameter(_fake(((elements + 1) // 2, 1), torch.uint8, mode), requires_grad=False)
    scales = -(-elements // 64)
    common = {
        "shape": torch.Size((module.out_features, module.in_features)),
        "code": _fake((16,), torch.float32, mode),
        "blocksize": 64,
        "quant_type": quant["quant_type"],
        "dtype": _DTYPES[quant["compute_dtype"]],
    }
    if quant["double_quant"]:
        outer = QuantState(
            absmax=_fake((-(-scales // 256),), torch.float32, mode),
            code=_fake((256,), torch.float32, mode),
            blocksize=256,
            dtype=torch.float32,
        )
        offset = _fake((), torch.float32, mode)
        state = QuantState(absmax=_fake((scales,), torch.uint8, mode), offset=offset, state2=outer, **common)
    else:
        state = QuantState(absmax=_fake((scales,), torch.float32, mode), **common)
    weight.quant_state = state
    weight.bnb_quantized = True
    module.quant_state = state
    module.compute_type_is_set = True
    return weight


# ---------------------------------------------------------------- one step


def trace(request: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Forward and backward of one micro-batch with so many layers.

    Returns:
        `moments`: name -> start and peak bytes; `static_bytes` of weights; `seconds`.
    """
    started = time.perf_counter()
    model = build(request, layers)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    to_fake(model, mode, request)
    with mode:
        ids = torch.zeros(request["micro_batch"], request["seq_len"], dtype=torch.long)
        labels = torch.zeros_like(ids)
    resident = [*model.parameters(), *model.buffers(), ids, labels]
    timeline = Timeline([*resident, *_quant_tensors(model)], _tied_shape(model))
    _mark_moments(model, timeline, layers)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(timeline.gradient)
    autocast = _DTYPES[request["precision"]] if request["zero_stage"] == 0 and request["precision"] != "fp32" else None
    with mode, timeline:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = summed_token_loss(model, {"input_ids": ids, "labels": labels})
        timeline.moment("loss backward")
        loss.backward()
    return {
        "layers": layers,
        "moments": peaks_by_moment(timeline),
        "static_bytes": _static_bytes(model),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _tied_shape(model: nn.Module) -> torch.Size | None:
    """Shape of the embedding where the head uses it too and it is trained."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight and embedding.weight.requires_grad
    return embedding.weight.shape if tied else None


def _static_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *_quant_tensors(model)]
    return sum(_rounded(tensor.untyped_storage().nbytes()) for tensor in tensors)


def _quant_tensors(model: nn.Module) -> list[Tensor]:
    found = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            found += [tensor for tensor in (state.absmax, state.code, state.offset) if isinstance(tensor, Tensor)]
            state = state.state2
    return found


def _mark_moments(model: nn.Module, timeline: Timeline, layers: int) -> None:
    """Name the moments: head and loss, their backward, the last and the first layer's backward, the embedding's.

    Hooks of a recomputed layer run again in backward, where they must not count.
    """
    stack = max((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers), key=_weight_count)
    seen: set[str] = set()

    def when_forward_reaches(module: nn.Module, name: str | None, gradient_moment: str) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if gradient_moment in seen:
                return
            seen.add(gradient_moment)
            if name is not None:
                timeline.moment(name)
            if tensor.requires_grad:
                tensor.register_hook(lambda _: timeline.moment(gradient_moment))

        module.register_forward_hook(hook)

    when_forward_reaches(model.get_input_embeddings(), None, "embedding backward")
    for number, layer in enumerate(stack):
        last = number == layers - 1
        name = "first" if number == 0 else "last" if last else "middle"
        when_forward_reaches(layer, "loss forward" if last else None, f"backward of the {name} layer")


def _weight_count(stack: nn.ModuleList) -> int:
    return sum(parameter.numel() for parameter in stack.parameters())


def _max_rss_bytes() -> int:
    """Most memory this process ever held; getrusage would report the parent's where that was larger."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> int:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    answer = {
        "traces": [trace(request, layers) for layers in request["layers"]],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "max_rss_bytes": _max_rss_bytes(),
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
