"""Inspection: what `plan --explain`, `--html` and `--trace` need beyond the plan itself, fitting or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import RecipeError
from launcher.facts.model import ModelShape, model_shape
from launcher.facts.site import Site, site_facts
from launcher.planning.plan import Plan
from launcher.planning.prepare import load_located
from launcher.planning.trace import Compared, Trace, compare, compare_weights, trace_recipe
from launcher.recipe.schema import ModelSection
from launcher.report.explain import Line, explain
from launcher.report.html import write_plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """A plan with the facts it was made from, read again: a refused plan travels without them."""

    plan: Plan
    model: ModelSection
    shape: ModelShape
    site: Site

    @classmethod
    def of(cls, plan: Plan, recipe: Path, overrides: Sequence[str]) -> Inspection:
        """The facts of the recipe the plan was made from."""
        loaded = load_located(recipe, overrides).recipe
        site = site_facts(loaded.slurm.site)
        return cls(plan=plan, model=loaded.model, shape=model_shape(loaded.model), site=site)

    def explained(self) -> tuple[Line, ...]:
        """Every formula with this plan's numbers."""
        return explain(self.plan, self.shape, self.site)

    def traced(self) -> tuple[Trace, tuple[Compared, ...]]:
        """One step on fake tensors, and the closed form beside it.

        Raises:
            ClusterError, ModelError: as `trace_recipe`.
        """
        candidate = self.plan.chosen.candidate
        trace = trace_recipe(self.model, candidate, self.site)
        compared = compare(self.shape, candidate, trace)
        return trace, (*compared, compare_weights(self.shape, candidate, trace))

    def write_html(self, path: Path, recipe_argument: str) -> None:
        """Write the page.

        Raises:
            RecipeError: the file cannot be written.
        """
        try:
            write_plan(self.plan, path, recipe_argument=recipe_argument, explained=self.explained())
        except OSError as error:
            raise RecipeError(f"--html: cannot write {path}: {error.strerror}") from error
