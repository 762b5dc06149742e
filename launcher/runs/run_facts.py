"""run_facts: what one run was, gained, forgot and took, from its files alone; beside what its plan had said.

Everything may be missing: a run that did not finish has no result, one on CPUs no GPU memory, an older one no hashes
of its rows. What is missing is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.errors import DataError, LauncherError
from launcher.recipe.load import load_recipe
from launcher.runs.folder import RunFolder, read_json, read_json_lines
from launcher.runs.measured import step_s
from launcher.runs.state import read_evidence
from launcher.runs.story import restarts
from launcher.runs.trial_scores import wall_s

Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Losses on one held-out set, mean over its trained tokens."""

    base: float | None
    """Of the untrained model."""
    best: float | None
    """Lowest of all evaluations."""
    best_step: int | None
    last: float | None

    @property
    def perplexity(self) -> float | None:
        """exp(last); None where it is unknown or beyond a float."""
        return math.exp(self.last) if self.last is not None and self.last < 700 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Against:
    """One number that the plan predicted and the run measured."""

    name: str
    unit: str
    predicted: float | None
    low: float | None
    high: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less one (0.1: the plan said 10 % too much)."""
        return self.predicted / self.measured - 1 if self.predicted and self.measured else None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """One run."""

    run: str
    path: str
    finished: bool
    base: str | None
    method: str | None
    lora_r: int | None
    learning_rate: float | None
    step: int | None
    total_steps: int | None
    validation: Quality
    retention: Quality
    retention_rise: float | None
    """Of its perplexity, relative, at the end (0.2 = 20 %)."""
    retention_limit: float
    wall_s: float | None
    """Devices held, over all attempts."""
    train_s: float | None
    gpu_hours: float | None
    """None on CPUs."""
    cost: float | None
    """In the user's currency; None without a price."""
    peak_bytes: int | None
    """Of rank 0's GPU, by torch's allocator."""
    host_peak_bytes: int | None
    """Resident memory of rank 0."""
    artifact: str | None
    artifact_bytes: int | None
    """Weights of the adapter or model."""
    restarts: int
    data_key: str | None
    validation_sha256: str | None
    retention_sha256: str | None
    against: tuple[Against, ...]
    warnings: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        document = asdict(self)
        document["validation"]["perplexity"] = self.validation.perplexity
        document["retention"]["perplexity"] = self.retention.perplexity
        for told, one in zip(document["against"], self.against, strict=True):
            told["error"] = one.error
        return document


def run_facts(run: RunFolder) -> RunFacts:
    """Everything known of a run."""
    evidence, lines = read_evidence(run), list(read_json_lines(run.metrics))
    result, plan = evidence.result or {}, read_json(run.plan)
    chosen = _section(plan, "chosen")
    held_s = wall_s(evidence) or None
    ranks = int(chosen.get("nodes") or 0) * int(chosen.get("gpus_per_node") or 0)
    gpu_hours = held_s / 3600 * ranks if held_s and chosen.get("device") == "cuda" else None
    price = _section(chosen, "cost").get("price_per_gpu_hour")
    cost = gpu_hours * price if gpu_hours is not None and price is not None else None
    artifact = next((path for path in (run.adapter, run.model) if path.is_dir()), None)
    peak = max((int(line["peak_bytes"]) for line in lines if line.get("peak_bytes")), default=None)
    data, validation, retention = _section(result, "data"), quality(lines, "validation"), quality(lines, "retention")
    return RunFacts(
        run=run.run_id,
        path=str(run.path),
        finished=bool(result),
        base=_section(plan, "model").get("name"),
        method=result.get("method") or chosen.get("method"),
        lora_r=chosen.get("lora_r"),
        learning_rate=chosen.get("learning_rate"),
        step=result.get("step") or max((int(line["step"]) for line in lines if "step" in line), default=None),
        total_steps=chosen.get("steps"),
        validation=validation,
        retention=retention,
        retention_rise=_rise(retention),
        retention_limit=_limit(run),
        wall_s=held_s,
        train_s=result.get("train_s"),
        gpu_hours=gpu_hours,
        cost=cost,
        peak_bytes=peak,
        host_peak_bytes=result.get("host_peak_bytes"),
        artifact=str(artifact) if artifact else None,
        artifact_bytes=sum(path.stat().st_size for path in artifact.glob("*.safetensors")) if artifact else None,
        restarts=restarts(evidence.events),
        data_key=data.get("key"),
        validation_sha256=data.get("validation_sha256"),
        retention_sha256=data.get("retention_sha256"),
        against=_against(chosen, result, step=_step_s(run), peak=peak, wall=held_s, gpu_hours=gpu_hours, cost=cost),
        warnings=tuple(result.get("warnings") or ()) or _logged_warnings(lines),
    )


def quality(lines: Sequence[Line], name: str) -> Quality:
    """What metrics.jsonl says of a held-out set; of a step evaluated twice the later value counts."""
    found: dict[int, float] = {}
    for line in lines:
        loss = line.get(f"{name}_loss")
        if isinstance(loss, int | float) and math.isfinite(loss) and isinstance(line.get("step"), int):
            found[line["step"]] = float(loss)
    if not found:
        return Quality(base=None, best=None, best_step=None, last=None)
    best = min(found, key=lambda step: (found[step], step))
    return Quality(base=found.get(0), best=found[best], best_step=best, last=found[max(found)])


def _rise(retention: Quality) -> float | None:
    if retention.base is None or retention.last is None:
        return None
    return math.expm1(min(retention.last - retention.base, 50.0))


def _limit(run: RunFolder) -> float:
    """The limit the run was given; the default of a recipe that cannot be read."""
    from launcher.recipe.schema import DataSection

    try:
        return load_recipe(run.resolved if run.resolved.exists() else run.recipe).data.retention_max_rise
    except LauncherError:
        return float(DataSection(train=()).retention_max_rise)


def _logged_warnings(lines: Sequence[Line]) -> tuple[dict[str, Any], ...]:
    """Warnings of a run that has no result (yet)."""
    return tuple(dict(line) for line in lines if line.get("event") == "warning")


def _step_s(run: RunFolder) -> float | None:
    """Seconds per step as `launcher score` measures them; None before the end."""
    try:
        return step_s(run)
    except DataError:
        return None


def _against(
    chosen: Line,
    result: Line,
    *,
    step: float | None,
    peak: int | None,
    wall: float | None,
    gpu_hours: float | None,
    cost: float | None,
) -> tuple[Against, ...]:
    """Wall time and cost are compared at the end only; positions count as tokens, as they do in the prediction."""
    memory = _section(chosen, "memory")
    positions = math.prod(int(chosen.get(key) or 0) for key in ("micro_batch", "gradient_accumulation", "seq_len"))
    speed = positions / step if step and positions else None
    found = (
        _interval("peak memory of one rank", "bytes", _section(memory, "peak_bytes"), peak),
        _interval("step", "s", _section(chosen, "step_s"), step),
        _single("tokens per second and rank", "tokens/s", chosen.get("tokens_per_s_per_gpu"), speed),
        _single("steps", "steps", chosen.get("steps"), result.get("step")),
        _single("wall time", "s", chosen.get("wall_s"), wall if result else None),
        _single("GPU-hours", "h", chosen.get("gpu_hours"), gpu_hours if result else None),
        _single("cost", "money", _section(chosen, "cost").get("amount"), cost if result else None),
    )
    return tuple(one for one in found if one.predicted or one.measured is not None)


def _interval(name: str, unit: str, predicted: Line, measured: float | None) -> Against:
    low, expected, high = (predicted.get(key) for key in ("low", "expected", "high"))
    return Against(name=name, unit=unit, predicted=expected, low=low, high=high, measured=measured)


def _single(name: str, unit: str, predicted: Any, measured: Any) -> Against:
    return Against(name=name, unit=unit, predicted=predicted, low=None, high=None, measured=measured)


def _section(document: Line, name: str) -> dict[str, Any]:
    found = document.get(name)
    return found if isinstance(found, dict) else {}
