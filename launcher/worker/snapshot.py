"""Snapshot: a state copied to host memory, written by a thread while training goes on.

An engine hands its state to a Writer, name by name, and never opens a file: an error of the disk inside a collective
save would leave the other ranks waiting in its barrier. Writers keep their error instead, and the checkpoint asks.

The copies live in buffers that are reused by every save, so their page faults are paid once; on a GPU they are pinned.
Tensors of the host are copied by the thread, while the next forward and backward pass read them; who changes them, the
update, waits until `settle` has returned (CheckFreq, FAST'21, calls it pipelining the snapshot).
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import mmap
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

_SLAB_BYTES = 64 << 20
_ALIGNED_BYTES = 64
_SMALL_BYTES = 64 << 10
"""Copied at once: counters and generators, which cost less than they are worth remembering."""
_RESERVE = 0.05
"""Share of the node's memory that a copy leaves alone."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Facts = dict[str, Any]
"""What a manifest says of a file: bytes and sha256."""


class Writer(Protocol):
    """Where an engine leaves its state; no method raises, `failure` tells."""

    def write(self, name: str, state: Any) -> None:
        """Keep `state` (tensors in containers, plain values) as the checkpoint's file `name`."""

    def copy_tree(self, name: str, source: Path, *, wanted: Callable[[str], bool]) -> None:
        """Keep the files below `source` whose names are wanted as the checkpoint's folder `name`."""


class NoRoomError(MemoryError):
    """The node's memory does not hold a copy of the state."""


class FolderWriter:
    """Writes at once; the training loop waits."""

    def __init__(self, folder: Path, *, moved: Callable[[int], None] | None = None) -> None:
        self.folder = folder
        self.files: dict[str, Facts] = {}
        self.failure: Exception | None = None
        self._moved = moved

    def write(self, name: str, state: Any) -> None:
        """Write, flush and hash; see Writer."""
        if self.failure is not None:
            return
        try:
            self.files[name] = write_file(self.folder / name, state, moved=self._moved)
        except Exception as error:
            self.failure = error

    def copy_tree(self, name: str, source: Path, *, wanted: Callable[[str], bool]) -> None:
        """Copy files; see Writer."""
        if self.failure is not None:
            return
        try:
            self.files |= copy_files(source, self.folder, name, wanted)
        except Exception as error:
            self.failure = error


class SnapshotWriter:
    """Copies to host memory; `settle` ends that and `into` writes, in any thread."""

    def __init__(self, memory: HostMemory, folder: Path) -> None:
        self._memory = memory
        self._folder = folder
        self._states: dict[str, Any] = {}
        self._copied: dict[str, Facts] = {}
        self.failure: Exception | None = None
        memory.begin()

    @property
    def bytes(self) -> int:
        """Bytes of tensors in the copy."""
        return self._memory.used_bytes

    def write(self, name: str, state: Any) -> None:
        """Copy; see Writer."""
        if self.failure is not None:
            return
        try:
            self._states[name] = self._memory.copy(state)
        except Exception as error:
            self.failure = error

    def copy_tree(self, name: str, source: Path, *, wanted: Callable[[str], bool]) -> None:
        """Files that training goes on changing cannot wait: they are copied now."""
        if self.failure is not None:
            return
        try:
            self._copied |= copy_files(source, self._folder, name, wanted)
        except Exception as error:
            self.failure = error

    def arrive(self) -> None:
        """Wait for what comes from a GPU. What the host holds itself must not change before `settle` has returned."""
        self._memory.arrive()

    def settle(self) -> None:
        """Copy what is still to be copied; the state may change afterwards."""
        self._memory.settle()

    def into(self, *, moved: Callable[[int], None] | None = None) -> dict[str, Facts]:
        """Write what was copied and forget it; file name -> bytes and sha256.

        Raises:
            OSError: the disk is full or the folder cannot be written; the message says how much room there is.
        """
        self.settle()
        files = dict(self._copied)
        for name in list(self._states):
            files[name] = write_file(self._folder / name, self._states.pop(name), moved=moved)
        return files


# --- host memory -------------------------------------------------------------------------------


class HostMemory:
    """Buffers for one copy of a rank's state: made by the first save, used again by every later one."""

    def __init__(self, *, ranks_here: int = 1, available: Callable[[], tuple[int, int]] | None = None) -> None:
        self._ranks_here = ranks_here
        self._available = available or available_bytes
        self._slabs: list[mmap.mmap] = []
        self._slab = 0
        self._offset = 0
        self._seen: dict[tuple[Any, ...], Tensor] = {}
        self._later: list[tuple[Tensor, Tensor]] = []
        self._on_gpu = False
        self.used_bytes = 0

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(len(slab) for slab in self._slabs)

    def begin(self) -> None:
        """Start a new copy over the old one, which must have been written."""
        self._slab = self._offset = self.used_bytes = 0
        self._seen, self._later = {}, []

    def copy(self, item: Any) -> Any:
        """`item` with every tensor in our buffers and everything else deep-copied.

        Views become tensors of their own, so that a file holds what was asked for and not the storage behind it; the
        same view twice stays one.

        Raises:
            NoRoomError: the node has too little memory left.
        """
        if isinstance(item, Tensor):
            return self._tensor(item)
        kind = type(item)
        if kind in (dict, OrderedDict):
            made = kind((copy.deepcopy(key), self.copy(value)) for key, value in item.items())
            if kind is OrderedDict:  # a module's state dict carries its versions as an attribute
                made.__dict__.update(copy.deepcopy(item.__dict__))
            return made
        if kind in (list, tuple):
            return kind(self.copy(value) for value in item)
        return item if isinstance(item, _PLAIN) else copy.deepcopy(item)

    def arrive(self) -> None:
        """Wait for copies from the GPU, in the thread that began them."""
        self._seen = {}
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()

    def settle(self) -> None:
        """Copy the host's own tensors, which must be as they were; at most once, in any thread."""
        later, self._later = self._later, []
        for made, source in later:
            made.copy_(source)

    def _tensor(self, tensor: Tensor) -> Tensor:
        source = tensor.detach()
        if type(source) not in (Tensor, torch.nn.Parameter) or source.layout is not torch.strided:
            return copy.deepcopy(source)
        if source.numel() == 0:
            return torch.empty_like(source, device="cpu")
        key = (source.data_ptr(), source.dtype, source.device, tuple(source.shape), source.stride())
        if key in self._seen:
            return self._seen[key]
        self._on_gpu = self._on_gpu or source.is_cuda
        target = self._buffer(source.numel() * source.element_size(), pinned=source.is_cuda)
        made = (
            target.view(source.dtype).view(source.shape) if source.numel() else torch.empty_like(source, device="cpu")
        )
        if source.is_cuda or source.numel() * source.element_size() < _SMALL_BYTES:
            made.copy_(source, non_blocking=source.is_cuda)
        else:
            self._later.append((made, source))
        if source.numel():
            self._seen[key] = made
        return made

    def _buffer(self, size: int, *, pinned: bool) -> Tensor:
        """`size` bytes with a storage of exactly that size, inside a slab."""
        while self._slab < len(self._slabs) and self._offset + size > len(self._slabs[self._slab]):
            self._slab, self._offset = self._slab + 1, 0
        if self._slab == len(self._slabs):
            self._slabs.append(self._new_slab(max(size, _SLAB_BYTES), pinned=pinned))
        made = torch.frombuffer(self._slabs[self._slab], dtype=torch.uint8, count=size, offset=self._offset)
        self._offset += -(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES
        self.used_bytes += size
        return made

    def _new_slab(self, size: int, *, pinned: bool) -> mmap.mmap:
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        free, total = self._available()
        if size > free / self._ranks_here - _RESERVE * total:
            raise NoRoomError(
                f"a copy of the state needs {size / 1e9:.2f} GB more and this node has {free / 1e9:.2f} GB for "
                f"{self._ranks_here} ranks"
            )
        slab = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                slab.madvise(mmap.MADV_HUGEPAGE)
        if pinned:
            # Pinned in place: torch's own pinned allocator would round up to a power of two.
            address = torch.frombuffer(slab, dtype=torch.uint8).data_ptr()
            torch.cuda.cudart().cudaHostRegister(address, size, 0)  # where refused, copies are slower and as right
        return slab


def available_bytes() -> tuple[int, int]:
    """(free, total) bytes of memory that this process may use: the machine's, or its control group's where smaller."""
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    kib = {name: int(value.split()[0]) for name, value in facts.items() if name in ("MemAvailable", "MemTotal")}
    free, total = kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    for limit, used in _group_limits():
        free, total = min(free, limit - used), min(total, limit)
    return max(free, 0), total


def _group_limits() -> Iterator[tuple[int, int]]:
    """(limit, in use) of every control group (version 2) this process is in; page cache counts as free."""
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    root = Path("/sys/fs/cgroup")
    group = root / line[3:].lstrip("/")
    for folder in [group, *group.parents]:
        if not folder.is_relative_to(root):
            return
        try:
            limit = (folder / "memory.max").read_text().strip()
            stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            if limit != "max":
                yield int(limit), int((folder / "memory.current").read_text()) - int(stat.get("file", 0))
        except (OSError, ValueError):
            continue


# --- files -------------------------------------------------------------------------------------


class _Sink:
    """A new file that counts and hashes what is written; an error is kept, so that torch's writer ends in peace."""

    def __init__(self, path: Path, moved: Callable[[int], None] | None) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self._moved = moved
        self._digest = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            done = 0
            while self.error is None and done < len(view):
                done += os.write(self._file, view[done : done + (16 << 20)])
        except OSError as error:
            self.error = error
        if self.error is None:
            self._digest.update(view)
            self.bytes += len(view)
            if self._moved:
                self._moved(len(view))
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> Facts:
        """Flush to the disk and describe the file."""
        try:
            if self.error is None:
                os.fsync(self._file)
        except OSError as error:
            self.error = error
        finally:
            os.close(self._file)
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}


def write_file(path: Path, state: Any, *, moved: Callable[[int], None] | None = None) -> Facts:
    """Write a new file with torch.save, flushed; `moved` hears of every piece. Returns its size and sha256.

    Raises:
        OSError: with the path, and for a full disk the bytes that are needed and free.
    """
    try:
        private_folder(path.parent)
        sink = _Sink(path, moved)
        try:
            torch.save(state, sink)
        finally:
            facts = sink.close()
        if sink.error:
            raise sink.error
    except OSError as error:
        raise _explained(error, path, state) from error
    return facts


def copy_files(source: Path, folder: Path, name: str, wanted: Callable[[str], bool]) -> dict[str, Facts]:
    """Copy the wanted files below `source` to `folder / name`, flushed and hashed on the way."""
    found: dict[str, Facts] = {}
    for path in sorted(path for path in source.rglob("*") if path.is_file() and wanted(path.name)):
        target = folder / name / path.relative_to(source)
        private_folder(target.parent)
        sink = _Sink(target, None)
        with path.open("rb") as file:
            while piece := file.read(16 << 20):
                sink.write(piece)
        facts = sink.close()
        if sink.error:
            raise _explained(sink.error, target, None) from sink.error
        found[target.relative_to(folder).as_posix()] = facts
    return found


def private_folder(folder: Path) -> None:
    """Make a folder and what is missing above it, for us alone, whatever the umask says."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def state_bytes(item: Any) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(item, Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, dict):
        return sum(state_bytes(value) for value in item.values())
    return sum(state_bytes(value) for value in item) if isinstance(item, list | tuple) else 0


def _explained(error: OSError, path: Path, state: Any) -> OSError:
    """The error with what a person needs: the file, and for a full disk how much is needed and free."""
    words = error.strerror or str(error)
    if error.errno in _FULL:
        folder = next(parent for parent in path.parents if parent.exists())
        free = shutil.disk_usage(folder).free
        words += f" ({path.name} needs {state_bytes(state)} bytes, {free} bytes are free)"
    return OSError(error.errno, words, str(path))
