"""What a user can fix: one error class per exit code.

    LauncherError                  base; never raised itself
    ├── RecipeError          2     recipe or usage
    ├── DataError            3     the user's data
    ├── ModelError           4     model folder or id
    ├── ClusterError         5     the cluster refuses or cannot
    ├── DoesNotFitError      6     no plan fits the memory
    ├── ConflictError        7     an existing run is in the way
    ├── JobFailedError       8     the job ran and failed (`wait`, `submit --local`)
    └── TemporaryError      75     try again later (controller down, lock held)

Anything else that escapes is our bug and keeps its traceback (exit 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class LauncherError(Exception):
    """An error the user can fix; `problems` holds every finding of the stage, one line each."""

    exit_code: ClassVar[int] = 1

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems: tuple[str, ...] = problems


class RecipeError(LauncherError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class DataError(LauncherError):
    """The data cannot be read or has nothing to train on."""

    exit_code = 3


class ModelError(LauncherError):
    """The model folder or id is incomplete, unknown or unusable."""

    exit_code = 4


class UnknownArchitectureError(ModelError):
    """No closed form knows this architecture; one traced step of the real class can still measure it."""


class ClusterError(LauncherError):
    """The cluster refuses the request or cannot ever satisfy it."""

    exit_code = 5


class DoesNotFitError(LauncherError):
    """The planned job does not fit in memory; `plan` holds what was estimated, for display."""

    exit_code = 6
    plan: Any = None
    """The Plan; typed loosely because errors know no other room."""


class ConflictError(LauncherError):
    """An existing run is in the way."""

    exit_code = 7


class JobFailedError(LauncherError):
    """The job was started and failed."""

    exit_code = 8


class TemporaryError(LauncherError):
    """Nothing is wrong with the request; try again later."""

    exit_code = 75


def raise_all(error: type[LauncherError], problems: Sequence[str]) -> None:
    """Raise `error` with every problem found, or return when there is none."""
    if problems:
        raise error(*problems)
