"""serving: what `launcher serve` would load: names and folders, the one base they share, and the memory that takes.

Only files are read here; `launcher/serving` does the rest, in the train environment.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import (
    ClusterError,
    ConflictError,
    JobFailedError,
    LauncherError,
    ModelError,
    RecipeError,
    raise_all,
)
from launcher.facts.adapters import AdapterFacts, read_adapter_facts
from launcher.facts.fingerprint import model_fingerprint
from launcher.runs.adapters import base_folder
from launcher.runs.named import tags_of
from launcher.runs.registry import find
from launcher.runs.status import runs_folder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
DTYPES = ("auto", "4bit", "bf16", "fp16", "fp32")
_PACKAGES = ("torch", "transformers", "peft", "fastapi", "uvicorn", "pydantic")
_LOOK_S = 60.0
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "auto"}
"""What --dtype 4bit means where no adapter says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One thing to serve."""

    name: str
    folder: Path
    adapter: AdapterFacts | None
    """None: a whole model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The base that all adapters share."""

    name: str
    folder: str
    dtype: str
    """bf16 | fp16 | fp32: of the weights, or of what 4-bit weights are computed in."""
    quantization: dict[str, Any] | None
    chosen: bool
    """Whether the user chose dtype and quantization."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How it is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    token_env: str | None = None
    rows: int = 8
    """Answers made at the same time."""
    waiting: int = 64
    context: int | None = None
    """Tokens of prompt and answer at most; None: what the base was made for."""
    body_bytes: int = 4 * 2**20
    grace_s: int = 30
    """For answers under way when it is told to end."""
    device: str = "auto"
    trust_base: bool = False
    json: bool = False


def check_environment(python: str) -> None:
    """Refuse a train environment without what the server needs, before it is started.

    Raises:
        ClusterError: which packages are missing, and how they are installed.
    """
    script = f"import importlib.util as u; print(*[name for name in {_PACKAGES} if u.find_spec(name) is None])"
    try:
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True, timeout=_LOOK_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(f"serve: cannot run {python}: {error}") from error
    if missing := done.stdout.split():
        raise ClusterError(
            f"serve: {python} lacks {', '.join(missing)}; install finetune-launcher[train,serve] there, or name "
            "another environment in LAUNCHER_VENV"
        )


def find_target(text: str, parent: Path | None) -> Target:
    """What `RUN` or `NAME=RUN` means; RUN is a run, a tag, an adapter folder or a model folder.

    Raises:
        RecipeError: nothing, or no name. JobFailedError: a run that has not finished. ModelError: a broken adapter.
    """
    name, _, rest = text.partition("=") if not Path(text).exists() else ("", "", text)
    named, wanted = (name, rest) if rest else ("", text)
    if (named and not _NAME.fullmatch(named)) or ("=" in text and not rest):
        raise RecipeError(f"{text!r}: NAME=RUN, with a name of letters, digits and . _ : / -")
    path = Path(wanted).expanduser()
    if (path / "adapter_config.json").is_file():
        facts = read_adapter_facts(path.resolve())
        return Target(name=named or facts.name, folder=path.resolve(), adapter=facts)
    if (path / "config.json").is_file():
        return Target(name=named or path.resolve().name, folder=path.resolve(), adapter=None)
    return _of_run(wanted, named, parent)


def _of_run(wanted: str, named: str, parent: Path | None) -> Target:
    """A run's adapter or model, or what a name or tag stands for."""
    run = find(wanted, parent)
    if isinstance(run, Path):
        return Target(name=named or wanted, folder=run, adapter=read_adapter_facts(run))
    named = named or (wanted if wanted in tags_of(runs_folder(parent)) else run.run_id)
    if (run.adapter / "adapter_config.json").is_file():
        return Target(name=named, folder=run.adapter, adapter=read_adapter_facts(run.adapter))
    if (run.model / "config.json").is_file():
        return Target(name=named, folder=run.model, adapter=None)
    raise JobFailedError(f"{run.run_id} has nothing to serve: it has not finished (launcher status {run.run_id})")


def serve_request(
    texts: Sequence[str],
    parent: Path | None,
    *,
    base: Path | None,
    base_name: str | None,
    dtype: str,
    options: Options,
) -> dict[str, Any]:
    """What is handed to the serving process.

    Raises:
        RecipeError, ModelError, ConflictError, JobFailedError: what cannot be served together; every finding.
    """
    targets = _found(texts, parent)
    whole = [one for one in targets if one.adapter is None]
    adapters = [one for one in targets if one.adapter is not None]
    if len(whole) + (base is not None) > 1:
        names = ", ".join([*(one.name for one in whole), *([str(base)] if base else [])])
        raise RecipeError(f"one server has one base, and {names} are several; start a server for each")
    _refuse_twice([one.name for one in targets])
    _refuse_several_bases(adapters)
    chosen = _base(whole, adapters, base, base_name, dtype)
    _refuse_twice([chosen.name, *(one.name for one in adapters)])
    _refuse_other_base(adapters, Path(chosen.folder), trusted=options.trust_base)
    listed = [{"name": one.name, "folder": str(one.folder)} for one in adapters]
    return {"base": asdict(chosen), "adapters": listed, **asdict(options)}


def _found(texts: Sequence[str], parent: Path | None) -> list[Target]:
    found, problems = [], []
    for text in texts:
        try:
            found.append(find_target(text, parent))
        except LauncherError as error:
            problems.append(error)
    if problems:
        raise type(problems[0])(*(problem for error in problems for problem in error.problems))
    return found


def _refuse_twice(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"{', '.join(twice)}: a name of two; give them names of their own: NAME=RUN")


def _refuse_several_bases(adapters: Sequence[Target]) -> None:
    """Every adapter against the first: weights, by their fingerprint, and how they were rounded."""
    problems = []
    for one in adapters[1:]:
        mine, its = (_lineage(each, "base_fingerprint") for each in (adapters[0], one))
        if mine and its and mine != its:
            problems.append(
                f"{adapters[0].name} was trained on {_told(adapters[0])} and {one.name} on {_told(one)}: "
                "other weights; start a server for each base"
            )
    raise_all(ConflictError, problems)


def _told(target: Target) -> str:
    """A base as the adapter names it."""
    revision, digest = _lineage(target, "base_revision"), _lineage(target, "base_fingerprint")
    return f"{_lineage(target, 'base')}{f' @ {revision[:12]}' if revision else ''} (fingerprint {digest[:12]})"


def _lineage(target: Target, key: str) -> Any:
    return target.adapter.lineage.get(key) if target.adapter is not None else None


def _base(
    whole: Sequence[Target], adapters: Sequence[Target], named: Path | None, name: str | None, dtype: str
) -> Base:
    """The base's folder, name, and how it is loaded."""
    if whole:
        folder, known = whole[0].folder, whole[0].name
    else:
        folder = base_folder(adapters[0].folder, named)
        known = str(_lineage(adapters[0], "base") or folder.name)
    if dtype != "auto":
        quantization = _rounding(adapters) or NF4 if dtype == "4bit" else None
        return Base(name=name or known, folder=str(folder), dtype=_plain(dtype, adapters, folder),
                    quantization=quantization, chosen=True)  # fmt: skip
    _refuse_several_roundings(adapters)
    return Base(name=name or known, folder=str(folder), dtype=_plain("auto", adapters, folder),
                quantization=_rounding(adapters[:1]), chosen=False)  # fmt: skip


def _rounding(adapters: Sequence[Target]) -> dict[str, Any] | None:
    return next((dict(found) for one in adapters if (found := _lineage(one, "quantization"))), None)


def _plain(dtype: str, adapters: Sequence[Target], folder: Path) -> str:
    """The dtype asked for, else the one the first adapter was trained in, else the one of the files."""
    if dtype in _DTYPES.values():
        return dtype
    trained = str(_lineage(adapters[0], "base_dtype")) if adapters else ""
    if trained in _DTYPES.values():
        return trained
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "fp32")


def _refuse_several_roundings(adapters: Sequence[Target]) -> None:
    """QLoRA's base is rounded to 4 bits: what was trained on it corrects errors that the plain base does not have."""
    kinds = {bool(_lineage(one, "quantization")): one for one in reversed(adapters) if _lineage(one, "method")}
    if len(kinds) == 2:
        raise ConflictError(
            f"{kinds[True].name} was trained on a base in 4 bits and {kinds[False].name} on one that was not "
            "quantized; start a server for each, or choose one base for both with --dtype 4bit or --dtype bf16"
        )


def _refuse_other_base(adapters: Sequence[Target], folder: Path, *, trusted: bool) -> None:
    here = model_fingerprint(folder)
    if here is None:
        raise ModelError(f"{folder}: holds no safetensors weights")
    problems = []
    for one in adapters:
        wanted = _lineage(one, "base_fingerprint")
        if wanted is None and not trusted:
            problems.append(
                f"{one.name} ({one.folder}) does not say which weights it was trained on; if {folder} is certain to be "
                "its base, say --trust-base"
            )
        elif wanted is not None and wanted != here:
            problems.append(
                f"{one.name} was trained on {_told(one)}, and {folder} holds other weights (fingerprint {here[:12]}); "
                "name the right folder with --base"
            )
    raise_all(ConflictError, problems)
