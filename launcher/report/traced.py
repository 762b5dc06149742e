"""A plan that was traced because no closed form knows the model: on a terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launcher.planning.plan import SCHEMA
from launcher.planning.traced import TracedPlan
from launcher.report.text import (
    batch_sentence,
    count,
    memory_table,
    method_sentence,
    peak_sentence,
    sharding_sentence,
    where_sentence,
)
from launcher.report.trace import trace_to_json

if TYPE_CHECKING:
    from rich.console import Console


def traced_to_json(plan: TracedPlan) -> dict[str, Any]:
    """`plan --trace --json` of such a model: the keys of a plan as far as they were measured, and `basis: trace`."""
    return {
        "schema": SCHEMA,
        "basis": "trace",
        "recipe": plan.recipe,
        "model": {"name": plan.model, "params": plan.params, "trainable_params": plan.trainable_params},
        "refusal": plan.refusal,
        "chosen": {
            **asdict(plan.candidate),
            "trainable_params": plan.trainable_params,
            "fits": plan.fits,
            "memory": asdict(plan.memory),
            "rejected_because": plan.rejected_because,
        },
        "alternatives": [],
        "site": plan.site,
        "trace": trace_to_json(plan.trace, ()),
    }


def print_traced(plan: TracedPlan, *, console: Console | None = None) -> None:
    """Print what was measured, whether it fits, and what is not known of it."""
    from rich.console import Console
    from rich.text import Text

    out = console or Console(highlight=False, soft_wrap=True)
    candidate, trace = plan.candidate, plan.trace
    share = plan.trainable_params / plan.params
    trained = f"{count(plan.trainable_params)} trained ({share:.2%})" if share < 1 else "all trained"
    verdict = Text("fits", style="bold green") if plan.fits else Text("does not fit", style="bold red")
    for name, said in (
        ("model   ", f"{plan.model}  {count(plan.params)} parameters, {trained}"),
        ("method  ", f"{method_sentence(candidate)}  {sharding_sentence(candidate)}"),
        ("where   ", Text.assemble(f"{where_sentence(candidate)} on {plan.site}  ", verdict)),
        ("batch   ", batch_sentence(candidate)),
        ("basis   ", f"traced, because the closed form refuses it: {plan.refusal}"),
    ):
        out.print(Text.assemble((name, "bold"), said))
    out.print()
    out.print(memory_table(plan.memory))
    out.print(peak_sentence(plan.memory))
    out.print(
        f"one step of the real class on fake tensors, {trace.layers} layers from two and four, {trace.seconds:.1f} s, "
        f"torch {trace.torch}, transformers {trace.transformers}"
    )
    out.print()
    out.print("Time, cost and alternatives are not predicted: they rest on the closed form.")
