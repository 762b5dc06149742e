"""The plan on a terminal: what runs, does it fit, how long, what else would work, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.planning.plan import Candidate, Estimate, MemoryEstimate, Plan
from launcher.report.parts import in_parts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from launcher.report.explain import Line

GIB = 2**30
_BAR = 40
_COLOURS = {
    "weights": "blue",
    "gradients": "cyan",
    "optimizer": "magenta",
    "activations": "green",
    "logits": "yellow",
    "gathered": "bright_blue",
    "buffers": "white",
    "runtime": "bright_black",
}
_SHOWN_ALTERNATIVES = 6


def print_plan(
    plan: Plan,
    *,
    explained: Sequence[Line] = (),
    all_alternatives: bool = False,
    recipe_argument: str | None = None,
    console: Console | None = None,
) -> None:
    """Print a plan to stdout; `recipe_argument` is what the user typed, for the next command."""
    out = console or _console()
    for line in _headline(plan):
        out.print(line)
    out.print()
    out.print(memory_table(plan.chosen.memory))
    out.print(_memory_sentence(plan.chosen))
    if explained:
        out.print()
        out.print(_explanation(explained))
    _print_alternatives(out, plan, all_alternatives)
    _print_reasons(out, plan)
    out.print()
    out.print(_next(plan, recipe_argument))


def _console() -> Console:
    from rich.console import Console

    terminal = Console(highlight=False, soft_wrap=True)
    return terminal if terminal.is_terminal else Console(highlight=False, soft_wrap=True, width=140)


def _headline(plan: Plan) -> list[Text]:
    from rich.text import Text

    chosen, candidate = plan.chosen, plan.chosen.candidate
    share = chosen.trainable_params / plan.params
    trained = f"{count(chosen.trainable_params)} trained ({share:.2%})" if share < 1 else "all trained"
    money = f", {chosen.cost.amount:,.0f} in your currency" if chosen.cost.amount is not None else ""
    hours = f", {chosen.gpu_hours:,.1f} GPU-hours{money}" if candidate.device == "cuda" else ""
    verdict = Text("fits", style="bold green") if chosen.fits else Text("does not fit", style="bold red")
    return [
        Text.assemble(("model   ", "bold"), f"{plan.model}  {count(plan.params)} parameters, {trained}"),
        Text.assemble(("method  ", "bold"), f"{method_sentence(candidate)}  {sharding_sentence(candidate)}"),
        Text.assemble(
            ("where   ", "bold"), f"{where_sentence(candidate)} on {plan.site}  ", verdict, elastic_words(plan)
        ),
        Text.assemble(("batch   ", "bold"), batch_sentence(candidate)),
        Text.assemble(
            ("data    ", "bold"),
            f"{plan.data.rows:,} rows, {count(plan.data.tokens)} tokens ({plan.data.basis})",
        ),
        Text.assemble(
            ("time    ", "bold"),
            f"{chosen.steps:,} steps of {step_time(chosen)} = {duration(chosen.wall_s)}{hours}, "
            f"{chosen.tokens_per_s_per_gpu:,.0f} tokens/s per rank",
        ),
    ]


def batch_sentence(candidate: Candidate) -> str:
    """The global batch as the product it is."""
    rows = "packed rows" if candidate.packing else "rows"
    return (
        f"{candidate.global_batch} {rows} of {candidate.seq_len} tokens = {candidate.micro_batch} x "
        f"{candidate.gradient_accumulation} accumulated x {candidate.world_size} ranks, "
        f"{_checkpointing(candidate)}, {candidate.precision}"
    )


def method_sentence(candidate: Candidate) -> str:
    """Such as: lora r=16 alpha=32 on all-linear."""
    if candidate.lora is not None:
        targets = candidate.lora.target_modules
        said = targets if isinstance(targets, str) else "+".join(targets)
        return f"{candidate.method} r={candidate.lora.r} alpha={candidate.lora.lora_alpha:g} on {said}"
    if candidate.num_virtual_tokens:
        return f"{candidate.method} with {candidate.num_virtual_tokens} virtual tokens"
    return "full fine-tuning"


def sharding_sentence(candidate: Candidate) -> str:
    """Such as: ZeRO-3, optimizer on cpu."""
    parts = [f"ZeRO-{candidate.zero_stage}" if candidate.zero_stage else "plain torch"]
    if candidate.hpz_partition > 1:
        parts.append("hpZ")
    if candidate.offload_optimizer != "none":
        parts.append(f"optimizer on {candidate.offload_optimizer}")
    if candidate.offload_param != "none":
        parts.append(f"parameters on {candidate.offload_param}")
    return ", ".join(parts)


def where_sentence(candidate: Candidate) -> str:
    """Such as: 8 x 8 A100-80GB."""
    unit = "CPU ranks" if candidate.device == "cpu" else candidate.gpu
    return f"{candidate.nodes} x {candidate.gpus_per_node} {unit}"


def elastic_words(plan: Plan) -> str:
    """On how many nodes else it starts, where survival.min_nodes allows fewer; they take longer for the same steps."""
    if not plan.elastic:
        return ""
    counts = sorted(each.nodes for each in plan.elastic)
    return f"; starts on {' or '.join(str(count) for count in counts)} where fewer are free, and takes longer there"


def _checkpointing(candidate: Candidate) -> str:
    return "activations recomputed" if candidate.gradient_checkpointing else "activations kept"


# ---------------------------------------------------------------- memory


def memory_table(memory: MemoryEstimate) -> Table:
    """One bar per term, against the device or what is needed."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    terms = memory.terms_bytes
    whole = max(memory.usable_bytes, sum(terms.values()))
    for name, value in terms.items():
        if value:
            width = math.ceil(_BAR * value / whole)
            table.add_row(f"  {name}", f"{value / GIB:.2f} GiB", Text("█" * width, style=_COLOURS.get(name, "")))
    return table


def _memory_sentence(chosen: Estimate) -> str:
    return (
        f"{peak_sentence(chosen.memory)}; "
        f"host {chosen.host_ram_bytes_per_node / GIB:.0f} GiB per node; checkpoint {gib(chosen.checkpoint_bytes)}"
    )


def peak_sentence(memory: MemoryEstimate) -> str:
    """The peak, its band and moment, and what the whole device shows."""
    peak, usable = memory.peak_bytes, memory.usable_bytes / GIB
    return (
        f"peak {peak.expected / GIB:.1f} GiB ({peak.low / GIB:.1f} to {peak.high / GIB:.1f}) at {memory.binding}; "
        f"device shows about {memory.device_bytes.expected / GIB:.1f} of {usable:.1f} GiB"
    )


def _explanation(lines: Sequence[Line]) -> Table:
    """Every formula with this plan's numbers, its result and its source."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="How the numbers come about", title_justify="left", box=None, pad_edge=False)
    for name in ("TERM", "FORMULA, AND HERE", "RESULT", "SOURCE"):
        table.add_column(name, overflow="fold", justify="right" if name == "RESULT" else "left")
    for line in lines:
        formula = Text.assemble(line.formula, "\n", ("= " + line.numbers, "dim"))
        table.add_row(Text(line.term), formula, Text(line.result), Text(line.source, style="dim"))
    return table


# ---------------------------------------------------------------- what else


def _print_alternatives(out: Console, plan: Plan, everything: bool) -> None:
    fitting = [each for each in plan.alternatives if each.rejected_because is None]
    shown: Sequence[Estimate] = plan.alternatives if everything else fitting[:_SHOWN_ALTERNATIVES]
    hidden = len(plan.alternatives) - len(shown)
    if not plan.alternatives:
        return
    out.print()
    out.print("What else would work" if not everything else "Alternatives", style="bold")
    if shown:
        out.print(_alternatives_table(shown))
    if hidden:
        out.print(f"  {hidden} more, with reasons where they are rejected: --alternatives")


def _alternatives_table(found: Sequence[Estimate]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    reasons = any(each.rejected_because for each in found)
    starts = any(each.start_s is not None for each in found)
    extra = [*(["STARTS IN"] if starts else []), *(["NOT, BECAUSE IT"] if reasons else [])]
    for name in ("  METHOD", "WHERE", "HOW", "PEAK", "TIME", "GPU-H", *extra):
        right = name in ("PEAK", "TIME", "GPU-H", "STARTS IN")
        folds = name in ("HOW", "NOT, BECAUSE IT")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=not folds)
    for each in found:
        candidate = each.candidate
        table.add_row(
            f"  {candidate.method}",
            where_sentence(candidate),
            sharding_sentence(candidate),
            f"{each.memory.peak_bytes.expected / GIB:.1f} GiB",
            duration(each.wall_s),
            f"{each.gpu_hours:,.1f}",
            *([_wait(each)] if starts else []),
            *([_reason(each)] if reasons else []),
        )
    return table


def _wait(each: Estimate) -> str:
    return "" if each.start_s is None else duration(each.start_s)


def _reason(each: Estimate) -> str:
    """Why it is rejected, and the smallest change that would make it fit, or bring it within the budget."""
    change = f"; {within_with(each)} {each.would_fit}" if each.would_fit else ""
    return f"{each.rejected_because or ''}{change}"


def within_with(each: Estimate) -> str:
    """What the smallest change of a rejected alternative does."""
    return "within it with" if each.fits else "fits with"


def _print_reasons(out: Console, plan: Plan) -> None:
    if plan.advice:
        out.print()
        out.print("Why", style="bold")
        for advice in plan.advice:
            out.print(
                f"  {advice.field} = {_value(advice.value)}: {advice.reason} [{advice.rule}; {advice.source}]",
                markup=False,
            )
    for warning in plan.warnings:
        out.print(f"warning ({warning.code}): {warning.message}", style="yellow", markup=False)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _next(plan: Plan, recipe_argument: str | None) -> str:
    recipe = recipe_argument or "RECIPE"
    if plan.chosen.fits:
        return f"Next: launcher submit {recipe}"
    return f"Next: change the recipe as the error says, then: launcher plan {recipe}"


# ---------------------------------------------------------------- recipes


def print_recipes(rows: Sequence[Mapping[str, Any]], *, console: Console | None = None) -> None:
    """Print the shipped recipes with their predictions, as `launcher recipes` lists them."""
    left, right = ("RECIPE", "METHOD", "MODEL", "WHERE"), ("PEAK/GPU", "TIME", "GPU-HOURS")
    cells = [
        (
            row["name"],
            row["method"],
            row["model"],
            f"{row['nodes']} x {row['gpus_per_node']} {row['gpu']}",
            f"{row['peak_bytes'] / GIB:.1f} GiB{'' if row['fits'] else ' (does not fit)'}",
            duration(row["wall_s"]),
            f"{row['gpu_hours']:,.1f}",
        )
        for row in rows
    ]
    out = console or _console()
    for at, part in enumerate(in_parts(left, right, cells, out.width)):
        if at:
            out.print()
        out.print(part)
    out.print("Next: launcher recipes NAME copies one; launcher plan NAME explains it")


# ---------------------------------------------------------------- numbers


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min, 3.5 h or 2.1 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def step_time(each: Estimate) -> str:
    """Such as 5.24 s (4.3 to 6.81), or 3,280 s (2,690 to 4,270)."""
    low, expected, high = (
        f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"
        for value in (each.step_s.low, each.step_s.expected, each.step_s.high)
    )
    return f"{expected} s ({low} to {high})"


def gib(size_bytes: float) -> str:
    """Such as 1.5 GiB or 24 MiB."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= 0.1 * GIB else f"{size_bytes / 2**20:.0f} MiB"


def count(number: float) -> str:
    """Such as 70.6 B, 207 M or 12,345."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"
