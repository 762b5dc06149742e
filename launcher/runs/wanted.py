"""Which files of a hub repository a run needs, and which repositories are refused before anything large is fetched."""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.errors import DataError, ModelError, raise_all
from launcher.facts.files import SIDE_FILES, SUFFIXES, kind
from launcher.facts.hub import Repository

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SMALL = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
_NEVER = ("*.bin.index.json", "*.onnx*", "consolidated*", "training_args*", "trainer_state.json", "manifest.json")
_TEMPLATES = "additional_chat_templates/*.jinja"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_CARD_BYTES = 2**20
Read = Callable[[str], bytes]
"""Content of a small file of the repository."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What to fetch of one repository."""

    paths: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]] | None = None
    """Of a data set whose card says so: split -> files of the configuration read by default, in reading order."""
    configs: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None
    """Configuration -> the same, for those that were asked for by name."""
    notices: tuple[str, ...] = field(default=())


def model_files(repo: Repository, read: Read, *, trust_remote_code: bool) -> Wanted:
    """Configuration, tokenizer, templates and safetensors weights of a model; nothing pickled or in other forms.

    Raises:
        ModelError: what `model_folder_problems` would say of the copy, said before it is fetched.
    """
    paths = set(repo.paths)
    if "config.json" not in paths:
        what = (
            "is an adapter, not a base model; name the base" if "adapter_config.json" in paths else "has no config.json"
        )
        raise ModelError(f"{repo.where} {what}; found {_some(sorted(paths))}")
    config = _json(repo, "config.json", read)
    weights, problems = _weights(repo, read)
    problems += list(_code_problems(repo, config, trust_remote_code=trust_remote_code))
    if not paths.intersection(_TOKENIZERS):
        problems.append(f"{repo.where} has no tokenizer (none of {', '.join(_TOKENIZERS)})")
    raise_all(ModelError, problems)
    small = [path for path in repo.paths if _is_small(path)]
    code = [path for path in repo.paths if trust_remote_code and path.endswith(".py")]
    return Wanted(paths=tuple(dict.fromkeys([*small, *code, *weights])))


def _is_small(path: str) -> bool:
    if fnmatchcase(path, _TEMPLATES):
        return True
    top = "/" not in path and not path.startswith(".")
    return top and any(fnmatchcase(path, one) for one in _SMALL) and not any(fnmatchcase(path, one) for one in _NEVER)


def _weights(repo: Repository, read: Read) -> tuple[list[str], list[str]]:
    """Weight files, and what is wrong with them."""
    if INDEX in repo.paths:
        shards = _json(repo, INDEX, read).get("weight_map")
        if not isinstance(shards, Mapping) or not shards:
            return [], [f"{repo.where}: {INDEX} names no weights"]
        names = sorted({str(name) for name in shards.values()})
        missing = [name for name in names if name not in repo.paths]
        if missing:
            said = f"{len(missing)} of {len(names)} weight files of the index are missing on the hub: {_some(missing)}"
            return [], [f"{repo.where}: {said}; this revision can be loaded by nobody, so try another"]
        return names, []
    if SINGLE in repo.paths:
        return [SINGLE], []
    pickles = [path for path in repo.paths if path.endswith(_PICKLES)]
    if pickles:
        return [], [
            f"{repo.where} has only pickled weights ({_some(pickles)}), which can run code when opened; look for a "
            "revision with safetensors (often refs/pr/N: model.revision), or convert them once where you trust them"
        ]
    return [], [f"{repo.where} has no weights ({SINGLE} or {INDEX}); found {_some(repo.paths)}"]


def _code_problems(repo: Repository, config: Mapping[str, Any], *, trust_remote_code: bool) -> Iterator[str]:
    """Code of its own is refused unless trusted, and always where it lies in yet another repository."""
    auto_map = config.get("auto_map")
    if not auto_map:
        return
    named = [str(one) for value in (auto_map.values() if isinstance(auto_map, Mapping) else [auto_map])
             for one in (value if isinstance(value, list) else [value]) if one]  # fmt: skip
    elsewhere = sorted({one.split("--")[0] for one in named if "--" in one})
    if elsewhere:
        yield (
            f"{repo.where}: takes its code from another repository ({_some(elsewhere)}), which a job without network "
            "cannot read and no revision pins; name a model that carries its own code, or needs none"
        )
    elif not trust_remote_code:
        files = sorted({one.split(".")[0] + ".py" for one in named})
        yield (
            f"{repo.where}: wants to run its own code ({_some(files)}); read it, then set model.trust_remote_code: "
            f"true and model.revision: {repo.commit}"
        )


def dataset_files(repo: Repository, read: Read, asked: Mapping[str | None, tuple[str, ...]]) -> Wanted:
    """Data files of a data set: those its card names, else every file that the launcher's reader reads.

    `asked`: configuration -> splits that are needed of it; None is the configuration read by default.

    Raises:
        DataError: it has a loading script, nothing readable, no such configuration, or lacks a split.
    """
    script = f"{repo.id.split('/')[-1]}.py"
    if script in repo.paths:
        raise DataError(
            f"{repo.where}: is read by a script ({script}), which is never run; many such data sets have a revision "
            "with plain files (revision: refs/convert/parquet)"
        )
    card = _card_configs(repo, read)
    named = {config: _splits_of(repo, _chosen(repo, card, config)["data_files"]) for config in asked if card or config}
    problems = [
        f"{repo.where}: no split {', '.join(missing)}{f' in configuration {config}' if config else ''}; its card names "
        f"{', '.join(named[config])}"
        for config, splits in asked.items()
        if config in named and (missing := [split for split in splits if split not in named[config]])
    ]
    raise_all(DataError, problems)
    if not named:
        return _plain_files(repo)
    paths = tuple(dict.fromkeys(path for splits in named.values() for found in splits.values() for path in found))
    unread = [path for path in paths if kind(Path(path)) not in SUFFIXES]
    if unread:
        raise DataError(f"{repo.where}: cannot read {_some(unread)}; expected {', '.join(SUFFIXES)}")
    configs = {config: splits for config, splits in named.items() if config is not None}
    return Wanted(paths=paths, splits=named.get(None), configs=configs or None)


def _plain_files(repo: Repository) -> Wanted:
    data = [path for path in repo.paths if _is_data(path)]
    if not data:
        raise DataError(f"{repo.where}: no data file; expected {', '.join(SUFFIXES)}, found {_some(repo.paths)}")
    by_kind = Counter(kind(Path(path)) for path in data)
    (most, _), *others = by_kind.most_common()
    notices: tuple[str, ...] = ()
    if others:  # the same rows in two forms, or notes beside them: datasets takes the most frequent form, too
        left = ", ".join(f"{count} {suffix}" for suffix, count in others)
        notices = (f"{repo.id}: {by_kind[most]} {most} files are taken, {left} are not",)
    return Wanted(paths=tuple(path for path in data if kind(Path(path)) == most), notices=notices)


def _is_data(path: str) -> bool:
    parts = PurePosixPath(path)
    hidden = any(part.startswith(".") for part in parts.parts)
    note = parts.suffix == ".txt" and parts.stem.lower() in ("readme", "license", "requirements", "notice")
    return kind(Path(path)) in SUFFIXES and parts.name not in SIDE_FILES and not hidden and not note


def _card_configs(repo: Repository, read: Read) -> list[Mapping[str, Any]]:
    """The configurations whose files the card names; empty where it names none."""
    import yaml

    listed = repo.file("README.md")
    if listed is None or (listed.size_bytes or 0) > _CARD_BYTES:
        return []
    text = read("README.md").decode("utf-8", errors="replace")
    if not text.startswith("---"):
        return []
    try:
        card = yaml.safe_load(text[3:].split("\n---", 1)[0])
    except (yaml.YAMLError, RecursionError, ValueError):
        return []
    configs = card.get("configs") if isinstance(card, Mapping) else None
    found = [one for one in configs if isinstance(one, Mapping)] if isinstance(configs, list) else []
    return [one for one in found if one.get("data_files")]


def _chosen(repo: Repository, configs: list[Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    """The configuration of that name, or the one that is read by default.

    Raises:
        DataError: there is none, or none by default.
    """
    names = [str(one.get("config_name")) for one in configs]
    if name is not None:
        if name not in names:
            has = f"its card has {_some(names)}" if names else "its card names no configurations; leave config out"
            raise DataError(f"{repo.where}: no configuration {name!r}; {has}")
        return configs[names.index(name)]
    chosen = [one for one in configs if one.get("default") is True or one.get("config_name") == "default"]
    if len(configs) == 1 or chosen:
        return (chosen or configs)[0]
    raise DataError(
        f"{repo.where}: has several configurations ({_some(names)}) and none by default; say which with config, such "
        f"as data.train.0.config={names[0]}"
    )


def _splits_of(repo: Repository, data_files: Any) -> dict[str, tuple[str, ...]]:
    """`data_files` of a card: a pattern, a list of patterns, or a list of {split, path}."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, patterns = (entry.get("split"), entry.get("path")) if isinstance(entry, Mapping) else ("train", entry)
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            wanted = posixpath.normpath(str(pattern))
            found.setdefault(str(split), []).extend(path for path in sorted(repo.paths) if fnmatchcase(path, wanted))
    empty = [split for split, paths in found.items() if not paths]
    raise_all(DataError, [f"{repo.where}: its card names files for split {split} that it does not have"
                          for split in empty])  # fmt: skip
    return {split: tuple(dict.fromkeys(paths)) for split, paths in found.items()}


def _json(repo: Repository, path: str, read: Read) -> Mapping[str, Any]:
    try:
        document = json.loads(read(path))
    except ValueError as error:
        raise ModelError(f"{repo.where}: {path} is not JSON: {error}") from error
    if not isinstance(document, Mapping):
        raise ModelError(f"{repo.where}: {path} holds a {type(document).__name__}, not an object")
    return document


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
