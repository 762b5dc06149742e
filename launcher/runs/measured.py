"""Measured: what finished runs took, read from their folders, beside what their plans had said."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, DataError, LauncherError
from launcher.facts.learned import Learned, learned_path, to_yaml
from launcher.facts.model import model_shape
from launcher.facts.site import profile_path, site_facts
from launcher.planning.calibration import Sample, calibrate, outliers
from launcher.planning.plan import Plan, plan_from_json
from launcher.planning.published import read_published
from launcher.planning.score import Scored, score
from launcher.recipe.load import load_recipe
from launcher.runs.folder import RunFolder, read_json_lines, write_atomic
from launcher.runs.status import find_run, runs_folder

GIB = 2**30


def score_all(targets: Sequence[str], parent: Path | None = None) -> list[Scored]:
    """Predictions beside measurements, of files of published rows (.jsonl) and of runs.

    Raises:
        DataError: a file that cannot be read.
        RecipeError: a run that is not there.
    """
    found: list[Scored] = []
    for target in targets:
        if target.endswith(".jsonl"):
            found += score(read_published(Path(target)))
        else:
            found.append(scored(find_run(target, parent)))
    return found


def calibrate_site(
    name: str, targets: Sequence[str], parent: Path | None = None, *, dry_run: bool = False
) -> tuple[Learned, Path, list[str]]:
    """Fit a site's coefficients to its finished runs and keep them beside its profile; returns both and the outliers.

    Without `targets`, every run of the runs folder that was planned for this site counts.

    Raises:
        ClusterError: the site has no profile to keep them beside, or a run is another site's.
        DataError: no finished run to learn from; a named run that did not finish.
    """
    profile = profile_path(name)
    site = site_facts(name)
    runs = [find_run(target, parent) for target in targets] or _runs_of(site.name, parent)
    others = [run.run_id for run in runs if read_plan(run).site != site.name]
    if others:
        raise ClusterError(f"--calibrate {name}: planned for another site: {', '.join(others)}")
    samples = [sample(run) for run in runs]
    learned = calibrate(samples, site)
    path = learned_path(profile)
    if not dry_run:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_yaml(learned, site.name))
    return learned, path, outliers(samples, site)


def _runs_of(site: str, parent: Path | None) -> list[RunFolder]:
    """Finished runs that were planned for a site; others are passed over."""
    folder = runs_folder(parent)
    found = []
    for path in sorted(folder.glob("*/result.json")):
        run = RunFolder(path.parent.resolve())
        try:
            if read_plan(run).site == site:
                sample(run)
                found.append(run)
        except (LauncherError, ValueError, OSError):
            continue
    return found


def read_plan(run: RunFolder) -> Plan:
    """The plan a run was started with.

    Raises:
        DataError: the file is missing or unreadable.
        ConflictError: another version of the launcher wrote it.
    """
    return plan_from_json(_read(run, "plan.json"))


def sample(run: RunFolder) -> Sample:
    """What a finished run took.

    Raises:
        DataError: it has no result, or none of its steps was timed.
        ModelError: its base model is no longer there to be sized.
    """
    plan = read_plan(run)
    heartbeat = json.loads(run.heartbeat.read_text(encoding="utf-8")) if run.heartbeat.exists() else {}
    return Sample(
        run=run.run_id,
        model=model_shape(load_recipe(run.resolved if run.resolved.exists() else run.recipe).model),
        candidate=plan.chosen.candidate,
        step_s=step_s(run),
        peak_bytes=heartbeat.get("peak_bytes"),
    )


def scored(run: RunFolder) -> Scored:
    """A run's own prediction beside its measurement; a run that did not finish says so."""
    try:
        plan, took = read_plan(run), sample(run)
    except (LauncherError, ValueError, OSError) as error:
        return _unfinished(run, str(error))
    chosen, candidate = plan.chosen, plan.chosen.candidate
    peak = chosen.memory.peak_bytes
    measured = took.peak_bytes / GIB if took.peak_bytes else None
    tokens = candidate.global_batch * candidate.seq_len / candidate.world_size
    return Scored(
        id=run.run_id,
        kind="allocated" if measured else None,
        predicted_gib=peak.expected / GIB,
        low_gib=peak.low / GIB,
        high_gib=peak.high / GIB,
        measured_gib=measured,
        error_pct=100 * (peak.expected / GIB / measured - 1) if measured else None,
        predicted_tokens_per_s=chosen.tokens_per_s_per_gpu,
        measured_tokens_per_s=tokens / took.step_s,
        predicted_fits=chosen.fits,
        outcome="ok",
        skipped=None,
        complete=True,
        model=plan.model,
        stack="launcher",
        sharding=f"zero{candidate.zero_stage}" if candidate.zero_stage else "none",
        measured_device_gib=None,
        usable_gib=chosen.memory.usable_bytes / GIB,
        binding=chosen.memory.binding,
    )


def _unfinished(run: RunFolder, why: str) -> Scored:
    return Scored(
        id=run.run_id,
        kind=None,
        measured_gib=None,
        measured_tokens_per_s=None,
        outcome="unknown",
        skipped=why,
        complete=True,
        model="",
        stack="launcher",
        sharding="",
        measured_device_gib=None,
    )


def _read(run: RunFolder, name: str) -> dict[str, Any]:
    path = run.path / name
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "has not finished" if name == "result.json" else "is no run folder"
        raise DataError(f"{run.run_id} {what}: no {name}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return document


def step_s(run: RunFolder) -> float:
    """Seconds per step: from the logged speeds without the first, which pays for compilation; else the mean.

    Raises:
        DataError: the run has no result, or it times no step.
    """
    result = _read(run, "result.json")
    steps, tokens, train_s = (result.get(key) or 0 for key in ("step", "tokens", "train_s"))
    if not steps or not train_s:
        raise DataError(f"{run.run_id}: result.json times no step")
    speeds = [line["tokens_per_s"] for line in read_json_lines(run.metrics) if line.get("tokens_per_s")]
    if len(speeds) > 2 and tokens:
        return float(tokens / steps / statistics.median(speeds[1:]))
    return float(train_s / steps)
