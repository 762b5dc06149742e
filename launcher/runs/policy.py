"""policy: what happens after an attempt: again, elsewhere, smaller, or not at all. Pure functions of the ledger.

Four bounds, each of which ends a run that would otherwise start for ever:

    slurm.max_restarts                    starts after the first, whatever ended the others; preemptions count too
    survival.attempts_without_progress    failed attempts in a row that left no newer checkpoint
    survival.node_strikes                 failures on a node before it is left out; forgotten after strike_hours
    micro-batch 1                         the smallest answer to a full GPU

A user who resumes a run by hand starts all counts afresh.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from launcher.recipe.schema import Recipe
from launcher.runs.diagnosis import Diagnosis
from launcher.runs.remains import number, seconds, text
from launcher.runs.remedies import smaller_micro_batch
from launcher.runs.symptoms import OF_THE_NODE, Cause

FOLLOW_UP = "follow-up"
"""`purpose` of a `submitted` line that this policy caused; every other purpose is a person's doing."""


class Action(StrEnum):
    """What happens next."""

    FINISH = "finish"
    """Nothing: the result is there."""
    STOP = "stop"
    """Nothing, until a person resumes the run."""
    WAIT = "wait"
    """Slurm brings the job back by itself."""
    REQUEUE = "requeue"
    """The same job again."""
    FOLLOW_UP = "follow_up"
    """A new job of the same run, after this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What the next attempt does differently."""

    exclude: tuple[str, ...] = ()
    """Nodes the next job must not get."""
    micro_batch: int | None = None

    def to_json(self) -> dict[str, Any]:
        """What is not as before."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items() if value
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What happens after an attempt, and why."""

    action: Action
    reason: str
    changes: Changes = field(default_factory=Changes)

    @property
    def again(self) -> bool:
        """Whether another attempt follows without anybody's doing."""
        return self.action in (Action.WAIT, Action.REQUEUE, Action.FOLLOW_UP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the recipe and the cluster allow."""

    requeue: bool = True
    max_restarts: int = 10
    attempts_without_progress: int = 3
    node_strikes: int = 2
    strike_s: float = 24 * 3600.0
    smaller_micro_batch: bool = True
    micro_batch: int = 1
    accumulation: int = 1
    nodes: int = 1
    """Nodes an attempt needs."""
    nodes_there: int | None = None
    """Nodes of the partition that are up; None where that is not known."""
    other_nodes: bool = True
    """Whether the job could get another node at all: not on this machine alone."""

    @classmethod
    def of(
        cls, recipe: Recipe, *, accumulation: int = 1, nodes_there: int | None = None, local: bool = False
    ) -> Limits:
        """From a resolved recipe; what is still `auto` in it counts as one."""
        micro, nodes = recipe.train.per_device_train_batch_size, recipe.slurm.nodes
        fewest = recipe.survival.min_nodes or (nodes if isinstance(nodes, int) else 1)
        return cls(
            requeue=recipe.slurm.requeue,
            max_restarts=recipe.slurm.max_restarts,
            attempts_without_progress=recipe.survival.attempts_without_progress,
            node_strikes=recipe.survival.node_strikes,
            strike_s=recipe.survival.strike_hours * 3600.0,
            smaller_micro_batch=recipe.survival.on_out_of_memory == "smaller_micro_batch",
            micro_batch=micro if isinstance(micro, int) else 1,
            accumulation=accumulation,
            nodes=min(fewest, nodes) if isinstance(nodes, int) else fewest,
            nodes_there=nodes_there,
            other_nodes=not local,
        )


# ---------------------------------------------------------------- history


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """One attempt since the user last started the run."""

    name: str
    cause: Cause | None = None
    """None: nobody has decided about it (yet)."""
    action: str | None = None
    host: str | None = None
    """Where it went wrong."""
    time_s: float = 0.0
    """When that was decided."""
    began_at: int = 0
    """Step of the checkpoint it began with."""
    ended_at: int = 0
    """Step of the newest checkpoint when it ended."""

    @property
    def progressed(self) -> bool:
        """Whether it left a newer checkpoint than it began with."""
        return self.ended_at > self.began_at

    @property
    def failed(self) -> bool:
        """Whether it counts towards a crash loop: ended neither by other jobs nor by people."""
        return self.cause not in _NOBODYS_FAULT


_NOBODYS_FAULT = frozenset({Cause.PREEMPTED, Cause.OPERATOR_REQUEUE, Cause.FINISHED, Cause.STOPPED, Cause.CANCELLED})


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The attempts of a run that count, oldest first. The last one is the one to decide about."""

    attempts: tuple[Past, ...] = ()
    strikes: tuple[tuple[str, float], ...] = ()
    """Node and time of every failure that counts against a node, also of before a resume by hand."""

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> History:
        """Read the ledger; lines that are damaged or unknown are passed over."""
        read = _Reader()
        for event in events:
            if isinstance(event, Mapping):
                read.take(event)
        return read.history()

    @property
    def restarts(self) -> int:
        """How often the run was started again without a person, or is about to be."""
        granted = sum(1 for past in self.attempts if past.action in _AGAIN)
        return max(len(self.attempts) - 1, granted)

    def without_progress(self) -> int:
        """Failed attempts in a row, up to the last one, that left no newer checkpoint."""
        count = 0
        for past in self.attempts[::-1]:
            if past.progressed:
                break
            count += past.failed
        return count

    def struck(self, limits: Limits, now_s: float) -> list[str]:
        """Nodes with enough strikes that are not forgotten, worst first."""
        recent = Counter(host for host, time_s in self.strikes if now_s - time_s <= limits.strike_s)
        return [host for host, count in recent.most_common() if count >= max(1, limits.node_strikes)]

    def deciding(self, name: str, diagnosis: Diagnosis, *, ended_at: int, now_s: float) -> History:
        """The history with the attempt that is decided about, and its failure, as if they were written down."""
        known = next((past for past in self.attempts if past.name == name), Past(name=name, began_at=0))
        last = replace(known, cause=diagnosis.cause, host=diagnosis.host, ended_at=max(ended_at, known.ended_at))
        others = tuple(past for past in self.attempts if past.name != name)
        strike = ((diagnosis.host, now_s),) if diagnosis.host and diagnosis.cause in OF_THE_NODE else ()
        return History(attempts=(*others, last), strikes=(*self.strikes, *strike))


_AGAIN = frozenset({"wait", "requeue", "follow_up"})


class _Reader:
    """Builds a History line by line."""

    def __init__(self) -> None:
        self._attempts: dict[str, Past] = {}
        self._strikes: list[tuple[str, float]] = []
        self._current: str | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if kind == "submitted":
            self._current = None
            if event.get("purpose") != FOLLOW_UP:
                self._attempts.clear()
            return
        name = text(event.get("attempt")) or (self._current if kind in ("saved", "stopped", "resumed") else None)
        if name is None:
            return
        past = self._attempts.get(name, Past(name=name, began_at=self._newest(), ended_at=self._newest()))
        if kind == "started":
            self._current = name
        step = number(event.get("step")) or 0
        if kind == "resumed":
            past = replace(past, began_at=step, ended_at=max(step, past.ended_at if past.ended_at > step else step))
        elif kind in ("saved", "stopped", "completed"):
            past = replace(past, ended_at=max(past.ended_at, step))
        elif kind == "decided":
            past = self._decided(past, event, step)
        if kind in ("started", "resumed", "saved", "stopped", "completed", "decided", "joined"):
            self._attempts[name] = past

    def _newest(self) -> int:
        """Where the next attempt will begin, as far as it is known."""
        return max((past.ended_at for past in self._attempts.values()), default=0)

    def _decided(self, past: Past, event: Mapping[str, Any], step: int) -> Past:
        cause, host, time_s = _cause(event.get("cause")), text(event.get("culprit")), seconds(event.get("time_s"))
        if host and cause in OF_THE_NODE:
            self._strikes.append((host, time_s))
        return replace(
            past,
            cause=cause,
            action=text(event.get("action")),
            host=host,
            time_s=time_s,
            ended_at=max(past.ended_at, step),
        )

    def history(self) -> History:
        return History(attempts=tuple(self._attempts.values()), strikes=tuple(self._strikes))


def _cause(value: Any) -> Cause:
    try:
        return Cause(value)
    except ValueError:
        return Cause.UNKNOWN


# ---------------------------------------------------------------- decision


def decide(diagnosis: Diagnosis, history: History, limits: Limits, *, now_s: float | None = None) -> Decision:
    """What happens after an attempt. `history` ends with that attempt (see `History.deciding`).

    `wait` only for what Slurm itself brings back; whether it really will is for the caller to find out.
    """
    cause = diagnosis.cause
    if cause is Cause.FINISHED:
        return Decision(action=Action.FINISH, reason="the result is there")
    if not limits.requeue:
        return _stop("slurm.requeue is false: nothing starts again by itself")
    if cause is Cause.GPU_OUT_OF_MEMORY:
        return _smaller(history, limits)
    if not diagnosis.retry:
        return _stop(_WHY_NOT.get(cause, "starting again would end the same way"))
    if cause is Cause.OPERATOR_REQUEUE:
        return Decision(action=Action.WAIT, reason="the job is in the queue again already")
    spent = _spent(history, limits)
    if spent is not None:
        return _stop(spent)
    if cause is Cause.PREEMPTED:
        return Decision(action=Action.WAIT, reason="Slurm puts a preempted job back into the queue")
    exclude, remark = left_out(history, limits, math.inf if now_s is None else now_s)
    budget = f"restart {history.restarts + 1} of {limits.max_restarts}"
    action = Action.FOLLOW_UP if exclude else Action.REQUEUE
    return Decision(action=action, reason=f"{_WHY[cause]}; {budget}{remark}", changes=Changes(exclude=tuple(exclude)))


_WHY = {
    Cause.TIME_LIMIT: "the time limit came before the end of the run",
    Cause.NODE_LOST: "another node will do",
    Cause.RANK_KILLED: "something outside ended a rank",
    Cause.RANK_EXITED: "a rank left early",
    Cause.CRASHED: "a crash may not come again",
    Cause.HUNG: "a hang may not come again",
    Cause.PEER_LOST: "the ranks lost each other",
    Cause.RENDEZVOUS: "the ranks may find each other next time",
    Cause.BAD_NODE: "the trouble is the node's",
    Cause.LAUNCH_FAILED: "the ranks may start next time",
    Cause.UNKNOWN: "nothing says that it would end the same way",
}
_WHY_NOT = {
    Cause.STOPPED: "somebody asked it to stop",
    Cause.CANCELLED: "it was cancelled",
    Cause.HOST_OUT_OF_MEMORY: "the same memory would not suffice next time",
    Cause.DISK_FULL: "the disk would still be full",
    Cause.NAN_LOSS: "the same numbers would come again; the last finite checkpoint is kept",
    Cause.DATA_ERROR: "the data have to be corrected first",
    Cause.MODEL_ERROR: "the model folder has to be corrected first",
    Cause.RECIPE_ERROR: "the recipe, or what the job was given, has to be corrected first",
    Cause.OUR_BUG: "an error in the program comes again",
    Cause.DAMAGED_CHECKPOINTS: "no checkpoint is whole, and starting over is for a person to decide",
    Cause.SUPERSEDED: "a newer attempt is at work",
    Cause.NEVER_STARTED: "the job never ran",
}


def _stop(reason: str) -> Decision:
    return Decision(action=Action.STOP, reason=reason)


def _spent(history: History, limits: Limits) -> str | None:
    """Which bound is reached, in words; None while another start is allowed."""
    if history.restarts >= limits.max_restarts:
        used = f"{min(history.restarts, limits.max_restarts)} of {limits.max_restarts}"
        return f"restart budget used: {used} (slurm.max_restarts)"
    fruitless = history.without_progress()
    if fruitless >= limits.attempts_without_progress:
        bound = "survival.attempts_without_progress"
        return f"crash loop: {fruitless} attempts in a row ended without a newer checkpoint ({bound})"
    return None


def _smaller(history: History, limits: Limits) -> Decision:
    """The same global batch in smaller pieces. Each step halves, so the crash-loop bound does not count here."""
    if not limits.smaller_micro_batch:
        return _stop("survival.on_out_of_memory is stop")
    if history.restarts >= limits.max_restarts:
        return _stop(_spent(history, limits) or "restart budget used")
    size = smaller_micro_batch(limits.micro_batch, limits.accumulation)
    if size is None:
        return _stop(f"out of GPU memory with the smallest micro-batch ({limits.micro_batch})")
    reason = (
        f"micro-batch {limits.micro_batch} -> {size} with the same global batch; "
        f"restart {history.restarts + 1} of {limits.max_restarts}"
    )
    return Decision(action=Action.REQUEUE, reason=reason, changes=Changes(micro_batch=size))


def left_out(history: History, limits: Limits, now_s: float) -> tuple[list[str], str]:
    """Nodes to leave out, never so many that the job could not start; and a remark where that kept some in."""
    if now_s is math.inf:
        now_s = max((time_s for _, time_s in history.strikes), default=0.0)
    struck = history.struck(limits, now_s) if limits.other_nodes else []
    if not struck:
        return [], ""
    spare = len(struck) if limits.nodes_there is None else max(0, limits.nodes_there - limits.nodes)
    out, kept = struck[:spare], struck[spare:]
    said = f"; without {', '.join(out)} (failed {limits.node_strikes} times or more)" if out else ""
    if kept:
        left = (limits.nodes_there or 0) - len(struck)
        said += (
            f"; {', '.join(kept)} failed as often but cannot be left out: only {max(0, left)} nodes would remain of "
            f"the {limits.nodes} that are needed"
        )
    return out, said
