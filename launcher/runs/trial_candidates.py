"""trial_candidates: which ways of training a trial compares, and what each was planned to be.

By default what the planner would do: full fine-tuning, LoRA at two ranks, QLoRA and prompt tuning, each at the advised
learning rate and at three times that. Or what the user names. What the planner rejects stays in the list with why.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError, RecipeError, raise_all
from launcher.planning.advice import RANK_CEILING
from launcher.planning.objective import device_hours
from launcher.planning.plan import Estimate
from launcher.planning.prepare import Planned, plan_recipe
from launcher.planning.retreat import SMALLEST_RANK
from launcher.recipe.load import load_recipe
from launcher.recipe.schema import AUTO, LORA_METHODS, PROMPT_METHODS, Recipe

NEIGHBOUR = 3.0
"""The other learning rate, in terms of the advised one: rates are searched by half decades."""
_METHODS = ("full", "lora", "qlora", "prompt")
_RANK_STEP = 4
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,39}")
_OWN = (
    *("method", "lora.", "prompt.", "quantization.", "deepspeed.", "model.attn_implementation"),
    *("train.learning_rate", "train.lr_scheduler_type", "train.warmup_ratio", "train.weight_decay"),
    *("train.max_grad_norm", "train.precision", "train.gradient_checkpointing", "train.optim"),
    "train.per_device_train_batch_size",
)
"""What candidates may differ in: everything else is the same for all, or the comparison would be none."""
_DEPENDENT = (
    *("lora.r", "lora.lora_alpha", "lora.lora_dropout", "train.learning_rate"),
    *("train.per_device_train_batch_size", "train.gradient_checkpointing", "train.optim"),
    *("deepspeed.stage", "deepspeed.offload_optimizer", "deepspeed.offload_param"),
)
"""What was chosen for the recipe's own method, and is left open for another one (as planning/retreat.py's `freed`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A candidate as it was asked for."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way of training, planned; what was predicted of it, or why it takes no part."""

    name: str
    overrides: tuple[str, ...]
    """Over the recipe, complete: the same plan comes of them again."""
    rejected: str | None = None
    method: str = ""
    lora_r: int | None = None
    learning_rate: float = 0.0
    trainable_params: int = 0
    steps: int = 0
    """Optimizer steps of the whole run."""
    nodes: int = 1
    gpus_per_node: int = 1
    devices: int = 1
    """What its hours are counted in: GPUs, or on CPUs nodes."""
    wall_s: float = 0.0
    device_hours: float = 0.0
    """Predicted for the whole run; so are the next."""
    gpu_hours: float = 0.0
    peak_bytes: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"overrides": list(self.overrides)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Candidate:
        """Read back what `to_json` wrote."""
        return cls(**document | {"overrides": tuple(document["overrides"])})


# ---------------------------------------------------------------- what is asked for


def parse_specs(lines: Sequence[str], origin: str) -> list[Spec]:
    """Candidates from lines such as `small: method=lora lora.r=8`; `origin` names the place in messages.

    Raises:
        RecipeError: every line that is none, names twice, fields that must be the same for all.
    """
    problems: list[str] = []
    found = [spec for number, line in enumerate(lines, 1) for spec in _spec(line, f"{origin}:{number}", problems)]
    names = [spec.name for spec in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [f"{origin}: two candidates are called {name!r}" for name in twice]
    if not found and not problems:
        problems.append(f"{origin}: no candidate; write lines such as: small: method=lora lora.r=8")
    raise_all(RecipeError, problems)
    return found


def read_specs(path: Path) -> list[Spec]:
    """The candidates of a file, one a line.

    Raises:
        RecipeError: the file cannot be read, or as `parse_specs`.
    """
    try:
        return parse_specs(path.read_text(encoding="utf-8").splitlines(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error


def _spec(line: str, where: str, problems: list[str]) -> Iterator[Spec]:
    line = line.strip()
    if not line or line.startswith("#"):
        return
    name, colon, rest = (part.strip() for part in line.partition(":"))
    try:
        words = shlex.split(rest)
    except ValueError as error:
        problems.append(f"{where}: {error} in {rest!r}")
        return
    if not colon or not _NAME.fullmatch(name):
        problems.append(
            f"{where}: expected NAME: FIELD=VALUE ..., the name of small letters, digits, dots and dashes; "
            f"found {line!r}"
        )
        return
    bad = [f"{where}: {name}: {word!r} is not FIELD=VALUE" for word in words if "=" not in word]
    shared = [word for word in words if "=" in word and not word.startswith(_OWN)]
    bad += [
        f"{where}: {name}: {word.partition('=')[0]} must be the same for all candidates; set it beside the recipe"
        for word in shared
    ]
    problems += bad
    if not bad:
        yield Spec(name=name, overrides=tuple(words))


# ---------------------------------------------------------------- planning


@dataclass(frozen=True, kw_only=True, slots=True)
class Planner:
    """Plans candidates over one recipe."""

    path: Path
    shared: tuple[str, ...]
    """Overrides of all candidates."""

    def candidates(self, specs: Sequence[Spec] | None) -> list[Candidate]:
        """The candidates, planned on the same ranks and for the same tokens.

        Raises:
            RecipeError: a candidate that the user named is no recipe.
            LauncherError: what is wrong with the recipe itself, its data, model or site; or nothing can be planned.
        """
        recipe = load_recipe(self.path, self.shared)
        planned = [self._named(recipe, spec) for spec in specs] if specs is not None else list(self._usual(recipe))
        if specs is not None:
            _refuse_mistakes(planned)
        planned = self._same_ranks(planned)
        if all(isinstance(each, LauncherError) for _, each in planned):
            _raise_together(planned)
        return self._same_tokens([_told(spec, each) for spec, each in planned], planned)

    def _named(self, recipe: Recipe, spec: Spec) -> _Attempt:
        own = dict(word.partition("=")[::2] for word in spec.overrides)
        freed = _freed(recipe, own.get("method", recipe.method), own)
        return self._plan(replace(spec, overrides=(*freed, *spec.overrides)))

    def _usual(self, recipe: Recipe) -> Iterator[_Attempt]:
        for method in _methods(recipe):
            base = self._plan(Spec(name=method, overrides=(*_freed(recipe, method, {}), f"method={method}")))
            yield from self._with_neighbour(base)
            plan = base[1]
            if method == "lora" and isinstance(plan, Planned) and (lora := plan.plan.chosen.candidate.lora):
                rank = lora.r * _RANK_STEP if lora.r * _RANK_STEP <= RANK_CEILING else lora.r // _RANK_STEP
                if rank >= SMALLEST_RANK // 2:
                    spec = base[0]
                    own = (*spec.overrides, f"lora.r={rank}", "lora.lora_alpha=auto")
                    yield from self._with_neighbour(self._plan(Spec(name="lora", overrides=own)))

    def _with_neighbour(self, base: _Attempt) -> Iterator[_Attempt]:
        """A candidate under its full name, and the same at the other rate."""
        spec, plan = base
        if isinstance(plan, LauncherError):
            yield base
            return
        chosen = plan.plan.chosen.candidate
        name = f"{spec.name}-r{chosen.lora.r}" if chosen.lora else spec.name
        for rate in (chosen.learning_rate, chosen.learning_rate * NEIGHBOUR):
            own = (*spec.overrides, f"train.learning_rate={rate:.3g}")
            yield self._plan(Spec(name=f"{name}-lr{_short(rate)}", overrides=own))

    def _plan(self, spec: Spec) -> _Attempt:
        """The plan of a candidate; the error where there is none."""
        try:
            return spec, plan_recipe(self.path, (*self.shared, *spec.overrides))
        except LauncherError as error:
            return spec, error

    def _same_ranks(self, planned: list[_Attempt]) -> list[_Attempt]:
        """All on the most ranks that any of them needs: one array has one shape, and times can be compared."""
        chosen = [each.plan.chosen.candidate for _, each in planned if isinstance(each, Planned)]
        if len({(one.nodes, one.gpus_per_node) for one in chosen}) < 2:
            return planned
        most = max(chosen, key=lambda one: (one.world_size, one.nodes))
        ranks = (f"slurm.nodes={most.nodes}", f"slurm.gpus_per_node={most.gpus_per_node}")
        return [
            (spec, each)
            if isinstance(each, LauncherError)
            else self._plan(replace(spec, overrides=(*spec.overrides, *ranks)))
            for spec, each in planned
        ]

    def _same_tokens(self, told: list[Candidate], planned: list[_Attempt]) -> list[Candidate]:
        """The same tokens for all: what cannot be packed takes more, shorter steps."""
        plans = [each.plan for _, each in planned if isinstance(each, Planned)]
        steps = max(plan.chosen.steps for plan in plans)
        packed = [plan for plan in plans if plan.chosen.candidate.packing]
        if packed:
            steps = packed[0].chosen.steps
        found = []
        for one, (_, each) in zip(told, planned, strict=True):
            if isinstance(each, LauncherError):
                found.append(one)
                continue
            share = 1.0 if each.plan.chosen.candidate.packing or not packed else _rows_per_sequence(each)
            own = max(1, round(steps * share))
            ratio = own / max(1, one.steps)
            found.append(
                replace(
                    one,
                    steps=own,
                    overrides=(*one.overrides, f"train.max_steps={own}"),
                    wall_s=one.wall_s * ratio,
                    device_hours=one.device_hours * ratio,
                    gpu_hours=one.gpu_hours * ratio,
                )
            )
        return found


_Attempt = tuple[Spec, Planned | LauncherError]


def _methods(recipe: Recipe) -> list[str]:
    """The usual methods, and the recipe's own; of the prompt methods one."""
    own = recipe.method
    if own in PROMPT_METHODS:
        return [*_METHODS[:-1], own]
    return [*_METHODS, own] if own not in (*_METHODS, AUTO) else list(_METHODS)


def _freed(recipe: Recipe, method: str, own: dict[str, str]) -> tuple[str, ...]:
    """What was chosen for the recipe's method and is open for another; the low-rank methods share theirs."""
    if method == recipe.method or recipe.method == AUTO:
        return ()
    kept: tuple[str, ...] = ()
    if method in LORA_METHODS and recipe.method in LORA_METHODS:
        kept = ("lora.", "train.learning_rate")
    return tuple(f"{key}=auto" for key in _DEPENDENT if key not in own and not key.startswith(kept or ("-",)))


def _told(spec: Spec, each: Planned | LauncherError) -> Candidate:
    if isinstance(each, LauncherError):
        return Candidate(name=spec.name, overrides=spec.overrides, rejected=each.problems[0])
    return _of_estimate(spec, each.plan.chosen)


def _of_estimate(spec: Spec, chosen: Estimate) -> Candidate:
    candidate = chosen.candidate
    return Candidate(
        name=spec.name,
        overrides=spec.overrides,
        method=candidate.method,
        lora_r=candidate.lora.r if candidate.lora else None,
        learning_rate=candidate.learning_rate,
        trainable_params=chosen.trainable_params,
        steps=chosen.steps,
        nodes=candidate.nodes,
        gpus_per_node=candidate.gpus_per_node,
        devices=candidate.world_size if candidate.device == "cuda" else candidate.nodes,
        wall_s=chosen.wall_s,
        device_hours=device_hours(chosen),
        gpu_hours=chosen.gpu_hours,
        peak_bytes=chosen.memory.peak_bytes.expected,
    )


def _rows_per_sequence(each: Planned) -> float:
    """Rows that one packed sequence holds on average: steps without packing are so many times as many."""
    data, candidate = each.plan.data, each.plan.chosen.candidate
    rows = max(1, data.rows)
    mean = data.mean_tokens if data.mean_tokens is not None else data.tokens / rows
    return max(1.0, candidate.seq_len / max(1.0, mean))


def _refuse_mistakes(planned: Sequence[_Attempt]) -> None:
    """What the user wrote of a candidate must be a recipe; that it does not fit is no mistake.

    Raises:
        RecipeError: every mistake, with the candidate's name.
    """
    wrong = [(spec.name, each) for spec, each in planned if isinstance(each, RecipeError)]
    raise_all(RecipeError, [f"{name}: {problem}" for name, error in wrong for problem in error.problems])


def _raise_together(planned: Sequence[_Attempt]) -> None:
    """Nothing can be planned: what is wrong, each once, of the first one's class.

    Raises:
        LauncherError: always.
    """
    errors = [each for _, each in planned if isinstance(each, LauncherError)]
    raise type(errors[0])(*dict.fromkeys(problem for error in errors for problem in error.problems))


def _short(rate: float) -> str:
    """A rate as part of a name: 2e-4, 6e-4."""
    mantissa, _, exponent = f"{rate:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
