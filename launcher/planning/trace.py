"""trace_step: activation and logits bytes of one step, measured on fake tensors with the real model class.

The light side of `launcher.worker.trace`: writes its request, runs it in the train environment, reads the answer and
extrapolates from two and four layers to all of them (every moment of a step is linear in the layers, because layers
are alike). `trace_step` takes any config.json that transformers can build, those `facts.architecture` refuses by name
too. No formula is shared with `memory`: the two check each other, and `compare` says how far they are apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, ModelError
from launcher.facts.model import catalogue
from launcher.facts.shape import ModelShape
from launcher.facts.site import Site
from launcher.planning.memory import Moment, moments
from launcher.planning.plan import Candidate
from launcher.planning.states import weight_bytes
from launcher.planning.trainable import trainable_params
from launcher.recipe.schema import LORA_METHODS, ModelSection

_MODULE = "launcher.worker.trace"
TRACED_LAYERS = (2, 4)
"""Two numbers of layers that stand for all of them."""
_TIMEOUT_S = 600.0
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PAIRS = {
    "loss forward": "loss forward",
    "loss backward": "loss backward",
    "backward of the last layer": "backward of one layer",
}
"""Traced moment -> the closed form's name for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedMoment:
    """One moment of a step, all layers: bytes beyond weights, inputs and gradients."""

    name: str
    start_bytes: float
    """Alive when the moment begins."""
    peak_bytes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One traced step of one rank and one micro-batch."""

    moments: tuple[TracedMoment, ...]
    weights_bytes: float
    """Base and adapter, unsharded, as the worker holds them."""
    layers: int
    seconds: float
    """Tracing alone, without imports."""
    torch: str
    transformers: str
    max_rss_bytes: int

    def __getitem__(self, name: str) -> TracedMoment:
        """The moment of that name."""
        return next(moment for moment in self.moments if moment.name == name)

    @property
    def activations_bytes(self) -> float:
        """What all layers keep between forward and backward."""
        return self["loss forward"].start_bytes

    @property
    def peak_bytes(self) -> float:
        """The largest of all moments."""
        return max(moment.peak_bytes for moment in self.moments)

    @property
    def binding(self) -> str:
        """Name of the moment that sets the peak."""
        return max(self.moments, key=lambda moment: moment.peak_bytes).name


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One moment, traced and by the closed form, in bytes."""

    moment: str
    traced_bytes: float
    formula_bytes: float

    @property
    def error(self) -> float:
        """Closed form relative to the trace; 0.03 is 3 % too much."""
        return self.formula_bytes / self.traced_bytes - 1


def model_config(model: ModelSection) -> dict[str, Any]:
    """The keys of config.json that the model class is built from: the folder's, else the shipped catalogue's.

    Raises:
        ModelError: neither a folder with a readable config.json nor a catalogued name.
    """
    path = Path(model.name_or_path).expanduser() / "config.json"
    if path.is_file():
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: not readable as JSON: {error}") from error
        if isinstance(loaded, dict):
            return loaded
    row = catalogue().get(model.name_or_path.lower())
    if row is None:
        raise ModelError(
            f"model.name_or_path: {model.name_or_path!r} has no config.json to trace and is not in the shipped "
            "catalogue; download the model (config.json is enough) and give its folder"
        )
    return {key: value for key, value in row.items() if key not in ("name", "source")}


def trace_request(
    config: Mapping[str, Any], candidate: Candidate, layers: tuple[int, ...] = TRACED_LAYERS
) -> dict[str, Any]:
    """What `launcher.worker.trace` is asked.

    Raises:
        ModelError: prompt and prefix tuning, whose model class is PEFT's own.
    """
    if candidate.method not in ("full", *LORA_METHODS):
        raise ModelError(f"method: {candidate.method} is not traced; full and {', '.join(LORA_METHODS)} are")
    return {
        "config": dict(config),
        "method": candidate.method,
        "lora": asdict(candidate.lora) if candidate.lora else None,
        "quant": asdict(candidate.quant) if candidate.quant else None,
        "precision": candidate.precision,
        "zero_stage": candidate.zero_stage,
        "checkpointing": candidate.gradient_checkpointing,
        "reentrant": candidate.checkpointing_reentrant,
        "attention": candidate.attn_implementation,
        "packing": candidate.packing,
        "device": candidate.device,
        "micro_batch": candidate.micro_batch,
        "seq_len": candidate.seq_len,
        "layers": list(layers),
    }


def trace_step(
    config: Mapping[str, Any],
    candidate: Candidate,
    *,
    python: str | None = None,
    cache: Path | None = None,
    layers: tuple[int, ...] = TRACED_LAYERS,
) -> Trace:
    """Trace one micro-batch of `candidate` on the model of `config`, extrapolated to all its layers.

    Args:
        config: what config.json holds.
        candidate: sizes, dtypes, method; layouts do not matter.
        python: interpreter of the train environment; the one that runs the launcher by default.
        cache: folder of earlier answers; `trace_cache()` by default.
        layers: layer counts to run; one alone is not extrapolated.

    Raises:
        ClusterError: the train environment cannot trace (not installed, or the model class failed).
        ModelError: `config` names no number of layers.
    """
    request = trace_request(config, candidate, layers)
    total = layer_count(config) if len(layers) > 1 else layers[0]
    return _extrapolated(answer(request, python or sys.executable, cache or trace_cache()), total)


def trace_recipe(model: ModelSection, candidate: Candidate, site: Site) -> Trace:
    """Trace what a plan chose, in the train environment of its site (its `venv`, else this interpreter).

    Raises:
        ClusterError, ModelError: as `trace_step`.
    """
    return trace_step(model_config(model), candidate, python=python_of(site))


def python_of(site: Site) -> str:
    """Interpreter of a site's train environment: its `venv`, else the one that runs the launcher."""
    return str(Path(site.venv).expanduser() / "bin" / "python") if site.venv else sys.executable


def trace_cache() -> Path:
    """Where answers are kept: $XDG_CACHE_HOME/launcher/traces, or ~/.cache/launcher/traces."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "launcher" / "traces"


def layer_count(config: Mapping[str, Any]) -> int:
    """How many layers config.json says there are.

    Raises:
        ModelError: it says nothing.
    """
    text = config.get("text_config")
    values = {**config, **text} if isinstance(text, Mapping) else config
    for key in _LAYER_KEYS:
        if isinstance(values.get(key), int):
            return int(values[key])
    raise ModelError(f"config.json: none of {', '.join(_LAYER_KEYS)} says how many layers there are")


def answer(request: Mapping[str, Any], python: str, cache: Path, *, module: str = _MODULE) -> dict[str, Any]:
    """The cached answer to the same question of the same versions, else a fresh one.

    Raises:
        ClusterError: as `trace_step`.
    """
    path = cache / f"{_fingerprint(request, python, module)}.json"
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    found = _run(request, python, module)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(found), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass  # a read-only home costs ten seconds the next time, no more
    return found


def _fingerprint(request: Mapping[str, Any], python: str, module: str) -> str:
    """Names the question, the tracer's code and the versions that answered it."""
    code = Path(__file__).parents[1] / "worker"
    parts = [json.dumps(request, sort_keys=True), module, python, *_versions(Path(python))]
    parts += [(code / name).read_text(encoding="utf-8") for name in ("trace.py", "loss.py", "anatomy.py")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _versions(python: Path) -> list[str]:
    """Names of the installed distributions that decide, from folder names: importing them would take seconds."""
    site_packages = python.parent.parent.glob("lib/python*/site-packages")
    wanted = ("torch", "transformers", "peft", "bitsandbytes")
    return sorted(
        found.name for folder in site_packages for name in wanted for found in folder.glob(f"{name}-*.dist-info")
    )


def _run(request: Mapping[str, Any], python: str, module: str) -> dict[str, Any]:
    command = [python, "-m", module]
    package_root = str(Path(__file__).parents[2])
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([package_root, os.environ.get("PYTHONPATH", "")]).rstrip(":")}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=environ,
        )
    except OSError as error:
        raise ClusterError(f"--trace: cannot run {python}: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"--trace: no answer within {_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        raise ClusterError(_failure(python, done.stderr))
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _failure(python: str, stderr: str) -> str:
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    if "ModuleNotFoundError" in last:
        return (
            f"--trace: {python} has no train environment ({last}); install finetune-launcher[train] there, "
            "or name the environment in LAUNCHER_VENV"
        )
    return f"--trace: the model class could not be traced: {last}"


def _extrapolated(answer: Mapping[str, Any], layers: int) -> Trace:
    """From two layer counts to `layers`: value = first + slope * (layers - first count)."""
    traces = answer["traces"]
    first, last = traces[0], traces[-1]
    apart = last["layers"] - first["layers"]

    def at(one: float, other: float) -> float:
        return one + (other - one) / apart * (layers - first["layers"]) if apart else one

    found = []
    for name, low in first["moments"].items():
        high = last["moments"][name]
        found.append(
            TracedMoment(
                name=name,
                start_bytes=at(low["start_bytes"], high["start_bytes"]),
                peak_bytes=at(low["peak_bytes"], high["peak_bytes"]),
            )
        )
    return Trace(
        moments=tuple(found),
        weights_bytes=at(first["static_bytes"], last["static_bytes"]),
        layers=layers,
        seconds=sum(trace["seconds"] for trace in traces),
        torch=answer["torch"],
        transformers=answer["transformers"],
        max_rss_bytes=answer["max_rss_bytes"],
    )


# ---------------------------------------------------------------- against the closed form


def compare(model: ModelShape, candidate: Candidate, trace: Trace) -> tuple[Compared, ...]:
    """The token-dependent terms of every moment both know, and their peak; weights are left to `compare_weights`."""
    by_name = {moment.name: moment for moment in moments(model, candidate)}
    found = [
        Compared(moment=traced, traced_bytes=trace[traced].peak_bytes, formula_bytes=_of_tokens(by_name[formula]))
        for traced, formula in _PAIRS.items()
    ]
    peak = Compared(
        moment="peak",
        traced_bytes=max(each.traced_bytes for each in found),
        formula_bytes=max(each.formula_bytes for each in found),
    )
    return (*found, peak)


def _of_tokens(moment: Moment) -> float:
    """Activations, logits and whole weights made on the way (autocast's casts, dequantized matrices)."""
    return moment.activations + moment.logits + moment.gathered


def compare_weights(model: ModelShape, candidate: Candidate, trace: Trace) -> Compared:
    """Resident weights before sharding: the real class against the shape's parameter count."""
    adapter = 0 if candidate.method == "full" else trainable_params(model, candidate)
    per_element = 4 if candidate.zero_stage == 0 else {"bf16": 2, "fp16": 2, "fp32": 4}[candidate.precision]
    formula = weight_bytes(model, candidate) + adapter * per_element
    return Compared(moment="weights", traced_bytes=trace.weights_bytes, formula_bytes=formula)
