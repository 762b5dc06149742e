"""Tracking: metrics.jsonl first, Weights & Biases as its mirror, and nothing at all on ranks other than 0.

The file is the record; the mirror may fail at any moment without touching training. Whatever goes wrong there is said
once, on stderr, and the mirror is dropped. wandb is imported only where a mirror is wanted, on rank 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import netrc
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from launcher.recipe.schema import Recipe
from launcher.runs.folder import RunFolder, append_json_line

INIT_TIMEOUT_S = 30.0
"""How long training may wait for W&B to answer before it goes on without."""
FINISH_TIMEOUT_S = 60.0
"""How long the end of a run may wait for the last uploads."""
MODES = ("online", "offline", "disabled")


class Tracker(Protocol):
    """Where numbers go; no method raises into training."""

    def log(self, step: int, **numbers: Any) -> None:
        """Record numbers that belong to an optimizer step."""

    def event(self, name: str, **facts: Any) -> None:
        """Record that something happened."""

    def artifact(self, folder: Path) -> None:
        """Hand over the verified adapter or model, where the recipe asks for it (wandb.log_model)."""

    def finish(self, status: str) -> None:
        """Close, with how the run ended: completed | failed | stopped | paused."""


class NullTracker:
    """Tracker of every rank that is not rank 0."""

    def log(self, step: int, **numbers: Any) -> None:
        """Nothing."""

    def event(self, name: str, **facts: Any) -> None:
        """Nothing."""

    def artifact(self, folder: Path) -> None:
        """Nothing."""

    def finish(self, status: str) -> None:
        """Nothing."""


def make_tracker(recipe: Recipe, run: RunFolder, rank: int) -> Tracker:
    """Tracker of this rank; `recipe` is the resolved one. Never raises, never asks, waits INIT_TIMEOUT_S at most."""
    if rank != 0:
        return NullTracker()
    return FileTracker(run.metrics, mirror=_start_mirror(recipe, run), allowed=run.glance)


class FileTracker:
    """One JSON line per call, and the same numbers under the same names to the mirror.

    A number's line is {"step": int, "time_s": epoch seconds, name: number, ...}; an event's has "event" instead
    of "step", or beside it when the fact belongs to one. Not-a-number and infinity become null, as JSON has no
    word for them.
    """

    def __init__(
        self, path: Path, mirror: WandbMirror | None = None, *, allowed: Callable[[], None] = lambda: None
    ) -> None:
        """`allowed` raises where a newer attempt writes now; the only error that leaves a tracker."""
        self.path = path
        self.allowed = allowed
        self.mirror = mirror
        self.writing = True

    def log(self, step: int, **numbers: Any) -> None:
        """Record numbers that belong to an optimizer step."""
        numbers = {name: _plain(value) for name, value in numbers.items()}
        self._append({"step": step, "time_s": time.time(), **numbers})
        self._mirror(lambda mirror: mirror.log(step, numbers))

    def event(self, name: str, **facts: Any) -> None:
        """Record that something happened."""
        facts = {key: _plain(value) for key, value in facts.items()}
        self._append({"event": name, "time_s": time.time(), **facts})
        self._mirror(lambda mirror: mirror.event(name, facts))

    def artifact(self, folder: Path) -> None:
        """Hand the artifact to the mirror; the run folder holds it in any case."""
        self._mirror(lambda mirror: mirror.artifact(folder))

    def finish(self, status: str) -> None:
        """Close, with how the run ended."""
        self.event("finished", status=status)
        self._mirror(lambda mirror: mirror.finish(status))
        self.mirror = None

    def _append(self, line: dict[str, Any]) -> None:
        self.allowed()
        try:
            append_json_line(self.path, line)
            self.writing = True
        except OSError as error:
            if self.writing:
                _warn(f"{self.path.name} cannot be written ({error}); training goes on")
            self.writing = False

    def _mirror(self, use: Callable[[WandbMirror], None]) -> None:
        if self.mirror is None:
            return
        try:
            use(self.mirror)
        except Exception as error:
            self.mirror = None
            _warn(f"Weights & Biases stopped working ({_first_line(error)}); metrics.jsonl goes on")


class WandbMirror:
    """A wandb run that gets what the file gets."""

    def __init__(self, run: Any, *, log_model: bool = False) -> None:
        self.run = run
        self.log_model = log_model

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Send numbers; `step` is ours, because an offline restart does not know where it was."""
        self.run.log({name: value for name, value in numbers.items() if value is not None}, step=step)

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Keep the latest facts of each kind of event in the summary: events have no place on a step axis."""
        self.run.summary.update({f"event/{name}": json.dumps(dict(facts), sort_keys=True)})

    def artifact(self, folder: Path) -> None:
        """Log the folder as a W&B artifact of type model, named after the run, where the recipe asks for it."""
        if not self.log_model:
            return
        import wandb

        artifact = wandb.Artifact(f"{folder.name}-{self.run.id}", type="model")
        artifact.add_dir(str(folder))
        self.run.log_artifact(artifact, aliases=["latest", "final"])

    def finish(self, status: str) -> None:
        """Upload what is left; a run that did neither complete nor pause, as in a trial, is marked failed."""
        self.run.finish(exit_code=0 if status in ("completed", "paused") else 1)


def wandb_mode(recipe: Recipe, environ: Mapping[str, str]) -> str:
    """Mode to run in: the recipe's; for auto WANDB_MODE, else online where a key is at hand and offline where not."""
    wanted = recipe.wandb.mode
    if wanted == "auto":
        wanted = environ.get("WANDB_MODE", "")
    if wanted in MODES:
        return wanted
    return "online" if has_key(environ) else "offline"


def has_key(environ: Mapping[str, str]) -> bool:
    """Whether wandb can log in without asking: its key variable or the netrc file. The key itself is not looked at."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(environ.get("NETRC") or Path(environ.get("HOME", "~")).expanduser() / ".netrc")
    try:
        return host is not None and host in netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _start_mirror(recipe: Recipe, run: RunFolder) -> WandbMirror | None:
    mode = wandb_mode(recipe, os.environ)
    if mode == "disabled":
        return None
    if mode == "online" and not has_key(os.environ):
        # wandb would ask for the key on a terminal, and a job must never wait for an answer.
        _warn("Weights & Biases has no key (WANDB_API_KEY or `wandb login`); recording offline")
        mode = "offline"
    try:
        return WandbMirror(_init(recipe, run, mode), log_model=recipe.wandb.log_model)
    except Exception as error:
        if mode == "offline":
            _warn(f"Weights & Biases is off ({_first_line(error)}); metrics.jsonl has everything")
            return None
        reason = _first_line(error)
    try:
        _forget_failed_start()
        mirror = WandbMirror(_init(recipe, run, "offline"), log_model=recipe.wandb.log_model)
    except Exception as error:
        _warn(f"Weights & Biases is off ({reason}; offline: {_first_line(error)}); metrics.jsonl has everything")
        return None
    _warn(f"Weights & Biases cannot be reached ({reason}); recording offline, `wandb sync` sends it later")
    return mirror


def _forget_failed_start() -> None:
    """Stop wandb's helper process: after a failed start it still holds our run id."""
    import wandb

    wandb.teardown(exit_code=1)


def _init(recipe: Recipe, run: RunFolder, mode: Any) -> Any:
    # Read when wandb is imported: it reports its own use to its makers, in offline mode, too.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    # Artifacts are staged where `wandb sync` finds them later; the home folder may be another node's.
    os.environ.setdefault("WANDB_DATA_DIR", str(run.path / "wandb" / "data"))
    return wandb.init(
        mode=mode,
        id=run.run_id,
        name=run.run_id,
        resume="allow",
        project=recipe.wandb.project or "launcher",
        entity=recipe.wandb.entity,
        group=recipe.wandb.group,
        tags=list(recipe.wandb.tags) or None,
        job_type="train",
        dir=str(run.path),
        config=tracked_config(recipe, run),
        settings=wandb.Settings(**_settings(wandb)),
    )


def _settings(wandb: Any) -> dict[str, Any]:
    """Keep the mirror to what is logged: no command line, host, user, code, git, package list or console text.

    System metrics stay on. Names an older wandb does not know are left out.
    """
    wanted = {
        "init_timeout": INIT_TIMEOUT_S,
        "finish_timeout": FINISH_TIMEOUT_S,
        "console": "off",
        "silent": True,
        "symlink": False,
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "program": "launcher",
        "host": "",
        "username": "",
        "email": "",
    }
    return {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}


def tracked_config(recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    """The resolved recipe and the chosen numbers of the plan; nothing from the environment."""
    config: dict[str, Any] = {"recipe": dataclasses.asdict(recipe), "run": run.run_id}
    try:
        plan = json.loads(run.plan.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return config
    return config | {"plan": {"model": plan.get("model"), "chosen": plan.get("chosen")}}


def _plain(value: Any) -> Any:
    """A value as JSON has it; tensors and numpy scalars give their number."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
