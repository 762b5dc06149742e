"""Operators: DeepSpeed compiles some at first use, behind a lock file that a killed process leaves behind for ever.

Whoever loads one here holds a lock of the kernel, which goes with its process; so a lock file that is found under it
was left by a process that is gone, and would make every later run wait without end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist


def load_shared_memory_operator() -> None:
    """Load (at first: compile) what DeepSpeed needs for collectives on CPUs, before it does so itself."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    with alone(Path(_get_build_directory(ShareMemCommBuilder.NAME, False))):
        ShareMemCommBuilder().load(verbose=False)


def forget_shared_memory() -> None:
    """Take away the names of the buffers that DeepSpeed's CPU collectives map; collective.

    Nobody else ever does: 66 MiB of the node's memory per rank stayed behind after every run, also after those that
    ended well. Every rank has mapped them when this is called, and what is mapped lives until the last process ends.
    """
    dist.barrier()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Build in `folder` while no other rank of any run does; a builder's lock file from before is removed.

    A file system without locks (some NFS mounts) is used as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".launcher.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)
