"""trial_standing: how far a trial is: which rung, who is still in it, what has to run next. Read, never stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.runs.trial_folder import Task, Trial
from launcher.runs.trial_rungs import survivors
from launcher.runs.trial_scores import Score, reached, score


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """Where a candidate's part in the trial ended, or how far it has come."""

    rung: int
    """The last one that all its runs have reached; -1 = none."""
    status: str
    """finished | stopped (others were better) | failed | running."""
    why: str | None = None
    scores: tuple[Score, ...] = ()
    """One per seed, at that rung."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A trial now."""

    rung: int
    """The one that is being run; the number of rungs when all are done."""
    todo: tuple[Task, ...]
    """Runs that have not reached it, in the order of the list."""
    candidates: Mapping[str, Ended]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to run."""
        return not self.todo


def stand(trial: Trial) -> Standing:
    """Go through the rungs with the losses that the runs have measured, as far as they go."""
    alive = [each.name for each in trial.running]
    told = {name: Ended(rung=-1, status="running") for name in alive}
    out = trial.out()
    for rung in range(len(trial.shares)):
        for name in [name for name in alive if name in out and out[name][0] <= rung]:
            alive.remove(name)
            told[name] = Ended(rung=rung - 1, status="failed", why=out[name][1], scores=told[name].scores)
        todo = [task for task in trial.tasks(alive) if not _reached(trial, task, rung)]
        told |= {
            name: Ended(rung=rung, status="running", scores=_scores(trial, name, rung))
            for name in alive
            if name not in {task.candidate for task in todo}
        }
        if todo:
            return Standing(rung=rung, todo=tuple(todo), candidates=told)
        last = rung == len(trial.shares) - 1
        going = alive if last else survivors({name: _losses(told[name]) for name in alive})
        for name in alive:
            if last or name not in going:
                told[name] = Ended(rung=rung, status="finished" if last else "stopped", scores=told[name].scores)
        alive = going
    return Standing(rung=len(trial.shares), todo=(), candidates=told)


def _reached(trial: Trial, task: Task, rung: int) -> bool:
    run = trial.run_of(task)
    last = rung == len(trial.shares) - 1
    return run is not None and reached(run, trial.steps(task.candidate, rung), last=last)


def _scores(trial: Trial, name: str, rung: int) -> tuple[Score, ...]:
    runs = [trial.run_of(task) for task in trial.tasks([name])]
    return tuple(score(run, trial.steps(name, rung)) for run in runs if run is not None)


def _losses(ended: Ended) -> list[float]:
    """Of each seed. A loss that is not a number is worse than any: such a candidate never goes on before another."""
    return [float("inf") if each.validation_loss is None else each.validation_loss for each in ended.scores]
