"""resume: a new job for an old run, from its newest checkpoint, on the same or on other ranks.

The run goes on with what its folder holds: recipe.resolved.yaml and plan.json, not the user's files of today. Nothing
is submitted while a job of the run may live, and only one launcher at a time gets as far as asking.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, ConflictError, LauncherError
from launcher.facts.dataset import dataset_facts
from launcher.facts.model import model_shape
from launcher.facts.site import Site, site_facts
from launcher.planning.elastic import with_elastic
from launcher.planning.plan import Plan, plan_from_json
from launcher.planning.replan import refuse_ragged, replan
from launcher.planning.search import resolve
from launcher.recipe.load import load_recipe, recipe_from_text
from launcher.recipe.schema import Recipe
from launcher.runs.adoption import SETTLES_S, open_submission
from launcher.runs.aftermath import close_last
from launcher.runs.changes import Change, changes, refuse_other_training
from launcher.runs.drift import drift
from launcher.runs.folder import RunFolder
from launcher.runs.kept import Kept, kept_checkpoints
from launcher.runs.living import refuse_living
from launcher.runs.lock import hold
from launcher.runs.plan_files import archive, restore, write_plan
from launcher.runs.policy import History, Limits, left_out
from launcher.runs.preflight import check
from launcher.runs.request import JobRequest
from launcher.runs.requeue import nodes_there, without_nodes
from launcher.runs.sending import MaybeSubmittedError, Say, silent
from launcher.runs.state import read_evidence
from launcher.runs.status import run_status
from launcher.runs.submission import job_request, python_of, submit_held

_POLL_S = 2.0
_MICRO_BATCH = "train.per_device_train_batch_size"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """There is nothing to resume."""

    run: RunFolder
    step: int | None

    @property
    def sentence(self) -> str:
        """What a person is told."""
        return f"already complete{f' at step {self.step}' if self.step else ''}; nothing to resume"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """What goes on, or would."""

    run: RunFolder
    request: JobRequest
    notices: tuple[str, ...]
    step: int
    """Of the checkpoint it goes on from; 0 = from the beginning."""
    from_world: int
    to_world: int
    """Ranks of the plan before and now."""
    job_id: str | None = None
    """None in a dry run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """Everything that is decided before anything is written."""

    recipe: Recipe
    plan: Plan
    before: Plan
    changed: tuple[Change, ...]
    resumed: Resumed


def resume(
    run: RunFolder, overrides: Sequence[str] = (), *, dry_run: bool = False, say: Say = silent
) -> Resumed | Finished:
    """Submit another job for a run that has stopped, or say what would be submitted.

    Raises:
        ConflictError: a job of the run lives, somebody else resumes it, an override would change the training, no
            checkpoint is whole, or data files changed.
        TemporaryError: Slurm does not answer, so whether a job lives cannot be told.
        RecipeError, DoesNotFitError, ClusterError: the new shape cannot be planned or asked for.
    """
    if (finished := _finished(run)) is not None:
        return finished
    if dry_run:
        refuse_living(run)
        return _prepare(run, overrides).resumed
    with hold(run, "resume"):
        _settle(run, say)
        if (finished := _finished(run)) is not None:
            return finished
        refuse_living(run)
        prepared = _prepare(run, overrides)
        close_last(run)
        job_id = _send(run, prepared, say)
    return replace(prepared.resumed, job_id=job_id)


def _finished(run: RunFolder) -> Finished | None:
    result = read_evidence(run).result
    return None if result is None else Finished(run=run, step=result.get("step"))


def _settle(run: RunFolder, say: Say) -> None:
    """A submission that nobody answered: wait until a job of it would be in the queue, and take it over if it is."""
    waited = False
    while (line := open_submission(read_evidence(run).events)) is not None:
        left_s = SETTLES_S - (time.time() - float(line.get("time_s", 0)))
        run_status(run, locked=True)  # takes over a job that is there
        if left_s <= 0 or open_submission(read_evidence(run).events) is None:
            return
        if not waited:
            say(f"an earlier submission of this run was never answered; looking for its job for {left_s:.0f} s")
            waited = True
        time.sleep(min(_POLL_S, left_s))


# ---------------------------------------------------------------- deciding


def _prepare(run: RunFolder, overrides: Sequence[str]) -> _Prepared:
    """Decide everything; nothing is written."""
    before = plan_from_json(json.loads(run.plan.read_text(encoding="utf-8")))
    with _working_folder(run):
        saved = load_recipe(run.resolved)
        recipe = _asked(run, saved, overrides)
        changed = changes(saved, recipe)
        refuse_other_training(changed, run.run_id)
        site = _site(recipe, before, changed)
        recipe, plan = _plan(recipe, before, changed, site)
        step, notices = _start(run)
        notices += drift(run, python_of(site))
        notices += check(recipe, plan, site, run.path.parent, kept=len(kept_checkpoints(run)))
        request, remark = _without_bad_nodes(run, plan, recipe, job_request(plan, recipe, run, site))
        notices += remark
    worlds = before.chosen.candidate.world_size, plan.chosen.candidate.world_size
    if plan != before:
        notices += [warning.message for warning in plan.warnings if warning not in before.warnings]
    if _shape(plan) != _shape(before):
        notices.append(_shape_words(before, plan))
    resumed = Resumed(
        run=run, request=request, notices=tuple(notices), step=step, from_world=worlds[0], to_world=worlds[1]
    )
    return _Prepared(recipe=recipe, plan=plan, before=before, changed=tuple(changed), resumed=resumed)


def _asked(run: RunFolder, saved: Recipe, overrides: Sequence[str]) -> Recipe:
    """The run's recipe with the overrides; its micro-batch stays where it divides the batch on the ranks asked for.

    Raises:
        RecipeError: an override is wrong, or the ranks do not divide the global batch.
    """
    text, written = run.resolved.read_text(encoding="utf-8"), {override.partition("=")[0] for override in overrides}
    batch, slurm = saved.train.global_batch_size, saved.slurm
    ranks = [
        _number(overrides, "slurm.nodes", slurm.nodes),
        _number(overrides, "slurm.gpus_per_node", slurm.gpus_per_node),
    ]
    if all(ranks):
        refuse_ragged(batch, ranks[0], ranks[1], most_nodes=2 * ranks[0])
    if _MICRO_BATCH in written:
        return recipe_from_text(text, str(run.resolved), overrides).recipe
    recipe = recipe_from_text(text, str(run.resolved), [f"{_MICRO_BATCH}=auto", *overrides]).recipe
    micro = saved.train.per_device_train_batch_size
    world = ranks[0] * ranks[1]
    if isinstance(micro, int) and world and batch % (micro * world) == 0:
        recipe = replace(recipe, train=replace(recipe.train, per_device_train_batch_size=micro))
    return recipe


def _number(overrides: Sequence[str], key: str, otherwise: int | str) -> int:
    """The last number asked for; 0 where it is left to the planner or is no number."""
    for override in overrides[::-1]:
        name, _, value = override.partition("=")
        if name == key:
            return int(value) if value.isdecimal() else 0
    return otherwise if isinstance(otherwise, int) else 0


def _plan(recipe: Recipe, before: Plan, changed: Sequence[Change], site: Site) -> tuple[Recipe, Plan]:
    """The plan as it was, with the job's own numbers as asked; a new one where the ranks change."""
    if any(change.replans for change in changed):
        local = Path(recipe.model.name_or_path)
        data = dataset_facts(recipe.data, local if local.is_dir() else None)
        model = model_shape(recipe.model)
        asked, plan = replan(_with_possible_minimum(recipe), before, model, data, site)
        return resolve(asked, plan), with_elastic(asked, plan, model, data, site)
    slurm, job = recipe.slurm, before.job
    minutes = slurm.time if isinstance(slurm.time, int) else job.time_limit_min
    return recipe, replace(before, job=replace(job, time_limit_min=minutes, mem=slurm.mem))


def _with_possible_minimum(recipe: Recipe) -> Recipe:
    """Asked for fewer nodes than the fewest it was allowed: these are the fewest now."""
    fewest, nodes = recipe.survival.min_nodes, recipe.slurm.nodes
    if fewest is None or not isinstance(nodes, int) or fewest <= nodes:
        return recipe
    return replace(recipe, survival=replace(recipe.survival, min_nodes=None))


def _site(recipe: Recipe, before: Plan, changed: Sequence[Change]) -> Site:
    site = site_facts(recipe.slurm.site)
    if site.name != before.site and not any(change.key == "slurm.site" for change in changed):
        raise ClusterError(
            f"the run was planned for site {before.site}, and this is {site.name}; go there, or write "
            f"slurm.site={site.name} to move the run"
        )
    return site


def _start(run: RunFolder) -> tuple[int, list[str]]:
    """The step the job will go on from, and what is to be said about it.

    Raises:
        ConflictError: there are checkpoints, and none looks whole: training from step 0 would hide that.
    """
    kept = kept_checkpoints(run)
    whole = next((each for each in kept if each.damage is None), None)
    damaged = [each for each in kept if each.damage is not None]
    if kept and whole is None:
        raise ConflictError(
            f"{run.checkpoints} holds {len(kept)} checkpoints and none is whole; move them away to start again "
            "from step 0",
            *(f"{each.path.name}: {each.damage}" for each in damaged),
        )
    step = whole.step if whole else 0
    return step, [_loss_words(each, step) for each in damaged if each.step > step]


def _without_bad_nodes(run: RunFolder, plan: Plan, recipe: Recipe, request: JobRequest) -> tuple[JobRequest, list[str]]:
    """The request without the nodes on which the run failed too often lately, as after a failure of its own."""
    limits = replace(Limits.of(recipe, local=request.cluster == "local"), nodes=plan.chosen.candidate.nodes)
    history, now_s = History.of(read_evidence(run).events), time.time()
    if not history.struck(limits, now_s):
        return request, []
    out, remark = left_out(history, replace(limits, nodes_there=nodes_there(request.partition)), now_s)
    return without_nodes(request, out), [f"the job goes on{remark.removeprefix(';').replace(';', ',')}"]


def _loss_words(damaged: Kept, step: int) -> str:
    return f"{damaged.path.name} is damaged ({damaged.damage}); {damaged.step - step} steps are done again"


@contextlib.contextmanager
def _working_folder(run: RunFolder) -> Iterator[None]:
    """Be where the run was submitted from, so that relative paths mean the same.

    Raises:
        ClusterError: that folder is gone.
    """
    here = _submitted_from(run)
    if here is None:
        yield
        return
    try:
        with contextlib.chdir(here):
            yield
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if error.filename != here:
            raise
        raise ClusterError(f"{here}: the run was submitted from there, and it cannot be entered now") from error


def _submitted_from(run: RunFolder) -> str | None:
    job: dict[str, Any] = dict(read_evidence(run).job)
    chdir = job.get("request", {}).get("chdir")
    if chdir is None and run.environment.exists():
        chdir = json.loads(run.environment.read_text(encoding="utf-8")).get("working_folder")
    return None if chdir is None else str(chdir)


def _shape(plan: Plan) -> tuple[Any, ...]:
    candidate = plan.chosen.candidate
    return (candidate.nodes, candidate.gpus_per_node, candidate.micro_batch, candidate.zero_stage)


def _shape_words(before: Plan, after: Plan) -> str:
    old, new = before.chosen.candidate, after.chosen.candidate
    stage = f", ZeRO-{old.zero_stage} to {new.zero_stage}" if old.zero_stage != new.zero_stage else ""
    return (
        f"goes on with {new.nodes} x {new.gpus_per_node} ranks instead of {old.nodes} x {old.gpus_per_node}, "
        f"{new.gradient_accumulation} x {new.micro_batch} sequences each instead of {old.gradient_accumulation} x "
        f"{old.micro_batch}{stage}; the global batch of {new.global_batch} and the order of rows stay, sums are "
        "rounded in another order"
    )


# ---------------------------------------------------------------- sending


def _send(run: RunFolder, prepared: _Prepared, say: Say) -> str:
    """Write the new plan beside the old one and submit; when nothing could be sent all is as it was."""
    resumed = prepared.resumed
    if prepared.plan == prepared.before and not prepared.changed:
        return submit_held(resumed.request, purpose="resume", say=say)
    number = archive(run)
    try:
        write_plan(run, prepared.recipe, prepared.plan)
        job_id = submit_held(resumed.request, purpose="resume", say=say)
    except MaybeSubmittedError:
        raise
    except (LauncherError, OSError):
        restore(run, number)
        raise
    if _shape(prepared.plan) != _shape(prepared.before):
        old = prepared.before.chosen.candidate
        run.record(
            "replanned",
            job_id=job_id,
            from_world=resumed.from_world,
            to_world=resumed.to_world,
            from_micro_batch=old.micro_batch,
            to_micro_batch=prepared.plan.chosen.candidate.micro_batch,
            archived=number,
        )
    return job_id
