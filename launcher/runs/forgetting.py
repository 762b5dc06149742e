"""forgetting: what earlier runs on the same base forgot, told before another one does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.planning.plan import Warning_
from launcher.planning.prepare import Planned
from launcher.runs.folder import RunFolder
from launcher.runs.status import runs_folder

CODE = "forgot-before"
_LOOKED_AT = 200
"""Newest finished runs that are read: planning must stay quick in a folder of thousands."""


def with_earlier_runs(planned: Planned) -> Planned:
    """The plan with a warning for what is known from the runs folder; unreadable runs are passed over."""
    recipe, chosen = planned.recipe, planned.plan.chosen.candidate
    parent = runs_folder(None) if recipe.output_dir == "auto" else Path(recipe.output_dir).expanduser()
    base, limit = planned.plan.model, recipe.data.retention_max_rise
    worst = [
        found
        for found in _finished(parent, base)
        if found["method"] == chosen.method and found["rise"] > limit and found["rate"] <= chosen.learning_rate * 1.01
    ]
    if not worst:
        return planned
    told = max(worst, key=lambda found: found["rise"])
    message = (
        f"{told['run']} trained the same base with {told['method']} at learning rate {told['rate']:g}, no higher than "
        f"this plan's {chosen.learning_rate:g}, and its retention perplexity rose by {told['rise']:.0%} (the limit is "
        f"{limit:.0%}): lower the rate, or mix general text into data.train"
    )
    warnings = (*planned.plan.warnings, Warning_(code=CODE, message=message))
    return replace(planned, plan=replace(planned.plan, warnings=warnings))


def _finished(parent: Path, base: str) -> list[dict[str, Any]]:
    """Runs on `base` that measured retention: {"run", "method", "rate", "rise"}."""
    paths = sorted(parent.glob("*/result.json"), key=_changed_s, reverse=True)[:_LOOKED_AT]
    found = [_measured(RunFolder(path.parent)) for path in paths]
    return [each for each in found if each is not None and each["base"] == base]


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _measured(run: RunFolder) -> dict[str, Any] | None:
    try:
        result = json.loads(run.result.read_text(encoding="utf-8"))
        plan = json.loads(run.plan.read_text(encoding="utf-8"))
        rise = result.get("retention_rise")
        if rise is None:
            return None
        rate, method = float(plan["chosen"]["learning_rate"]), str(result["method"])
        return {"run": run.run_id, "base": plan["model"]["name"], "method": method, "rate": rate, "rise": float(rise)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
