"""A trial on a terminal: its candidates before, its table after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.report.parts import in_parts
from launcher.runs.trial import Asked, Planned
from launcher.runs.trial_candidates import Candidate
from launcher.runs.trial_rungs import kept, rung_steps
from launcher.runs.trial_table import Row

if TYPE_CHECKING:
    from rich.console import Console

_GIB = 2**30
_FILE_WIDTH = 400


def print_candidates(planned: Planned, asked: Asked, *, console: Console | None = None) -> None:
    """What a trial would run and what it would cost at most."""
    out = console or _console()
    right = ("RANK", "LR", "TRAINS", "STEPS", "TIME", "GPU-HOURS", "PEAK")
    _print(out, ("CANDIDATE", "METHOD"), right, [_planned_cells(each) for each in planned.running])
    for each in planned.candidates:
        if each.rejected:
            out.print(f"not in it: {each.name}: {each.rejected}")
    out.print(_rungs_words(planned, asked))
    out.print(_cost_words(planned))


def _planned_cells(each: Candidate) -> list[str]:
    hours = f"{each.gpu_hours:.3g}" if each.gpu_hours else ""
    cells = [each.name, each.method, _text(each.lora_r), f"{each.learning_rate:.3g}", f"{each.trainable_params:,}"]
    return [*cells, str(each.steps), duration(each.wall_s), hours, f"{each.peak_bytes / _GIB:.2f} GiB"]


def _cost_words(planned: Planned) -> str:
    hours, price = planned.most_gpu_hours, planned.recipe.budget.gpu_hour_price
    if not hours:
        return f"at most {duration(planned.most_device_hours * 3600)} on a node (predicted)"
    money = f", {hours * price:,.2f} at {price:g} per GPU-hour" if price else ""
    return f"at most {hours:.3g} GPU-hours{money} (predicted)"


def _rungs_words(planned: Planned, asked: Asked) -> str:
    steps, left, parts = max(each.steps for each in planned.running), len(planned.running), []
    for share, at in zip(asked.shares, rung_steps(asked.shares, steps), strict=True):
        parts.append(f"{left} to step {at} ({share})")
        left = kept(left)
    seeds = f", each with seeds {', '.join(map(str, planned.seeds))}" if len(planned.seeds) > 1 else ""
    return f"rungs: {', '.join(parts)}{seeds}"


def print_table(document: dict[str, Any], told: Sequence[Row], *, console: Console | None = None) -> None:
    """The table, and what may be said of it."""
    out = console or _console()
    forgetting = any(row.retention_change is not None for row in told)
    gpus, money = any(row.gpu_hours for row in told), any(row.cost is not None for row in told)
    scored = any(row.score is not None for row in told)
    on_gpu = any(row.peak_bytes is not None for row in told)
    several = any(row.spread is not None for row in told)
    right = ["RANK", "LR", "STEPS", "VAL LOSS", *(["+-"] if several else []), "PPL"]
    right += ["SCORE", *(["+-"] if several else [])] if scored else []
    right += [*(["FORGETS"] if forgetting else []), "TRAIN", "WALL"]
    right += ["GPU-HOURS" if gpus else "NODE-HOURS", *(["COST"] if money else [])]
    right += ["GPU PEAK" if on_gpu else "HOST PEAK", "WEIGHTS", "TOKENS"]
    shown = [
        _cells(row, several=several, scored=scored, forgetting=forgetting, money=money, on_gpu=on_gpu)
        for row in told
        if row.status != "rejected"
    ]
    _print(out, ("CANDIDATE", "METHOD", "STATUS"), right, shown)
    for row in told:
        if row.why:
            out.print(f"{row.candidate}: {row.status}: {row.why}")
    if document.get("base_score") is not None:
        out.print(f"score of the base: {document['base_score']:.3f}")
    for line in verdict(document, told):
        out.print(line)


def _cells(row: Row, *, several: bool, scored: bool, forgetting: bool, money: bool, on_gpu: bool) -> list[str]:
    status = f"stopped at {row.steps}" if row.status == "stopped" else row.status
    cells = [row.candidate, row.method, status, _text(row.lora_r), f"{row.learning_rate:.3g}"]
    cells += [f"{row.steps}/{row.of_steps}", _float(row.validation_loss, ".4f")]
    cells += [_float(row.spread, ".4f")] if several else []
    cells += [_float(row.perplexity, ".3f")]
    cells += [_float(row.score, ".3f")] if scored else []
    cells += [_float(row.score_spread, ".3f")] if scored and several else []
    cells += [_float(row.retention_change, "+.4f")] if forgetting else []
    cells += [_seconds(row.train_s), _seconds(row.wall_s), _float(row.device_hours, ".3g")]
    cells += [_float(row.cost, ".2f")] if money else []
    cells += [
        _bytes(row.peak_bytes if on_gpu else row.host_peak_bytes, _GIB, "GiB"),
        _bytes(row.artifact_bytes, 1e6, "MB"),
    ]
    return [*cells, "" if row.tokens is None else f"{row.tokens:,}"]


def verdict(document: dict[str, Any], told: Sequence[Row]) -> list[str]:
    """What the table allows to be said, in sentences."""
    if document["state"] != "finished":
        was = ", and the trial was cancelled" if document["state"] == "cancelled" else ""
        return [f"rung {document['rung']} of {len(document['rungs'])} is not done{was}"]
    if not document["ties"]:
        return []
    if document.get("confirms"):
        return [_confirmation(document)]
    finished = sum(row.status == "finished" for row in told)
    lines = [_best(document["ties"], document["smallest_difference"], finished)]
    if document["score_ties"]:
        lines.append(f"by score: {_best(document['score_ties'], document['score_smallest_difference'], finished)}")
    return lines


def _best(tied: Sequence[str], noise: float | None, finished: int) -> str:
    """Which is best, and what chance may have to do with it."""
    if noise is None and len(tied) > 1:
        return f"the same for {', '.join(tied)}; one seed, so what chance does is not known (--seeds 3 measures it)"
    if noise is None:
        return f"best measured: {tied[0]}; one seed, so how much of it is chance is not known (--seeds 3 measures it)"
    if len(tied) > 1:
        return f"a tie: {', '.join(tied)}; differences below {noise:.4f} are seed-to-seed noise (95 %)"
    alone = f"by more than seed-to-seed noise ({noise:.4f}, 95 %)" if finished > 1 else "the only one that finished"
    return f"best: {tied[0]}, {alone}"


def _confirmation(document: dict[str, Any]) -> str:
    """What running winner and runner-up again has shown."""
    said, by_score = document["confirms"], document["confirms"]["by"] == "score"
    noise = document["score_smallest_difference" if by_score else "smallest_difference"]
    by, seeds = " by score" if by_score else "", f"{len(document['seeds'])} new seeds"
    named = f"{said['winner']}, the winner of {said['trial']}{by}"
    match said["outcome"]:
        case "confirmed":
            return f"confirmed: {named}, is better again with {seeds}, by more than noise ({noise:.4f}, 95 %)"
        case "reversed":
            return f"NOT confirmed: with {seeds}, {said['runner_up']} is better than {named} (noise {noise:.4f}, 95 %)"
        case "tie":
            other = said["runner_up"]
            return f"a tie: with {seeds}, {named}, and {other} differ by less than noise ({noise:.4f}, 95 %)"
    takes = "two finished candidates and two seeds or more"
    judged = f", judged: launcher trial {document['trial']} --scorer FUNCTION" if by_score else ""
    return f"whether {named}, is better is not known: it takes {takes}{judged}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _print(out: Console, left: Sequence[str], right: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table, or where the terminal is narrow several."""
    for at, part in enumerate(in_parts(left, right, rows, out.width)):
        if at:
            out.print()
        out.print(part)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _float(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _seconds(value: float | None) -> str:
    return "" if value is None else duration(value)


def _bytes(value: int | None, unit: float, name: str) -> str:
    return "" if value is None else f"{value / unit:.2f} {name}"
