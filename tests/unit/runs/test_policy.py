"""What follows an attempt: the table of causes, and the bounds that end a run which would start for ever."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.runs.diagnosis import Cause, Diagnosis
from launcher.runs.policy import FOLLOW_UP, Action, Decision, History, Limits, decide
from launcher.runs.symptoms import AGAIN
from tests.unit.runs.test_diagnosis import JSON

NOW_S = 100_000.0
Events = list[dict[str, Any]]


def found(cause: Cause, host: str | None = None) -> Diagnosis:
    """A diagnosis of that cause."""
    return Diagnosis(cause=cause, sentence="x", host=host)


def lived(*steps: int, cause: Cause = Cause.CRASHED, host: str | None = None, hours_ago: float = 0.0) -> Events:
    """A ledger of attempts that ended with the newest checkpoint of these steps and were started again."""
    events: Events = [{"event": "submitted", "job_id": "5"}]
    for number, step in enumerate(steps):
        name = f"5.{number}"
        events += [
            {"event": "started", "attempt": name},
            {"event": "decided", "attempt": name, "action": "requeue", "cause": cause.value, "step": step,
             "culprit": host, "time_s": NOW_S - 3600 * hours_ago},
        ]  # fmt: skip
    return events


def after(
    events: Events, cause: Cause, *, step: int = 0, host: str | None = None, limits: Limits | None = None
) -> Decision:
    """The decision about the next attempt of such a ledger, which ends with a checkpoint of `step`."""
    name = f"5.{sum(event['event'] == 'started' for event in events)}"
    events = [*events, {"event": "started", "attempt": name}]
    diagnosis = found(cause, host)
    history = History.of(events).deciding(name, diagnosis, ended_at=step, now_s=NOW_S)
    return decide(diagnosis, history, limits or Limits(nodes=2), now_s=NOW_S)


@pytest.mark.parametrize(
    ("cause", "action"),
    [
        (Cause.FINISHED, Action.FINISH),
        (Cause.PREEMPTED, Action.WAIT),
        (Cause.OPERATOR_REQUEUE, Action.WAIT),
        *((cause, Action.REQUEUE) for cause in sorted(AGAIN - {Cause.PREEMPTED, Cause.OPERATOR_REQUEUE})),
        *((cause, Action.STOP) for cause in sorted(set(Cause) - AGAIN - {Cause.FINISHED, Cause.GPU_OUT_OF_MEMORY})),
    ],
)
def test_the_table(cause: Cause, action: Action) -> None:
    """What lies in the cluster is tried again; what lies in data, model, recipe or program is not."""
    assert after(lived(), cause, step=10).action == action


def test_nothing_comes_back_where_the_recipe_says_so() -> None:
    """`slurm.requeue: false` ends every cause but a finished run."""
    limits = Limits(requeue=False)
    decisions = {cause: after(lived(), cause, step=10, limits=limits).action for cause in Cause}
    assert set(decisions.values()) == {Action.STOP, Action.FINISH}
    assert decisions[Cause.FINISHED] is Action.FINISH


def test_the_restart_budget_counts_preemptions_and_time_limits() -> None:
    """Two starts after the first are allowed, so the third interruption is the last; the bound is named."""
    limits = Limits(max_restarts=2)
    events = lived(10, 20, cause=Cause.PREEMPTED)
    assert after(lived(10), Cause.TIME_LIMIT, step=20, limits=limits).again
    ended = after(events, Cause.TIME_LIMIT, step=30, limits=limits)
    assert (ended.action, ended.reason) == (Action.STOP, "restart budget used: 2 of 2 (slurm.max_restarts)")


def test_a_crash_loop_ends() -> None:
    """Three failures in a row without a newer checkpoint end the run, far below the budget."""
    assert after(lived(10, 10), Cause.CRASHED, step=20).again
    ended = after(lived(10, 10, 10), Cause.CRASHED, step=10)
    assert ended.action is Action.STOP
    assert ended.reason.startswith("crash loop: 3 attempts in a row ended without a newer checkpoint")


def test_preemptions_are_no_crash_loop() -> None:
    """Three short preemptions in a row are the cluster's business, not the run's failure."""
    assert after(lived(0, 0, 0, cause=Cause.PREEMPTED), Cause.PREEMPTED).action is Action.WAIT


def test_a_resume_by_hand_starts_the_counts_afresh() -> None:
    """A person who resumes a run has looked at it; a follow-up job of our own has not."""
    resumed = [*lived(10, 10, 10), {"event": "submitted", "job_id": "6", "purpose": "resume"}]
    assert after(resumed, Cause.CRASHED, step=10).again
    followed = [*lived(10, 10, 10), {"event": "submitted", "job_id": "6", "purpose": FOLLOW_UP}]
    assert not after(followed, Cause.CRASHED, step=10).again


# ---------------------------------------------------------------- nodes


def test_a_node_is_left_out_after_two_strikes() -> None:
    """The second failure on the same node asks for a job without it."""
    first = after(lived(), Cause.HUNG, step=10, host="node3")
    second = after(lived(10, cause=Cause.CRASHED, host="node3"), Cause.HUNG, step=20, host="node3")
    assert (first.action, first.changes.exclude) == (Action.REQUEUE, ())
    assert (second.action, second.changes.exclude) == (Action.FOLLOW_UP, ("node3",))
    assert "without node3" in second.reason


def test_strikes_are_forgotten_and_survive_a_resume_by_hand() -> None:
    """A repaired node comes back after a day; a resume does not make a broken one whole."""
    old = lived(10, cause=Cause.CRASHED, host="node3", hours_ago=25)
    assert not after(old, Cause.HUNG, step=20, host="node3").changes.exclude
    resumed = [*lived(10, host="node3"), {"event": "submitted", "job_id": "6", "purpose": "resume"}]
    assert after(resumed, Cause.HUNG, step=20, host="node3").changes.exclude == ("node3",)


def test_never_so_many_that_the_job_could_not_start() -> None:
    """With as many nodes as are needed the bad one stays in, and the reason says so."""
    events = lived(10, host="node3")
    decision = after(events, Cause.HUNG, step=20, host="node3", limits=Limits(nodes=4, nodes_there=4))
    assert decision.action is Action.REQUEUE
    assert "node3 failed as often but cannot be left out: only 3 nodes would remain of the 4" in decision.reason


def test_a_failure_of_the_run_is_no_strike() -> None:
    """A node is not to blame for the data, for full memory or for another rank's death."""
    for cause in (Cause.DATA_ERROR, Cause.GPU_OUT_OF_MEMORY, Cause.PEER_LOST):
        assert not after(lived(10, cause=cause, host="node3"), Cause.HUNG, step=20, host="node3").changes.exclude


# ---------------------------------------------------------------- memory


def test_a_full_gpu_gets_a_smaller_micro_batch_down_to_one() -> None:
    """Halved with the same global batch (6 x 2 -> 3 x 4 -> 1 x 12), then the run stops."""
    sizes = []
    micro, accumulation = 6, 2
    while True:
        limits = Limits(micro_batch=micro, accumulation=accumulation)
        decision = after(lived(), Cause.GPU_OUT_OF_MEMORY, limits=limits)
        if not decision.again:
            break
        size = decision.changes.micro_batch
        assert size is not None
        micro, accumulation = size, micro * accumulation // size
        sizes.append((micro, accumulation))
    assert sizes == [(3, 4), (1, 12)]
    assert decision.reason == "out of GPU memory with the smallest micro-batch (1)"


def test_a_full_gpu_may_end_the_run() -> None:
    """`survival.on_out_of_memory: stop`."""
    limits = Limits(smaller_micro_batch=False, micro_batch=4)
    assert after(lived(), Cause.GPU_OUT_OF_MEMORY, limits=limits).action is Action.STOP


# ---------------------------------------------------------------- properties


@given(
    causes=st.lists(st.sampled_from(sorted(set(Cause) - {Cause.OPERATOR_REQUEUE})), min_size=1, max_size=30),
    saved=st.lists(st.booleans(), min_size=30, max_size=30),
    budget=st.integers(0, 12),
    micro=st.integers(1, 64),
)
@settings(max_examples=200, deadline=None)
def test_never_more_restarts_than_the_budget(causes: list[Cause], saved: list[bool], budget: int, micro: int) -> None:
    """Whatever happens to a run, it is started at most once and `max_restarts` times."""
    events: Events = [{"event": "submitted", "job_id": "5"}]
    starts = step = 0
    while True:
        name = f"5.{starts}"
        starts += 1
        cause = causes[(starts - 1) % len(causes)]
        if cause is not Cause.LAUNCH_FAILED:  # then no rank ever wrote that it began
            events.append({"event": "started", "attempt": name})
        step += saved[(starts - 1) % 30]
        history = History.of(events).deciding(name, found(cause), ended_at=step, now_s=NOW_S)
        decision = decide(found(cause), history, Limits(max_restarts=budget, micro_batch=micro), now_s=NOW_S)
        facts = {"action": decision.action.value, "cause": cause.value, "step": step}
        events.append({"event": "decided", "attempt": name, "time_s": NOW_S, **facts})
        if not decision.again:
            break
        micro = decision.changes.micro_batch or micro
    assert starts <= budget + 1


@given(
    events=st.lists(
        st.dictionaries(
            st.sampled_from(["event", "attempt", "action", "cause", "step", "culprit", "time_s", "purpose", "job_id"]),
            JSON | st.sampled_from(["submitted", "started", "decided", "resumed", "saved", "5.0", "requeue", "hung"]),
        ),
        max_size=12,
    ),
    cause=st.sampled_from(sorted(Cause)),
    nodes_there=st.none() | st.integers(0, 9),
    budget=st.integers(-1, 9),
)
@settings(max_examples=300, deadline=None)
def test_decide_is_total(events: Events, cause: Cause, nodes_there: int | None, budget: int) -> None:
    """For any ledger, damaged or not, there is a decision with a reason, and never a second try for a user's error."""
    diagnosis = found(cause, "node1")
    limits = Limits(nodes_there=nodes_there, nodes=2, micro_batch=4, max_restarts=budget)
    history = History.of(events)
    for one in (history, history.deciding("5.0", diagnosis, ended_at=0, now_s=NOW_S)):
        decision = decide(diagnosis, one, limits)
        assert decision.reason
        if cause in (Cause.DATA_ERROR, Cause.MODEL_ERROR, Cause.RECIPE_ERROR, Cause.NAN_LOSS, Cause.CANCELLED):
            assert decision.action is Action.STOP
        if nodes_there is not None:
            assert nodes_there - len(decision.changes.exclude) >= min(limits.nodes, nodes_there)
