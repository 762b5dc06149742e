"""One rank of `scripts/bench checkpoint`: the worker's own engine and checkpoints; saves with and without waiting.

A request as JSON on stdin, rank 0's answer as JSON on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from bench_step import batch_of, build

WARM_STEPS = 3
BASE_STEPS = 6
SAVES = 3
PATIENCE_S = 300.0


class Bench:
    """An engine, its checkpoints, and a clock around every step."""

    def __init__(self, request: dict[str, Any]) -> None:
        from launcher.planning.plan import _candidate_from_json
        from launcher.worker.checkpoint import Checkpoints, Identity
        from launcher.worker.snapshot import HostMemory

        self.candidate = _candidate_from_json(request["candidate"])
        self.vocab = request["vocab"]
        on_gpu = request["device"] == "cuda"
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if on_gpu else "gloo")
        torch.manual_seed(0)
        self.engine = build(request, self.candidate, self.device)
        world = dist.get_world_size()
        identity = Identity(
            run_id="bench",
            attempt="bench.0",
            world_size=world,
            zero_stage=self.candidate.zero_stage,
            method=self.candidate.method,
        )
        memory = HostMemory(ranks_here=world)
        self.checkpoints = Checkpoints(Path(request["folder"]), identity, keep=1, memory=memory)
        self.memory = memory
        self.number = 0
        self.landed: Any = None

    def step(self) -> float:
        """Seconds of one optimizer step, with the votes of a save in flight."""
        self.number += 1
        tokens = self.candidate.global_batch * (self.candidate.seq_len - 1)
        batches = [
            batch_of(self.candidate, self.vocab, self.device) for _ in range(self.candidate.gradient_accumulation)
        ]
        dist.barrier()
        began = time.perf_counter()
        result = self.engine.train_step(
            batches, trained_tokens=tokens, learning_rate=1e-5, step=self.number, votes=self.checkpoints.votes
        )
        self.landed = self.checkpoints.heard(result.votes)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def blocking(self) -> tuple[float, int]:
        """Seconds training waits for one save, and its bytes."""
        dist.barrier()
        outcome = self.checkpoints.save_now(self.number, self.engine, {"step": self.number})
        if outcome.problem:
            raise RuntimeError(outcome.problem)
        return outcome.seconds, outcome.bytes

    def background(self) -> dict[str, Any]:
        """One save while training goes on: the wait for the copy, and the steps until it is on disk."""
        dist.barrier()
        began = time.perf_counter()
        failed = self.checkpoints.begin(self.number, self.engine, {"step": self.number})
        before_s = time.perf_counter() - began
        if failed:
            raise RuntimeError(failed.problem)
        steps = []
        while self.landed is None and time.perf_counter() - began < PATIENCE_S:
            steps.append(self.step())
        if self.landed is None or self.landed.problem:
            raise RuntimeError(self.landed.problem if self.landed else "the save never landed")
        # Asking for the copy, and what the update had to wait for its end.
        stall_s = max(before_s, self.landed.stall_s)
        self.landed = None
        return {"stall_s": stall_s, "steps_s": steps, "seconds": time.perf_counter() - began}


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Plain steps, saves that wait, saves that do not, plain steps again."""
    bench = Bench(request)
    for _ in range(WARM_STEPS):
        bench.step()
    before = [bench.step() for _ in range(BASE_STEPS)]
    blocking = []
    for _ in range(SAVES):
        bench.step()
        blocking.append(bench.blocking())
    bench.step()
    background = [bench.background() for _ in range(SAVES)]
    plain = before + [bench.step() for _ in range(BASE_STEPS)]
    step_s = median(plain)
    dist.barrier()
    dist.destroy_process_group()
    names = ("torch", "transformers", "peft", "deepspeed")
    return {
        "bytes": blocking[-1][1],
        "step_s": step_s,
        "blocking_s": [seconds for seconds, _ in blocking],
        "first_stall_s": background[0]["stall_s"],
        "stall_s": [save["stall_s"] for save in background[1:]],
        "background_s": [save["seconds"] for save in background[1:]],
        "overlapping_steps": [len(save["steps_s"]) for save in background[1:]],
        "slower_s": [sum(save["steps_s"]) - step_s * len(save["steps_s"]) for save in background[1:]],
        "host_bytes": bench.memory.reserved_bytes,
        "versions": {name: version(name) for name in names},
    }


def main() -> int:
    """Answer the request on stdin; whatever libraries print goes to stderr."""
    request = json.load(sys.stdin)
    answer = os.dup(1)
    os.dup2(2, 1)
    found = measure(request)
    with os.fdopen(answer, "w") as out:
        print(json.dumps(found), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
