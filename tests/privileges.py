"""What a test needs of its machine: skipped with the reason where it is missing, except in CI, where that fails."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def unavailable(reason: str) -> NoReturn:
    """Skip the test; in CI (CI=true), which runs as root and promises every test, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"must not be skipped in CI: {reason}")
    pytest.skip(reason)
