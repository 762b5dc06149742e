"""Rows of the security checklist that need ranks: hostile checkpoints and models, strangers, a whole life."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pickle
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from launcher.errors import LauncherError
from launcher.facts.weights import model_folder_problems
from launcher.worker import rendezvous
from tests.privileges import unavailable
from tests.tiny import make_chat_rows, make_model_dir, make_recipe
from tests.train.ranks import place_of

TOP = Path(__file__).parents[2]
CANARY = "canary5f3a9c1e7b"
SECRETS = {
    "WANDB_API_KEY": f"{CANARY}{CANARY}wandbapi",  # 40 characters, as wandb insists
    "HF_TOKEN": f"hf_{CANARY}hub",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}-aws",
    "DB_PASSWORD": f"{CANARY}-password",
}


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("name", ["state.pt", "rng-00000.pt", "optimizer.pt", "training_args.bin"])
def test_s04_a_payload_in_a_checkpoint_is_not_run(name: str, tmp_path: Path) -> None:
    """Whatever the file is called: our loader takes tensors and plain values only."""
    import torch

    canary, path = tmp_path / "canary", tmp_path / name
    path.write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(Exception, match=r"(?i)weights_only|unsupported|pickle|zip|mmap"):
        torch.load(path, weights_only=True)
    torch.save(Payload(canary), path)
    with pytest.raises(Exception, match=r"(?i)weights_only|unsupported"):
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    assert not canary.exists()


def test_s05_deepspeed_opens_nothing_that_the_manifest_does_not_name(tmp_path: Path) -> None:
    """It unpickles every file of a pattern; a stranger's, a link and one that others can write are found before."""
    from launcher.worker.manifest import strangers

    folder = tmp_path / "step-000001"
    (folder / "zero").mkdir(parents=True)
    folder.chmod(0o700)
    (folder / "zero").chmod(0o700)
    known = folder / "zero" / "mp_rank_00_model_states.pt"
    known.write_bytes(b"x")
    known.chmod(0o600)
    names = {"zero/mp_rank_00_model_states.pt"}
    assert strangers(folder, names) == []
    (folder / "zero" / "zero_to_fp32.py").write_text("import os")
    (folder / "zero" / "mp_rank_01_model_states.pt").symlink_to("/etc/passwd")
    assert len(strangers(folder, names)) == 2
    known.chmod(0o666)
    assert any("can be written by others" in problem for problem in strangers(folder, names))


def test_s07_a_models_own_code_is_not_imported(tmp_path: Path) -> None:
    """Refused before the queue, and by the loader that the ranks use, unless the recipe trusts it."""
    from launcher.worker.tokenizer import load_tokenizer

    folder, canary = make_model_dir(tmp_path / "model"), tmp_path / "canary"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = folder / "tokenizer_config.json"
    tokens.write_text(json.dumps(json.loads(tokens.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n")
    assert any("wants to run its own code" in problem for problem in model_folder_problems(folder))
    recipe = make_recipe(tmp_path)
    with contextlib.suppress(LauncherError, ValueError, OSError):
        load_tokenizer(recipe)
    assert not canary.exists()


def test_s16_a_stranger_at_the_rendezvous_is_not_counted_as_a_rank(tmp_path: Path) -> None:
    """The store takes anybody's connection; ranks speak below the attempt's token, which only its owner can read."""
    from torch.distributed import PrefixStore, TCPStore

    place = place_of(0, 2, "attempt.0")
    store, host, port = rendezvous._host(place, "127.0.0.1", tmp_path / "attempt.0.json", 10.0)
    published = tmp_path / "attempt.0.json"
    assert published.stat().st_mode & 0o777 == 0o600 and len(json.loads(published.read_text())["token"]) == 32
    client = TCPStore(host, port, 2, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
    for stranger in (client, PrefixStore("0" * 32, client)):
        stranger.set("here/1", "stranger")
        stranger.set("all", "1")
    assert not store.check(["here/1"]) and not store.check(["all"])
    with pytest.raises(LauncherError, match="ranks 1 of 2 did not come"):
        rendezvous._meet(place, store, deadline=0.0, timeout_s=0.0)


def test_s16_a_file_with_another_token_or_of_another_attempt_leads_nowhere(tmp_path: Path) -> None:
    """A rank that was shown a wrong token never meets the others."""
    _store, host, port = rendezvous._host(place_of(0, 2, "a.0"), "127.0.0.1", tmp_path / "a.0.json", 10.0)
    wrong = tmp_path / "b.0.json"
    wrong.write_text(json.dumps({"host": host, "port": port, "token": "0" * 32, "attempt": "b.0"}))
    with pytest.raises(LauncherError, match="could not reach rank 0"):
        rendezvous._enter(place_of(1, 2, "b.0"), wrong, time.monotonic() + 2.0)
    assert rendezvous._read_address(wrong, "c.0") is None


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that succeeds and one that dies of an exception quoting a key, in a network that leads nowhere.

    The second one is for a group to read.
    """
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0:
        unavailable("needs root and network namespaces (unshare --net)")
    home = tmp_path_factory.mktemp("life")
    make_model_dir(home / "model")
    make_chat_rows(home / "chats.jsonl")
    recipe = {
        "name": "life",
        "model": {"name_or_path": "model", "attn_implementation": "sdpa"},
        "method": "lora",
        "data": {"train": [{"path": "chats.jsonl"}], "validation": 8, "max_seq_length": 128},
        "train": {"global_batch_size": 8, "per_device_train_batch_size": 4, "max_steps": 2, "precision": "fp32",
                  "gradient_checkpointing": False},
        "deepspeed": {"stage": 0},
        "slurm": {"nodes": 1, "gpus_per_node": 1, "time": 20},
        "wandb": {"mode": "online"},
    }  # fmt: skip
    (home / "life.yaml").write_text(yaml.safe_dump(recipe))
    # Where Python starts, before anything of ours: a library that quotes its key in an exception.
    (home / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('QUOTE_KEY') and 'RANK' not in os.environ:\n"
        "    import builtins\n    real = builtins.__import__\n"
        "    def bad(name, *rest, **named):\n"
        "        if name == 'peft':\n            raise RuntimeError('401 for key ' + os.environ['WANDB_API_KEY'])\n"
        "        return real(name, *rest, **named)\n"
        "    builtins.__import__ = bad\n"
    )
    group = [f"output_group={grp.getgrgid(os.getegid()).gr_name}"]
    for number, (more, overrides) in enumerate((({}, []), ({"QUOTE_KEY": "1"}, group))):
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("LAUNCHER_", "SLURM_"))}
        environ |= SECRETS | more | {"PYTHONPATH": f"{home}:{TOP}", "HOME": str(home), "OMP_NUM_THREADS": "1"}
        words = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", sys.executable, "-m",
                 "launcher.cli", "submit", "life.yaml", "--local", *overrides]  # fmt: skip
        ran = subprocess.run(words, cwd=home, env=environ, capture_output=True, text=True, timeout=400, check=False)
        (home / f"terminal-{number}").write_text(f"exit {ran.returncode}\n{ran.stdout}{ran.stderr}")
    return home


def test_s09_s11_no_secret_is_written_in_a_whole_life(life: Path) -> None:
    """Records, logs, tracebacks, W&B's offline files, what the terminal showed: not one."""
    assert "exit 0" in (life / "terminal-0").read_text(), (life / "terminal-0").read_text()[-3000:]
    assert "exit 0" not in (life / "terminal-1").read_text().splitlines()[0]
    everything = {path: path.read_bytes() for path in life.rglob("*") if path.is_file()}
    assert any(b"401 for key [redacted]" in data for data in everything.values()), "the exception was logged"
    assert [str(path) for path, data in everything.items() if CANARY.encode() in data] == []


def test_s12_every_file_of_a_run_is_private(life: Path) -> None:
    """Whoever wrote it: launcher, ranks, W&B, safetensors; nothing beside the runs is open to others either."""
    shared = next(path.parents[2] for path in (life / "runs").glob("*/errors/*/rank-0.json"))
    files = [
        path for path in (life / "runs").rglob("*") if not path.is_symlink() and shared not in (path, *path.parents)
    ]
    assert len(files) > 20
    assert [str(path) for path in files if path.stat().st_mode & 0o077] == []


def test_s12_a_run_for_a_group_is_read_by_it_and_written_by_nobody(life: Path) -> None:
    """Plan, ledger, log and the report of the error; checkpoints, the ranks' token and what was submitted are not."""
    run = next(path.parents[2] for path in (life / "runs").glob("*/errors/*/rank-0.json"))
    everything = [path for path in (run, *run.rglob("*")) if not path.is_symlink()]
    assert [str(path) for path in everything if path.stat().st_mode & 0o027] == []
    shown = {path.relative_to(run).parts[0] for path in everything[1:] if path.stat().st_mode & 0o040}
    assert {"plan.json", "recipe.yaml", "attempts.jsonl", "logs", "errors"} <= shown
    assert not shown & {"checkpoints", "rendezvous", "submission", "wandb"}
    assert all(path.stat().st_mode & 0o040 for path in [*run.glob("logs/*.out"), *run.glob("errors/*/*.json")])


def test_s17_a_run_needs_no_network_and_opens_no_service(life: Path) -> None:
    """Everything but the loopback is missing; it trains, and W&B's records wait for `launcher sync`."""
    run = next(path.parent for path in (life / "runs").glob("*/result.json"))
    assert list((run / "wandb").glob("offline-run-*"))
