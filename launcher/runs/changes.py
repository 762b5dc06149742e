"""changes: what may differ when a run goes on, and what would make it another run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from launcher.errors import ConflictError
from launcher.recipe.schema import Recipe

_SECTIONS = ("slurm.", "checkpoint.", "survival.", "wandb.", "budget.")
_FIELDS = frozenset({"train.logging_steps", "train.eval_steps", "train.per_device_train_batch_size"})
_REPLANNED = frozenset(
    {
        *("slurm.nodes", "slurm.gpus_per_node", "slurm.site", "slurm.cpus_per_task"),
        *("train.per_device_train_batch_size", "survival.min_nodes"),
    }
)
"""Fields whose change makes a new plan."""
_AUTO_REPLANNED = frozenset({"slurm.time"})
"""Fields that the planner decides when they are asked for as auto."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One field of the recipe, as the run has it and as it was asked for."""

    key: str
    saved: Any
    asked: Any

    @property
    def allowed(self) -> bool:
        """Whether the same training can go on with it."""
        return self.key.startswith(_SECTIONS) or self.key in _FIELDS

    @property
    def replans(self) -> bool:
        """Whether it decides on which ranks the work is done."""
        return self.key in _REPLANNED or (self.key in _AUTO_REPLANNED and self.asked == "auto")


def changes(saved: Recipe, asked: Recipe) -> list[Change]:
    """Every field in which two recipes differ, by its dotted name."""
    before, after = dict(_flat(dataclasses.asdict(saved))), dict(_flat(dataclasses.asdict(asked)))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [Change(key=key, saved=before.get(key), asked=after.get(key)) for key in keys]


def refuse_other_training(found: list[Change], run_id: str) -> None:
    """Refuse what would change the training itself.

    Raises:
        ConflictError: a table of what the run has and what was asked.
    """
    refused = [change for change in found if not change.allowed]
    if not refused:
        return
    width = max(len(change.key) for change in refused)
    lines = [f"{change.key:<{width}}  the run has {change.saved!r}, asked is {change.asked!r}" for change in refused]
    raise ConflictError(
        f"run {run_id} cannot go on with another training than it began:",
        *lines,
        "leave these as they are, or start a new run: launcher submit RECIPE "
        + " ".join(f"{change.key}={change.asked}" for change in refused),
    )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name != "deepspeed.overrides":
            if not value:
                continue
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
