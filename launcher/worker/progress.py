"""Progress: what rank 0 shows while it works: the heartbeat file, one line per logged step, a bar on a terminal.

Every rank shows its supervisor more: the pulse beats with each phase, step and evaluated batch.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from launcher.runs.folder import RunFolder
from launcher.runs.pulse import Pulse

_EVERY_S = 2.0
"""The heartbeat is on a shared file system: never more often than this, except when the state changes."""


class Progress:
    """Rank 0's voice, and every rank's pulse."""

    def __init__(self, run: RunFolder, *, rank: int, job_id: str, attempt: str, pulse: Pulse | None = None) -> None:
        self._run = run
        self._pulse = pulse or Pulse(None)
        self._speaks = rank == 0
        self._facts: dict[str, Any] = {"job_id": job_id, "attempt": attempt, "state": "starting"}
        self._beaten_s = 0.0
        self._bar: Any = None
        # A terminal gets a bar; its lines go to the file that a scheduler would have made of our output.
        self._terminal = self._speaks and sys.stderr.isatty()
        self._log: Path | None = run.log(job_id, 0) if self._speaks and sys.stdout.isatty() else None

    def state(self, name: str, **facts: Any) -> None:
        """Enter a state: starting, tokenizing, training, evaluating, saving, finishing; beats at once."""
        self.phase(name, facts.get("step"))
        self._facts |= {"state": name, **facts}
        self._beat()

    def phase(self, name: str, step: int | None = None) -> None:
        """Enter a phase that only the supervisor is told of; at the same place of the program on every rank.

        Raises:
            ValueError: no such phase.
        """
        self._pulse.beat(name, step)

    def alive(self) -> None:
        """Tell the supervisor that a long phase goes on."""
        self._pulse.beat()

    def step(self, **facts: Any) -> None:
        """Note a finished step (step, total_steps, loss, tokens_per_s, eta_s, peak_bytes); beats now and then."""
        self._pulse.beat("training", int(facts["step"]))
        self._facts |= facts
        if time.monotonic() - self._beaten_s >= _EVERY_S:
            self._beat()
        if self._terminal:
            self._advance(int(facts["step"]), int(facts["total_steps"]), float(facts["loss"]))

    def slow(self, facts: dict[str, Any] | None) -> None:
        """Name the rank that the others wait for (rank, host, times), or nobody; part of the next beats."""
        self._facts |= {"slow": facts}

    def warned(self, warnings: list[dict[str, Any]]) -> None:
        """What the run warns of now ({"code", "message", ...}), or nothing; part of the next beats."""
        self._facts |= {"warnings": warnings}

    def line(self, text: str) -> None:
        """One plain line for the log."""
        if not self._speaks:
            return
        if self._log is None:
            print(text, flush=True)
            return
        with self._log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def say(self, text: str) -> None:
        """A line that a person at a terminal should see too."""
        self.line(text)
        if self._speaks and self._log is not None:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _beat(self) -> None:
        if self._speaks:
            self._run.beat(**self._facts)
            self._beaten_s = time.monotonic()

    def _advance(self, step: int, total: int, loss: float) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step - 1, unit="step", dynamic_ncols=True, file=sys.stderr)
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update(step - self._bar.n)


def step_line(step: int, total: int, numbers: dict[str, float], eta_s: float) -> str:
    """The log line of a step."""
    return (
        f"step {step}/{total}  loss {numbers['loss']:.4f}  lr {numbers['learning_rate']:.3e}  "
        f"grad_norm {numbers['grad_norm']:.3f}  {numbers['tokens_per_s']:.0f} tokens/s  "
        f"eta {timedelta(seconds=round(eta_s))}"
    )
