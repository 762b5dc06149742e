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


def load_shared_memory_operator() -> None:
    """Load (at first: compile) what DeepSpeed needs for collectives on CPUs, before it does so itself."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    with alone(Path(_get_build_directory(ShareMemCommBuilder.NAME, False))):
        ShareMemCommBuilder().load(verbose=False)


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
