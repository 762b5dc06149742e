"""limits: what an account and a QOS allow one job, and where a job is over it; pure comparisons of known values.

Slurm looks at the QOS of the partition first, then at the job's QOS, then at the account; the first that sets a limit
decides it (Slurm's "Resource Limits" page). A QOS with OverPartQOS comes before the partition's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.facts.offer import AccountLimits, Qos
from launcher.facts.slurm_text import tres
from launcher.recipe.scalars import format_minutes

_GIB = 2**30
_KEYS = {"node": "slurm.nodes", "cpu": "slurm.cpus_per_task", "mem": "slurm.mem"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What one job asks for, in all and per node, in TRES: node, cpu, mem (bytes), gres/gpu, gres/gpu:TYPE."""

    time_min: int
    nodes: int
    total: dict[str, int]
    per_node: dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """The limits of one QOS or account, and who it is."""

    who: str
    time_min: int | None
    most: dict[str, int]
    """Of one job, of the user or of the group together: more than any of them can never start."""
    most_per_node: dict[str, int]
    least: dict[str, int]
    submit_jobs: int | None
    """Waiting and running at once."""
    no_jobs: bool
    """Whether it lets no job run at all."""


def rule_of_qos(qos: Qos, who: str) -> Rule:
    """A QOS as a rule; of several limits on the same thing the smallest counts."""
    return Rule(
        who=who,
        time_min=qos.max_time_min,
        most=_least(qos.max_tres, qos.max_tres_per_user, qos.max_tres_per_account, qos.group_tres),
        most_per_node={},
        least=tres(qos.min_tres),
        submit_jobs=qos.max_submit_jobs,
        no_jobs=qos.max_jobs == 0,
    )


def rule_of_account(limits: AccountLimits) -> Rule:
    """An account (for the user who asked) as a rule."""
    counts = [count for count in (limits.max_submit_jobs, limits.group_submit_jobs) if count is not None]
    return Rule(
        who=f"account {limits.account}",
        time_min=limits.max_time_min,
        most=_least(limits.max_tres, limits.group_tres),
        most_per_node=tres(limits.max_tres_per_node),
        least={},
        submit_jobs=min(counts, default=None),
        no_jobs=limits.max_jobs == 0 or limits.group_jobs == 0,
    )


def _least(*amounts: str | None) -> dict[str, int]:
    found: dict[str, int] = {}
    for amount in amounts:
        for name, value in tres(amount).items():
            found[name] = min(value, found.get(name, value))
    return found


def over(wanted: Wanted, rules: Sequence[Rule]) -> Iterator[str]:
    """What the job asks beyond the rules, which come in the order in which Slurm looks at them."""
    for rule in rules:
        if rule.no_jobs:
            yield f"slurm.account: {rule.who} lets no job run (its limit of running jobs is 0); take another one"
    timed = next((rule for rule in rules if rule.time_min is not None), None)
    if timed is not None and timed.time_min is not None and wanted.time_min > timed.time_min:
        most = format_minutes(timed.time_min)
        yield (
            f"slurm.time: {format_minutes(wanted.time_min)} asked, {timed.who} allows {most}; set slurm.time={most} or "
            "take another QOS"
        )
    yield from _too_much(wanted.total, [(rule.who, rule.most) for rule in rules], "")
    yield from _too_much(wanted.per_node, [(rule.who, rule.most_per_node) for rule in rules], " of each node")
    for rule in rules:
        for name, least in rule.least.items():
            if name in wanted.total and wanted.total[name] < least:
                asked = _amount(name, wanted.total[name])
                yield f"{_key(name)}: {asked} of {name} asked, {rule.who} takes no job with less than " + _amount(
                    name, least
                )


def _too_much(asked: dict[str, int], limits: Sequence[tuple[str, dict[str, int]]], where: str) -> Iterator[str]:
    for name, value in asked.items():
        setter = next(((who, most[name]) for who, most in limits if name in most), None)
        if setter is not None and value > setter[1]:
            who, most = setter
            yield f"{_key(name)}: {_amount(name, value)} of {name}{where} asked, {who} allows {_amount(name, most)}"


def _key(name: str) -> str:
    return _KEYS.get(name, "slurm.gpus_per_node")


def _amount(name: str, value: int) -> str:
    return f"{value / _GIB:g}G" if name == "mem" else str(value)
