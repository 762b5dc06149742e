"""Stacks: what every thread of a rank is doing, asked from outside.

Python's faulthandler answers a signal in C, so it works while the GIL is held and while the main thread sits in a
collective. It writes into a memory file that the supervisor holds too: no file to clean up, no disk to be full.
A stopped process cannot answer. Light: no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import sys
import time
from collections.abc import Mapping

DESCRIPTOR = "LAUNCHER_STACK_FD"
"""Environment variable with the number of the open memory file."""
STACK_SIGNAL = signal.SIGRTMIN + 9
"""A real-time signal: no library of the training stack uses these, and NCCL has SIGUSR1."""
_LIMIT_BYTES = 256 * 1024
_POLL_S = 0.05
_FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')
_WAITING = re.compile(
    r"/torch/distributed/|/deepspeed/comm/|_engine_run_backward|/torch/cuda/.* in synchronize"
    r"|/torch/nn/parallel/distributed.py.* in _(distributed|default|sync)_"
    r"|in (all_reduce|all_gather|barrier|after_rank_zero|sum_over_ranks)\b"
)
"""Frames in which a rank waits for others. Backward counts: gradients are reduced inside it; so does reading a sum
over the ranks from a GPU."""


class Stacks:
    """The supervisor's end."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("launcher-stacks", os.MFD_CLOEXEC)

    @property
    def environment(self) -> dict[str, str]:
        """What the rank's environment needs."""
        return {DESCRIPTOR: str(self.descriptor)}

    def read(self) -> str:
        """Everything the rank wrote so far: the answer to a question, or a crash's last words."""
        return os.pread(self.descriptor, _LIMIT_BYTES, 0).decode(errors="replace")

    def ask(self, pid: int, *, patience_s: float) -> str:
        """Stacks of all threads of `pid`, which has called `answer`; empty when it does not answer in time."""
        before = len(self.read())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACK_SIGNAL)
        told, deadline = "", time.monotonic() + patience_s
        while time.monotonic() < deadline:
            time.sleep(_POLL_S)
            more = self.read()[before:]
            if more and more == told:
                break
            told = more
        return told


def answer(environ: Mapping[str, str] | None = None) -> None:
    """In the rank: answer the supervisor's question, and leave the stacks there on a crash (SEGV, ABRT, BUS, FPE).

    A rank started by hand has nobody who asks; its crashes are told on stderr.
    """
    number = (os.environ if environ is None else environ).get(DESCRIPTOR, "")
    if number.isdigit() and _is_open(int(number)):
        faulthandler.register(STACK_SIGNAL, file=int(number), all_threads=True)
        faulthandler.enable(file=int(number), all_threads=True)
    else:
        with contextlib.suppress(OSError, ValueError):  # stderr may be no real file
            faulthandler.enable(file=sys.stderr, all_threads=True)


def _is_open(number: int) -> bool:
    try:
        return "launcher-stacks" in os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115 - no file of that name
    except OSError:
        return False


def main_thread(stacks: str) -> list[str]:
    """Frames of the main thread, innermost first; faulthandler lists it last."""
    blocks = re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.MULTILINE)
    return [line.strip() for line in blocks[-1].splitlines() if line.strip().startswith("File ")]


def innermost(stacks: str) -> str:
    """Where the main thread is, as path:line in function; empty when nothing is known."""
    frame = _FRAME.match(next(iter(main_thread(stacks)), ""))
    return f"{'/'.join(frame[1].split('/')[-3:])}:{frame[2]} in {frame[3]}" if frame else ""


def waits_for_others(stacks: str) -> bool | None:
    """Whether the main thread is inside something that ends only when other ranks do their part; None: unknown."""
    frames = main_thread(stacks)
    if not frames:
        return None
    return any(_WAITING.search(frame) for frame in frames[:3])
