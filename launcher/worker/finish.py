"""Finish: from trained weights to an artifact that is proved, and result.json, which is what success means."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.planning.plan import Candidate
from launcher.recipe.schema import Recipe
from launcher.runs.folder import RunFolder, write_json
from launcher.worker import faults, forgetting
from launcher.worker.artifact import verify_artifact, write_artifact
from launcher.worker.engine import Engine
from launcher.worker.loop import Loop, Memory
from launcher.worker.loss import mean_loss
from launcher.worker.place import Place
from launcher.worker.progress import Progress
from launcher.worker.rendezvous import after_rank_zero
from launcher.worker.table import fingerprint

if TYPE_CHECKING:
    from launcher.worker.data import TokenCache

ARTIFACT_TIMEOUT_S = 4 * 3600.0
PROBE_ROWS = 64
"""Rows on which the artifact, loaded again by rank 0 alone, must have the loss of the trained model."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """What is known when the last step is done."""

    folder: RunFolder
    place: Place
    recipe: Recipe
    candidate: Candidate
    tokenizer: Any
    tokens: TokenCache
    progress: Progress
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    started_s: float

    def work(self, loop: Loop, engine: Engine) -> None:
        """Gather, write, verify; result.json last. Collective; ranks other than 0 wait for rank 0."""
        self.progress.state("finishing")
        peaks = peaks_of(loop.device)
        probe = Head(self.tokens.validation or self.tokens.train, PROBE_ROWS)
        expected_loss = loop.evaluate(probe)
        state = engine.full_state()

        def write() -> dict[str, Any]:
            self.folder.check()
            path = write_artifact(
                state or {}, engine.module, self.tokenizer, self.recipe, self.folder, data_key=self.tokens.key
            )
            faults.at("export", rank=self.place.rank, step=loop.memory.step)
            return verify_artifact(
                path,
                self.recipe,
                self.candidate,
                evaluate=partial(self._evaluate_alone, probe, loop.device),
                expected_loss=expected_loss,
                device=str(loop.device),
            )

        name = f"artifact/{self.folder.run_id}/{self.place.attempt}"
        facts = after_rank_zero(name, write, rank=self.place.rank, timeout_s=ARTIFACT_TIMEOUT_S)
        if self.place.rank == 0:
            self._result(loop, facts, peaks)

    def _evaluate_alone(self, rows: Head, device: torch.device, model: nn.Module) -> float:
        """Mean loss of a reloaded model, under the autocast that the engine used."""
        autocast = _AUTOCAST.get(self.candidate.precision) if self.candidate.zero_stage == 0 else None
        width = self.candidate.micro_batch
        starts = range(0, len(rows), width)
        batches = (self.collate([rows.row(n) for n in range(at, min(at + width, len(rows)))]) for at in starts)
        return mean_loss(model, batches, device=device, autocast=autocast)

    def _result(self, loop: Loop, artifact: dict[str, Any], peaks: dict[str, int | None]) -> None:
        memory = loop.memory
        warnings = self._warnings(memory)
        losses = {
            f"{name}_loss": {"before": memory.before.get(name), "after": memory.after.get(name)}
            for name in ("validation", "retention")
        }
        result = {
            "schema": 1,
            "run_id": self.folder.run_id,
            **self.place.names,
            "method": self.candidate.method,
            "world_size": self.place.world_size,
            "zero_stage": self.candidate.zero_stage,
            "step": memory.step,
            "tokens": memory.tokens,
            "train_loss": {"first": memory.first_loss, "last": memory.last_loss},
            **losses,
            "retention_rise": forgetting.rise(memory.before, memory.after),
            "warnings": warnings,
            "data": self._data(loop),
            "artifact": artifact,
            "train_s": memory.train_s,
            "wall_s": time.monotonic() - self.started_s,
            **peaks,
            "finished_time_s": time.time(),
        }
        self.folder.check()
        write_json(self.folder.result, result)
        self.folder.record("completed", **self.place.names, step=memory.step)
        self.progress.say(f"finished after step {memory.step}: {artifact['path']}")

    def _warnings(self, memory: Memory) -> list[dict[str, Any]]:
        """What the result is to be looked at for; what was not said during training is said now."""
        method, limit = self.candidate.method, self.recipe.data.retention_max_rise
        forgot = forgetting.warning(memory.step, memory.before, memory.after, limit, method=method)
        worse = forgetting.worse_than_base(memory.step, memory.before, memory.after)
        if worse:
            self.progress.say(f"warning: {worse['message']}")
        return [found for found in (forgot, worse) if found]

    def _data(self, loop: Loop) -> dict[str, str | None]:
        """What was trained and measured on, so that runs on the same rows can be told: key of the cache, and hashes."""
        held = {name: rows for name, rows in loop.held_out.items() if hasattr(rows, "documents")}
        hashes: dict[str, str | None] = {f"{name}_sha256": fingerprint(rows.documents()) for name, rows in held.items()}
        return {"key": self.tokens.key} | hashes


def peaks_of(device: torch.device) -> dict[str, int | None]:
    """Most memory that rank 0 has held so far: of the device, by torch's allocator, and of the host."""
    of_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"peak_bytes": of_device, "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


class Head:
    """The first rows of a table."""

    def __init__(self, table: Any, count: int) -> None:
        self._table = table
        self._count = min(count, len(table))
        self.trained_tokens = table.trained_tokens[: self._count]

    def __len__(self) -> int:
        return self._count

    def row(self, index: int) -> Any:
        """Row `index` of the table."""
        return self._table.row(index)
