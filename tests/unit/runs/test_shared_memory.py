"""What killed ranks leave in shared memory is taken away, and nothing else."""

import mmap
import os
import time
from pathlib import Path

from launcher.runs.shared_memory import sweep

NAME = "deepspeed_allreduce_buffer_0_127.0.0.1_1234_"


def old(path: Path) -> Path:
    """A page that was written an hour ago."""
    path.write_bytes(b"x" * 4096)
    os.utime(path, (time.time() - 3600,) * 2)
    return path


def test_only_old_unmapped_files_of_that_name_go(tmp_path):
    """A mapped one, a fresh one, a link and a stranger's file stay."""
    left, used = old(tmp_path / f"{NAME}0"), old(tmp_path / f"{NAME}1")
    fresh, other = tmp_path / f"{NAME}2", old(tmp_path / "somebody-elses")
    fresh.write_bytes(b"x")
    link = tmp_path / f"{NAME}3"
    link.symlink_to(other)
    with used.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert sweep(tmp_path) == [left.name]
    assert {path.name for path in tmp_path.iterdir()} == {used.name, fresh.name, other.name, link.name}


def test_a_folder_that_is_not_there_is_nothing_to_sweep(tmp_path):
    """Not every system has one."""
    assert sweep(tmp_path / "nowhere") == []
