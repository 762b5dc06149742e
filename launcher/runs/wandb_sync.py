"""wandb_sync: what a run recorded offline, sent from a node that has network.

A run that was started several times has one offline folder per attempt, all with the run's id; wandb joins them in
order of their start when they are sent together under that id.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from launcher.errors import ClusterError, DataError, TemporaryError
from launcher.facts.train_environment import train_python
from launcher.runs.folder import RunFolder

_TIMEOUT_S = 3600.0


def offline_folders(run: RunFolder) -> list[Path]:
    """The run's offline folders, oldest first.

    Raises:
        DataError: it recorded nothing offline.
    """
    found = sorted((run.path / "wandb").glob("offline-run-*"))
    if not found:
        raise DataError(
            f"{run.run_id} recorded nothing offline ({run.path / 'wandb'}); its numbers are in {run.metrics}"
        )
    return found


def command(run: RunFolder) -> list[str]:
    """The `wandb sync` that sends them."""
    folders = [str(path) for path in offline_folders(run)]
    return [train_python(), "-m", "wandb", "sync", "--yes", "--id", run.run_id, *folders]


def send(run: RunFolder) -> str:
    """Send everything; returns what wandb said.

    Raises:
        DataError: nothing to send.
        ClusterError: wandb is not installed here, or refuses.
        TemporaryError: no answer in an hour.
    """
    words = command(run)
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TemporaryError(f"sync: wandb did not finish within {_TIMEOUT_S:.0f} s") from error
    except OSError as error:
        raise ClusterError(f"sync: cannot run {words[0]}: {error}") from error
    said = (done.stdout + done.stderr).strip()
    if done.returncode != 0:
        last = said.splitlines()[-1] if said else "no message"
        raise ClusterError(f"sync: wandb refused: {last} (is WANDB_API_KEY set, or `wandb login` done, on this node?)")
    return said
