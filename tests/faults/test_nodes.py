"""Nodes that go away, come back or lie, and the network between them: rows 15 to 17, 40, 49 and 54."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from launcher.runs.folder import RunFolder
from tests.cluster.bed import dev_cluster, slurm
from tests.faults.bed import SLOW, FaultBed
from tests.faults.conftest import Reference
from tests.faults.gauntlet import check_survival
from tests.faults.report import Row
from tests.faults.story import events, story

FINISHED = "finished"
NODES = [f"node{number}" for number in range(1, 5)]
LOST = ("NODE_FAIL|REQUEUED", "COMPLETED")


@pytest.fixture(autouse=True)
def slurm_row(row: Row) -> None:
    """Every row of this module is about Slurm."""
    row.where = "slurm"


@pytest.fixture(autouse=True)
def whole_cluster(slurm_bed: FaultBed) -> Iterator[None]:
    """Every node is up again after each test."""
    yield
    for node in NODES:
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True, check=False)
        dev_cluster("boot", node)
    slurm_bed.until(lambda: slurm("sinfo", "-h", "-t", "idle,mix,alloc", "-o", "%D").strip() == "4", "four nodes")


def case(name: str) -> pytest.MarkDecorator:
    """One parameter whose name carries the number in the matrix."""
    return pytest.mark.parametrize("_case", [pytest.param(None, id=name)])


def second_node(bed: FaultBed, run: RunFolder) -> str:
    """The node of the run's last rank, not that of its batch script."""
    return str(bed.after_event(run, "joined")["hosts"][-1])


@case("f15_node_set_down")
def test_node_set_down(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """A node that an administrator takes away costs the steps since the last checkpoint at most.

    The development cluster's node comes back at once (ReturnToService=2), so the run may get it again.
    """
    row.fault = "scontrol update state=down for one of two nodes"
    run = slurm_bed.inject("lora-down", SLOW)
    slurm_bed.after_step(run, 6)
    slurm("scontrol", "update", f"nodename={second_node(slurm_bed, run)}", "state=down", "reason=test")
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=("node_lost", FINISHED), states=LOST)


@case("f16_slurmd_lost_ranks_live")
def test_slurmd_lost(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """A node whose daemon is gone is given up by Slurm while its rank lives on: that rank may not write any more."""
    row.fault = "kill -9 of slurmd; the rank on that node lives on"
    run = slurm_bed.inject("lora-zombie", SLOW.replace("0.4", "1.5"))
    slurm_bed.after_step(run, 6)
    dev_cluster("kill-slurmd", second_node(slurm_bed, run))
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=("node_lost", FINISHED), states=LOST)


@case("f16_node_crashes")
def test_node_crash(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """A whole node dies at once, without a word."""
    row.fault = "every process of a node killed at once"
    run = slurm_bed.inject("lora-crash", SLOW)
    slurm_bed.after_step(run, 6)
    dev_cluster("crash", second_node(slurm_bed, run))
    causes, states = ("node_lost|rank_killed|peer_lost", FINISHED), ("NODE_FAIL|REQUEUED", "COMPLETED")
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=causes, states=states)


@case("f17_slurmd_restarts")
def test_slurmd_restart(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """A node's daemon that comes back in time disturbs nobody."""
    row.fault = "kill -9 of slurmd, started again at once"
    run = slurm_bed.inject("lora-reboot", SLOW)
    slurm_bed.after_step(run, 6)
    node = second_node(slurm_bed, run)
    dev_cluster("kill-slurmd", node)
    dev_cluster("boot", node)
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=(FINISHED,), states=("COMPLETED",), lost=0)


@case("f40_cyclic_ranks")
def test_cyclic_distribution(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """Ranks dealt to the nodes in turn train the same."""
    row.fault = "--distribution=cyclic on two nodes of two ranks"
    ranks = {"nodes": 2, "gpus_per_node": 2}
    reference = slurm_reference("lora-four", slurm=ranks)
    run = slurm_bed.inject("lora-cyclic", slurm=ranks | {"extra": {"distribution": "cyclic"}})
    check_survival(slurm_bed, run, reference, row, causes=(FINISHED,), states=("COMPLETED",), lost=0)


@case("f49_bad_node")
def test_bad_node(_case: None, slurm_bed: FaultBed, slurm_reference: Reference, row: Row) -> None:
    """A node on which two attempts failed is left out of the third."""
    row.fault = "rank 1 killed on the same node twice"
    run = slurm_bed.inject(
        "lora-badnode", "at=step,rank=1,step=6,do=kill;at=step,rank=1,step=10,do=kill", slurm={"requeue": True}
    )
    slurm_bed.until(run.result.exists, "the result", run, 600)
    nodes = [event["hosts"][-1] for event in events(run, "joined")]
    row.measure(run)
    row.seen = f"rank 1 on {', then '.join(nodes)}"
    assert nodes[0] == nodes[1]
    assert story(run)[1].decision["changes"].get("exclude") == [nodes[0]]
    assert nodes[0] not in events(run, "joined")[-1]["hosts"]


@pytest.fixture
def partition() -> Iterator[list[tuple[str, str]]]:
    """Pairs of nodes that do not see each other; joined again afterwards."""
    cut: list[tuple[str, str]] = []
    yield cut
    for node, address in cut:
        subprocess.run(["ip", "-n", node, "route", "del", "blackhole", address], capture_output=True, check=False)


def address(node: str) -> str:
    """Address of a node of the development cluster."""
    return f"10.77.0.{10 + int(node.removeprefix('node'))}/32"


@case("f54_network_cut_between_nodes")
def test_network_cut(
    _case: None, slurm_bed: FaultBed, slurm_reference: Reference, partition: list[tuple[str, str]], row: Row
) -> None:
    """Two nodes that lose each other while Slurm sees both: the hang is found and the run goes on elsewhere."""
    row.fault = "two nodes cut from each other; Slurm sees both"
    run = slurm_bed.inject("lora-cut", SLOW, survival={"hang_minutes": 0.5})
    slurm_bed.after_step(run, 6)
    first, second = slurm_bed.after_event(run, "joined")["hosts"]
    for node, other in ((first, second), (second, first)):
        subprocess.run(["ip", "-n", node, "route", "add", "blackhole", address(other)], check=True)
        partition.append((node, address(other)))
    slurm_bed.until(lambda: len(events(run, "decided")) == 1, "the end of the attempt", run, 400)
    for node, cut in partition:
        subprocess.run(["ip", "-n", node, "route", "del", "blackhole", cut], check=True)
    partition.clear()
    check_survival(slurm_bed, run, slurm_reference("lora"), row, causes=("hung|peer_lost", FINISHED))
