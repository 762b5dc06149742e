"""Run folders for the worker's tests, and what the worker leaves in them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from launcher.planning.deepspeed_config import deepspeed_config
from launcher.planning.plan import (
    Candidate,
    Cost,
    DataNumbers,
    Estimate,
    Interval,
    JobShape,
    MemoryEstimate,
    Plan,
    plan_to_json,
)
from launcher.recipe.load import recipe_to_yaml
from launcher.recipe.schema import Recipe
from launcher.runs.folder import RunFolder, read_json_lines, write_json


def candidate_for(
    world: int, stage: int = 0, *, global_batch: int = 8, micro_batch: int = 2, **fields: Any
) -> Candidate:
    """A CPU candidate of `world` ranks with the accumulation that keeps the global batch."""
    from tests.tiny import make_candidate

    return make_candidate(
        gpus_per_node=world,
        zero_stage=stage,
        micro_batch=micro_batch,
        gradient_accumulation=global_batch // micro_batch // world,
        **fields,
    )


def make_run(recipe: Recipe, candidate: Candidate) -> RunFolder:
    """A run folder as `submit` leaves it: resolved recipe, plan and, for ZeRO, DeepSpeed's configuration."""
    run = RunFolder.create(Path(recipe.output_dir), recipe.name)
    resolved = _resolved(recipe, candidate)
    run.resolved.write_text(recipe_to_yaml(resolved), encoding="utf-8")
    write_json(run.plan, plan_to_json(make_plan_of(resolved, candidate)))
    if candidate.zero_stage:
        write_json(run.ds_config, deepspeed_config(candidate))
    return run


def train_here(run_dir: Path, attempt: str = "test.0", stop_after: int | None = None) -> dict[str, Any]:
    """One rank's whole life, in a process that has joined already; returns its ending (for use in `Ranks`)."""
    import torch.distributed as dist
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from launcher.worker import main
    from launcher.worker.stopping import StopFlag
    from tests.train.ranks import place_of

    # DeepSpeed never lets go of an engine, and its model goes on telling transformers that ZeRO-3 is on.
    unset_hf_deepspeed_config()
    stop = StopFlag() if stop_after is None else StopAfter(stop_after)
    place = place_of(dist.get_rank(), dist.get_world_size(), attempt)
    main.train(RunFolder(run_dir), place, stop, join=lambda *_args, **_named: None)
    return {"stopped": stop.reason}


class StopAfter:
    """A stop signal that the last rank alone receives, during its n-th step."""

    def __init__(self, step: int) -> None:
        import torch.distributed as dist

        self._steps_left = step if dist.get_rank() == dist.get_world_size() - 1 else None
        self.reason: str | None = None

    @property
    def raised(self) -> bool:
        """The loop asks once per step."""
        if self._steps_left is not None:
            self._steps_left -= 1
            if self._steps_left <= 0:
                self.reason = "SIGTERM"
        return self.reason is not None


def losses(run: RunFolder) -> list[float]:
    """Training loss of every step; of a step trained twice the later one."""
    found = losses_at(run.metrics)
    return [found[step] for step in sorted(found)]


def losses_at(metrics: Path) -> dict[int, float]:
    """Step -> training loss."""
    return {line["step"]: line["loss"] for line in read_json_lines(metrics) if line.get("loss") is not None}


SAVES = ("saving", "saved", "save_failed")
_ALWAYS = ("checked",)


def events(run: RunFolder) -> list[str]:
    """Names of the ledger's events, in order; those of saves and of the checks at every start are left out."""
    return [line["event"] for line in read_json_lines(run.attempts) if line["event"] not in (*SAVES, *_ALWAYS)]


def saves(run: RunFolder) -> list[tuple[str, int]]:
    """The ledger's events of saves, with their steps, in order."""
    return [(line["event"], line["step"]) for line in read_json_lines(run.attempts) if line["event"] in SAVES]


def result(run: RunFolder) -> dict[str, Any]:
    """The run's result.json."""
    return json.loads(run.result.read_text(encoding="utf-8"))


def _resolved(recipe: Recipe, candidate: Candidate) -> Recipe:
    """The recipe with the candidate's numbers in it and every step logged."""
    train = dataclasses.replace(
        recipe.train,
        global_batch_size=candidate.global_batch,
        per_device_train_batch_size=candidate.micro_batch,
        learning_rate=candidate.learning_rate,
        precision=candidate.precision,
        gradient_checkpointing=candidate.gradient_checkpointing,
        optim=candidate.optim,
        logging_steps=1,
        eval_steps=recipe.train.eval_steps if isinstance(recipe.train.eval_steps, int) else 1000,
    )
    return dataclasses.replace(
        recipe,
        method=candidate.method,
        train=train,
        data=dataclasses.replace(recipe.data, packing=candidate.packing, max_seq_length=candidate.seq_len),
        wandb=dataclasses.replace(recipe.wandb, mode="disabled"),
    )


def make_plan_of(recipe: Recipe, candidate: Candidate) -> Plan:
    """A plan that chose this candidate and estimated nothing."""
    nothing = Interval(low=0, expected=0, high=0)
    estimate = Estimate(
        candidate=candidate,
        trainable_params=0,
        fits=True,
        memory=MemoryEstimate(
            terms_bytes={}, peak_bytes=nothing, device_bytes=nothing, usable_bytes=0, binding="optimizer step"
        ),
        host_ram_bytes_per_node=0,
        checkpoint_bytes=0,
        step_s=nothing,
        tokens_per_s_per_gpu=0,
        steps=recipe.train.max_steps or 0,
        wall_s=0,
        gpu_hours=0,
        cost=Cost(amount=None, price_per_gpu_hour=None),
        rejected_because=None,
    )
    return Plan(
        recipe=recipe.name,
        model=recipe.model.name_or_path,
        params=0,
        chosen=estimate,
        alternatives=(),
        advice=(),
        warnings=(),
        data=DataNumbers(rows=0, tokens=0, basis="counted"),
        job=JobShape(time_limit_min=10, cpus_per_task=1, mem=None),
        site="local",
    )
