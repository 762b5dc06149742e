"""trial: candidates compared by measurement on the user's own data: made, run rung by rung, and continued.

On this machine the runs follow one another; on a cluster each rung is one job array (trial_array.py), and a small job
that waits for it sends the next. Every run is an ordinary run that pauses at its rung, so whatever interrupts one is
survived as ever; what a rung decides follows from the runs' losses alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, JobFailedError, RecipeError
from launcher.facts.site import Site, site_facts
from launcher.planning.prepare import plan_recipe
from launcher.recipe.load import load_recipe, load_recipe_with_notices
from launcher.recipe.schema import Recipe
from launcher.runs import launching, trial_folder, trial_table
from launcher.runs.folder import RunFolder, write_json
from launcher.runs.lock import hold, renew
from launcher.runs.measured import read_plan
from launcher.runs.request import JobRequest
from launcher.runs.resume import resume
from launcher.runs.sending import Say
from launcher.runs.status import cancel, run_status, runs_folder
from launcher.runs.submission import job_request, submit
from launcher.runs.trial_candidates import Candidate, Planner, Spec
from launcher.runs.trial_ending import halt_if_cancelled
from launcher.runs.trial_folder import Confirms, Task, Trial
from launcher.runs.trial_rungs import most_hours, rung_steps
from launcher.runs.trial_scores import failure_of, reached
from launcher.runs.trial_standing import Standing, stand

_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A trial as it was asked for on a command line."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    specs: tuple[Spec, ...] | None = None
    """None = the usual candidates."""
    seeds: int = 1
    shares: tuple[Fraction, ...]
    parallel: int | None = None
    local: bool = False
    parent: Path | None = None
    """Folder of the runs; None = the recipe's output_dir, or the usual one."""
    settled: tuple[str, ...] = ()
    """Overrides that the user did not write; they win over those that were written."""
    confirms: Confirms | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """Everything that is decided before anything is written."""

    recipe: Recipe
    text: str
    site: Site
    shared: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    notices: tuple[str, ...]
    most_device_hours: float
    most_gpu_hours: float

    @property
    def running(self) -> list[Candidate]:
        """Those that take part."""
        return [each for each in self.candidates if each.rejected is None]


# ---------------------------------------------------------------- before anything is written


def plan(asked: Asked) -> Planned:
    """Plan every candidate and what the trial may cost; nothing is written.

    Raises:
        RecipeError: no held-out rows to compare on, fewer than two candidates, or over the budget.
        ClusterError: more tasks than one array may have.
        LauncherError: what is wrong with recipe, data, model or site.
    """
    shared = (*asked.overrides, *(("slurm.site=local",) if asked.local else ()), *asked.settled)
    loaded = load_recipe_with_notices(asked.recipe, shared)
    recipe = loaded.recipe
    _refuse_without_validation(recipe)
    site = site_facts(recipe.slurm.site)
    seeds = tuple(recipe.train.seed + index for index in range(asked.seeds))
    if len(seeds) > 1 and recipe.data.split_seed is None:
        shared = (*shared, f"data.split_seed={recipe.train.seed}")
    candidates = tuple(Planner(path=asked.recipe, shared=shared).candidates(asked.specs))
    running = [each for each in candidates if each.rejected is None]
    planned = Planned(
        recipe=recipe,
        text=loaded.text,
        site=site,
        shared=shared,
        candidates=candidates,
        seeds=seeds,
        notices=tuple(dict.fromkeys((*loaded.notices, *_notices(candidates, asked)))),
        most_device_hours=most_hours([each.device_hours for each in running], asked.shares, asked.seeds),
        most_gpu_hours=most_hours([each.gpu_hours for each in running], asked.shares, asked.seeds),
    )
    _refuse(planned)
    return planned


def _refuse_without_validation(recipe: Recipe) -> None:
    held = recipe.data.validation
    if held.source is None and not held.count and not held.share:
        raise RecipeError("data.validation: nothing is held out, so candidates cannot be compared; set a share or rows")


def _refuse(planned: Planned) -> None:
    running, limit = planned.running, planned.recipe.budget.max_gpu_hours
    if len(running) < 2:
        left = "; ".join(f"{each.name}: {each.rejected}" for each in planned.candidates if each.rejected)
        raise RecipeError(f"a trial compares at least two candidates; {len(running)} can be planned here. {left}")
    if limit is not None and planned.most_gpu_hours > limit:
        raise RecipeError(
            f"budget.max_gpu_hours: {limit:,.4g}, but the trial may take {planned.most_gpu_hours:,.4g} GPU-hours; "
            "nearest within it: fewer candidates or seeds, fewer steps (train.max_steps=N), or earlier rungs (--rungs)"
        )
    tasks, most = len(running) * len(planned.seeds), planned.site.max_array_size
    if planned.site.executor == "slurm" and most is not None and tasks > most:
        raise ClusterError(
            f"{tasks} runs ({len(running)} candidates, {len(planned.seeds)} seeds) are more than one array of this "
            f"cluster may have (MaxArraySize {most}); name fewer candidates or seeds"
        )


def _notices(candidates: Sequence[Candidate], asked: Asked) -> Iterator[str]:
    steps = {each.steps for each in candidates if each.rejected is None}
    if len(steps) > 1:
        yield (
            "prompt methods cannot be packed: they take more, shorter steps for the same tokens "
            f"({min(steps)} to {max(steps)} steps); the table shows the tokens that were read"
        )
    if asked.seeds == 1:
        yield "one seed: how much a loss varies by chance stays unknown, so no difference can be called real; --seeds 3"
    if any(rung_steps(asked.shares, each)[0] == each for each in steps) and len(asked.shares) > 1:
        yield "the run is so short that the first rung is all of it; candidates are not stopped early"


def plan_to_json(asked: Asked, planned: Planned) -> dict[str, Any]:
    """What a dry run prints."""
    return {
        "schema": trial_folder.SCHEMA,
        "trial": None,
        "rungs": [str(share) for share in asked.shares],
        "seeds": list(planned.seeds),
        "candidates": [each.to_json() for each in planned.candidates],
        "most_device_hours": planned.most_device_hours,
        "most_gpu_hours": planned.most_gpu_hours,
    }


# ---------------------------------------------------------------- making


def create(asked: Asked, planned: Planned) -> Trial:
    """Write the trial down; no run exists yet.

    Raises:
        ClusterError: the folder cannot be written.
    """
    here = planned.recipe.output_dir
    parent = runs_folder(asked.parent) if asked.parent or here == "auto" else Path(here).expanduser()
    try:
        return trial_folder.create(
            parent,
            planned.recipe.name,
            planned.text,
            candidates=planned.candidates,
            shares=asked.shares,
            seeds=planned.seeds,
            executor=planned.site.executor,
            parallel=asked.parallel,
            price=planned.recipe.budget.gpu_hour_price,
            overrides=(*planned.shared, f"output_dir={parent.resolve()}"),
            asked=asked.overrides,
            origin=str(asked.recipe.resolve()),
            working_folder=str(Path.cwd()),
            confirms=asked.confirms,
        )
    except OSError as error:
        raise ClusterError(f"cannot write the trial's folder in {parent}: {error}") from error


def make_runs(trial: Trial, tasks: Sequence[Task], say: Say) -> None:
    """The run folders that these tasks do not have yet.

    Raises:
        LauncherError: a check before the queue refuses one.
    """
    said: set[str] = set()
    for task in tasks:
        if trial.run_of(task) is not None:
            continue
        made = launching.create(plan_recipe(trial.recipe, _overrides(trial, task)))
        for notice in made.notices:
            if notice not in said:
                say(notice)
            said.add(notice)
        trial.folder.record("run", candidate=task.candidate, seed=task.seed, run=made.run.run_id)


def _overrides(trial: Trial, task: Task) -> list[str]:
    recipe = load_recipe_with_notices(trial.recipe, trial.overrides).recipe
    seed = f"-s{task.seed}" if len(trial.seeds) > 1 else ""
    name = f"{recipe.name[:24]}-{task.candidate}"[:58] + seed
    group = [] if recipe.wandb.group else [f"wandb.group={trial.name}"]
    own = trial.candidate(task.candidate).overrides
    return [*trial.overrides, *own, f"train.seed={task.seed}", f"name={name}", *group]


# ---------------------------------------------------------------- going on


def remember(trial: Trial, standing: Standing, *, dry_run: bool = False) -> dict[str, Any]:
    """The trial's table as it is now, stored beside trial.json unless nothing is to be written."""
    document = trial_table.to_json(trial, standing, trial_table.rows(trial, standing))
    if not dry_run:
        write_json(trial.table, document)
    return document


def advance(trial: Trial, say: Say, *, by_hand: bool = True, wait: bool = True) -> Standing:
    """Take a trial as far as it goes now, and say how far that is.

    Here: until it ends. On a cluster: until its next array is sent, with `wait` until it ends. `by_hand`: a person
    asks, so what was ended by hand, runs or the trial itself, is started again.

    Raises:
        ConflictError: somebody else takes this trial on just now.
        JobFailedError: every candidate failed, a run ended and nobody knows whether it should go on, or a person
            has ended the trial.
        LauncherError: what a submission may raise.
    """
    with working_folder(trial), hold(trial.folder, "trial"):
        if by_hand and trial.cancelled:
            trial.folder.record("taken_on")
        if trial.executor == "local":
            return _here(trial, say)
        from launcher.runs.trial_array import advance_on_cluster

        return advance_on_cluster(trial, say, by_hand=by_hand, wait=wait)


def _here(trial: Trial, say: Say) -> Standing:
    """One run after the other, rung by rung."""
    while not (standing := stand(trial)).finished:
        remember(trial, standing)
        halt_if_cancelled(trial)
        task = standing.todo[0]
        make_runs(trial, [task], say)
        run = trial.run_of(task)
        if run is None:
            raise RuntimeError(f"{task} has no run after it was made")
        say(f"rung {standing.rung + 1} of {len(trial.shares)}: {task.candidate}, seed {task.seed}: {run.run_id}")
        _run_here(trial, task, run, standing.rung, say)
    return standing


def _run_here(trial: Trial, task: Task, run: RunFolder, rung: int, say: Say) -> None:
    """Start or go on with a run, wait until it leaves, and note if it cannot go on.

    One that is alive already was left by a launcher that was killed: it is waited for, then taken further.
    """
    set_pause(trial, task, run, rung)
    step, started = trial.steps(task.candidate, rung), False
    try:
        while True:
            halt_if_cancelled(trial)
            status = run_status(run)
            if not status.ended and status.state != "NOT_SUBMITTED":
                renew(trial.folder)
                time.sleep(_POLL_S)
            elif reached(run, step, last=is_last(trial, rung)):
                return
            elif started:
                settle(trial, task, run, rung, status.sentence)
                return
            else:
                _start(run, say)
                started = True
    except KeyboardInterrupt:
        cancel(run)
        say(f"interrupted; go on with: launcher trial {trial.name}")
        raise


def _start(run: RunFolder, say: Say) -> None:
    """The run's first job, or another one."""
    if run.job.exists():
        resume(run, say=say)
    else:
        submit(first_request(run), purpose="trial", say=say)


def first_request(run: RunFolder) -> JobRequest:
    """The job of a run that was made and checked a moment ago and has had none."""
    recipe = load_recipe(run.resolved)
    return job_request(read_plan(run), recipe, run, site_facts(recipe.slurm.site))


def settle(trial: Trial, task: Task, run: RunFolder, rung: int, sentence: str) -> None:
    """A run that left before its rung: its candidate is out, where it is the candidate's fault.

    Raises:
        JobFailedError: it is not, so somebody has to say that it should go on.
    """
    why = failure_of(run)
    if why is None:
        raise JobFailedError(
            f"run {run.run_id} ({task.candidate}, seed {task.seed}) {sentence}",
            f"the trial waits for it: launcher why {run.run_id}; go on with: launcher trial {trial.name}",
        )
    trial.folder.record("out", candidate=task.candidate, rung=rung, why=why)
    if len(trial.out()) == len(trial.running):
        raise JobFailedError("every candidate failed", *(f"{name}: {said}" for name, (_, said) in trial.out().items()))


def set_pause(trial: Trial, task: Task, run: RunFolder, rung: int) -> None:
    """Where the run is to leave next."""
    if is_last(trial, rung):
        run.pause.unlink(missing_ok=True)
    else:
        write_json(run.pause, {"after_step": trial.steps(task.candidate, rung)})


def is_last(trial: Trial, rung: int) -> bool:
    """Whether a rung is the end of the run."""
    return rung == len(trial.shares) - 1


@contextlib.contextmanager
def working_folder(trial: Trial) -> Iterator[None]:
    """Inside it: where the trial was started, so relative paths of its recipe mean the same.

    Raises:
        ClusterError: that folder is gone.
    """
    try:
        with contextlib.chdir(trial.working_folder):
            yield
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if error.filename != trial.working_folder:
            raise
        raise ClusterError(
            f"{trial.working_folder}: the trial was started there, and it cannot be entered now"
        ) from error


__all__ = ["Asked", "Planned", "advance", "create", "make_runs", "plan", "working_folder"]
