"""What the table of bad inputs is made with: a tiny recipe that is accepted, and the ways to spoil it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from launcher.cli import main
from tests import tiny
from tests.unit.runs.material import FakeSlurm

PARTITION = "PartitionName={name} AllowAccounts=ALL Default={default} MaxTime=1-00:00:00 State=UP TotalNodes=4 {more}\n"
NODES = "main|16|65536|gpu:a100:8|4|idle|a100,ib\n"
QUIET = "||||||||cluster||||{name}\n"
ACCOUNT = "{wall}||{submit}|{tres}||{group}||{groupsubmit}|normal|||normal|dev\n"


@dataclass
class Bench:
    """A tiny recipe that would be accepted, and what can be made wrong with it."""

    home: Path
    slurm: FakeSlurm
    recipe: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    site: dict[str, Any] = field(default_factory=dict)
    patch: pytest.MonkeyPatch = field(default_factory=pytest.MonkeyPatch)

    def partition(self, more: str = "", **words: str) -> None:
        """What scontrol says of the partitions."""
        main = PARTITION.format(name="main", default="YES", more=more)
        for key, value in words.items():
            main = re.sub(rf"{key}=\S+", f"{key}={value}", main)
        self.slurm.say_when("scontrol", "partition", main + PARTITION.format(name="long", default="NO", more=""))

    def nodes(self, listing: str) -> None:
        """What sinfo says of the nodes."""
        self.slurm.say("sinfo", listing)

    def account(self, **limits: str) -> None:
        """The one account of this user."""
        empty = dict.fromkeys(("wall", "submit", "tres", "group", "groupsubmit"), "")
        self.slurm.say_when("sacctmgr", "associations", ACCOUNT.format(**(empty | limits)))

    def rows(self, *rows: object, name: str = "chats.jsonl") -> Path:
        """Data of these rows: text as it is, anything else as JSON."""
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (self.home / name).write_text("".join(f"{line}\n" for line in lines))
        return self.home / name

    def raw(self, content: bytes, name: str) -> None:
        """Data of these bytes, under a name of their own."""
        (self.home / name).write_bytes(content)
        self.recipe["data"]["train"] = [{"path": name}]

    def config(self, **changes: Any) -> None:
        """Change the model's config.json."""
        path = self.home / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def submit(self, *overrides: str) -> Result:
        """`launcher submit --dry-run`: the same checks as `submit`."""
        (self.home / "site.yaml").write_text(yaml.safe_dump(SITE | self.site))
        text = self.text if self.text is not None else yaml.safe_dump(self.recipe, sort_keys=False)
        (self.home / "recipe.yaml").write_text(text)
        return CliRunner().invoke(main, ["submit", "recipe.yaml", "--dry-run", *overrides])


SITE = {
    "executor": "slurm",
    "gpu": "cpu",
    "gpus_per_node": 8,
    "gpu_type": "a100",
    "max_nodes": 64,
    "cpus_per_node": 16,
    "mem_bytes_per_node": "64G",
    "default_partition": "main",
    "account": "dev",
    "file_systems": [{"name": "all", "path": "/", "shared": True}],
}
RECIPE = {
    "name": "tiny",
    "model": {"name_or_path": "model", "attn_implementation": "sdpa"},
    "method": "lora",
    "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
    "data": {"train": [{"path": "chats.jsonl"}], "validation": 8, "max_seq_length": 128},
    "train": {"global_batch_size": 8, "per_device_train_batch_size": 1, "max_steps": 6, "precision": "fp32"},
    "deepspeed": {"stage": 0},
    "checkpoint": {"save_minutes": None, "save_steps": 3},
    "slurm": {"site": "site.yaml", "nodes": 1, "gpus_per_node": 1, "cpus_per_task": 1, "time": 20, "mem": "4G"},
    "wandb": {"mode": "disabled"},
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and chats, made once."""
    folder = tmp_path_factory.mktemp("material")
    tiny.make_model_dir(folder / "model")
    tiny.make_chat_rows(folder / "chats.jsonl")
    return folder


@pytest.fixture
def bench(material: Path, tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Four nodes with eight GPUs; everything else is asked of the fake."""
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    for path in material.rglob("*"):
        if path.is_file():
            (home / path.relative_to(material)).write_bytes(path.read_bytes())
    for name in (
        "LAUNCHER_RUNS",
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_IDENTITY_TOKEN_FILE",
        "NETRC",
        "LAUNCHER_CACHE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alice")
    monkeypatch.chdir(home)
    bench = Bench(home, fake_slurm, recipe=json.loads(json.dumps(RECIPE)), patch=monkeypatch)
    bench.partition()
    bench.nodes(NODES + NODES.replace("main", "long"))
    bench.account()
    fake_slurm.say_when("scontrol", "config", "AccountingStorageEnforce = associations,limits,qos\n")
    fake_slurm.say_when("sacctmgr", "qos", QUIET.format(name="normal") + QUIET.format(name="gold"))
    return bench


# ---------------------------------------------------------------- ways to go wrong

Wrong = Callable[[Bench], object]


def text(line: str, before: str = "") -> Wrong:
    """The recipe's file with a line more."""

    def make(bench: Bench) -> None:
        bench.text = before + yaml.safe_dump(bench.recipe, sort_keys=False) + line

    return make


def slurm_says(program: str, **answer: Any) -> Wrong:
    return lambda bench: bench.slurm.say(program, **answer)


def answers(program: str, word: str, words: str) -> Wrong:
    return lambda bench: bench.slurm.say_when(program, word, words)


def qos(**columns: str) -> Wrong:
    """The QOS `normal` with limits in these columns of sacctmgr."""
    names = ("MaxWall", "MaxJobsPU", "MaxSubmitPU", "MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES", "MinTRES")
    row = "|".join(columns.get(name, "") for name in names)
    return answers("sacctmgr", "qos", f"{row}|cluster||{columns.get('Flags', '')}||normal\n")


def section(name: str, **fields: Any) -> Wrong:
    return lambda bench: bench.recipe[name].update(fields)


def chat(*turns: tuple[str, object]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = chat(("user", "hello"), ("assistant", "there"))


def long_prompts(bench: Bench) -> None:
    bench.rows(*[chat(("user", "word " * 400 + str(i)), ("assistant", "yes")) for i in range(32)])


def some_long(bench: Bench) -> None:
    """A fifth of the rows does not fit."""
    rows = [chat(("user", f"say {i}"), ("assistant", "word " * (400 if i % 5 == 0 else 3))) for i in range(60)]
    bench.rows(*rows)


def repeated(bench: Bench) -> None:
    """Every row stands there twice."""
    bench.rows(*[chat(("user", f"say {i // 2}"), ("assistant", "yes")) for i in range(64)])


def old_python(bench: Bench) -> None:
    """An environment of another time."""
    venv = empty_venv(bench.home / "venv")
    (venv / "lib" / "python3.11").rename(venv / "lib" / "python3.9")
    bench.site.update(venv=str(venv))


def few(bench: Bench) -> None:
    del bench.recipe["train"]["max_steps"]
    bench.recipe["data"]["validation"] = None
    bench.rows(*[chat(("user", f"a {i}"), ("assistant", "b")) for i in range(4)])


def same_rows_twice(bench: Bench) -> None:
    bench.recipe["data"]["validation"] = {"path": str(bench.home / "chats.jsonl")}


def small_disk(*, free: int = 2**60, files: int = 2**30) -> Wrong:
    """A disk with so many bytes and files free, as the kernel would tell."""

    def make(bench: Bench) -> None:
        real = os.statvfs

        def statvfs(path: Any) -> os.statvfs_result:
            told = list(real(path))
            told[0:5] = [1, 1, 2**60, free, free]
            told[5:8] = [2**31, files, files]
            return os.statvfs_result(told)

        bench.patch.setattr(os, "statvfs", statvfs)

    return make


def index(missing: bool = False) -> Wrong:
    """Weights in shards, one of which is missing."""

    def make(bench: Bench) -> None:
        model = bench.home / "model"
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return make


def weights(change: Callable[[bytes], bytes]) -> Wrong:
    def make(bench: Bench) -> None:
        path = bench.home / "model" / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return make


def without(*names: str) -> Wrong:
    def make(bench: Bench) -> None:
        for name in names:
            (bench.home / "model" / name).unlink()

    return make


def pickled(bench: Bench) -> None:
    (bench.home / "model" / "model.safetensors").rename(bench.home / "model" / "pytorch_model.bin")


def reservation(bench: Bench) -> None:
    from datetime import datetime, timedelta

    begins = datetime.now() + timedelta(minutes=15)
    bench.slurm.say_when(
        "scontrol",
        "reservation",
        f"ReservationName=service StartTime={begins:%Y-%m-%dT%H:%M:%S} EndTime=2099-01-01T00:00:00 Duration=1 "
        "Nodes=node[1-4] NodeCnt=4 PartitionName=(null) Flags=MAINT,SPEC_NODES State=INACTIVE\n",
    )


def refused_by_test_only(words: str) -> Wrong:
    return slurm_says("sbatch", stderr=f"allocation failure: {words}\n", status=1)


def empty_venv(folder: Path) -> Path:
    """A virtual environment with Python and nothing else."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text("#!/bin/sh\n")
    (folder / "bin" / "python").chmod(0o755)
    (folder / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("include-system-site-packages = false\n")
    return folder
