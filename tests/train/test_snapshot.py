"""A snapshot is a copy: what training does afterwards is not in it, and what it writes is what was copied."""

from __future__ import annotations

import hashlib
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.worker.snapshot import FolderWriter, HostMemory, NoRoomError, SnapshotWriter, available_bytes, write_file

PLENTY = lambda: (1 << 40, 1 << 40)  # noqa: E731


def _state() -> dict[str, Any]:
    flat = torch.arange(1000, dtype=torch.float32)
    return {
        "weights": {"a": flat[100:200].view(10, 10), "b": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0)},
        "same": flat[100:200].view(10, 10),
        "step": torch.tensor(7.0),
        "flags": torch.tensor([True, False]),
        "plain": [1, "two", (3.0, None), {"four": [4]}],
        "shape": torch.Size((2, 3)),
    }


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and not isinstance(left, torch.Size):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)


def test_what_changes_after_the_copy_is_not_in_the_file(tmp_path: Path) -> None:
    """Tensors on the CPU, and Python objects, are changed in place between the copy and the write."""
    state = _state()
    writer = SnapshotWriter(HostMemory(available=PLENTY), tmp_path)
    writer.write("a.pt", state)
    writer.settle()
    state["weights"]["a"].zero_()
    state["weights"]["b"].fill_(-1)
    state["step"].add_(1)
    state["plain"][3]["four"].append(5)
    state["plain"].clear()
    writer.into()
    assert _equal(torch.load(tmp_path / "a.pt", weights_only=True), _state())


def test_large_tensors_of_the_host_are_copied_last(tmp_path: Path) -> None:
    """Up to `settle` the file would have what they hold then: whoever changes them waits for it."""
    large, small = torch.zeros(1 << 16), torch.zeros(8)
    writer = SnapshotWriter(HostMemory(available=PLENTY), tmp_path)
    writer.write("a.pt", {"large": large, "small": small})
    writer.arrive()
    large.fill_(1)
    small.fill_(1)
    writer.settle()
    large.fill_(2)
    writer.into()
    told = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (float(told["large"].max()), float(told["small"].max())) == (1.0, 0.0)


def test_the_buffers_are_used_again_and_the_second_file_is_the_second_state(tmp_path: Path) -> None:
    """Two saves one after the other take memory once, and neither file has anything of the other."""
    memory = HostMemory(available=PLENTY)
    sizes = []
    for number in range(3):
        writer = SnapshotWriter(memory, tmp_path / str(number))
        writer.write("a.pt", {"w": torch.full((300_000,), float(number)), "m": torch.full((70,), number)})
        writer.into()
        sizes.append(memory.reserved_bytes)
    for number in range(3):
        found = torch.load(tmp_path / str(number) / "a.pt", weights_only=True)
        assert found["w"].eq(number).all()
        assert found["m"].eq(number).all()
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_a_file_holds_what_a_view_shows_and_not_the_storage_behind_it(tmp_path: Path) -> None:
    """One row of a megabyte is a small file; the same view twice is written once."""
    large = torch.zeros(1000, 250)
    writer = SnapshotWriter(HostMemory(available=PLENTY), tmp_path)
    writer.write("a.pt", {"row": large[3], "again": large[3]})
    assert writer.bytes == 1000
    assert writer.into()["a.pt"]["bytes"] < 4000


def test_a_modules_state_dict_keeps_its_versions(tmp_path: Path) -> None:
    """torch keeps them as an attribute of the dict, which a plain copy would lose."""
    state = torch.nn.Linear(2, 2).state_dict()
    copied = HostMemory(available=PLENTY).copy(state)
    assert isinstance(copied, OrderedDict)
    assert copied._metadata == state._metadata  # type: ignore[attr-defined]


def test_a_file_is_described_by_what_is_on_disk_and_is_ours_alone(tmp_path: Path) -> None:
    """Size and sha256 are those of the file, its mode 0600 and its folders' 0700 whatever the umask."""
    old = os.umask(0o002)
    try:
        facts = write_file(tmp_path / "new" / "part" / "a.pt", _state())
    finally:
        os.umask(old)
    data = (tmp_path / "new" / "part" / "a.pt").read_bytes()
    assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "new/part", "new/part/a.pt")]
    assert modes == [0o700, 0o700, 0o600]


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file of this process may be larger than so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_writer_keeps_its_error_and_says_where_and_how_much_room_there_is(tmp_path: Path, small_files: int) -> None:
    """Nothing is raised inside an engine's collective save; the error has path, needed and free bytes."""
    writer = FolderWriter(tmp_path)
    writer.write("a.pt", {"w": torch.zeros(small_files)})
    writer.write("b.pt", {"w": torch.zeros(1)})
    assert isinstance(writer.failure, OSError)
    assert writer.failure.filename == str(tmp_path / "a.pt")
    assert "a.pt needs 400000 bytes" in str(writer.failure)
    assert "bytes are free" in str(writer.failure)
    assert not (tmp_path / "b.pt").exists()


def test_a_copy_that_does_not_fit_is_refused_before_memory_runs_out(tmp_path: Path) -> None:
    """The node's free memory is shared by its ranks; the writer keeps the refusal."""
    memory = HostMemory(ranks_here=4, available=lambda: (400 << 20, 1 << 30))
    writer = SnapshotWriter(memory, tmp_path)
    writer.write("a.pt", torch.zeros(25 << 20))
    assert isinstance(writer.failure, NoRoomError)
    assert "0.42 GB for 4 ranks" in str(writer.failure)
    assert memory.reserved_bytes == 0


def test_the_memory_of_this_machine_is_known() -> None:
    """Free is positive and at most all of it."""
    free, total = available_bytes()
    assert 0 < free <= total


def test_a_stage_is_pickled_by_value_whichever_python_writes_it():
    """Python 3.11.2 pickles an enum's member as a call of getattr, which loading weights alone refuses."""
    import pickle
    import pickletools

    from deepspeed.runtime.zero.config import ZeroStageEnum

    from launcher.worker.engine_deepspeed import _pickle_stages_by_value

    _pickle_stages_by_value()
    written = pickle.dumps(ZeroStageEnum.weights)
    assert "getattr" not in {argument for _, argument, _ in pickletools.genops(written)}
    assert pickle.loads(written) is ZeroStageEnum.weights
