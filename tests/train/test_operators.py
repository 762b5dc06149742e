"""What DeepSpeed's collectives on CPUs leave on a machine: nothing."""

from __future__ import annotations

import os
from pathlib import Path

from tests.train.ranks import Ranks


def _mapped_and_named() -> tuple[int, list[str]]:
    """Buffers this rank has mapped, and those of its job that still have a name."""
    import torch.distributed as dist

    from launcher.worker.engine_deepspeed import prepare_deepspeed

    os.environ["LOCAL_SIZE"] = os.environ["WORLD_SIZE"]
    prepare_deepspeed()
    dist.barrier()  # the other rank has taken its name away too
    prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_"
    maps = {line.split()[5] for line in Path("/proc/self/maps").read_text().splitlines() if prefix in line}
    return len(maps), [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]


def test_shared_memory_does_not_outlive_its_processes(tmp_path: Path) -> None:
    """Both ranks use the buffers of both, and none of them has a name that would keep it after a kill -9."""
    ranks = Ranks(2, tmp_path / "rendezvous")
    try:
        assert ranks.run(_mapped_and_named) == [(2, []), (2, [])]
    finally:
        ranks.close()
