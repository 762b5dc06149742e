"""Status: the state of runs, waiting for them, ending them and reading their logs; files first, Slurm second."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, ConflictError, JobFailedError, LauncherError, RecipeError, TemporaryError
from launcher.runs.adoption import adopt, controller_of, lost_jobs
from launcher.runs.folder import RunFolder
from launcher.runs.lock import hold, holder
from launcher.runs.process import end_session
from launcher.runs.slurm import SlurmJob, cancel_job, find_jobs, find_named
from launcher.runs.state import Evidence, State, judge, read_evidence

_GRACE_S = 15.0
"""How long a cancelled local job has before it is killed (Slurm's KillWait is 30 s)."""
_RESULT_MAY_LAG_S = 10.0
"""A shared file system may show result.json a moment after Slurm shows the end of the job."""
_LOG_POLL_S = 0.3
_SLOWEST_POLL_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """What is known of one run now."""

    run: str
    path: str
    state: str
    """Slurm's word; also NOT_SUBMITTED, STOPPED (told to stop, saved, left) and UNKNOWN (Slurm does not answer)."""
    ended: bool
    sentence: str
    """The state in plain words, and why."""
    reason: str | None
    """Slurm's own reason."""
    job_id: str | None
    cluster: str
    """slurm | local."""
    nodes: str | None
    restarts: int
    step: int | None
    total_steps: int | None
    loss: float | None
    tokens_per_s: float | None
    peak_bytes: int | None
    """Largest allocation so far of one rank."""
    eta_s: float | None
    """Seconds of training left, while it runs."""
    submitted_s: float | None
    """Epoch seconds."""
    heartbeat_s: float | None
    """Epoch seconds of the last sign of life of rank 0."""
    warnings: tuple[str, ...] = ()
    """What the run itself found odd, such as a base that is being forgotten."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the schema's number."""
        return {"schema": 1, **dataclasses.asdict(self)}


# ---------------------------------------------------------------- finding


def runs_folder(parent: Path | None) -> Path:
    """Folder that holds the runs: `parent`, $LAUNCHER_RUNS or ./runs."""
    return parent or Path(os.environ.get("LAUNCHER_RUNS") or "runs").expanduser()


def find_run(name_or_path: str, parent: Path | None = None) -> RunFolder:
    """The run a user means: its folder, its name, or the beginning of its name if only one begins so.

    Raises:
        RecipeError: none or several; names what comes nearest.
    """
    path = Path(name_or_path).expanduser()
    if is_run(path):
        return RunFolder(path.resolve())
    folder = runs_folder(parent)
    names = names_of_runs(parent)
    matching = [name for name in names if name == name_or_path] or [n for n in names if n.startswith(name_or_path)]
    if len(matching) == 1:
        return RunFolder((folder / matching[0]).resolve())
    if matching:
        raise RecipeError(f"{name_or_path!r} is the beginning of {len(matching)} runs: {', '.join(matching[:5])}")
    close = difflib.get_close_matches(name_or_path, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"it holds {', '.join(names[:5]) if names else 'no runs'}"
    raise RecipeError(f"no run {name_or_path!r} in {folder}; {hint}")


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return (path / "recipe.yaml").is_file() and (path / "plan.json").is_file()


def names_of_runs(parent: Path | None = None) -> list[str]:
    """Names of the runs of a folder, newest first."""
    return [run.run_id for run in _runs_in(runs_folder(parent))]


def _runs_in(folder: Path) -> list[RunFolder]:
    """Runs of a folder, newest first."""
    found = [path for path in folder.glob("[!.]*") if is_run(path)] if folder.is_dir() else []
    return [RunFolder(path.resolve()) for path in sorted(found, key=lambda one: one.stat().st_ctime, reverse=True)]


# ---------------------------------------------------------------- state


def run_status(run: RunFolder, *, locked: bool = False) -> RunStatus:
    """The state of one run now; Slurm being down is a state, not an error. `locked`: the caller holds its lock."""
    return statuses([run], locked=locked)[0]


def list_runs(parent: Path | None = None) -> list[RunStatus]:
    """The state of every run in the folder, newest first, with one question to Slurm for all."""
    return statuses(sorted(_runs_in(runs_folder(parent)), key=lambda run: -_submitted_s(run)))


def _submitted_s(run: RunFolder) -> float:
    return run.recipe.stat().st_mtime


def statuses(runs: Sequence[RunFolder], *, locked: bool = False) -> list[RunStatus]:
    """The state of these runs, in their order, with one question to Slurm for all; `locked` as in `run_status`."""
    evidence = [read_evidence(run) for run in runs]
    jobs: Mapping[str, SlurmJob] = {}
    unreachable: str | None = None
    try:
        evidence = _with_lost_jobs(evidence, locked=locked)
        jobs = find_jobs(
            one.slurm_id for one in evidence if one.cluster == "slurm" and one.result is None and one.slurm_id
        )
    except LauncherError as error:
        unreachable = error.problems[0]
    return [_status(one, judge(one, jobs.get(one.slurm_id or ""), unreachable=unreachable)) for one in evidence]


def _with_lost_jobs(evidence: list[Evidence], *, locked: bool) -> list[Evidence]:
    """The evidence, with jobs whose submission was never answered taken over; asks Slurm only where there is one.

    Raises:
        TemporaryError: Slurm does not answer.
    """
    orphaned = [one for one in evidence if one.result is None and one.unanswered and (locked or not holder(one.run))]
    if not orphaned:
        return evidence
    remote = {one.run.run_id: one.events for one in orphaned if one.cluster == "slurm"}
    found = {run_id: job.job_id for run_id, job in lost_jobs(remote).items()} if remote else {}
    for one in orphaned:
        if one.cluster == "local" and (process := controller_of(one.run)) is not None:
            found[one.run.run_id] = str(process.pid)
        if one.run.run_id in found:
            lock = contextlib.nullcontext() if locked else hold(one.run, "status")
            with contextlib.suppress(ConflictError, OSError, ClusterError), lock:
                adopt(one.run, found[one.run.run_id], cluster=one.cluster)
    return [read_evidence(one.run) if one.run.run_id in found else one for one in evidence]


def _status(evidence: Evidence, state: State) -> RunStatus:
    beat, result = evidence.heartbeat, evidence.result or {}
    hosts = [event["hosts"] for event in evidence.events if event.get("hosts")]
    return RunStatus(
        run=evidence.run.run_id,
        path=str(evidence.run.path),
        state=state.word,
        ended=state.ended,
        sentence=state.sentence,
        reason=state.reason,
        job_id=evidence.job_id,
        cluster=evidence.cluster,
        nodes=state.nodes or (",".join(hosts[-1]) if hosts else None),
        restarts=evidence.restarts,
        step=result.get("step", beat.get("step")),
        total_steps=beat.get("total_steps"),
        loss=result.get("train_loss", {}).get("last", beat.get("loss")),
        tokens_per_s=beat.get("tokens_per_s"),
        peak_bytes=beat.get("peak_bytes"),
        eta_s=beat.get("eta_s") if state.word == "RUNNING" else None,
        submitted_s=evidence.job.get("submitted_s"),
        heartbeat_s=beat.get("time_s"),
        warnings=tuple(_messages(result.get("warnings", beat.get("warnings")))),
    )


def _messages(warnings: Any) -> Iterator[str]:
    """Messages of the warnings in a result or a heartbeat, whatever else is there."""
    for warning in warnings if isinstance(warnings, list) else ():
        if isinstance(warning, dict) and isinstance(warning.get("message"), str):
            yield warning["message"]


# ---------------------------------------------------------------- waiting


def wait(run: RunFolder, poll_s: float = 1.0, timeout_s: float | None = None) -> RunStatus:
    """Wait for the end of a run and return its last status; Slurm is asked less and less often (30 s at most).

    Raises:
        JobFailedError: it ended without result.json: failed, stopped or cancelled.
        TemporaryError: `timeout_s` is over and it has not ended.
    """
    began = time.monotonic()
    ended_at: float | None = None
    for status in _watch(run, poll_s):
        if status.state == "COMPLETED":
            return status
        now = time.monotonic()
        ended_at = (ended_at or now) if status.ended else None
        certain = status.cluster == "local" or status.state == "CANCELLED"
        if ended_at is not None and (certain or now - ended_at >= _RESULT_MAY_LAG_S):
            raise JobFailedError(f"run {status.run} {status.sentence}", *_where_to_look(run, status))
        if timeout_s is not None and now - began >= timeout_s:
            raise TemporaryError(f"run {status.run} has not ended after {timeout_s:.0f} s: it {status.sentence}")
    raise RuntimeError("watching a run never ends by itself")


def _where_to_look(run: RunFolder, status: RunStatus) -> list[str]:
    """Where the reason stands, in full."""
    if status.state == "CANCELLED" or status.job_id is None:
        return []
    return [f"its log: {run.log(status.job_id, 0)} (launcher logs {status.run})"]


def _watch(run: RunFolder, poll_s: float) -> Iterator[RunStatus]:
    """The status again and again: at once when result.json appears, else when it is time to ask Slurm."""
    interval_s = poll_s
    while True:
        status = run_status(run)
        yield status
        slowest_s = poll_s if status.cluster == "local" or status.ended else _SLOWEST_POLL_S
        interval_s = min(interval_s * 1.3, max(slowest_s, poll_s))
        until = time.monotonic() + interval_s
        while time.monotonic() < until and not run.result.exists():
            time.sleep(min(poll_s, 0.5))


# ---------------------------------------------------------------- ending


def cancel(run: RunFolder) -> str:
    """End a run, pending or running, and say what was done; a run that has ended stays as it is.

    Raises:
        TemporaryError: Slurm does not answer.
        ClusterError: the job belongs to somebody else, or runs on another machine.
    """
    evidence, status = read_evidence(run), run_status(run)
    if status.ended:
        return f"{run.run_id} has ended already ({status.state}): it {status.sentence}"
    if evidence.job_id is None:
        return f"{run.run_id} was never submitted; nothing to cancel"
    if evidence.cancelled and status.cluster == "slurm" and status.state != "UNKNOWN":
        return f"{run.run_id} is being cancelled already (job {evidence.job_id})"
    if evidence.cluster == "local":
        _cancel_local(evidence)
        jobs = [evidence.job_id]
    else:
        jobs = _cancel_in_queue(run, evidence.slurm_id or evidence.job_id)
    return f"cancelled {run.run_id} (job {', '.join(jobs)}); checkpoints stay in {run.checkpoints}"


def _cancel_in_queue(run: RunFolder, job_id: str) -> list[str]:
    """End the newest job, and whatever else waits or runs under the run's name (a follow-up, its predecessor)."""
    try:
        others = [job.job_id for job in find_named([run.run_id]).get(run.run_id, []) if job.active]
    except LauncherError:
        others = []
    jobs = list(dict.fromkeys([job_id, *others]))
    for each in jobs:
        cancel_job(each)
        run.record("cancelled", job_id=each)
    return jobs


def _cancel_local(evidence: Evidence) -> None:
    process = evidence.process
    if process is None or judge(evidence, None).word == "UNKNOWN":
        raise ClusterError(f"{evidence.run.run_id} was started on another machine; cancel it there")
    # Written first: the ranks' ends must not look like a failure to somebody who looks meanwhile.
    evidence.run.record("cancelled", job_id=evidence.job_id)
    end_session(process, grace_s=_GRACE_S)


# ---------------------------------------------------------------- logs


def follow_logs(run: RunFolder, rank: int = 0, follow: bool = False) -> Iterator[str]:
    """Lines of one rank's logs, all jobs of the run in order; with `follow` until the run has ended.

    Raises:
        RecipeError: without `follow`, when that rank has no log.
    """
    reader = _LogReader(run, rank)
    if not follow:
        yield from reader.lines()
        yield from reader.rest()
        if not reader.seen:
            state = run_status(run)
            raise RecipeError(f"no log of rank {rank} in {run.logs}: the run {state.sentence}")
        return
    for status in _watch(run, 1.0):
        yield from reader.lines()
        if status.ended:
            break
        until = time.monotonic() + (1.0 if status.cluster == "local" else 5.0)
        while time.monotonic() < until and not run.result.exists():
            yield from reader.lines()
            time.sleep(_LOG_POLL_S)
    yield from reader.lines()
    yield from reader.rest()


class _LogReader:
    """Remembers how far each log file was read; yields complete lines only."""

    def __init__(self, run: RunFolder, rank: int) -> None:
        self._run = run
        self._rank = rank
        self._read_bytes: dict[Path, int] = {}

    @property
    def seen(self) -> bool:
        """Whether there was any log."""
        return bool(self._read_bytes)

    def _files(self) -> list[Path]:
        """Logs of the rank by job; where there is none, what the local controller said (a failing set-up line)."""
        found = [path for path in self._run.logs.glob(f"*_{self._rank}.out") if path.name.split("_")[0].isdecimal()]
        return sorted(found, key=lambda path: (path.stat().st_mtime, path.name)) if found else []

    def lines(self) -> Iterator[str]:
        """What was written since the last call."""
        for path in self._files():
            with path.open("rb") as file:
                file.seek(self._read_bytes.setdefault(path, 0))
                text = file.read()
            complete = text[: text.rfind(b"\n") + 1]
            self._read_bytes[path] += len(complete)
            yield from complete.decode(errors="replace").splitlines()

    def rest(self) -> Iterator[str]:
        """Last lines without a line end; the controller's words where no rank ever wrote."""
        for path, read in self._read_bytes.items():
            yield from path.read_bytes()[read:].decode(errors="replace").splitlines()
        controller = self._run.logs / "controller.out"
        if (
            not any(self._read_bytes.values())
            and controller.is_file()
            and (text := controller.read_text(errors="replace"))
        ):
            self._read_bytes[controller] = len(text)
            yield from text.splitlines()
