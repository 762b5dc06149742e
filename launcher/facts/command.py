"""Command: one external command, list-form, with a time limit and its own words in the error."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import ClusterError, TemporaryError

_TEMPORARY = (
    "unable to contact slurm controller",
    "could not establish a configuration source",
    "slurm backup controller in standby mode",
    "slurm temporarily unable",
    "communication connection failure",
    "connection refused",
    "connection timed out",
    "no route to host",
    "socket timed out",
    "zero bytes were transmitted",
    "problem talking to the database",
    "unable to contact slurmdbd",
    "rate limit exceeded",
)
"""What Slurm's commands print (in lower case) when the same call may work in a minute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """How a command ended."""

    stdout: str
    stderr: str
    returncode: int

    @property
    def words(self) -> str:
        """What the command said about itself, on one line: stderr, else stdout."""
        return " / ".join(line.strip() for line in (self.stderr or self.stdout).splitlines() if line.strip())


def run_command(command: Sequence[str], *, timeout_s: float = 30.0) -> Ran:
    """Run `command` and return its output whatever its exit status.

    Raises:
        TemporaryError: the program is not on PATH, or did not answer within `timeout_s` seconds.
    """
    environment = {**os.environ, "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
    try:
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise TemporaryError(
            f"{command[0]} is not on this machine's PATH; go to a login node of the cluster (or load its Slurm "
            "module) and try again, or run here with: launcher submit --local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise TemporaryError(f"{command[0]} did not answer within {timeout_s:.0f} s; try again later") from error
    return Ran(stdout=done.stdout, stderr=done.stderr, returncode=done.returncode)


def is_temporary(words: str) -> bool:
    """Whether Slurm's message means "try again" rather than "no"."""
    lowered = words.lower()
    return any(sign in lowered for sign in _TEMPORARY)


def run_slurm(command: Sequence[str], *, timeout_s: float = 30.0) -> str:
    """Run one of Slurm's commands and return its stdout.

    Raises:
        TemporaryError: the command is absent, or the controller (or its database) does not answer.
        ClusterError: Slurm refused; its words are quoted.
    """
    ran = run_command(command, timeout_s=timeout_s)
    if ran.returncode == 0:
        return ran.stdout
    if is_temporary(ran.words):
        raise TemporaryError(f"Slurm does not answer; try again later ({command[0]} said: {ran.words})")
    raise ClusterError(f"{command[0]} failed with status {ran.returncode}: {ran.words or 'no message'}")
