"""shrink: a recipe's model made tiny with random weights, and the head of its data; for `launcher rehearse`.

A process of its own in the train environment, asked by runs/rehearsal.py. It never asks a network: what is not on
this machine is stood in for, and the answer says so.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # before the libraries are imported, which read these once
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import itertools
import json
import random
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import DataError, LauncherError, ModelError
from launcher.facts.files import is_dataset_id
from launcher.facts.formats import Example, read_examples
from launcher.facts.rows import Located, Problems, read_rows
from launcher.recipe.load import recipe_from_text
from launcher.recipe.schema import AUTO, DataSource, ModelSection, Recipe
from launcher.worker.preview import Count
from launcher.worker.shrunk_config import shrunk_config
from launcher.worker.sources import Sources
from launcher.worker.tokenizer import TOKENIZER_FILES, load_tokenizer
from launcher.worker.tokens import Tokenizing

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_LOGITS = 32 * 2**20
"""Logits of one micro-batch, in elements: 128 MiB in fp32, and a few times that while the loss is computed."""
_SHORTEST, _LONGEST = 128, 1024
"""Tokens per row of a rehearsal, before it is known whether rows survive so much truncation."""
_KEPT_SHARE = 0.5
"""At least this share of the rows must have something to train after truncation; else longer rows are rehearsed."""
_TOKENIZER_PATTERNS = ("tokenizer*", "*.model", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.jinja")
_STAND_IN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ---------------------------------------------------------------- the model


def shrink_model(recipe: Recipe, known: Mapping[str, Any] | None, folder: Path, *, seq_len: int) -> dict[str, Any]:
    """Write a tiny model of the same architecture with random weights to `folder`; returns what it has.

    `known` is the configuration where none is on this machine.

    Raises:
        ModelError: the architecture cannot be built, large or small.
    """
    import torch
    from transformers import AutoModelForCausalLM

    large = _config(recipe.model, known)
    small = shrunk_config(large, seq_len=seq_len)
    quantized = small.pop("quantization_config", None)
    try:
        config = type(large).from_dict(small)
        torch.manual_seed(recipe.train.seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    except Exception as error:  # any class of the zoo may refuse a configuration in its own way
        raise ModelError(
            f"model.name_or_path: a small {large.model_type} cannot be made ({type(error).__name__}: {error}); "
            "this model cannot be rehearsed"
        ) from error
    model.to(torch.bfloat16).save_pretrained(folder)
    if quantized is not None:  # so that the worker refuses it as it would refuse the real one
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantized}, indent=2))
    text = config.get_text_config()
    return {
        "type": large.model_type,
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "vocab": text.vocab_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _config(model: ModelSection, known: Mapping[str, Any] | None) -> PretrainedConfig:
    """The real model's configuration: its own, else the one that the planner knows."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        if known is None or Path(model.name_or_path).is_dir():
            raise ModelError(f"model.name_or_path: {model.name_or_path} cannot be read: {error}") from error
    return known_config(known)


def known_config(known: Mapping[str, Any]) -> PretrainedConfig:
    """A row of the catalogue as transformers' configuration; what its class derives by itself is left out."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[known["model_type"]]
    derived = {name for name in known if isinstance(getattr(kind, name, None), property)}
    left_out = derived | {"name", "source", "model_type"}
    return kind(**{key: value for key, value in known.items() if value is not None and key not in left_out})


# ---------------------------------------------------------------- the tokenizer


def bring_tokenizer(recipe: Recipe, folder: Path, *, vocab: int) -> str | None:
    """Put the recipe's tokenizer, or a stand-in, into `folder`; why it is a stand-in, or None.

    Raises:
        ModelError, RecipeError: the tokenizer is here and cannot be used.
    """
    model, local = recipe.model, Path(recipe.model.name_or_path).is_dir()
    try:
        load_tokenizer(recipe)
        home = _tokenizer_folder(model)
    except ModelError:
        if local:
            raise
        home = None
    if home is None:
        _stand_in(folder, vocab)
        return f"the tokenizer of {model.name_or_path} is not on this machine"
    for pattern in _TOKENIZER_PATTERNS:
        for path in home.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    return None


def _tokenizer_folder(model: ModelSection) -> Path | None:
    """Where its files lie: the model's folder, or the hub cache's."""
    from transformers.utils import cached_file

    folder = Path(model.name_or_path)
    if folder.is_dir():
        return folder
    for name in TOKENIZER_FILES:
        try:
            found = cached_file(model.name_or_path, name, revision=model.revision, local_files_only=True)
        except OSError:
            continue
        if found is not None:
            return Path(found).parent
    return None


def _stand_in(folder: Path, vocab: int) -> None:
    """A tokenizer of single bytes with a plain chat template: enough to move tokens, no word of the real one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    specials = ["<pad>", "<s>", "</s>", *(f"<|{role}|>" for role in ("system", "user", "assistant", "tool"))]
    entries = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if vocab < len(entries):
        raise ModelError(f"model.name_or_path: its vocabulary of {vocab} is too small for a stand-in tokenizer")
    tokenizer = Tokenizer(models.BPE(vocab={entry: index for index, entry in enumerate(entries)}, merges=[]))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": _STAND_IN_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------- the data


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The first rows of one source, as they were read."""

    source: DataSource
    used_for: str
    rows: list[tuple[Located, Example]]
    made_up: str | None = None
    """Why they are not the user's."""

    @property
    def examples(self) -> list[tuple[str, Example]]:
        """(place, example) of each."""
        return [(located.where, example) for located, example in self.rows]


def read_heads(recipe: Recipe, rows: int) -> list[Head]:
    """The first `rows` rows of every source, training first.

    Raises:
        DataError: a row among them cannot be used, or a source of this machine has none.
    """
    sources = Sources(recipe)
    uses = [*(("train", source) for source in sources.train)]
    uses += [("validation", sources.validation)] if sources.validation else []
    uses += [("retention", sources.retention)] if sources.retention else []
    return [_head(sources, source, use, rows) for use, source in uses]


def _head(sources: Sources, source: DataSource, use: str, rows: int) -> Head:
    if not is_dataset_id(source.path):
        problems = Problems()
        read = list(read_examples(source, itertools.islice(read_rows(source, problems), rows)))
        problems.raise_if_any()
        if not read:
            raise DataError(f"{source.path}: no rows")
        return Head(source=source, used_for=use, rows=read)
    try:
        read = list(itertools.islice(sources.located(source), rows))
        return Head(source=source, used_for=use, rows=read)
    except DataError:
        why = f"{source.path} is not on this machine"
        return Head(source=source, used_for=use, rows=list(_made_up(source)), made_up=why)


_MADE_UP = {
    "messages": lambda ask, say: {
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
    },
    "sharegpt": lambda ask, say: {"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": say}]},
    "alpaca": lambda ask, say: {"instruction": ask, "output": say},
    "prompt_completion": lambda ask, say: {"prompt": ask, "completion": say},
    "text": lambda ask, say: {"text": f"{ask} {say}"},
}


def _made_up(source: DataSource, count: int = 64) -> Any:
    """Rows in the source's format that nobody wrote; the same every time."""
    dice = random.Random(0)
    make = _MADE_UP["messages" if source.format == AUTO else source.format]
    rows = []
    for number in range(count):
        said = " ".join(dice.choices(("one", "two", "three", "four", "five"), k=dice.randint(2, 6)))
        rows.append(Located(source.path, number + 1, make(f"Repeat: {said}", said), by_row=True))
    return read_examples(source, rows)


def count_heads(heads: list[Head], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[dict[str, Any]]:
    """What the run would see of each source, at the recipe's own length."""
    tokenizing = _tokenizing(tokenizer, recipe, recipe.data.max_seq_length)
    counted = []
    for head in heads:
        count = Count()
        for (_, example), tokenized in zip(head.examples, tokenizing(head.examples), strict=True):
            count.add(example, tokenized, tokenizer.eos_token_id)
        counted.append({"path": head.source.path, "used_for": head.used_for, "made_up": head.made_up} | count.facts())
    return counted


def _tokenizing(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, length: int) -> Tokenizing:
    return Tokenizing(tokenizer, max_seq_length=length, loss_on=recipe.data.loss_on)


def rehearsed_length(
    heads: list[Head], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, *, vocab: int, micro: int
) -> int:
    """Tokens per row of the rehearsal: short, as long as most rows still have something to train."""
    whole = recipe.data.max_seq_length
    length = min(whole, max(_SHORTEST, min(_LONGEST, _LOGITS // vocab // micro)))
    training = [head for head in heads if head.used_for == "train"]
    while length < whole and any(_kept_share(head, tokenizer, recipe, length) < _KEPT_SHARE for head in training):
        length = min(2 * length, whole)
    return length


def _kept_share(head: Head, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, length: int) -> float:
    return len(_trainable(head, tokenizer, recipe, length)) / len(head.rows)


def _trainable(head: Head, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, length: int) -> list[Located]:
    """Rows that have something to train at this length."""
    tokenized = _tokenizing(tokenizer, recipe, length)(head.examples)
    return [located for (located, _), one in zip(head.rows, tokenized, strict=True) if one.documents]


def write_heads(
    heads: list[Head], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path, *, length: int
) -> list[str]:
    """The rows that can be trained at this length, one file per source; their paths."""
    folder.mkdir()
    paths = []
    for index, head in enumerate(heads):
        rows = _trainable(head, tokenizer, recipe, length) or [located for located, _ in head.rows]
        path = folder / f"{index}-{head.used_for}.jsonl"
        path.write_text("".join(json.dumps(dict(one.row), default=str) + "\n" for one in rows), encoding="utf-8")
        paths.append(str(path))
    return paths


# ---------------------------------------------------------------- one question, one answer


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Make the material of a rehearsal in `folder`: {"recipe", "config", "folder", "rows", "micro_batch"}.

    Raises:
        RecipeError, DataError, ModelError: what the run would be refused for.
    """
    recipe, folder = recipe_from_text(request["recipe"], "recipe").recipe, Path(request["folder"])
    small = folder / "model"
    model = shrink_model(recipe, request["config"], small, seq_len=recipe.data.max_seq_length)
    why = bring_tokenizer(recipe, small, vocab=model["vocab"])
    tokenizer = load_tokenizer(replace(recipe, model=replace(recipe.model, name_or_path=str(small), revision=None)))
    heads = read_heads(recipe, request["rows"])
    sources = count_heads(heads, tokenizer, recipe)
    length = rehearsed_length(heads, tokenizer, recipe, vocab=model["vocab"], micro=request["micro_batch"])
    paths = write_heads(heads, tokenizer, recipe, folder / "data", length=length)
    return {"model": model, "tokenizer_stand_in": why, "sources": sources, "seq_len": length, "paths": paths}


def main() -> int:
    """Read the request, print the answer; a user's error is an answer too."""
    request = json.load(sys.stdin)
    try:
        told = answer(request)
    except LauncherError as error:
        told = {"error": type(error).__name__, "problems": list(error.problems)}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
