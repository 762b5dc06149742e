"""Slurm's spellings of amounts, times and GPUs, and what the kernel and quota commands say of file systems."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import ClusterError
from launcher.facts import slurm_text
from launcher.facts.places import lustre_quota_left, mount_of, place, quota_left
from launcher.facts.profile import read_profile

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
auto.home /home autofs rw 0 0
server:/export/home /home nfs4 rw,vers=4.2 0 0
10.0.0.1@o2ib:/fs1 /scratch lustre rw 0 0
tmpfs /scratch\\040old tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:a100:8(S:0-1)", [("a100", 8)]),
        ("gpu:8", [("", 8)]),
        ("gpu:a100:4(S:0,1),gpu:v100:2", [("a100", 4), ("v100", 2)]),
        ("craynetwork:4,gpu:a100:4", [("a100", 4)]),
        ("gpu:a100:no_consume:4", [("a100", 4)]),
        ("gpu:nvidia_a100_3g.20gb:8(S:0)", [("nvidia_a100_3g.20gb", 8)]),
        ("gpu:h100:4,lscratch:100,shard:h100:32", [("h100", 4)]),
        ("(null)", []),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: list[tuple[str, int]]) -> None:
    """GRES as sites write it; slices and shards keep their own names."""
    assert slurm_text.gpus(gres) == gpus


def test_amounts_times_and_flags() -> None:
    """mem counts MiB without a unit; a limit that is none is None, not zero."""
    assert slurm_text.tres("cpu=640,mem=10G,gres/gpu:a100=8") == {"cpu": 640, "mem": 10 * 2**30, "gres/gpu:a100": 8}
    assert slurm_text.tres("mem=512000,node=N") == {"mem": 512000 * 2**20}
    assert [slurm_text.seconds(text) for text in ("30 sec", "00:01:00", "1-00:00:00", "N/A", "")] == [
        *(30, 60, 86400, None, None)
    ]
    assert [slurm_text.minutes(text) for text in ("UNLIMITED", "INFINITE", "NONE", "1-12:00:00")] == [
        *(None, None, None, 36 * 60)
    ]
    assert [slurm_text.flag(text) for text in ("1", "no", "YES", "(null)", None)] == [True, False, True, None, None]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_no_text_breaks_a_parser(text: str) -> None:
    """Whatever Slurm prints, reading it raises nothing."""
    for listing in (text, f"PartitionName={text}", f"PartitionName=a MaxTime={text} State={text}"):
        assert all("PartitionName" in record for record in slurm_text.records(listing, "PartitionName"))
    for read in (slurm_text.tres, slurm_text.gpus, slurm_text.seconds, slurm_text.minutes, slurm_text.names):
        read(text)
    assert all(isinstance(value, str) for value in slurm_text.settings(text).values())
    assert all(len(row) == 2 for row in slurm_text.rows(text, ("a", "b")))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "nfs4"),
        ("/homework", "ext4"),
        ("/scratch/project", "lustre"),
        ("/scratch old/x", "tmpfs"),
        ("/", "ext4"),
    ],
)
def test_the_mount_that_holds_a_path(path: str, kind: str) -> None:
    """The longest mount point wins, an automounter's own entry never does, and blanks are written as \\040."""
    assert mount_of(Path(path), MOUNTS)[1] == kind


def test_what_a_quota_leaves() -> None:
    """Hard limit less use, in bytes; over it is nothing left, and no limit is no quota."""
    table = (
        "Disk quotas for user someone (uid 2000):\n"
        "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
        "server:/export/home  1000  4000  5000            100  0  0\n"
        "server:/full  6000*  4000  5000  6days  100  0  0\n"
        "server:/free  6000  0  0  100  0  0\n"
    )
    assert quota_left(table, "server:/export/home") == 4000 * 1024
    assert quota_left(table, "server:/full") == 0
    assert quota_left(table, "server:/free") is None
    assert quota_left("Disk quotas for user someone (uid 2000): none\n", "server:/free") is None
    assert lustre_quota_left("        /lustre7 982177580       0 1000000000       - 443208230 0 0 -\n") == (
        (1_000_000_000 - 982_177_580) * 1024
    )
    assert lustre_quota_left("/lustre/a/very/long/path\n      10*  5  8  6d  1  0  0 -\n") == 0
    assert lustre_quota_left("cannot open\n") is None


def test_a_folder_that_does_not_exist_yet_has_the_space_of_the_one_above(tmp_path: Path) -> None:
    """The runs folder is made later; its file system is known now."""
    found = place("runs", "runs", tmp_path / "not" / "yet")
    assert found is not None and found.type and found.free_bytes and found.free_bytes > 0


def test_zero_is_allowed_where_it_means_something(tmp_path: Path) -> None:
    """A partition may have no nodes or GPUs and a grace of no seconds; a site without CPUs is a mistake."""
    profile = tmp_path / "x.yaml"
    profile.write_text("partitions: [{name: a, nodes: 0, gpus_per_node: 0, preempt_grace_s: 0}]\nkill_wait_s: 0\n")
    assert read_profile(profile)["partitions"][0].gpus_per_node == 0
    profile.write_text("cpus_per_node: 0\npartitions: [{nodes: -1}]\nqos_limits: [{max_jobs: 1}]\n")
    with pytest.raises(ClusterError) as caught:
        read_profile(profile)
    said = str(caught.value)
    assert "cpus_per_node is '0'; expected more than 0" in said
    assert "nodes is '-1'; expected 0 or more" in said
    assert "a partition needs a name" in said and "a QOS needs a name" in said
