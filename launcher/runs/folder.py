"""RunFolder: every file name of a run, atomic writes and the attempts ledger.

The run folder is the only state of a run (docs/architecture.md, decision 2). Light: no torch.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"
"""No 0/o, 1/l/i: run names are read aloud and typed."""


_GROUP_FOLDER = stat.S_ISGID | 0o750
_GROUP_FILE = 0o640


def for_group(folder: Path) -> bool:
    """Whether a folder is one that its group may read (recipe's output_group): 2750, which nothing else here makes."""
    try:
        mode = stat.S_IMODE(folder.lstat().st_mode)
    except OSError:
        return False
    return mode & _GROUP_FOLDER == _GROUP_FOLDER


def make_folder(path: Path) -> None:
    """Make a folder, if it is missing, as its parent is: for us alone, or for the group to read; whatever the umask."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return
    open_folder(path)


def open_folder(path: Path) -> None:
    """Give a new folder to the group that its parent is for; nothing where that is for us alone."""
    if for_group(path.parent):
        path.chmod(_GROUP_FOLDER)


def show_group(path: Path) -> None:
    """Let the group read a file of ours that lies in a folder for the group; a link or another's file stays."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            facts = os.fstat(descriptor)
            if stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and for_group(path.parent):
                os.fchmod(descriptor, _GROUP_FILE)
        finally:
            os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` beside `path`, fsync and rename, so that readers never see half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if for_group(path.parent):
            os.fchmod(descriptor, _GROUP_FILE)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file; empty where it is missing, half-written or something else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line with a single write, so that lines of two writers never mix."""
    line = (json.dumps(value, sort_keys=True) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        if not os.fstat(descriptor).st_size and for_group(path.parent):
            os.fchmod(descriptor, _GROUP_FILE)
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; torn lines, and lines that hold anything else, are skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value


def new_run_id() -> str:
    """Five random characters; unique enough inside one output folder, checked by mkdir."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(5))


class Guard(Protocol):
    """Says whether this process may still write; see runs/fence.py."""

    def check(self) -> None:
        """Raise where a newer attempt has begun."""

    def glance(self) -> None:
        """The same, not at every call."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Names of everything inside `runs/<name>-<id>/`."""

    path: Path
    guard: Guard | None = field(default=None, compare=False, repr=False)
    """Asked before a worker writes ledger, heartbeat, metrics or result; None for everybody else."""

    @classmethod
    def create(cls, parent: Path, name: str, *, group: str | None = None) -> RunFolder:
        """Make a new run folder (mode 0700) with its empty sub-folders.

        `group`: who may read it, logs and results included; checkpoints, which readers would unpickle, the ranks'
        token and what was submitted stay ours alone.

        Raises:
            FileExistsError: never in practice; after 20 collisions of the random id.
            OSError: the parent cannot be written, or may not be given to the group.
            KeyError: there is no such group.
        """
        gid = None if group is None else grp.getgrnam(group).gr_gid
        if not parent.exists():
            parent.mkdir(parents=True)
            if gid is not None:  # the group must pass; what else lies there has modes of its own
                os.chown(parent, -1, gid)
                parent.chmod(0o710)
        for _ in range(20):
            path = parent / f"{name}-{new_run_id()}"
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                continue
            if gid is not None:
                os.chown(path, -1, gid)
                path.chmod(_GROUP_FOLDER)
            folder = cls(path.resolve())
            make_folder(folder.logs)
            for sub in (folder.checkpoints, folder.rendezvous, folder.submission):
                sub.mkdir(mode=0o700)
            return folder
        raise FileExistsError(f"no free run id under {parent}")

    @property
    def run_id(self) -> str:
        """Folder name; also the W&B run id."""
        return self.path.name

    @property
    def recipe(self) -> Path:
        """The recipe as written by the user."""
        return self.path / "recipe.yaml"

    @property
    def resolved(self) -> Path:
        """The recipe with every "auto" filled in."""
        return self.path / "recipe.resolved.yaml"

    @property
    def plan(self) -> Path:
        """`launcher plan --json` of this run."""
        return self.path / "plan.json"

    @property
    def ds_config(self) -> Path:
        """DeepSpeed configuration; absent at stage 0."""
        return self.path / "ds_config.json"

    def ds_config_of(self, world_size: int) -> Path:
        """DeepSpeed configuration for so many ranks: of an elastic layout where there is one, else the plan's."""
        elastic = self.path / f"ds_config-world{world_size}.json"
        return elastic if elastic.exists() else self.ds_config

    @property
    def environment(self) -> Path:
        """Git commit, diff, packages; no secrets."""
        return self.path / "environment.json"

    @property
    def job(self) -> Path:
        """The JobRequest that was submitted, with the job id it got."""
        return self.path / "job.json"

    @property
    def attempts(self) -> Path:
        """Append-only ledger, one line per event of an attempt."""
        return self.path / "attempts.jsonl"

    @property
    def metrics(self) -> Path:
        """One line per logged step, evaluation or event."""
        return self.path / "metrics.jsonl"

    @property
    def retention(self) -> Path:
        """Text that the untrained base wrote (data.retention: builtin), one row per line; sampled once."""
        return self.path / "retention.jsonl"

    @property
    def heartbeat(self) -> Path:
        """What rank 0 is doing now; rewritten atomically."""
        return self.path / "heartbeat.json"

    @property
    def result(self) -> Path:
        """Success is this file; never Slurm's word alone."""
        return self.path / "result.json"

    @property
    def pause(self) -> Path:
        """{"after_step": N} where the ranks are to save and leave before the end, as in a trial."""
        return self.path / "pause.json"

    @property
    def checkpoints(self) -> Path:
        """Holds step-000100/ and so on."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Holds <jobid>_<rank>.out."""
        return self.path / "logs"

    @property
    def errors(self) -> Path:
        """Holds <attempt>/rank-N.json of ranks that failed, and what was seen of ranks that hung."""
        return self.path / "errors"

    @property
    def fences(self) -> Path:
        """Holds one numbered file per attempt; only the attempt of the highest may write."""
        return self.path / "fences"

    @property
    def decisions(self) -> Path:
        """Holds <attempt>.json: what was decided after an attempt, by whoever came first."""
        return self.path / "decisions"

    @property
    def faults(self) -> Path:
        """Marks of injected faults that were done (tests and rehearsals only)."""
        return self.path / "faults"

    @property
    def rendezvous(self) -> Path:
        """Address files of attempts."""
        return self.path / "rendezvous"

    @property
    def submission(self) -> Path:
        """submitit's own files."""
        return self.path / "submission"

    @property
    def adapter(self) -> Path:
        """Final adapter, exactly as PEFT loads it."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """Final safetensors model folder of full fine-tuning."""
        return self.path / "model"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint taken after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:06d}"

    def error(self, attempt: str, rank: int) -> Path:
        """What one rank of one attempt died of."""
        return self.errors / attempt / f"rank-{rank}.json"

    def log(self, job_id: str, rank: int) -> Path:
        """Log file of one rank of one job."""
        return self.logs / f"{job_id}_{rank}.out"

    def record(self, event: str, **facts: Any) -> None:
        """Append one event to the attempts ledger."""
        self.check()
        entry = {"event": event, "time_s": time.time(), "host": socket.gethostname(), **facts}
        append_json_line(self.attempts, entry)

    def beat(self, **facts: Any) -> None:
        """Rewrite the heartbeat."""
        self.glance()
        write_json(self.heartbeat, {"time_s": time.time(), "host": socket.gethostname(), **facts})

    def check(self) -> None:
        """Before a write that matters: are we still the newest attempt?"""
        if self.guard is not None:
            self.guard.check()

    def glance(self) -> None:
        """`check`, for writes that come often."""
        if self.guard is not None:
            self.guard.glance()
