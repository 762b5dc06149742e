"""Ranks: real processes in one gloo group, started once, that run many jobs one after another.

Importing transformers, PEFT and DeepSpeed takes 20 seconds per process; a test module pays for it once.
The group is made by the worker's own rendezvous.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 300.0
JOB_TIMEOUT_S = 300.0


class RankFailedError(AssertionError):
    """A rank raised; the message holds its traceback."""


class Ranks:
    """`world` processes; `run` calls the same function in all of them."""

    def __init__(self, world: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.world = world
        self._processes = []
        self._pipes: list[Any] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect(START_TIMEOUT_S)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = JOB_TIMEOUT_S) -> list[Any]:
        """What `function(*args)` returns on each rank; `function` is importable by name."""
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._collect(timeout_s)

    def close(self) -> None:
        """End the processes, those that hang too."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=3)
            if process.is_alive():
                process.kill()
                process.join()

    def _collect(self, timeout_s: float) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.world:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = sorted(set(range(self.world)) - answers.keys())
                self._kill()
                raise RankFailedError(f"ranks {missing} gave no answer within {timeout_s:.0f} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, f"rank {rank} died"
                if not ok:
                    self._kill()
                    raise RankFailedError(f"rank {rank} of {self.world}:\n{value}")
                answers[rank] = value
        return [answers[rank] for rank in range(self.world)]

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


def _serve(rank: int, world: int, folder: Path, pipe: Any) -> None:
    """A rank's life: join, then run what arrives until the pipe closes."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.stderr.flush()
    try:
        place = place_of(rank, world)
        import torch

        from launcher.worker import rendezvous

        torch.set_num_threads(1)
        rendezvous.join(place, folder, device="cpu", timeout_s=START_TIMEOUT_S)
        pipe.send((True, None))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            rendezvous.leave()
            return
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def place_of(rank: int, world: int, attempt: str = "test.0") -> Any:
    """Place of a rank on this one machine."""
    from launcher.worker.place import Place

    return Place(
        rank=rank,
        world_size=world,
        local_rank=rank,
        local_world_size=world,
        node_rank=0,
        nodes=1,
        host=socket.gethostname(),
        job_id=attempt.partition(".")[0],
        attempt=attempt,
    )
