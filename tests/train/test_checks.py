"""Before the first step: ranks that cannot train say so by name, and take nobody's word for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ClusterError
from launcher.runs.folder import RunFolder
from launcher.runs.symptoms import Cause, cause_of_error
from tests.train.ranks import Ranks, place_of

WORLD = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that have met."""
    ranks = Ranks(WORLD, tmp_path_factory.mktemp("rendezvous"))
    yield ranks
    ranks.close()


def check(folders: list[Path], needs: dict[str, Any], odd_version: str | None = None) -> tuple[str | None, Any, float]:
    """On each rank: what went wrong, what was found, and the seconds it took."""
    import torch
    import torch.distributed as dist

    from launcher.worker import checks

    rank, wait_s = dist.get_rank(), checks.FOLDER_S
    checks.FOLDER_S = 1.0
    real = checks.versions
    if odd_version and rank == 1:
        checks.versions = lambda: real() | {"torch": odd_version}
    began_s = time.monotonic()
    answer: tuple[str | None, Any] = (None, None)
    try:
        facts = checks.check_ranks(
            RunFolder(folders[rank]), place_of(rank, WORLD), torch.device("cpu"),
            say=lambda _line: None, needs=checks.Needs(**needs),
        )  # fmt: skip
        answer = (None, facts)
    except ClusterError as error:
        answer = (str(error), None)
    finally:
        checks.FOLDER_S, checks.versions = wait_s, real
    return (*answer, time.monotonic() - began_s)


def run_folders(tmp_path: Path, *names: str) -> list[Path]:
    """A run folder per rank."""
    for name in names:
        with contextlib.suppress(FileExistsError):
            (tmp_path / name / "rendezvous").mkdir(parents=True)
    return [tmp_path / name for name in names]


def test_healthy_ranks_start_in_less_than_a_second(ranks: Ranks, tmp_path: Path) -> None:
    """The second time, as imports are done: the sum is right, the bandwidth is told, nothing is left in the folder."""
    folders = run_folders(tmp_path, "run", "run")
    ranks.run(check, folders, {})
    answers = ranks.run(check, folders, {})
    assert [answer[0] for answer in answers] == [None, None]
    assert answers[0][1]["all_reduce_bytes_per_s"] > 1e6
    assert max(answer[2] for answer in answers) < 1.0
    assert not list((folders[0] / "rendezvous").iterdir())


def test_a_rank_that_sees_another_folder_is_the_one_to_blame(ranks: Ranks, tmp_path: Path) -> None:
    """Its host goes into the report as a bad node; the other rank only points at it."""
    (healthy, _, _), (blind, _, _) = ranks.run(check, run_folders(tmp_path, "run", "elsewhere"), {})
    assert "no other rank sees what it writes" in healthy and "does not see what rank 0 writes" in blind
    assert cause_of_error("ClusterError", blind) is Cause.BAD_NODE


def test_other_packages_on_one_host_end_the_attempt_there(ranks: Ranks, tmp_path: Path) -> None:
    """What was planned decides which of two is the odd one."""
    import importlib.metadata

    planned = {"versions": {"torch": importlib.metadata.version("torch")}}
    (healthy, _, _), (odd, _, _) = ranks.run(check, run_folders(tmp_path, "run", "run"), planned, "1.0")
    assert odd.startswith("rank 1 on ") and "torch is 1.0" in odd
    assert cause_of_error("ClusterError", odd) is Cause.BAD_NODE
    assert "rank 1 on " in healthy and cause_of_error("ClusterError", healthy) is Cause.PEER_LOST


def test_what_changed_everywhere_is_a_warning(ranks: Ranks, tmp_path: Path) -> None:
    """An upgrade between submission and start is no node's fault, and another node would not help."""
    answers = ranks.run(check, run_folders(tmp_path, "run", "run"), {"versions": {"torch": "0.1"}})
    assert [answer[0] for answer in answers] == [None, None]
    assert any("it was 0.1 when the run was submitted" in notice for notice in answers[0][1]["notices"])


def test_a_node_without_memory_is_left(ranks: Ranks, tmp_path: Path) -> None:
    """Less than half of what was planned; the rank that looked says so."""
    (full, _, _), _ = ranks.run(check, run_folders(tmp_path, "run", "run"), {"host_ram_bytes_per_node": 2**60})
    assert "GiB of host memory are free" in full and cause_of_error("ClusterError", full) is Cause.BAD_NODE


def test_a_full_disk_is_no_bad_node(ranks: Ranks, tmp_path: Path) -> None:
    """Other nodes have the same disk."""
    (full, _, _), _ = ranks.run(check, run_folders(tmp_path, "run", "run"), {"checkpoint_bytes": 2**60})
    assert cause_of_error("ClusterError", full) is Cause.DISK_FULL


def test_gpu_health_is_read_from_nvidia_smi() -> None:
    """Errors that are gone after a reset count, and what a GPU does not report does not."""
    from launcher.worker.checks import gpu_health

    problems, notices = gpu_health(
        "0, 0, No, No, Not Active\n1, 3, No, No, Active\n2, [N/A], [N/A], [N/A], [N/A]\n3, 0, Yes, Yes, Not Active\nx\n"
    )
    assert [problem[:5] for problem in problems] == ["GPU 1", "GPU 3", "GPU 3"]
    assert all(
        cause_of_error("ClusterError", f"rank 0 on n1 is not fit to train: {p}") is Cause.BAD_NODE for p in problems
    )
    assert notices == ["GPU 1 is slowed down by its hardware (heat or power)"]
