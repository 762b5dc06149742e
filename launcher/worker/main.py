"""One rank, start to finish: from a run folder to an exit code.

Everything a rank needs is in the folder (recipe.resolved.yaml, plan.json, ds_config.json) and in the environment
(which rank it is); it decides nothing about the plan. The order matters: signal flags stand before the heavy
imports, tokens are made before the process group exists, weights come after it (`rank.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ClusterError, LauncherError
from launcher.planning.plan import Candidate, plan_from_json
from launcher.recipe.load import load_recipe
from launcher.recipe.schema import Recipe
from launcher.runs import stacks
from launcher.runs.fence import claim, replaced
from launcher.runs.folder import RunFolder, make_folder, write_json
from launcher.runs.pulse import Pulse
from launcher.runs.redaction import redact, redact_all, redact_output
from launcher.worker import faults, rendezvous
from launcher.worker.place import Place, place_from_environment
from launcher.worker.progress import Progress
from launcher.worker.stopping import StopFlag

if TYPE_CHECKING:
    from launcher.worker.data import TokenCache
    from launcher.worker.tracking import Tracker

JOIN_TIMEOUT_S = 900.0
"""From the first rank at the rendezvous to the last: imports from a cold shared file system take minutes."""
TOKENS_TIMEOUT_S = 24 * 3600.0
"""Ranks wait this long for rank 0's token cache; the job's time limit ends it earlier."""


def run(run_dir: Path) -> int:
    """Run this process's rank of the job; returns its exit code and does not raise.

    0: finished, or stopped on request with a checkpoint (then without result.json), or nothing was left to do.
    An error is printed once with its traceback, and recorded in `errors/<attempt>/rank-N.json` and the ledger.
    The supervisor is told of an orderly end before the process group is left: what libraries do on the way out may
    hang or crash, and the work is done by then.
    """
    stop = StopFlag.install()
    redact_output()
    stacks.answer()
    pulse = Pulse.from_environment()
    pulse.beat("starting")
    folder = RunFolder(Path(run_dir).resolve())
    place: Place | None = None
    try:
        place = place_from_environment(os.environ)
        if folder.result.exists():
            print(f"{folder.run_id} is finished already ({folder.result}); nothing to do", flush=True)
            pulse.beat("done")
            return 0
        reason = train(folder, place, stop, join=rendezvous.join, pulse=pulse)
        pulse.beat("done" if reason is None else "stopped")
        rendezvous.leave()
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _failed(folder, place, error, pulse)


def train(
    folder: RunFolder, place: Place, stop: StopFlag, *, join: Callable[..., None], pulse: Pulse | None = None
) -> str | None:
    """The life of a rank; why it stopped before the end (a checkpoint is there), or None when the run is finished.

    `join` brings up the process group; it is called once, after the tokens are there. `pulse` tells the supervisor
    that the rank goes on.

    Raises:
        LauncherError: something a user can fix, by its class.
    """
    started_s = time.monotonic()
    recipe, candidate = _read(folder, place)
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "DISABLE_TELEMETRY": "1"}
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of transformers and datasets in a log file
    fence = claim(folder, place.attempt) if place.rank == 0 else None
    folder = replace(folder, guard=fence)
    progress = Progress(folder, rank=place.rank, job_id=place.job_id, attempt=place.attempt, pulse=pulse)
    if place.rank == 0:
        for left in folder.path.glob(f".{folder.heartbeat.name}.*.tmp"):  # rank 0 was killed while it wrote
            left.unlink(missing_ok=True)
        folder.record("started", **place.names, world_size=place.world_size, hosts=[place.host])
    faults.arm(folder, rank=place.rank, attempt=place.attempt)
    faults.at("start", rank=place.rank)
    progress.state("tokenizing")
    tokenizer, tokens = _tokens(folder, place, recipe, candidate)
    for notice in tokens.stats.get("notices", []):
        progress.say(f"warning: {notice}")
    progress.state("starting")
    progress.phase("joining")
    join(place, folder.rendezvous, device=candidate.device, timeout_s=JOIN_TIMEOUT_S)

    from launcher.worker.rank import Rank

    with _tracking(recipe, folder, place) as tracker, contextlib.closing(progress):
        return Rank(
            folder=folder,
            place=place,
            recipe=recipe,
            candidate=candidate,
            tokenizer=tokenizer,
            tokens=tokens,
            tracker=tracker,
            progress=progress,
            stop=stop,
            started_s=started_s,
            fence=fence,
        ).work()


def _read(folder: RunFolder, place: Place) -> tuple[Recipe, Candidate]:
    """The recipe with every value filled in, and the plan's candidate.

    Raises:
        ClusterError: the job started with another number of ranks than planned.
    """
    recipe = load_recipe(folder.resolved)
    plan = plan_from_json(json.loads(folder.plan.read_text(encoding="utf-8")))
    candidate = plan.chosen.candidate
    elastic = [each for each in plan.elastic if each.world_size == place.world_size]
    if place.world_size != candidate.world_size and elastic:
        return recipe, elastic[0]
    if place.world_size != candidate.world_size:
        raise ClusterError(
            f"the job has {place.world_size} ranks, the plan {candidate.world_size} "
            f"({candidate.nodes} nodes x {candidate.gpus_per_node}); submit the run again, or plan for these ranks"
        )
    return recipe, candidate


def _tokens(folder: RunFolder, place: Place, recipe: Recipe, candidate: Candidate) -> tuple[Any, TokenCache]:
    """Tokenizer and token cache; rank 0 makes the cache, the others wait for it without a process group."""
    from launcher.worker.data import build_token_cache, open_token_cache
    from launcher.worker.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe)
    cache = Path(os.environ.get("LAUNCHER_CACHE") or folder.path.parent / ".cache") / "tokens"
    if place.rank == 0:
        return tokenizer, build_token_cache(recipe, candidate, tokenizer, cache, scope=place.attempt)
    wait_s, scope = TOKENS_TIMEOUT_S, place.attempt
    return tokenizer, open_token_cache(recipe, candidate, tokenizer, cache, wait_s=wait_s, scope=scope)


@contextlib.contextmanager
def _tracking(recipe: Recipe, folder: RunFolder, place: Place) -> Iterator[Tracker]:
    """A tracker that is told how the work ended."""
    from launcher.worker.tracking import make_tracker

    tracker = make_tracker(recipe, folder, place.rank)
    try:
        yield tracker
    except BaseException:
        tracker.finish("failed")
        raise
    if folder.result.exists():
        result = json.loads(folder.result.read_text(encoding="utf-8"))
        tracker.artifact(Path(result["artifact"]["path"]))
        tracker.finish("completed")
    else:
        tracker.finish("paused" if folder.pause.exists() else "stopped")


def _failed(folder: RunFolder, place: Place | None, error: Exception, pulse: Pulse) -> int:
    """Say it once, write it down, and give the exit code of its class (1: our bug)."""
    code = error.exit_code if isinstance(error, LauncherError) else 1
    rank = place.rank if place else -1
    traceback.print_exc()
    sys.stderr.flush()
    last = pulse.read()
    facts = {
        "type": type(error).__name__,
        "message": str(error),
        "exit_code": code,
        "rank": rank,
        "host": place.host if place else socket.gethostname(),
        "phase": last.phase,
        "step": last.step,
        "time_s": time.time(),
        "traceback": traceback.format_exc(),
    }
    with contextlib.suppress(OSError):  # the disk may be what failed; the exit code still tells
        path = folder.error(place.attempt if place else "unknown", rank)
        make_folder(folder.errors)
        make_folder(path.parent)
        write_json(path, redact_all(facts | (place.names if place else {})))
        if place is None or not replaced(folder, place.attempt):
            names = place.names if place else {}
            folder.record(
                "failed", **names, error=redact(f"{type(error).__name__}: {error}"), rank=rank, exit_code=code
            )
        elif rank == 0:  # the ledger is the newer attempt's now; this is the one line we may leave
            folder.record("fenced", **place.names, error=redact(str(error)))
    return code


def main(argv: list[str]) -> int:
    """`python -m launcher.worker.main RUN_DIR`."""
    if len(argv) != 2:
        print("usage: python -m launcher.worker.main RUN_DIR", file=sys.stderr)
        return 2
    return run(Path(argv[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
