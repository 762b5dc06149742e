"""Fixtures that several modules of real runs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.ranks import Ranks
from tests.train.trained import make_trained_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder whose `model` has learnt Python's documentation."""
    folder = tmp_path_factory.mktemp("base")
    make_trained_base(folder / "model")
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    group = Ranks(1, tmp_path_factory.mktemp("rendezvous"))
    yield group
    group.close()
