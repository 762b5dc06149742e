"""rehearsal: the whole life of a run in minutes: the recipe's job with a tiny model on a few CPU ranks.

    <runs>/.rehearsals/<name>-xxxxxx/      a folder of our own, marked; removed after success
        REHEARSAL                           the mark
        model/  data/                       what worker/shrink.py made
        rehearsal-<name>-xxxxx/             the run, as any other

One job is submitted; one of its ranks is killed before the last step and the job must come back by itself.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, ConflictError, DataError, LauncherError, RecipeError, TemporaryError
from launcher.facts.site import Site, site_facts
from launcher.planning.plan import Candidate
from launcher.planning.prepare import Planned, plan_recipe
from launcher.planning.resolve import resolve
from launcher.planning.shrunk import KILL_STEP, MOST_RANKS, Shrunk, few_ranks, shrink, shrink_candidate
from launcher.recipe.dump import recipe_to_yaml
from launcher.recipe.schema import Recipe
from launcher.runs.folder import RunFolder, read_json_lines
from launcher.runs.living import refuse_living
from launcher.runs.preview import refuse_untrained
from launcher.runs.rehearsal_material import FOLDER, ROWS, Space, make_material, with_material, workspace
from launcher.runs.request import JobRequest
from launcher.runs.status import cancel, run_status, runs_folder
from launcher.runs.submission import create_run, describe, job_request, submit
from launcher.runs.verdicts import Tale, Verdict, exit_code, fail, judge

_LONGEST_S = {"local": 1800.0, "slurm": 4 * 3600.0}
"""A rehearsal that has not ended by then is cancelled; on Slurm this counts the wait in the queue."""
_POLL_S = 1.0
_LAST_WORDS_S = 40.0

Report = Callable[[Verdict], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What was rehearsed, and how it went."""

    recipe: str
    verdicts: tuple[Verdict, ...]
    not_exercised: tuple[str, ...]
    capped: tuple[str, ...] = ()
    exit_code: int = 0
    kept: Path | None = None
    """Its folder, where it is still there."""

    @property
    def failed(self) -> Verdict | None:
        """The stage that failed."""
        return next((verdict for verdict in self.verdicts if verdict.verdict == "failed"), None)

    def to_json(self) -> dict[str, Any]:
        """Schema 1."""
        return {
            "schema": 1,
            "recipe": self.recipe,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "not_exercised": list(self.not_exercised),
            "smaller": list(self.capped),
            "exit_code": self.exit_code,
            "kept": None if self.kept is None else str(self.kept),
        }


@dataclass(kw_only=True)
class _Stage:
    """Collects verdicts and tells each as it is known."""

    report: Report
    verdicts: list[Verdict] = field(default_factory=list)

    def add(self, *verdicts: Verdict) -> None:
        """Note new verdicts."""
        for verdict in verdicts:
            self.verdicts.append(verdict)
            self.report(verdict)


# ---------------------------------------------------------------- planning


def preview(path: Path, overrides: list[str], *, slurm: bool, ranks: int | None) -> dict[str, Any]:
    """The job a rehearsal would send, for folders that do not exist yet; nothing is made.

    Raises:
        LauncherError: the recipe cannot be planned.
    """
    planned = _planned(path, overrides)
    candidate = _small(planned, ranks)
    shrunk = shrink(planned.recipe, planned.plan, candidate, seq_len=candidate.seq_len)
    site = _site(planned.site, ranks=candidate.world_size, slurm=slurm)
    run = RunFolder(
        _parent(planned.recipe) / f"{planned.recipe.name}-xxxxxx" / f"rehearsal-{planned.recipe.name}-xxxxx"
    )
    request = _request(shrunk, resolve(shrunk.recipe, shrunk.plan), run, site)
    return describe(request) | {"smaller": list(shrunk.capped), "not_exercised": list(shrunk.not_exercised)}


def _planned(path: Path, overrides: list[str]) -> Planned:
    return plan_recipe(path, overrides, ask_queue=False)


def _small(planned: Planned, ranks: int | None) -> Candidate:
    if ranks is not None and not 1 <= ranks <= MOST_RANKS:
        raise RecipeError(f"--ranks: {ranks} asked; a rehearsal has 1 to {MOST_RANKS} ranks")
    candidate = planned.plan.chosen.candidate
    return shrink_candidate(candidate, ranks=few_ranks(candidate, ranks))


def _parent(recipe: Recipe) -> Path:
    runs = runs_folder(None) if recipe.output_dir == "auto" else Path(recipe.output_dir).expanduser()
    return runs.resolve() / FOLDER


def _site(site: Site, *, ranks: int, slurm: bool) -> Site:
    """Where the rehearsal runs: this machine with the site's environment, or the site without its GPUs.

    Raises:
        ClusterError: --slurm for a site that has none.
    """
    if slurm and site.executor != "slurm":
        raise ClusterError(f"--slurm: site {site.name} runs jobs on this machine, without Slurm; leave --slurm out")
    here = site if slurm or site.executor == "local" else site_facts("local")
    there = site.venv is not None and os.access(Path(site.venv).expanduser() / "bin" / "python", os.X_OK)
    venv = site.venv if slurm or there else here.venv
    return replace(here, gpu="cpu", gpus_per_node=ranks, request_gpus=False, gpu_type=None, venv=venv)


def _request(shrunk: Shrunk, resolved: Recipe, run: RunFolder, site: Site) -> JobRequest:
    """The job, with the kill in its environment beside a fault that a test may have asked for."""
    request = job_request(shrunk.plan, resolved, run, site)
    last = shrunk.plan.chosen.candidate.world_size - 1
    kill = f"at=step,rank={last},step={KILL_STEP},do=kill"
    variables = {
        "LAUNCHER_FAULT": ";".join(filter(None, [os.environ.get("LAUNCHER_FAULT"), kill])),
        "LAUNCHER_CACHE": str(run.path.parent / ".cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    return replace(request, env=request.env | variables)


# ---------------------------------------------------------------- the rehearsal


def rehearse(
    path: Path, overrides: list[str], *, slurm: bool, ranks: int | None, keep: bool, report: Report
) -> Rehearsal:
    """Rehearse a recipe; `report` hears each verdict as soon as it is known.

    A stage that fails ends the rehearsal and is a verdict, not an error.

    Raises:
        RecipeError: a wrong number of ranks.
        ClusterError: --slurm without Slurm, or no folder for the rehearsal.
    """
    stage, began_s = _Stage(report=report), time.time()
    try:
        planned = _planned(path, overrides)
    except LauncherError as error:
        stage.add(*fail("plan", _words(error)))
        return _judged(path.stem, stage, (), code=error.exit_code)
    candidate = _small(planned, ranks)
    site = _site(planned.site, ranks=candidate.world_size, slurm=slurm)
    stage.add(_ok("plan", began_s, _plan_note(planned)))
    with workspace(_parent(planned.recipe), planned.recipe.name) as space:
        try:
            return _in(space, planned, candidate, stage, site=site, slurm=slurm, keep=keep)
        except BaseException:
            space.remove()
            raise


def _in(
    space: Space, planned: Planned, candidate: Candidate, stage: _Stage, *, site: Site, slurm: bool, keep: bool
) -> Rehearsal:
    """Everything after the plan."""
    name, began_s = planned.recipe.name, time.time()
    try:
        made = make_material(planned, space.path, candidate)
        refuse_untrained(made)
    except LauncherError as error:
        look = f"; try: launcher data show {planned.path}" if isinstance(error, DataError) else ""
        stage.add(*fail("data", _words(error) + look))
        space.remove()
        return _judged(name, stage, (), code=error.exit_code)
    stage.add(_data_verdict(made, began_s))
    shrunk = shrink(
        planned.recipe, planned.plan, candidate, seq_len=made["seq_len"], params=made["model"]["parameters"]
    )
    shrunk = replace(shrunk, recipe=with_material(shrunk.recipe, made, space.path))
    untold = (*shrunk.not_exercised, *_untold(planned, made, slurm=slurm))
    try:
        run = _submit(shrunk, site, space)
    except LauncherError as error:
        stage.add(*fail("start", _words(error)))
        space.remove()
        return _judged(name, stage, untold, code=error.exit_code, capped=shrunk.capped)
    _watch(run, stage, shrunk.recipe)
    code = 0 if stage.verdicts[-1].verdict == "ok" else exit_code(run)
    kept = space.path if code or keep else None
    if kept is None:
        space.remove()
    return _judged(name, stage, untold, code=code, capped=shrunk.capped, kept=kept)


def _judged(
    name: str,
    stage: _Stage,
    untold: tuple[str, ...],
    *,
    code: int,
    capped: tuple[str, ...] = (),
    kept: Path | None = None,
) -> Rehearsal:
    verdicts = tuple(stage.verdicts)
    return Rehearsal(recipe=name, verdicts=verdicts, not_exercised=untold, capped=capped, exit_code=code, kept=kept)


def _words(error: LauncherError) -> str:
    return "; ".join(error.problems)


def _ok(name: str, began_s: float, note: str) -> Verdict:
    return Verdict(stage=name, verdict="ok", seconds=round(time.time() - began_s, 1), note=note)


def _plan_note(planned: Planned) -> str:
    chosen = planned.plan.chosen.candidate
    sharding = f"ZeRO-{chosen.zero_stage}" if chosen.zero_stage else "no sharding"
    return f"{chosen.method}, {sharding}, {chosen.nodes} x {chosen.gpus_per_node} {chosen.gpu}"


# ---------------------------------------------------------------- what is said of it


def _data_verdict(made: dict[str, Any], began_s: float) -> Verdict:
    """What is known of the data; no blessing where the tokenizer or rows are not the user's."""
    training = [one for one in made["sources"] if one["used_for"] == "train"]
    rows, share = sum(one["rows"] for one in training), _share(training)
    truncated = sum(one["truncated_rows"] for one in training)
    note = f"{rows} rows read, {share:.0%} of their tokens trained" + (f", {truncated} truncated" if truncated else "")
    missing = [*filter(None, (one["made_up"] for one in made["sources"])), *filter(None, [made["tokenizer_stand_in"]])]
    seconds = round(time.time() - began_s, 1)
    if missing:
        why = f"{'; '.join(dict.fromkeys(missing))}: stand-ins were used"
        return Verdict(stage="data", verdict="not exercised", seconds=seconds, note=why)
    return Verdict(stage="data", verdict="ok", seconds=seconds, note=note)


def _share(sources: list[dict[str, Any]]) -> float:
    tokens = sum(one["tokens"] for one in sources)
    return sum(one["trained_tokens"] for one in sources) / tokens if tokens else 0.0


def _untold(planned: Planned, made: dict[str, Any], *, slurm: bool) -> Iterator[str]:
    """What was not exercised because of this machine."""
    recipe, site = planned.recipe, planned.site
    if made["tokenizer_stand_in"]:
        yield f"the tokenizer and its chat template: {made['tokenizer_stand_in']}"
    yield from (f"data: {one['made_up']}; made-up rows stood in" for one in made["sources"] if one["made_up"])
    if any(one["rows"] >= ROWS for one in made["sources"]):
        yield f"rows after the first {ROWS} of each source"
    if not Path(recipe.model.name_or_path).expanduser().is_dir():
        yield "access to the hub: nothing was downloaded"
    if site.executor == "slurm" and not slurm:
        yield "the queue, its limits and the compute nodes: rehearse with --slurm, or see launcher submit --dry-run"
        if site.modules or site.setup or site.container.runtime != "none":
            yield "the site's modules, set-up lines and container"
    if slurm and planned.plan.chosen.candidate.device == "cuda":
        yield "the partition's GPUs: none were asked for"


# ---------------------------------------------------------------- its job


def _submit(shrunk: Shrunk, site: Site, space: Space) -> RunFolder:
    resolved = resolve(shrunk.recipe, shrunk.plan)
    run = create_run(recipe_to_yaml(shrunk.recipe), resolved, shrunk.plan, site, space.path)
    space.run = run
    submit(_request(shrunk, resolved, run, site))
    return run


def _watch(run: RunFolder, stage: _Stage, recipe: Recipe) -> None:
    """Judge the run while it goes on, until it has ended."""
    began_s, before = time.time(), len(stage.verdicts)
    while True:
        state = run_status(run)
        late = time.time() - began_s > _LONGEST_S[state.cluster]
        if late:
            cancel(run)
        ended = (state.ended and (state.cluster == "local" or _settled(run))) or late
        verdicts = judge(Tale.of(run, recipe), began_s=began_s, ended=ended)
        stage.add(*verdicts[len(stage.verdicts) - before :])
        if ended or (verdicts and verdicts[-1].stage == "export"):
            break
        time.sleep(_POLL_S)
    _end(run)


def _settled(run: RunFolder) -> bool:
    """Whether the last words of the newest attempt are written: a shared file system may show them late."""
    events = list(read_json_lines(run.attempts))
    return run.result.exists() or (bool(events) and time.time() - events[-1]["time_s"] > 10.0)


def _end(run: RunFolder) -> None:
    """Let the job say its last words, which it writes into the run's folder; end one that stays."""
    until = time.monotonic() + _LAST_WORDS_S
    while time.monotonic() < until:
        try:
            refuse_living(run)
            return
        except ConflictError:
            time.sleep(_POLL_S)
        except TemporaryError:
            break
    with contextlib.suppress(LauncherError):
        cancel(run)
