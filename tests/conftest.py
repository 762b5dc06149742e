"""What holds for every test: nothing asks a network, and tests that need a machine part say so when it is missing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell makes what it starts in the background deaf to Ctrl-C, and so would be what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/cluster needs Slurm; tests marked `gpu` are skipped where there is none."""
    cluster = Path(__file__).parent / "cluster"
    for item in items:
        if cluster in item.path.parents:
            item.add_marker("slurm")
        if item.get_closest_marker("gpu") and not Path("/dev/nvidiactl").exists():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here (/dev/nvidiactl)"))
