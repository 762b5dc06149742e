"""explain: every formula of a plan with this model's numbers, its result and its source.

Values come from the functions the planner used (`states`, `moments`, `compute`, `traffic`), never from a second copy of
a formula; where such a function gives a total, the factors shown are taken from it by division. The tests multiply the
factors out and compare with the plan. Symbols: P parameters, P_t trained ones, N ranks, T tokens of a micro-batch,
L layers, d hidden size, V vocabulary, c bytes of the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.facts.gpu import gpu
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning import speed
from launcher.planning.activations import layer_activation_bytes_per_token, logits_bytes_per_token, residual_bytes
from launcher.planning.collectives import traffic
from launcher.planning.compute import attention_flop_per_token, compute, matmul_flop_per_token
from launcher.planning.memory import Moment, moments
from launcher.planning.plan import DTYPE_BYTES, Candidate, Estimate, Plan
from launcher.planning.speed_profile import OUR_SPEED
from launcher.planning.stack import OUR_STACK
from launcher.planning.states import weight_bytes
from launcher.planning.trainable import trainable_params
from launcher.report.text import duration, gib

_ZERO = "ZeRO, arXiv 1910.02054, section 3"
_SWEEPS = "allocator peaks of published sweeps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One formula: result = the product of its factors, or what the numbers say where it is a sum or a comparison."""

    term: str
    formula: str
    numbers: str
    result: str
    value: float
    """The result unrounded, in bytes, seconds, or as counted."""
    factors: tuple[float, ...] = ()
    """Multiply to `value`; empty for sums and comparisons."""
    source: str


def explain(plan: Plan, model: ModelShape, site: Site) -> tuple[Line, ...]:
    """Every line, memory first, then time; `model` and `site` are those the plan was made with."""
    chosen = plan.chosen
    return (*_memory(chosen, model), *_room(chosen), *_time(chosen, model, site), *_run(chosen))


def _product(
    term: str, formula: str, factors: tuple[tuple[float, str], ...], source: str, *, unit: str = "bytes"
) -> Line:
    """A line whose result is the product of (value, how it is written)."""
    value = 1.0
    for factor, _ in factors:
        value *= factor
    return Line(
        term=term,
        formula=formula,
        numbers=" x ".join(said for _, said in factors),
        result=_said(value, unit),
        value=value,
        factors=tuple(factor for factor, _ in factors),
        source=source,
    )


def _sum(term: str, formula: str, numbers: str, value: float, source: str, *, unit: str = "bytes") -> Line:
    return Line(
        term=term, formula=formula, numbers=numbers, result=_said(value, unit), value=value, factors=(), source=source
    )


def _said(value: float, unit: str) -> str:
    if unit == "bytes":
        return gib(value)
    if unit == "s":
        return f"{value:.3g} s"
    if unit == "run":
        return duration(value)
    if unit == "FLOP":
        return f"{value / 1e12:,.1f} TFLOP"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _each(value: float, of: str) -> str:
    return f"{value:.4g} {of}"


# ---------------------------------------------------------------- memory


def _memory(chosen: Estimate, model: ModelShape) -> Iterator[Line]:
    candidate = chosen.candidate
    moment = max(moments(model, candidate), key=lambda each: each.total_bytes)
    yield _sum(
        "parameters P",
        "L x layer + embedding + head + final norm",
        f"{model.layers} x {model.layer_params:,} + {model.embedding_params:,} + {model.final_norm_params:,}",
        model.params,
        model.source,
        unit="count",
    )
    yield _sum("trained P_t", *_trained(model, candidate), unit="count")
    yield from _resident(model, candidate, moment)
    yield from _of_tokens(model, candidate, moment)
    yield from _others(moment)


def _trained(model: ModelShape, candidate: Candidate) -> tuple[str, str, float, str]:
    trained = trainable_params(model, candidate)
    if candidate.method == "full":
        return "P", f"{model.params:,}", trained, "full fine-tuning"
    if candidate.lora is not None:
        said = f"r = {candidate.lora.r} on {_targets(candidate)}"
        return "r x (in + out) per target", said, trained, "LoRA, arXiv 2106.09685, section 4.1"
    return "virtual tokens x width", f"{candidate.num_virtual_tokens} tokens", trained, "PEFT"


def _targets(candidate: Candidate) -> str:
    targets = candidate.lora.target_modules if candidate.lora else ""
    return targets if isinstance(targets, str) else "+".join(targets)


def _resident(model: ModelShape, candidate: Candidate, moment: Moment) -> Iterator[Line]:
    """Weights, gradients, optimizer: bytes per element times elements times what one rank has of them."""
    trained, ranks, stage = trainable_params(model, candidate), candidate.world_size, candidate.zero_stage
    whole = weight_bytes(model, candidate)
    yield _product(
        "base, whole",
        "P x bytes per parameter",
        ((model.params, f"{model.params:,}"), (whole / model.params, _each(whole / model.params, "B"))),
        "QLoRA, arXiv 2305.14314, section 3 (4-bit layers)" if candidate.quant else _held(candidate),
    )
    share = moment.weights / whole
    formula = "whole / N + norms + adapters" if stage == 3 else "whole + adapters"
    yield _product(
        "weights",
        formula,
        ((whole, gib(whole)), (share, _each(share, f"of it (ZeRO-{stage})" if stage else "of it, adapters included"))),
        _ZERO,
    )
    shards = ranks if stage >= 2 else 1
    yield _shared("gradients", moment.gradients, trained, shards, f"alive at {moment.name}")
    shards = ranks if stage >= 1 else 1
    what = "fp32 master and two moments" if stage else "two moments"
    if "8bit" in candidate.optim:
        what = "8-bit moments" + (", fp32 master" if stage else "")
    yield _shared("optimizer", moment.optimizer, trained, shards, what)


def _held(candidate: Candidate) -> str:
    if candidate.method == "full" and candidate.zero_stage == 0 and candidate.precision != "fp32":
        return "plain torch trains fp32 weights under autocast"
    return f"held in {candidate.precision}"


def _shared(term: str, value: float, trained: int, shards: int, what: str) -> Line:
    per_element = value * shards / trained if trained else 0.0
    return _product(
        term,
        "P_t x bytes per element / shards",
        ((trained, f"{trained:,}"), (per_element, _each(per_element, f"B ({what})")), (1 / shards, f"1/{shards}")),
        _ZERO,
    )


def _of_tokens(model: ModelShape, candidate: Candidate, moment: Moment) -> Iterator[Line]:
    """Activations and logits: tokens times bytes per token."""
    tokens = candidate.micro_batch * (candidate.seq_len + (candidate.num_virtual_tokens or 0))
    tokens_said = f"{tokens:,} tokens ({candidate.micro_batch} x {tokens // candidate.micro_batch:,})"
    layer = layer_activation_bytes_per_token(model, candidate)
    residual = residual_bytes(candidate, OUR_STACK) * model.hidden
    yield _sum(
        "one layer",
        "norms (4 + 2c)d each, attention c(2q + 2k), gated MLP 4cf, inputs that adapters keep",
        f"d {model.hidden:,}, q {model.q_width:,}, k {model.kv_width:,}, f {model.intermediate:,}, "
        f"c {DTYPE_BYTES[candidate.precision]}: {layer:,.0f} B per token",
        layer * tokens,
        "autograd's saved tensors; traced by plan --trace",
    )
    kept = f"L x {residual:,} B (inputs of layers)" if candidate.gradient_checkpointing else f"L x {layer:,.0f} B"
    per_token = moment.activations / tokens
    yield _product(
        "activations",
        "T x (what L layers keep + what the layer at work needs)",
        ((tokens, tokens_said), (per_token, f"{per_token:,.0f} B, of which {kept}, L = {model.layers}")),
        "traced by plan --trace; " + _SWEEPS,
    )
    per_token = moment.logits / tokens
    both = [logits_bytes_per_token(model, candidate, OUR_STACK, backward=side) for side in (False, True)]
    yield _product(
        "logits",
        "T x (fp32 copies in the loss x 4V + the final norm's input)",
        ((tokens, tokens_said), (per_token, f"{per_token:,.0f} B (V = {model.vocab:,}; at most {max(both):,.0f} B)")),
        "worker/loss.py, traced; " + _SWEEPS,
    )


def _others(moment: Moment) -> Iterator[Line]:
    yield _sum(
        "gathered",
        "live gathered units (ZeRO-3), autocast's casts, one dequantized matrix",
        f"alive at {moment.name}",
        moment.gathered,
        "DeepSpeed stage3.py; torch.autocast; bitsandbytes",
    )
    yield _sum(
        "buffers",
        "reduce and all-gather buckets",
        f"alive at {moment.name}",
        moment.buffers,
        "DeepSpeed stage_1_and_2.py, stage3.py",
    )


def _room(chosen: Estimate) -> Iterator[Line]:
    memory = chosen.memory
    terms = {name: size for name, size in memory.terms_bytes.items() if name != "runtime" and size}
    peak, runtime = memory.peak_bytes, memory.terms_bytes["runtime"]
    yield _sum(
        "peak",
        f"sum of the terms at {memory.binding}, the largest moment",
        " + ".join(f"{name} {gib(size)}" for name, size in terms.items()),
        sum(terms.values()),
        f"between {gib(peak.low)} and {gib(peak.high)}",
    )
    what = "process" if chosen.candidate.device == "cpu" else "CUDA context, kernels, NCCL"
    yield _sum("runtime", "outside the allocator", what, runtime, "measured on A100, torch 2 (Bekman)")
    needed = peak.high + runtime
    verdict = "fits" if needed <= memory.usable_bytes else "does not fit"
    yield _sum(
        "fits",
        "high end of the peak + runtime <= what the device has",
        f"{gib(peak.high)} + {gib(runtime)} against {gib(memory.usable_bytes)}: {verdict}",
        needed,
        "the allocator's reserve gives way under pressure",
    )


# ---------------------------------------------------------------- time


def _time(chosen: Estimate, model: ModelShape, site: Site) -> Iterator[Line]:
    candidate, device = chosen.candidate, gpu(chosen.candidate.gpu)
    part = compute(model, candidate, device, site, OUR_SPEED)
    tokens = candidate.micro_batch * (candidate.seq_len + (candidate.num_virtual_tokens or 0))
    flop = matmul_flop_per_token(model, candidate, OUR_SPEED.recompute)
    flop += attention_flop_per_token(model, candidate, OUR_SPEED.recompute)
    yield _product(
        "FLOP of a micro-batch",
        "T x (2 P per pass and token + attention), recomputation included",
        ((tokens, f"{tokens:,} tokens"), (flop, f"{flop / 1e9:,.1f} GFLOP")),
        "arXiv 2001.08361, section 2.1; FlashAttention-2, 2307.08691",
        unit="FLOP",
    )
    parts = {
        "matmul": part.matmul_s,
        "attention": part.attention_s,
        "element-wise": part.elementwise_s,
        "reading weights": part.weights_s,
        "dequantization": part.dequantization_s,
    }
    yield _sum(
        "micro-batch",
        "max(arithmetic / achievable FLOP/s + memory traffic / bandwidth, launching the kernels)",
        " + ".join(f"{name} {value:.3g} s" for name, value in parts.items() if value)
        + f"; launching {part.floor_s:.3g} s",
        part.total_s,
        f"{device.name}: {device.achievable_flops / 1e12:,.3g} TFLOP/s reached by large matmuls, efficiency "
        f"{device.efficiency:g}",
        unit="s",
    )
    yield from _step(chosen, model, site)


def _step(chosen: Estimate, model: ModelShape, site: Site) -> Iterator[Line]:
    candidate, device = chosen.candidate, gpu(chosen.candidate.gpu)
    step = speed.step_time(model, candidate, site)
    moved = traffic(model, candidate, device, site, OUR_SPEED)
    often = candidate.gradient_accumulation
    yield _sum(
        "communication",
        "gathers and reductions beyond what hides behind compute",
        f"on the links {often} x {moved.per_micro_batch_s:.3g} s + {moved.per_step_s:.3g} s at "
        f"{speed.link_bytes_s(candidate, device, site) / 1e9:,.0f} GB/s, {OUR_SPEED.overlap:.0%} of compute hides it",
        step.communication_s,
        "ZeRO, arXiv 1910.02054, section 7",
        unit="s",
    )
    yield _sum(
        "step",
        "accumulation x micro-batch + exposed communication + optimizer",
        f"{often} micro-batches {step.compute_s:.3g} s + dequantization {step.dequantization_s:.3g} s + communication "
        f"{step.communication_s:.3g} s + optimizer {step.optimizer_s:.3g} s",
        step.total_s,
        f"between {chosen.step_s.low:.3g} and {chosen.step_s.high:.3g} s",
        unit="s",
    )
    tokens = candidate.global_batch * candidate.seq_len
    yield _product(
        "tokens/s per rank",
        "global batch x sequence / step / N",
        (
            (tokens, f"{tokens:,} tokens"),
            (1 / chosen.step_s.expected, f"1/{chosen.step_s.expected:.3g} s"),
            (1 / candidate.world_size, f"1/{candidate.world_size}"),
        ),
        "definition",
        unit="count",
    )


def _run(chosen: Estimate) -> Iterator[Line]:
    steps_s = chosen.steps * chosen.step_s.expected
    yield _sum(
        "run time",
        "steps x step + start-up + reading weights + evaluations + saves",
        f"{chosen.steps:,} x {chosen.step_s.expected:.3g} s = {duration(steps_s)}, and "
        f"{duration(chosen.wall_s - steps_s)} for the rest",
        chosen.wall_s,
        "the wait in the queue is not in it",
        unit="run",
    )
    if chosen.candidate.device != "cuda":
        return
    ranks = chosen.candidate.world_size
    yield _product(
        "GPU-hours",
        "run time x GPUs",
        ((chosen.wall_s / 3600, f"{chosen.wall_s / 3600:.3g} h"), (ranks, f"{ranks} GPUs")),
        "definition",
        unit="count",
    )
    price = chosen.cost.price_per_gpu_hour
    if price is not None:
        factors = ((chosen.gpu_hours, f"{chosen.gpu_hours:,.1f} GPU-hours"), (price, f"{price:g}"))
        yield _product("cost", "GPU-hours x price", factors, "budget.gpu_hour_price", unit="count")
