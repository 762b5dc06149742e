"""Rank: the parts of the worker put together, from a joined process group to a checkpoint or a result."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from launcher.planning.plan import Candidate
from launcher.recipe.schema import Recipe
from launcher.runs.fence import Fence
from launcher.runs.folder import RunFolder
from launcher.worker import model as models
from launcher.worker.checkpoint import Checkpoints, Identity
from launcher.worker.checks import check_ranks
from launcher.worker.data import Order, collate, needs_flat
from launcher.worker.engine import Engine, Hooks, make_engine
from launcher.worker.finish import Finish, peaks_of
from launcher.worker.loop import Layout, Loop, Memory, Rhythm
from launcher.worker.pace import Pace, Stopwatch, Stragglers
from launcher.worker.place import Place
from launcher.worker.progress import Progress
from launcher.worker.rendezvous import device_name
from launcher.worker.retention import sampled_rows
from launcher.worker.saving import Saving
from launcher.worker.schedule import learning_rates, total_steps
from launcher.worker.snapshot import HostMemory
from launcher.worker.stopping import StopFlag

if TYPE_CHECKING:
    from launcher.worker.data import TokenCache
    from launcher.worker.tracking import Tracker


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """What is fixed while one rank works."""

    folder: RunFolder
    place: Place
    recipe: Recipe
    candidate: Candidate
    tokenizer: Any
    tokens: TokenCache
    tracker: Tracker
    progress: Progress
    stop: StopFlag
    started_s: float
    """time.monotonic() when this process began."""
    fence: Fence | None = None
    """This attempt's right to write."""

    def work(self) -> str | None:
        """Build, resume, train, and leave a checkpoint (stopped: why) or an artifact and result.json (None)."""
        hosts = self._note_hosts()
        self.progress.phase("building")
        device = torch.device(device_name(self.place, self.candidate.device))
        self._check(device)
        order, steps = self._order()
        engine = self._engine(device, steps)
        checkpoints = self._checkpoints()
        loop = self._loop(engine, checkpoints, order, device, steps)
        loop.pace = self._pace(engine, device, hosts)
        self.progress.phase("loading")
        self._resume(loop, engine, checkpoints)
        reason = loop.run()
        if reason is not None:
            self._stopped(reason, loop.memory, peaks_of(device))
            return reason
        finish = Finish(
            folder=self.folder,
            place=self.place,
            recipe=self.recipe,
            candidate=self.candidate,
            tokenizer=self.tokenizer,
            tokens=self.tokens,
            progress=self.progress,
            collate=loop.collate,
            started_s=self.started_s,
        )
        finish.work(loop, engine)
        return None

    # --- putting together ----------------------------------------------------------------------

    def _order(self) -> tuple[Order, int]:
        """Which rows each step trains, and how many steps there are."""
        train = self.recipe.train
        order = Order(rows=len(self.tokens.train), global_batch=self.candidate.global_batch, seed=train.seed)
        return order, total_steps(train.max_steps, train.num_train_epochs, order.steps_per_epoch)

    def _engine(self, device: torch.device, steps: int) -> Engine:
        ds_config = None
        if self.candidate.zero_stage > 0:
            from launcher.worker.engine_deepspeed import prepare_deepspeed

            ds_config = json.loads(self.folder.ds_config_of(self.candidate.world_size).read_text(encoding="utf-8"))
            prepare_deepspeed()
        _seed(self.recipe.train.seed)  # the same adapter on every rank, and in every attempt
        model = models.build_model(
            self.recipe, self.candidate, device=str(device), ds_config=ds_config, total_steps=steps
        )
        _seed(self.recipe.train.seed + 1 + self.place.rank)  # but not the same dropout
        hooks = Hooks(before_clipping=models.adalora_regularize, after_step=models.adalora_after_step)
        return make_engine(model, self.candidate, device=device, ds_config=ds_config, hooks=hooks)

    def _checkpoints(self) -> Checkpoints:
        identity = Identity(
            run_id=self.folder.run_id,
            attempt=self.place.attempt,
            world_size=self.place.world_size,
            zero_stage=self.candidate.zero_stage,
            method=self.candidate.method,
        )
        return Checkpoints(
            self.folder.checkpoints,
            identity,
            keep=self.recipe.checkpoint.save_total_limit,
            fence=self.fence,
            memory=HostMemory(ranks_here=self.place.local_world_size),
            waiting=self.progress.alive,
        )

    def _saving(self, engine: Engine, checkpoints: Checkpoints) -> Saving:
        plan = json.loads(self.folder.plan.read_text(encoding="utf-8"))
        job = json.loads(self.folder.job.read_text(encoding="utf-8")) if self.folder.job.exists() else {}
        return Saving(
            checkpoints=checkpoints,
            engine=engine,
            extra=lambda: {"adalora": models.adalora_state(engine.module)},
            background=self.recipe.checkpoint.background is not False,
            folder=self.folder,
            place=self.place,
            progress=self.progress,
            predicted_s=plan["chosen"].get("save_s"),
            lead_s=job.get("signal_lead_s"),
        )

    def _loop(self, engine: Engine, checkpoints: Checkpoints, order: Order, device: torch.device, steps: int) -> Loop:
        candidate = self.candidate
        tables = {"validation": self.tokens.validation, "retention": self._retention(engine)}
        return Loop(
            engine=engine,
            train=self.tokens.train,
            held_out={name: table for name, table in tables.items() if table is not None and len(table)},
            order=order,
            layout=Layout(
                rank=self.place.rank,
                world_size=self.place.world_size,
                micro_batch=candidate.micro_batch,
                accumulation=candidate.gradient_accumulation,
            ),
            rhythm=self._rhythm(steps),
            device=device,
            collate=self._collate(),
            learning_rate=learning_rates(
                candidate.lr_scheduler_type, candidate.learning_rate, candidate.warmup_ratio, steps
            ),
            saving=self._saving(engine, checkpoints),
            tracker=self.tracker,
            progress=self.progress,
            stop=self.stop,
            retention_max_rise=self.recipe.data.retention_max_rise,
            method=self.candidate.method,
        )

    def _retention(self, engine: Engine) -> Any:
        """Rows on which forgetting is measured: the user's, or what the base, untrained as it still is, writes."""
        if not self.recipe.data.retention_builtin:
            return self.tokens.retention
        name = f"retention/{self.folder.run_id}/{self.place.attempt}"
        return sampled_rows(
            self.folder.retention,
            engine.module,
            self.tokenizer,
            self.candidate,
            rank=self.place.rank,
            name=name,
            alive=self.progress.alive,
        )

    def _pace(self, engine: Engine, device: torch.device, hosts: list[str]) -> Pace | None:
        if self.place.world_size == 1:
            return None
        return Pace(
            Stopwatch(engine.module, device=device, zero_stage=self.candidate.zero_stage),
            rank=self.place.rank,
            stragglers=Stragglers(hosts=hosts, share=1 / self.candidate.gradient_accumulation),
            progress=self.progress,
        )

    def _rhythm(self, steps: int) -> Rhythm:
        train, saving = self.recipe.train, self.recipe.checkpoint
        return Rhythm(
            total_steps=steps,
            logging_steps=train.logging_steps,
            eval_steps=train.eval_steps if isinstance(train.eval_steps, int) else None,
            save_steps=saving.save_steps,
            save_s=None if saving.save_minutes is None else saving.save_minutes * 60.0,
            pause_step=self._pause_step(),
        )

    def _collate(self) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
        flat = self.candidate.packing and needs_flat(self.candidate.attn_implementation)
        return partial(collate, pad_token_id=int(self.tokenizer.pad_token_id), flat=flat)

    # --- starting and stopping -----------------------------------------------------------------

    def _resume(self, loop: Loop, engine: Engine, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint that verifies, if the run ever finished one."""
        path = checkpoints.newest()
        for notice in checkpoints.notices:
            self.progress.say(f"warning: {notice}")
        if path is None:
            return
        state = checkpoints.load(path, engine)
        models.load_adalora_state(engine.module, state["adalora"])
        loop.memory = Memory(**state["memory"])
        self.progress.say(f"resumed after step {loop.memory.step} from {path.name}")
        if self.place.rank == 0:
            if checkpoints.reshaped:
                self.folder.record("reshaped", **self.place.names, step=loop.memory.step, **checkpoints.reshaped)
            seconds = round(time.monotonic() - self.started_s, 3)
            self.folder.record(
                "resumed", **self.place.names, step=loop.memory.step, checkpoint=path.name, seconds=seconds
            )

    def _note_hosts(self) -> list[str]:
        """Which machine each rank is on, known once they have met."""
        hosts: list[Any] = [None] * self.place.world_size
        dist.all_gather_object(hosts, self.place.host)
        if self.place.rank == 0:
            self.folder.record("joined", **self.place.names, hosts=list(dict.fromkeys(hosts)))
        return hosts

    def _check(self, device: torch.device) -> None:
        """Nothing is loaded on a host that could not train it."""
        facts = check_ranks(self.folder, self.place, device, say=self.progress.say)
        if self.place.rank == 0:
            bandwidth = facts["all_reduce_bytes_per_s"]
            speed = "" if bandwidth is None else f", all-reduce {bandwidth / 1e9:.2f} GB/s"
            self.progress.line(f"checked {self.place.world_size} ranks in {facts['seconds']:.1f} s{speed}")
            self.folder.record("checked", **self.place.names, **facts)

    def _stopped(self, reason: str, memory: Memory, peaks: dict[str, int | None]) -> None:
        """The ranks agreed to stop and the checkpoint is written; whether the job comes back is not decided here."""
        self.progress.say(f"stopped after step {memory.step} ({reason}); a checkpoint is there")
        if self.place.rank == 0:
            facts = {"reason": reason, "step": memory.step, "train_s": memory.train_s, "tokens": memory.tokens}
            self.folder.record("stopped", **self.place.names, **facts, **peaks)

    def _pause_step(self) -> int | None:
        """Where this attempt is to pause, as rank 0 reads it: every rank must leave at the same step."""
        told: list[int | None] = [None]
        if self.place.rank == 0 and self.folder.pause.exists():
            told = [int(json.loads(self.folder.pause.read_text(encoding="utf-8"))["after_step"])]
        dist.broadcast_object_list(told)
        return told[0]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
