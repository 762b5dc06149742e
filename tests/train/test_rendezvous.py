"""Every process knows which rank it is, and the ranks of one attempt find each other and nobody else."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ClusterError
from launcher.runs.folder import write_json
from launcher.worker import rendezvous
from launcher.worker.place import place_from_environment, tasks_per_node
from tests.train.ranks import Ranks, place_of

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "4",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
    "SLURMD_NODENAME": "n3",
}


# --- which rank --------------------------------------------------------------------------------


def test_slurm_says_where_a_rank_stands() -> None:
    """Nodes may have different numbers of tasks; the restart count makes the attempt."""
    place = place_from_environment(SLURM | {"SLURM_RESTART_COUNT": "2"})
    assert (place.rank, place.world_size) == (4, 5)
    assert (place.local_rank, place.local_world_size) == (0, 1)
    assert (place.node_rank, place.nodes, place.host) == (2, 3, "n3")
    assert place.attempt == "4711.2"


def test_a_requeued_job_is_another_attempt() -> None:
    """Slurm keeps the job id over a requeue; ranks of the first start must not meet those of the second."""
    first, second = (place_from_environment(SLURM | {"SLURM_RESTART_COUNT": n}) for n in ("0", "1"))
    assert first.job_id == second.job_id
    assert first.attempt != second.attempt


def test_a_local_job_inside_an_allocation_is_a_local_job() -> None:
    """Its ranks inherit the allocation's variables, which describe the shell and not them."""
    local = {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": "99",
        "SUBMITIT_LOCAL_GLOBALID": "1",
        "SUBMITIT_LOCAL_LOCALID": "1",
        "SUBMITIT_LOCAL_NTASKS": "2",
    }
    place = place_from_environment(SLURM | {"SLURM_PROCID": "0"} | local)
    assert (place.rank, place.world_size, place.nodes, place.attempt) == (1, 2, 1, "99.0")


def test_a_process_that_nobody_started_specially_is_alone() -> None:
    """`python -m launcher.worker.main RUN` in a shell is one rank."""
    place = place_from_environment({})
    assert (place.rank, place.world_size, place.nodes) == (0, 1, 1)


def test_ranks_set_by_hand_or_by_torchrun_are_understood() -> None:
    """RANK and WORLD_SIZE are enough."""
    place = place_from_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"})
    assert (place.rank, place.local_rank, place.node_rank, place.nodes) == (3, 1, 1, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SLURM_NTASKS": "8"}, "SLURM_NTASKS=8, but '2\\(x2\\),1' tasks per node"),
        ({"SLURM_PROCID": "5"}, "rank 5 of 5 ranks cannot be"),
        ({"SLURM_LOCALID": "1"}, "local rank 1 of 1 on this node cannot be"),
        ({"SLURM_PROCID": "first"}, "SLURM_PROCID='first' is not a rank number"),
        ({"RANK": "0"}, "RANK=0 contradicts the scheduler, which says 4"),
        ({"WORLD_SIZE": "1"}, "WORLD_SIZE=1 contradicts the scheduler, which says 5"),
        ({"SLURM_TASKS_PER_NODE": "2(x"}, "is not of the form"),
    ],
)
def test_contradictions_are_refused(change: dict[str, str], words: str) -> None:
    """A wrong rank map trains on wrong rows or hangs; it never starts."""
    with pytest.raises(ClusterError, match=words):
        place_from_environment(SLURM | change)


def test_tasks_per_node_is_expanded() -> None:
    """Slurm's short form names each node's number of tasks."""
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]


# --- how they meet -----------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let `join` export what it likes; this process forgets it afterwards."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")
    return monkeypatch


@pytest.mark.usefixtures("environment")
def test_rank_zero_names_the_ranks_that_did_not_come(tmp_path: Path) -> None:
    """The error lists who is missing and who is there."""
    with pytest.raises(ClusterError, match=f"ranks 1, 2 of 3 did not come within 1 s; present: 0 on {_HOST}"):
        rendezvous.join(place_of(0, 3), tmp_path, device="cpu", timeout_s=1)


@pytest.mark.usefixtures("environment")
def test_a_rank_without_rank_zero_says_what_it_waited_for(tmp_path: Path) -> None:
    """Nothing was published in time."""
    with pytest.raises(ClusterError, match=r"rank 1 on .* could not reach rank 0: it never wrote .*test\.0\.json"):
        rendezvous.join(place_of(1, 2), tmp_path, device="cpu", timeout_s=1)


@pytest.mark.usefixtures("environment")
def test_a_rank_of_an_earlier_attempt_does_not_get_in(tmp_path: Path) -> None:
    """A zombie looks for its own attempt's file; one with another attempt inside is no address for it."""
    address = {"host": "127.0.0.1", "port": 1, "token": "t", "attempt": "test.1"}
    write_json(tmp_path / "test.1.json", address)
    write_json(tmp_path / "test.0.json", address)
    with pytest.raises(ClusterError, match="it never wrote"):
        rendezvous.join(place_of(1, 2, "test.0"), tmp_path, device="cpu", timeout_s=1)


def test_an_address_left_by_a_dead_process_is_overcome(tmp_path: Path) -> None:
    """A job id can come again on another day; ranks read the file again until somebody answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    stale = {"host": "127.0.0.1", "port": port, "token": "old", "attempt": "test.0"}
    write_json(tmp_path / "test.0.json", stale)
    group = Ranks(2, tmp_path)
    try:
        assert group.run(_world) == [2, 2]
    finally:
        group.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    group = Ranks(2, tmp_path_factory.mktemp("rendezvous"))
    yield group
    group.close()


def test_libraries_are_told_who_they_are(ranks: Ranks) -> None:
    """DeepSpeed and others read the environment; the port is the one that rank 0 really holds."""
    told = ranks.run(_environment)
    assert [each["RANK"] for each in told] == ["0", "1"]
    assert {each["WORLD_SIZE"] for each in told} == {"2"}
    assert {each["DS_ACCELERATOR"] for each in told} == {"cpu"}
    assert len({each["MASTER_PORT"] for each in told}) == 1


def test_the_token_does_not_lie_about(tmp_path: Path) -> None:
    """Once everyone is in, the address file is gone."""
    group = Ranks(1, tmp_path)
    group.close()
    assert list(tmp_path.iterdir()) == []


def test_ranks_wait_for_work_that_only_rank_zero_does(ranks: Ranks) -> None:
    """Without a collective, so its time-out does not count."""
    assert ranks.run(_work_of_rank_zero, "work/1", None) == ["done by 0", None]


def test_ranks_learn_that_rank_zero_failed(ranks: Ranks) -> None:
    """They raise its words instead of waiting for ever."""
    first, second = ranks.run(_work_of_rank_zero, "work/2", "no space left")
    assert first == "OSError: no space left"
    assert second == "ClusterError: rank 0 could not finish work/2: no space left"


def _world() -> int:
    import torch.distributed as dist

    return dist.get_world_size()


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR", "MASTER_PORT")}


def _work_of_rank_zero(name: str, trouble: str | None) -> Any:
    import torch.distributed as dist

    def work() -> str:
        if trouble:
            raise OSError(trouble)
        return f"done by {dist.get_rank()}"

    try:
        return rendezvous.after_rank_zero(name, work, rank=dist.get_rank(), timeout_s=60)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# --- which address -----------------------------------------------------------------------------


def test_one_node_needs_only_the_loopback() -> None:
    """It exists on every machine, whatever the host name resolves to."""
    assert rendezvous.reachable_address(1) == "127.0.0.1"


def test_the_site_can_name_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """$LAUNCHER_INTERFACE decides, and gloo and NCCL are told the same."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("LAUNCHER_INTERFACE", "lo")
    assert rendezvous.reachable_address(2) == "127.0.0.1"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"


def test_an_unknown_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message lists those that exist."""
    monkeypatch.setenv("LAUNCHER_INTERFACE", "ib9")
    with pytest.raises(ClusterError, match=r"no network interface 'ib9' .* there are .*lo"):
        rendezvous.reachable_address(2)


def test_a_host_name_that_means_the_loopback_is_not_given_to_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian writes 127.0.1.1 for the host's own name; another interface is taken, for gloo and NCCL too."""
    for name in ("LAUNCHER_INTERFACE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(socket, "gethostbyname", lambda _name: "127.0.1.1")
    monkeypatch.setattr(rendezvous, "_interfaces", lambda: {"lo": "127.0.0.1", "eth1": "10.1.2.3"})
    assert rendezvous.reachable_address(2) == "10.1.2.3"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1"


_HOST = socket.gethostname()


@pytest.mark.usefixtures("environment")
def test_a_rank_without_a_gpu_says_what_to_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU per task leaves every rank but the first without one."""
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ClusterError, match=r"local rank 1 .* sees 1 GPUs .*request GPUs per node, not per task"):
        rendezvous.join(place_of(1, 2), tmp_path, device="cuda", timeout_s=1)
