"""sending: a request to Slurm through submitit, once, whatever happens to the question or to its answer.

sbatch fails in three ways: it could not speak to the controller (tried again for a while), the controller refused (said
with what exists instead), or nobody knows (asked for by the job's name before anything is sent again).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator

from launcher.errors import ClusterError, LauncherError, TemporaryError
from launcher.facts.command import is_temporary
from launcher.facts.probe import associations, partitions
from launcher.runs.adoption import ledger, lost_jobs
from launcher.runs.folder import RunFolder
from launcher.runs.request import JobRequest
from launcher.runs.sbatch import python_words, submitit_parameters
from launcher.runs.train_job import nothing, task_words, without_pickle

PATIENCE_S = 60.0
"""How long an unreachable controller is tried again: a restart takes seconds, an upgrade is not waited for."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 15.0
Say = Callable[[str], None]


def silent(_sentence: str) -> None:
    """Tell nobody."""


_KEPT_SLURM_VARIABLES = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SBATCH_WCKEY"})
_FOREIGN_PREFIXES = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMIX_", "PMI_", "SUBMITIT_")
_FOREIGN_NAMES = frozenset(
    {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
)
"""Variables of a job or launcher around this process; inherited, they would contradict the new job's own."""


class MaybeSubmittedError(TemporaryError):
    """Slurm stopped answering after it may have taken the job; the ledger's open line lets it be found later."""


def send_to_slurm(request: JobRequest, run: RunFolder, say: Say) -> str:
    """Submit through submitit's Slurm executor, again while the controller is away, and never a second job.

    Raises:
        TemporaryError: the controller did not answer in time, and no job exists.
        MaybeSubmittedError: it did not, and whether a job exists cannot be told.
        ClusterError: Slurm refuses the job, or its commands are not on this machine.
    """
    for command in ("sbatch", "srun"):
        if shutil.which(command) is None:
            raise ClusterError(
                f"{command} is not on this machine's PATH, so nothing was submitted; go to a login node of the cluster "
                "(or load its Slurm module) and try again, or run here with: launcher submit --local"
            )
    give_up, pause_s, tries = time.monotonic() + patience_s(), _FIRST_PAUSE_S, 0
    while True:
        tries += 1
        words = _sbatch(request, run)
        if isinstance(words, JobId):
            return words
        lost = _look_for_lost(run, sure=_never_arrived(words))
        if isinstance(lost, str):
            say(f"sbatch said {words!r}, but job {lost} of this run is there; it was taken over")
            return lost
        late = time.monotonic() + pause_s > give_up
        if lost and (late or not is_temporary(words)):
            raise MaybeSubmittedError(
                f"sbatch failed ({words}), and Slurm does not say whether it took the job; nothing more was sent. "
                f"Look later with launcher status {run.run_id}: a job that exists is found by its name"
            )
        if late or not is_temporary(words):
            raise _refusal(words, request, tries)
        if tries == 1:
            say(f"Slurm does not answer ({words}); trying again for {patience_s():.0f} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        # What timed out may have been on its way still; look once more before anything is sent again.
        lost = _look_for_lost(run, sure=_never_arrived(words))
        if isinstance(lost, str):
            return lost


class JobId(str):
    """The number of a job, as Slurm gave it."""


def _sbatch(request: JobRequest, run: RunFolder) -> JobId | str:
    """One call of sbatch: the job's id, or what sbatch said instead."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = without_pickle(submitit.SlurmExecutor, task_words(python_words(request), request.run_dir))(
        run.submission
    )
    executor.update_parameters(**submitit_parameters(request))
    try:
        # submitit prints sbatch's complaint as well as raising it; the error that is raised here quotes it once.
        with contextlib.redirect_stderr(io.StringIO()):
            return JobId(executor.submit(nothing).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        return " / ".join(str(error).split("\n"))


def _look_for_lost(run: RunFolder, *, sure: bool) -> str | bool:
    """Id of the job that an unanswered sbatch left; else whether one may exist all the same."""
    if sure:
        return False
    try:
        found = lost_jobs({run.run_id: ledger(run)})
    except LauncherError:
        return True
    return found[run.run_id].job_id if run.run_id in found else False


def _never_arrived(words: str) -> bool:
    """Whether sbatch says that it could not even speak to the controller."""
    lowered = words.lower()
    return any(sign in lowered for sign in ("connect failure", "configuration source", "connection refused"))


def patience_s() -> float:
    """Seconds for which an unreachable controller is tried again; LAUNCHER_PATIENCE_S overrules the usual minute."""
    try:
        return max(0.0, float(os.environ.get("LAUNCHER_PATIENCE_S", PATIENCE_S)))
    except ValueError:
        return PATIENCE_S


def _refusal(words: str, request: JobRequest, tries: int) -> LauncherError:
    """Slurm's words as an error, with what exists where that helps."""
    if is_temporary(words):
        often = f" ({tries} tries)" if tries > 1 else ""
        return TemporaryError(
            f"Slurm does not answer{often}, so nothing was submitted; try again later (sbatch said: {words})"
        )
    lowered, hints = words.lower(), []
    with contextlib.suppress(LauncherError):
        if "partition" in lowered or "node configuration" in lowered:
            hints.append(f"partitions here: {', '.join(partition.name for partition in partitions())}")
        allowed = associations() if "account" in lowered or "qos" in lowered else None
        if allowed:
            hints.append(f"your accounts: {', '.join(allowed[0])}; your QOS: {', '.join(allowed[1])}")
    asked = f"asked for partition={request.partition} account={request.account} qos={request.qos} nodes={request.nodes}"
    return ClusterError("; ".join([f"Slurm refused the job: {words}", asked, *hints]))


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Hide the variables of a surrounding job or launcher while a job is submitted.

    They would silently win over the script (SBATCH_*) or bind the new job to the old one's CPUs (SLURM_CPU_BIND).
    SLURM_CONF stays: without it sbatch may not find its cluster.
    """
    hidden = {name: value for name, value in os.environ.items() if _is_foreign(name)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_foreign(name: str) -> bool:
    if name in _KEPT_SLURM_VARIABLES:
        return False
    return name in _FOREIGN_NAMES or name.startswith(_FOREIGN_PREFIXES)
