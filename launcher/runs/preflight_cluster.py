"""Preflight of the cluster: what Slurm would accept and never start, found by at most MOST_CALLS questions.

Plain sbatch accepts jobs that wait for ever: a limit over the partition's, more nodes than there are, an amount that
an account or a QOS never gives, a dependency on a job that never was. What is asked first decides most.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

from launcher.errors import LauncherError
from launcher.facts.command import is_temporary, run_command, run_slurm
from launcher.facts.limits import Rule, Wanted, over, rule_of_account, rule_of_qos
from launcher.facts.offer import AccountLimits, Partition, Qos
from launcher.facts.probe import account_limits, partitions, qos_limits, slurm_config, user_name, with_group_limits
from launcher.facts.slurm_text import records
from launcher.recipe.problems import nearest
from launcher.recipe.scalars import format_minutes
from launcher.runs.asked import Asked
from launcher.runs.preflight_partition import asked_partitions, partition_problems
from launcher.runs.request import JobRequest
from launcher.runs.sbatch import directives
from launcher.runs.sending import clean_environment

MOST_CALLS = 5
"""Calls of Slurm's commands in one preflight: controllers count them against a user's rate."""
_TESTED = ("nodelist", "exclude", "reservation", "licenses", "nodefile", "tmp", "prefer", "cluster-constraint")
"""Options whose values only Slurm itself can judge."""
_UNTESTED = ("output", "open-mode", "signal", "comment", "dependency")
_WAITS = ("down, drained or reserved", "nodes are busy")
_Answer = TypeVar("_Answer")


@dataclass(slots=True)
class Questions:
    """How many more calls this preflight may make."""

    left: int = MOST_CALLS

    def ask(self, question: Callable[[], _Answer], calls: int = 1) -> _Answer | None:
        """The answer; None where too many were asked already, or Slurm refuses or does not answer."""
        if self.left < calls:
            return None
        self.left -= calls
        try:
            return question()
        except LauncherError:
            return None


@dataclass(slots=True)
class _Check:
    """One preflight of the cluster under way."""

    job: Asked
    notices: list[str]
    questions: Questions = field(default_factory=Questions)
    problems: list[str] = field(default_factory=list)


def check_cluster(job: Asked, notices: list[str]) -> list[str]:
    """Everything that the cluster can never give to the job; unchecked, with a notice, where Slurm does not answer."""
    check = _Check(job=job, notices=notices)
    check.questions.left -= 2
    try:
        known = partitions()
    except LauncherError as error:
        notices.append(f"cluster: not checked, because {error.problems[0]}")
        return []
    check.problems += _dependency(check)
    accounts = check.questions.ask(lambda: account_limits(groups=False))
    qos = check.questions.ask(qos_limits) if accounts else None
    flags = next((one.flags for one in qos or () if one.name == job.qos), ())
    check.problems += partition_problems(job, known, notices, ignored=flags)
    check.problems += _unknown_names(job, accounts or (), qos or ())
    if not check.problems:
        partition = _chosen(job, known)
        check.problems += _tested(check)
        check.problems += _submit_limits(check, _rules(job, partition, accounts or (), qos or ()))
        check.problems += _over_limits(check, partition, accounts or (), qos or ())
        _maintenance(check, partition)
    return check.problems


def _with_groups(check: _Check, accounts: tuple[AccountLimits, ...]) -> tuple[AccountLimits, ...]:
    """The limits with those that an account sets on all its users together: from the site profile, else asked."""
    known = {one.account: one for one in check.job.site.account_limits}
    if known:
        return tuple(one.within(known.get(one.account)) for one in accounts)
    return check.questions.ask(lambda: with_group_limits(accounts)) or accounts


def _chosen(job: Asked, known: Sequence[Partition]) -> Partition | None:
    """The partition, where it is one."""
    names = asked_partitions(job, known)
    return next((one for one in known if [one.name] == names), None)


# ---------------------------------------------------------------- accounts, QOS and their limits


def _unknown_names(job: Asked, accounts: Sequence[AccountLimits], qos: Sequence[Qos]) -> Iterator[str]:
    """Names that are not this user's: without enforcement Slurm would take them, and the hours would go nowhere."""
    mine = sorted({one.account for one in accounts if one.account})
    yield from _unknown("account", job.account, mine)
    usable = [one for one in accounts if job.account in (None, one.account)] or list(accounts)
    granted = sorted({name for one in usable for name in one.qos})
    if job.qos is not None and qos and job.qos not in granted and all(one.name != job.qos for one in qos):
        there = ", ".join(one.name for one in qos)
        close = nearest(job.qos, granted)
        hint = f"did you mean {close[0]}? " if close else ""
        yield f"slurm.qos: there is no QOS {job.qos!r}; {hint}yours: {', '.join(granted) or f'none of {there}'}"
    else:
        yield from _unknown("qos", job.qos, granted)


def _unknown(what: str, name: str | None, known: Sequence[str]) -> list[str]:
    if name is None or name in known or not known:
        return []
    close = nearest(name, known)
    hint = f"did you mean {close[0]}? " if close else ""
    return [f"slurm.{what}: {name!r} is not yours to use; {hint}yours: {', '.join(known)}"]


def _rules(
    job: Asked, partition: Partition | None, accounts: Sequence[AccountLimits], qos: Sequence[Qos]
) -> list[list[Rule]]:
    """The rules of each account that may be charged, each in Slurm's order: partition's QOS, job's QOS, account."""
    by_name = {one.name: one for one in qos}
    found = []
    for account in _charged(job, partition, accounts):
        name = job.qos or account.default_qos or (account.qos[0] if len(account.qos) == 1 else None)
        rules = [rule_of_qos(by_name[name], f"QOS {name}")] if name in by_name else []
        if partition and partition.qos in by_name:
            own = rule_of_qos(by_name[partition.qos], f"QOS {partition.qos} of partition {partition.name}")
            first = name in by_name and "OverPartQOS" in by_name[name].flags
            rules = [*rules, own] if first else [own, *rules]
        found.append([*rules, rule_of_account(account)])
    return found


def _charged(job: Asked, partition: Partition | None, accounts: Sequence[AccountLimits]) -> Iterator[AccountLimits]:
    """Associations of the account asked for, or of every one where the default is not known.

    One for the partition comes before one for all partitions.
    """
    mine = [one for one in accounts if job.account in (None, one.account)]
    for name in dict.fromkeys(one.account for one in mine):
        rows = {one.partition: one for one in mine if one.account == name}
        found = rows.get(partition.name if partition else None) or rows.get(None)
        if found is not None:
            yield found


def _over_limits(
    check: _Check, partition: Partition | None, accounts: tuple[AccountLimits, ...], qos: Sequence[Qos]
) -> list[str]:
    """What every account that may be charged refuses; nothing where the site does not enforce limits."""
    wanted = _wanted(check.job)
    known: Sequence[Callable[[], tuple[AccountLimits, ...]]]
    known = (lambda: accounts, lambda: _with_groups(check, accounts))
    for limits in known:
        found = [list(over(wanted, rules)) for rules in _rules(check.job, partition, limits(), qos)]
        if found and all(found):
            return found[0] if _enforced(check) else []
    return []


def _enforced(check: _Check) -> bool:
    """Whether limits bind: the profile's word, else Slurm's configuration; assumed where nobody says."""
    known = check.job.site.accounting_enforce
    if known is None:
        config = check.questions.ask(slurm_config)
        said = None if config is None else config.get("AccountingStorageEnforce")
        known = None if said is None else tuple(word.strip().lower() for word in said.split(","))
    return known is None or bool({"limits", "safe", "all"} & set(known))


def _wanted(job: Asked) -> Wanted:
    candidate = job.plan.chosen.candidate
    per_node = {"cpu": candidate.gpus_per_node * job.plan.job.cpus_per_task}
    if mem := job.mem_bytes:
        per_node["mem"] = mem
    if job.site.request_gpus:
        per_node["gres/gpu"] = candidate.gpus_per_node
        if job.site.gpu_type:
            per_node[f"gres/gpu:{job.site.gpu_type}"] = candidate.gpus_per_node
    total = {"node": candidate.nodes} | {name: candidate.nodes * amount for name, amount in per_node.items()}
    return Wanted(time_min=job.plan.job.time_limit_min, nodes=candidate.nodes, total=total, per_node=per_node)


def _submit_limits(check: _Check, rules: Sequence[Sequence[Rule]]) -> Iterator[str]:
    """Jobs of this user that wait and run, against the most that may."""
    job = check.job
    limits = [(rule.submit_jobs, rule.who) for each in rules for rule in each if rule.submit_jobs is not None]
    if not limits and job.site.max_submit_jobs is not None:
        limits = [(job.site.max_submit_jobs, f"the profile of {job.site.name}")]
    if not limits:
        return
    command = ["squeue", "--noheader", "--array", f"--user={user_name()}", "--format=%i"]
    listing = check.questions.ask(lambda: run_slurm(command))
    most, who = min(limits)
    if listing is not None and (there := len(listing.split())) >= most:
        yield (
            f"slurm.account: {there} of your jobs wait or run, and {who} allows {most} at once; wait for one to end, "
            "or end one (launcher status shows those of your runs)"
        )


# ---------------------------------------------------------------- what only Slurm can judge


def _dependency(check: _Check) -> list[str]:
    """Jobs that this one is to wait for and that never were: Slurm would start it without them."""
    ids = dict.fromkeys(re.findall(r"(?<=:)(\d+)(?:_\d+|_\*)?", check.job.option("dependency") or ""))
    if not ids:
        return []
    listed = ",".join(ids)
    command = ["squeue", "--noheader", "--states=all", f"--jobs={listed}", "--format=%A|%F"]
    ran = check.questions.ask(lambda: run_command(command))
    # squeue fails where it knows none of them.
    if ran is None or (ran.returncode != 0 and "invalid job id" not in ran.words.lower()):
        check.notices.append(f"cluster: whether the jobs of slurm.extra.dependency exist ({listed}) was not checked")
        return []
    seen = _numbers(ran.stdout)
    if not set(ids) <= seen:  # sacct remembers those that ended long ago
        command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={listed}", "--format=JobID,JobIDRaw"]
        past = check.questions.ask(lambda: run_slurm(command))
        seen |= _numbers(past)
    unknown = [one for one in ids if one not in seen]
    return [
        f"slurm.extra.dependency: Slurm knows no job {one}; it would not wait for it. Leave it out if it ended long ago"
        for one in unknown
    ]


def _numbers(text: str | None) -> set[str]:
    return set(re.findall(r"\d+", text or ""))


def _tested(check: _Check) -> list[str]:
    """What `sbatch --test-only` says to options that only Slurm can judge; nothing is submitted."""
    job = check.job
    special = [name for name in _TESTED if job.option(name) is not None]
    if job.request is None or not (special or job.recipe.slurm.constraint) or shutil.which("sbatch") is None:
        return []
    request = job.request
    ran = check.questions.ask(lambda: _test(request))
    if ran is None or ran.returncode == 0 or is_temporary(ran.words):
        return []
    words = ran.words.removeprefix("allocation failure: ")
    named = [f"slurm.extra.{name}={job.option(name)}" for name in special]
    named += [f"slurm.constraint={job.recipe.slurm.constraint}"] if job.recipe.slurm.constraint else []
    if any(sign in words.lower() for sign in _WAITS):
        check.notices.append(f"cluster: the job would wait: {words} ({', '.join(named)})")
        return []
    return [f"{', '.join(named)}: Slurm says {words!r}; sinfo -N lists nodes, scontrol show reservation reservations"]


def _test(request: JobRequest) -> Any:
    # The script is one fixed word: no text of a recipe is run.
    wanted = {key.replace("_", "-"): value for key, value in directives(request).items()}
    options = [
        f"--{key}" if value is True else f"--{key}={value}" for key, value in wanted.items() if key not in _UNTESTED
    ]
    with clean_environment():
        return run_command(["sbatch", "--test-only", *options, "--wrap=true"], timeout_s=20)


def _maintenance(check: _Check, partition: Partition | None) -> None:
    """A notice where a maintenance begins before the job could end: Slurm would hold it back until that is over."""
    job = check.job
    if job.option("reservation") is not None:
        return
    command = ["scontrol", "--oneliner", "show", "reservation"]
    text = check.questions.ask(lambda: run_slurm(command))
    limit_min, now = job.plan.job.time_limit_min, datetime.now()
    for found in records(text or "", "ReservationName"):
        starts, ends = _moment(found.get("StartTime")), _moment(found.get("EndTime"))
        elsewhere = found.get("PartitionName") not in (None, "(null)", partition.name if partition else None)
        if "MAINT" not in found.get("Flags", "") or starts is None or elsewhere or (ends and ends < now):
            continue
        if starts >= now + timedelta(minutes=limit_min):
            continue
        left_min = int((starts - now).total_seconds() // 60)
        shorter = f"; slurm.time={format_minutes(left_min)} or less ends before it" if left_min > 0 else ""
        check.notices.append(
            f"cluster: maintenance {found['ReservationName']} of {found.get('NodeCnt', 'some')} nodes "
            f"({found.get('Nodes', '')}) begins {starts:%Y-%m-%d %H:%M}; a job of {format_minutes(limit_min)} may have "
            f"to wait until {ends:%Y-%m-%d %H:%M}{shorter}"
            if ends
            else f"cluster: maintenance {found['ReservationName']} begins {starts:%Y-%m-%d %H:%M}{shorter}"
        )


def _moment(text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text or "")
    except ValueError:
        return None
