"""One rank, start to finish: from a run folder to its result.

Everything a rank needs is in the folder (recipe.resolved.yaml, plan.json, ds_config.json) and in the environment
(which rank it is); it decides nothing about the plan. The order matters: signal flags stand before the heavy
imports, tokens are made before the process group exists, weights come after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ClusterError, LauncherError
from launcher.planning.plan import Candidate, plan_from_json
from launcher.recipe.load import load_recipe
from launcher.recipe.schema import Recipe
from launcher.runs.folder import RunFolder, write_json
from launcher.worker import rendezvous
from launcher.worker.progress import Progress
from launcher.worker.rendezvous import Place
from launcher.worker.stopping import StopFlag

if TYPE_CHECKING:
    import torch
    from torch import nn

    from launcher.worker.checkpoint import Checkpoints
    from launcher.worker.data import TokenCache
    from launcher.worker.engine import Engine
    from launcher.worker.loop import Loop, Memory
    from launcher.worker.tracking import Tracker

JOIN_TIMEOUT_S = 900.0
"""From the first rank at the rendezvous to the last: imports from a cold shared file system take minutes."""
TOKENS_TIMEOUT_S = 24 * 3600.0
"""Ranks wait this long for rank 0's token cache; the job's time limit ends it earlier."""
ARTIFACT_TIMEOUT_S = 4 * 3600.0
PROBE_ROWS = 64
"""Rows on which the artifact, loaded again by rank 0 alone, must have the loss of the trained model."""


def run(run_dir: Path) -> int:
    """Run this process's rank of the job; returns its exit code and never raises.

    0: finished, or stopped on request with a checkpoint (then without result.json), or nothing was left to do.
    An error is printed once with its traceback, and recorded in `errors/rank-N.json` and the ledger.
    """
    stop = StopFlag.install()
    folder = RunFolder(Path(run_dir).resolve())
    place: Place | None = None
    try:
        place = rendezvous.place_from_environment(os.environ)
        if folder.result.exists():
            print(f"{folder.run_id} is finished already ({folder.result}); nothing to do", flush=True)
            return 0
        train(folder, place, stop, join=rendezvous.join)
        rendezvous.leave()
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _failed(folder, place, error)


def train(folder: RunFolder, place: Place, stop: StopFlag, *, join: Callable[..., None]) -> None:
    """The life of a rank. `join` brings up the process group; it is called once, after the tokens are there.

    Raises:
        LauncherError: something a user can fix, by its class.
    """
    started_s = time.monotonic()
    recipe, candidate = _read(folder, place)
    progress = Progress(folder, rank=place.rank, job_id=place.job_id, attempt=place.attempt)
    if place.rank == 0:
        folder.record("started", **_names(place), world_size=place.world_size, hosts=[place.host])
    progress.state("tokenizing")
    tokenizer, tokens = _tokens(folder, place, recipe, candidate)
    for notice in tokens.stats.get("notices", []):
        progress.say(f"warning: {notice}")
    progress.state("starting")
    join(place, folder.rendezvous, device=candidate.device, timeout_s=JOIN_TIMEOUT_S)
    rank = _Rank(
        folder=folder, place=place, recipe=recipe, candidate=candidate, tokenizer=tokenizer, tokens=tokens,
        progress=progress, stop=stop, started_s=started_s,
    )  # fmt: skip
    with rank.tracking():
        rank.work()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rank:
    """What is fixed while one rank works."""

    folder: RunFolder
    place: Place
    recipe: Recipe
    candidate: Candidate
    tokenizer: Any
    tokens: TokenCache
    progress: Progress
    stop: StopFlag
    started_s: float
    _tracker: list[Tracker] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def tracking(self) -> Iterator[None]:
        """Open the tracker and close it with the status the work ended in."""
        from launcher.worker.tracking import make_tracker

        tracker = make_tracker(self.recipe, self.folder, self.place.rank)
        self._tracker.append(tracker)
        try:
            yield
        except BaseException:
            tracker.finish("failed")
            raise
        finally:
            self.progress.close()
        tracker.finish("completed" if self.folder.result.exists() else "stopped")

    def work(self) -> None:
        """Build, resume, train, and leave a checkpoint (stopped) or an artifact and result.json (completed)."""
        self._note_hosts()
        loop, engine, checkpoints = self._prepare()
        self._resume(loop, engine, checkpoints)
        reason = loop.run()
        if reason is not None:
            self._stopped(reason, loop.memory.step)
            return
        self.progress.state("finishing")
        facts = self._artifact(loop, engine)
        if self.place.rank == 0:
            self._finish(loop.memory, facts)

    # --- before the first step -----------------------------------------------------------------

    def _prepare(self) -> tuple[Loop, Engine, Checkpoints]:
        import torch

        from launcher.worker.checkpoint import Checkpoints, Identity
        from launcher.worker.data import Order
        from launcher.worker.schedule import learning_rates, total_steps

        train = self.recipe.train
        order = Order(rows=len(self.tokens.train), global_batch=self.candidate.global_batch, seed=train.seed)
        steps = total_steps(train.max_steps, train.num_train_epochs, order.steps_per_epoch)
        device = torch.device(_device(self.candidate, self.place))
        engine = self._engine(device, steps)
        identity = Identity(
            run_id=self.folder.run_id,
            attempt=self.place.attempt,
            world_size=self.place.world_size,
            zero_stage=self.candidate.zero_stage,
            method=self.candidate.method,
        )
        checkpoints = Checkpoints(self.folder.checkpoints, identity, keep=self.recipe.checkpoint.save_total_limit)
        rates = learning_rates(
            self.candidate.lr_scheduler_type, self.candidate.learning_rate, self.candidate.warmup_ratio, steps
        )
        return self._loop(engine, checkpoints, order, device, rates, steps), engine, checkpoints

    def _engine(self, device: torch.device, steps: int) -> Engine:
        from launcher.worker import model as models
        from launcher.worker.engine import Hooks, make_engine

        ds_config = None
        if self.candidate.zero_stage > 0:
            from launcher.worker.engine_deepspeed import prepare_deepspeed

            ds_config = json.loads(self.folder.ds_config.read_text(encoding="utf-8"))
            prepare_deepspeed()
        _seed(self.recipe.train.seed)  # the same adapter on every rank, and in every attempt
        model = models.build_model(
            self.recipe, self.candidate, device=str(device), ds_config=ds_config, total_steps=steps
        )
        _seed(self.recipe.train.seed + 1 + self.place.rank)  # but not the same dropout
        hooks = Hooks(before_clipping=models.adalora_regularize, after_step=models.adalora_after_step)
        return make_engine(model, self.candidate, device=device, ds_config=ds_config, hooks=hooks)

    def _loop(
        self,
        engine: Engine,
        checkpoints: Checkpoints,
        order: Any,
        device: torch.device,
        rates: Callable[[int], float],
        steps: int,
    ) -> Loop:
        from launcher.worker.loop import Layout, Loop, Rhythm
        from launcher.worker.model import adalora_state

        def save(memory: Memory) -> Path:
            state = {"memory": dataclasses.asdict(memory), "adalora": adalora_state(engine.module)}
            return checkpoints.save(memory.step, engine, state)

        saving, train = self.recipe.checkpoint, self.recipe.train
        return Loop(
            engine=engine,
            train=self.tokens.train,
            validation=self.tokens.validation,
            order=order,
            layout=Layout(
                rank=self.place.rank,
                world_size=self.place.world_size,
                micro_batch=self.candidate.micro_batch,
                accumulation=self.candidate.gradient_accumulation,
            ),
            rhythm=Rhythm(
                total_steps=steps,
                logging_steps=train.logging_steps,
                eval_steps=train.eval_steps if isinstance(train.eval_steps, int) else None,
                save_steps=saving.save_steps,
                save_s=None if saving.save_minutes is None else saving.save_minutes * 60.0,
            ),
            device=device,
            collate=self._collate(),
            learning_rate=rates,
            save=save,
            tracker=self._tracker[0],
            progress=self.progress,
            stop=self.stop,
        )

    def _collate(self) -> Callable[[list[Any]], Any]:
        from launcher.worker.data import collate, needs_flat

        flat = self.candidate.packing and needs_flat(self.candidate.attn_implementation)
        return partial(collate, pad_token_id=int(self.tokenizer.pad_token_id), flat=flat)

    def _resume(self, loop: Loop, engine: Engine, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint that verifies, if the run ever finished one."""
        from launcher.worker.loop import Memory
        from launcher.worker.model import load_adalora_state

        path = checkpoints.newest()
        for notice in checkpoints.notices:
            self.progress.say(f"warning: {notice}")
        if path is None:
            return
        state = checkpoints.load(path, engine)
        load_adalora_state(engine.module, state["adalora"])
        loop.memory = Memory(**state["memory"])
        self.progress.say(f"resumed after step {loop.memory.step} from {path.name}")
        if self.place.rank == 0:
            self.folder.record("resumed", **_names(self.place), step=loop.memory.step, checkpoint=path.name)

    def _note_hosts(self) -> None:
        """Which machines take part is known once they have met."""
        import torch.distributed as dist

        hosts: list[Any] = [None] * self.place.world_size
        dist.all_gather_object(hosts, self.place.host)
        if self.place.rank == 0:
            self.folder.record("joined", **_names(self.place), hosts=list(dict.fromkeys(hosts)))

    # --- after the last step -------------------------------------------------------------------

    def _stopped(self, reason: str, step: int) -> None:
        """The ranks agreed to stop and the checkpoint is written; whether Slurm requeues is not decided here."""
        self.progress.say(f"stopped after step {step} ({reason}); a checkpoint is there")
        if self.place.rank == 0:
            self.folder.record("stopped", **_names(self.place), reason=reason, step=step)

    def _artifact(self, loop: Loop, engine: Engine) -> dict[str, Any] | None:
        """Write the artifact and prove it; the facts on rank 0, None elsewhere. The others wait."""
        from launcher.worker.artifact import verify_artifact, write_artifact

        probe = _Head(self.tokens.validation or self.tokens.train, PROBE_ROWS)
        expected_loss = loop.evaluate(probe)
        state = engine.full_state()

        def write() -> dict[str, Any]:
            path = write_artifact(state or {}, engine.module, self.tokenizer, self.recipe, self.folder)
            return verify_artifact(
                path,
                self.recipe,
                self.candidate,
                evaluate=partial(self._evaluate_alone, probe, loop.device),
                expected_loss=expected_loss,
                device=str(loop.device),
            )

        facts: dict[str, Any] | None = rendezvous.after_rank_zero(
            f"artifact/{self.folder.run_id}/{self.place.attempt}",
            write,
            rank=self.place.rank,
            timeout_s=ARTIFACT_TIMEOUT_S,
        )
        return facts

    def _evaluate_alone(self, rows: _Head, device: torch.device, model: nn.Module) -> float:
        """Mean loss of a reloaded model, under the autocast that the engine used."""
        import torch

        from launcher.worker.loss import mean_loss

        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        autocast = kinds.get(self.candidate.precision) if self.candidate.zero_stage == 0 else None
        collate, width = self._collate(), self.candidate.micro_batch
        starts = range(0, len(rows), width)
        batches = (collate([rows.row(n) for n in range(at, min(at + width, len(rows)))]) for at in starts)
        return mean_loss(model, batches, device=device, autocast=autocast)

    def _finish(self, memory: Memory, artifact: dict[str, Any] | None) -> None:
        write_json(
            self.folder.result,
            {
                "schema": 1,
                "run_id": self.folder.run_id,
                **_names(self.place),
                "method": self.candidate.method,
                "world_size": self.place.world_size,
                "zero_stage": self.candidate.zero_stage,
                "step": memory.step,
                "tokens": memory.tokens,
                "train_loss": {"first": memory.first_loss, "last": memory.last_loss},
                "validation_loss": {"before": memory.loss_before, "after": memory.loss_after},
                "artifact": artifact,
                "train_s": memory.train_s,
                "wall_s": time.monotonic() - self.started_s,
                "finished_time_s": time.time(),
            },
        )
        self.folder.record("completed", **_names(self.place), step=memory.step)
        self.progress.say(f"finished after step {memory.step}: {artifact['path'] if artifact else ''}")


class _Head:
    """The first rows of a table."""

    def __init__(self, table: Any, count: int) -> None:
        self._table = table
        self._count = min(count, len(table))
        self.trained_tokens = table.trained_tokens[: self._count]

    def __len__(self) -> int:
        return self._count

    def row(self, index: int) -> Any:
        return self._table.row(index)


# --- reading -----------------------------------------------------------------------------------


def _read(folder: RunFolder, place: Place) -> tuple[Recipe, Candidate]:
    """The recipe with every value filled in, and the plan's candidate.

    Raises:
        ClusterError: the job started with another number of ranks than planned.
    """
    recipe = load_recipe(folder.resolved)
    candidate = plan_from_json(json.loads(folder.plan.read_text(encoding="utf-8"))).chosen.candidate
    if place.world_size != candidate.world_size:
        raise ClusterError(
            f"the job has {place.world_size} ranks, the plan {candidate.world_size} "
            f"({candidate.nodes} nodes x {candidate.gpus_per_node}); submit the run again, or plan for these ranks"
        )
    return recipe, candidate


def _tokens(folder: RunFolder, place: Place, recipe: Recipe, candidate: Candidate) -> tuple[Any, TokenCache]:
    """Tokenizer and token cache; rank 0 makes the cache, the others wait for it without a process group."""
    from launcher.worker.data import build_token_cache, open_token_cache
    from launcher.worker.model import load_tokenizer

    tokenizer = load_tokenizer(recipe)
    cache = Path(os.environ.get("LAUNCHER_CACHE") or folder.path.parent / ".cache") / "tokens"
    if place.rank == 0:
        return tokenizer, build_token_cache(recipe, candidate, tokenizer, cache, scope=place.attempt)
    wait_s, scope = TOKENS_TIMEOUT_S, place.attempt
    return tokenizer, open_token_cache(recipe, candidate, tokenizer, cache, wait_s=wait_s, scope=scope)


def _device(candidate: Candidate, place: Place) -> str:
    """This rank's device; all GPUs of the node are visible and the local rank chooses.

    Raises:
        ClusterError: there is no GPU of that number.
    """
    if candidate.device != "cuda":
        return "cpu"
    import torch

    if torch.cuda.device_count() <= place.local_rank:
        raise ClusterError(
            f"local rank {place.local_rank} on {place.host} sees {torch.cuda.device_count()} GPUs "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); "
            "request GPUs per node, not per task"
        )
    torch.cuda.set_device(place.local_rank)
    return f"cuda:{place.local_rank}"


def _seed(seed: int) -> None:
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _names(place: Place) -> dict[str, str]:
    return {"job_id": place.job_id, "attempt": place.attempt}


# --- failing -----------------------------------------------------------------------------------


def _failed(folder: RunFolder, place: Place | None, error: Exception) -> int:
    """Say it once, write it down, and give the exit code of its class (1: our bug)."""
    code = error.exit_code if isinstance(error, LauncherError) else 1
    rank = place.rank if place else -1
    traceback.print_exc()
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        errors = folder.path / "errors"
        errors.mkdir(mode=0o700, exist_ok=True)
        facts = {"type": type(error).__name__, "message": str(error), "exit_code": code, "rank": rank}
        write_json(
            errors / f"rank-{rank}.json",
            {
                **facts,
                **(_names(place) if place else {}),
                "host": place.host if place else socket.gethostname(),
                "time_s": time.time(),
                "traceback": traceback.format_exc(),
            },
        )
        folder.record("failed", error=f"{type(error).__name__}: {error}", rank=rank, exit_code=code)
    return code


def main(argv: list[str]) -> int:
    """`python -m launcher.worker.main RUN_DIR`."""
    if len(argv) != 2:
        print("usage: python -m launcher.worker.main RUN_DIR", file=sys.stderr)
        return 2
    return run(Path(argv[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
